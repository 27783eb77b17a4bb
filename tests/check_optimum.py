"""Shows that exported bundles open in Optimum's ORTModelFor* classes and give the same numbers.

    python tests/check_optimum.py --output benchmarks/results/optimum.json

Optimum for ONNX Runtime does not take the transformers that this project exports with, so this makes an
environment of its own in --work (1.3 GB; pip's own settings apply: PIP_EXTRA_INDEX_URL may name an index that
has a CPU build of torch), builds bundles of every family and the default recipe's, opens them there by
open_in_optimum.py, and compares. A run takes five minutes on two cores; another one less, since what is in
--work is used again. Exit code 1 if anything does not open, warns, or gives other numbers.

A copy of a bundle with one number of its plugin changed is opened too; a check that does not find it fails.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from conftest import MINILM, MODELS, copy_tokenizer, plugin_for
from optimum_findings import SENTENCE_EMBEDDING, SESSION, judge_variant, table
from safetensors.numpy import load_file, save_file

from variator_export import Bundle
from variator_export.building.recipe_build import build
from variator_export.core.environment import GRAPH_DISTRIBUTIONS, machine, versions
from variator_export.core.json_file import write_json
from variator_export.model.backbone import load_backbone, quiet_transformers
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.plugin_file import save_plugin
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import Recipe
from variator_export.recipe.recipe_file import load_recipe
from variator_export.text.tokenizer import TextEncoder
from variator_export.verification.cases import DEFAULT_TEXTS, REAL_TEXT, UNUSUAL_TEXTS
from variator_export.verification.judging.error_budget import MULTIPLE

REQUIREMENTS = (
    "optimum-onnx==0.1.*",
    "transformers==4.57.*",
    "sentence-transformers==5.*",
    "torch==2.13.0",
)
# The largest difference allowed between embeddings of sentence-transformers and of Bundle.embed.
EMBEDDING_TOLERANCE = 1e-5
# One is longer than MiniLM's limit.
EMBEDDED_TEXTS = (*DEFAULT_TEXTS, "word " * 600)
RATIO = 4
CLASSES = {
    "feature-extraction": "ORTModelForFeatureExtraction",
    "text-classification": "ORTModelForSequenceClassification",
    "token-classification": "ORTModelForTokenClassification",
    "question-answering": "ORTModelForQuestionAnswering",
    "fill-mask": "ORTModelForMaskedLM",
}
# The bundle that is spoilt: one number of its plugin.
CONTROL, CONTROL_OF = "one number changed", "minilm"
SPOILT = "layers.0.decompress.up.bias"


def main() -> int:
    """Do everything; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("build/optimum"), help="environment, bundles, outputs"
    )
    parser.add_argument("--output", type=Path, help="the result, a JSON document")
    parser.add_argument("--onnxruntime", default="1.31.*", help="its version in the environment")
    options = parser.parse_args()
    work = options.work.resolve()
    torch.set_num_threads(2)
    python = make_environment(work / "environment", (*REQUIREMENTS, f"onnxruntime=={options.onnxruntime}"))
    bundles = {name: build_bundle(name, work) for name in ("minilm", *MODELS)}
    bundles[CONTROL] = spoil(bundles[CONTROL_OF], work / "bundles" / "control")
    tokenizers = make_tokenizers(work / "tokenizers")
    opened = open_in_optimum(python, work, bundles, tokenizers)
    result = judge(opened, bundles, tokenizers, work / "opened" / "outputs")
    if options.output:
        write_json(options.output, result)
    return report(result)


def report(result: dict[str, Any]) -> int:
    """Say how it went; the exit code."""
    print(json.dumps({"table": result["table"], "tokenizers": result["tokenizers"]}, indent=2))
    for problem in result["problems"]:
        say(f"FAILED {problem}")
    say("It does not all open and agree." if result["problems"] else "All opens and agrees.")
    return 1 if result["problems"] else 0


def make_environment(folder: Path, requirements: tuple[str, ...]) -> Path:
    """A virtual environment with Optimum, made once; its Python."""
    python, done = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements)
    if not done.exists() or done.read_text() != wanted:
        say("environment: " + " ".join(requirements))
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        done.write_text(wanted)
    return python


def build_bundle(name: str, work: Path) -> Path:
    """A bundle of ratios 1 and 4: the default recipe's, or of a small random model of conftest.py."""
    say(f"bundle: {name}")
    bundle = work / "bundles" / name
    if name == "minilm":
        changes = {"speed": None, "ratios": [RATIO], "targets": ["onnxruntime"]}
        recipe = load_recipe(name).model_copy(update=changes)
    else:
        model = make_model(name, work / "models" / name)
        recipe = Recipe.model_validate(
            {
                "name": name,
                "backbone": {"source": str(model)},
                "plugins": [{"source": str(make_plugin(model, work / "plugins" / name))}],
                "targets": ["onnxruntime"],
                "speed": None,
            }
        )
    return build(recipe, bundle).bundle


def make_model(name: str, folder: Path) -> Path:
    """A small random model with MiniLM's tokenizer."""
    torch.manual_seed(0)
    with quiet_transformers():
        MODELS[name](2).save_pretrained(folder)
    copy_tokenizer(resolve_source(MINILM).folder, folder)
    return folder


def make_plugin(model: Path, folder: Path) -> Path:
    """A plugin with large random numbers."""
    backbone = load_backbone(read_backbone_info(resolve_source(str(model))), TextEncoder(model).pad_token_id)
    save_plugin(plugin_for(backbone, RATIO), folder)
    return folder


def spoil(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle with one number of its plugin changed."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(bundle, folder)
    path = folder / "plugins" / f"ratio-{RATIO}" / "plugin.safetensors"
    tensors = load_file(path)
    tensors[SPOILT][0] += 0.1
    save_file(tensors, path)
    return folder


def make_tokenizers(work: Path) -> dict[str, Path]:
    """By model type: the family's tokenizer, trained on a few texts, as this transformers saves it."""
    t = transformers
    own = {
        "roberta": t.RobertaTokenizer,
        "xlm-roberta": t.XLMRobertaTokenizer,
        "t5": t.T5Tokenizer,
        "deberta": t.DebertaTokenizer,
        "deberta-v2": t.DebertaV2Tokenizer,
    }
    minilm = resolve_source(MINILM).folder
    special = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "cls_token", "sep_token", "unk_token")
    }
    makers = {
        "bert": partial(t.BertTokenizer.from_pretrained, minilm),
        "distilbert": partial(t.DistilBertTokenizer.from_pretrained, minilm),
        "mpnet": partial(t.MPNetTokenizer.from_pretrained, minilm),
        "modernbert": partial(
            t.PreTrainedTokenizerFast, tokenizer_file=str(minilm / "tokenizer.json"), **special
        ),
    } | {name: partial(_train, kind) for name, kind in own.items()}
    folders = {}
    for model_type, make in makers.items():
        folder = work / model_type
        make().save_pretrained(folder)
        write_json(folder / "config.json", {"model_type": model_type, "architectures": []})
        folders[model_type] = folder
    return folders


def _train(kind: Any) -> Any:
    return kind().train_new_from_iterator([*DEFAULT_TEXTS] * 20, 400)


def open_in_optimum(
    python: Path, work: Path, bundles: dict[str, Path], tokenizers: dict[str, Path]
) -> dict[str, Any]:
    """Run the other environment; what it found."""
    output = work / "opened"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    job = {
        "bundles": [describe(name, Bundle.load(path)) for name, path in bundles.items() if name != CONTROL],
        "tokenizers": [{"model_type": name, "folder": str(path)} for name, path in tokenizers.items()],
        "tokenizer_texts": [*DEFAULT_TEXTS, *UNUSUAL_TEXTS],
    }
    original = next(item for item in job["bundles"] if item["name"] == CONTROL_OF)
    job["bundles"].append(original | {"name": CONTROL, "folder": str(bundles[CONTROL])})
    write_json(work / "job.json", job)
    say(f"opening {len(bundles)} bundles in Optimum")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    script = Path(__file__).with_name("open_in_optimum.py")
    subprocess.run(
        [python, "-P", script, work / "job.json", output],
        check=True,
        env=environment | {"HF_HUB_OFFLINE": "1"},
    )
    # Messages name files; a result names no folder of the machine that it was made on.
    return json.loads((output / "opened.json").read_text().replace(f"{work}/", ""))


def describe(name: str, bundle: Bundle) -> dict[str, Any]:
    """A bundle for the other environment."""
    backbone = bundle.manifest.backbone
    return {
        "name": name,
        "folder": str(bundle.path),
        "task": backbone.task,
        "class": CLASSES[str(backbone.task)],
        "max_length": backbone.max_length,
        "sentence_embedding": SENTENCE_EMBEDDING in backbone.outputs,
        "texts": {REAL_TEXT: DEFAULT_TEXTS, "unusual text": UNUSUAL_TEXTS},
        "embedded_texts": EMBEDDED_TEXTS,
        "variants": [
            {"name": v.name, "file": v.graph, "reference": v.reference} for v in bundle.manifest.variants
        ],
    }


def judge(
    opened: dict[str, Any], bundles: dict[str, Path], tokenizers: dict[str, Path], outputs: Path
) -> dict[str, Any]:
    """Compare everything."""
    say("comparing")
    results, problems, control = [], [], []
    for item in opened["bundles"]:
        name = item["name"]
        # The control's numbers are compared with those of the bundle that it is a copy of.
        bundle = Bundle.load(bundles[CONTROL_OF if name == CONTROL else name])
        backbone = bundle.manifest.backbone
        variants = []
        for variant in bundle.manifest.variants:
            found = item["variants"][variant.name]
            path = outputs / name / f"{variant.name}.safetensors"
            variants.append(judge_variant(bundle, variant, path, found["printed"], found["failed"]))
        wrong = [f"{name}, {v['variant']}, {problem}" for v in variants for problem in v["problems"]]
        if name == CONTROL:
            control = wrong
            continue
        problems += wrong
        embeddings = judge_embeddings(bundle, item["sentence_transformers"])
        problems += [
            f"{name}, {variant}: embeddings of sentence-transformers differ by {difference:.1e}"
            for variant, difference in embeddings.items()
            if not difference <= EMBEDDING_TOLERANCE
        ]
        results.append(
            {
                "name": name,
                "model_type": backbone.model_type,
                "task": backbone.task,
                "class": CLASSES[str(backbone.task)],
                "limits": item["limits"],
                "sentence_transformers": embeddings,
                "variants": variants,
            }
        )
    if not any(f"against {SESSION}" in problem for problem in control):
        problems.append(f"{CONTROL}: {SPOILT}[0] of {CONTROL_OF} is 0.1 more, and nothing was found")
    kinds = judge_tokenizers(opened["tokenizers"], tokenizers)
    problems += [f"tokenizer of {kind['model_type']}: {kind['problem']}" for kind in kinds if kind["problem"]]
    return {
        "what": "bundles opened by Optimum's classes against our own session and eager PyTorch",
        "machine": machine(),
        "versions": {
            "made with": versions("variator-export", *GRAPH_DISTRIBUTIONS, "onnxruntime"),
            "opened with": opened["versions"],
        },
        "allowed": MULTIPLE,
        "table": table(results),
        "tokenizers": kinds,
        "control": {"changed": f"{SPOILT}[0] by 0.1", "found": control[:1]},
        "problems": problems,
        "bundles": results,
    }


def judge_embeddings(bundle: Bundle, found: dict[str, Any]) -> dict[str, float]:
    """By variant, the largest difference between embeddings of sentence-transformers and `Bundle.embed`."""
    return {
        name: float(np.abs(np.array(embeddings) - bundle.embed(EMBEDDED_TEXTS, name)).max())
        for name, embeddings in found.items()
    }


def judge_tokenizers(opened: list[dict[str, Any]], folders: dict[str, Path]) -> list[dict[str, Any]]:
    """Whether each tokenizer opens, how, and gives the ids of our own reading."""
    kinds = []
    for item in opened:
        encoder = TextEncoder(folders[item["model_type"]])
        rows = encoder.token_rows([*DEFAULT_TEXTS, *UNUSUAL_TEXTS], None)
        problem = None
        if item["opened_by"] is None:
            problem = f"it does not open: {item['failed']}"
        elif item["ids"] != [list(row.ids) for row in rows]:
            problem = "other token ids than ours"
        del item["ids"]
        kinds.append(item | {"problem": problem})
    return kinds


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
