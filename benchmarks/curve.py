"""What to deploy at 1.5x, 2x, 3x: plugins, modules, both, and layers left out, at equal training.

    python benchmarks/curve.py --data DIR --work WORK --output benchmarks/results/curve-cpu.json

DIR holds STS-B, SST-2, agnews and corpus/british_fiction. Every way gets the same number of examples after
the same start: on STS-B, pre-training on text from the untrained state; on SST-2 and AG News, adaptation of
the shipped plugins and modules to a fine-tuned classifier. `left out` keeps every second or third layer and
trains all of them (on the tasks on labels, the whole classifier), as after LayerDrop (arXiv 1909.11556).
Plugins of assemblies are those of the original layers. Each model is measured in a verified bundle, in
float32 and int8. Every finished part is kept in WORK and not done again. Speeds are those of the graphs of
SST-2, all in turns, over the original in float32. Results that are in the output already stay there.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from common import describe, write_result
from modular import MODULES
from quality import SEED, SHIPPED, Bench, Printed
from variator_export.benchmark.speed_table import speed_inputs
from variator_export.benchmark.timing import speedup, time_in_turns
from variator_export.building.recipe_build import build
from variator_export.core.assembly import parse_assembly
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns, Examples
from variator_export.data.texts import read_texts
from variator_export.model.modular.layout import even_groups
from variator_export.model.source import modules_folder, resolve_source
from variator_export.quality.evaluation import Request, evaluate_bundle
from variator_export.recipe.recipe import Recipe
from variator_export.recipe.recipe_file import load_recipe
from variator_export.sessions import Bundle
from variator_export.training.adapt import adapt
from variator_export.training.finetune import finetune
from variator_export.training.modular.adapt import adapt_modules
from variator_export.training.modular.pretrain import default_losses, pretrain_modules
from variator_export.training.modular.settings import ModuleLosses, ModuleShape, Replacing
from variator_export.training.run import Run
from variator_export.training.settings import Losses, Optimisation, PassageSettings

RATIOS = (2, 4, 8)
GRANULARITIES = (2, 3)
SPEED = "speed"
SHAPES = ((1, 32), (8, 128), (32, 128))
PRECISIONS = ("float32", "int8")
# From 1.2x to 3x, without a plugin and with one.
ASSEMBLIES = ("enc=1x4,2", "enc=1x2,2x2", "enc=2x2,1x2", "enc=2x3", "enc=3,1,2", "enc=3x2")
BOTH = ("enc=2,1x4;k=2", "enc=2,1x4;k=4", "enc=2x3;k=2", "enc=2x3;k=4", "enc=3x2;k=2")
LEFT_OUT = {2: "enc=2x3", 3: "enc=3x2"}
# All modules in every step, and nothing but the outputs to learn from: a smaller model that is trained.
_ALL = Replacing(begin=1.0, end=1.0)


class Curve(Bench):
    """The models of each way, and what they lose."""

    def optimisation(self, steps: int, learning_rate: float) -> Optimisation:
        """The same for every way but the learning rate."""
        return Optimisation(
            steps=steps,
            batch_size=self.batch_size,
            learning_rate=learning_rate,
            seed=SEED,
            precision=self.precision,
            eval_every=max(1, steps // 4),
        )

    def measured(self, name: str, backbone: Path | None, content: Mapping[str, Any], data: Examples) -> Any:
        """Metrics of each variant of a bundle, in each precision."""
        found = {}
        for precision in PRECISIONS:
            recipe = {
                **load_recipe("minilm").model_dump(mode="json"),
                **({} if backbone is None else {"backbone": {"source": str(backbone)}}),
                "plugins": [],
                **content,
                # What int8 loses is measured here, and shown beside its speed.
                "quantization": {"min_cosine": -1, "min_agreement": 0},
                "targets": ["onnxruntime"],
                "precision": precision,
                "speed": None,
            }

            def measure(recipe: dict[str, Any] = recipe, precision: str = precision) -> dict[str, Any]:
                folder = self.work / "bundles" / f"{name}-{precision}".replace(" ", "-")
                built = build(Recipe.model_validate(recipe), folder, progress=Printed()).bundle
                quality = evaluate_bundle(Bundle.load(built), Request(None, data), runtimes=("onnxruntime",))
                return {
                    row.variant: {"metrics": row.metrics, "lost_interval": row.loss_interval}
                    for row in quality.rows
                }

            found[precision] = self.kept(f"curve-{name}-{precision}".replace(" ", "-"), measure)
        return found

    def similarity(self) -> dict[str, Any]:
        """STS-B dev after pre-training of the same length."""
        texts = [str(self.data / "corpus/british_fiction"), f"{self.work / 'sts' / 'train.jsonl'}@0.5"]
        losses = default_losses(self.backbone(self.source))
        ways = {
            "modules": (GRANULARITIES, losses, Replacing(), 5e-4),
            **{f"left-{g}": ((g,), ModuleLosses(hidden=1.0, embedding=1.0), _ALL, 5e-4) for g in LEFT_OUT},
        }
        for name, (granularities, weights, replacing, rate) in ways.items():
            if not (output := self.work / "pretrained" / name).exists():
                pretrain_modules(
                    self.backbone(self.source),
                    read_texts(texts),
                    Run(output, progress=Printed()),
                    shape=ModuleShape(granularities=granularities),
                    losses=weights,
                    replacing=replacing,
                    passages=PassageSettings(min_tokens=8, max_tokens=128),
                    optimisation=self.optimisation(self.steps, rate),
                )
        dev = read_examples(str(self.data / "STS-B/dev.tsv"), Columns("sentence1", "sentence2", "score"))
        pretrained = self.work / "pretrained"
        result = {
            "plugins and modules": self.measured(
                "STS-B",
                None,
                contents(
                    self.pretrained("default"), [pretrained / "modules" / f"g{g}" for g in GRANULARITIES]
                ),
                dev,
            )
        }
        for granularity, spec in LEFT_OUT.items():
            folder = pretrained / f"left-{granularity}" / f"g{granularity}"
            content = {"modules": [{"source": str(folder)}], "assemblies": [spec]}
            result[f"left out {spec}"] = self.measured(f"STS-B-left-{granularity}", None, content, dev)
        return result

    def task(self, name: str) -> dict[str, Any]:
        """Accuracy on a task after adaptation of the same length."""
        train, dev = self._examples(name)
        cut = self._cut(train)
        folder = self.work / "tasks" / name.replace(" ", "-")
        self.finetuned(name, folder, cut)
        source = resolve_source(str(folder / "backbone"))
        steps = self.adaptation_steps
        if not (plugins := folder / "plugins").exists():
            adapt(
                self.backbone(source),
                {f"ratio-{k}": self.pretrained(SHIPPED) / f"ratio-{k}" for k in RATIOS},
                *cut,
                Run(plugins, progress=Printed()),
                losses=Losses(hidden=1.0, logits=0.1),
                optimisation=self.optimisation(steps, 1e-3),
            )
        if not (modules := folder / "modules").exists():
            adapt_modules(
                self.backbone(source),
                {f"g{g}": modules_folder(m) for g, m in zip(GRANULARITIES, MODULES, strict=True)},
                *cut,
                Run(modules, progress=Printed()),
                losses=ModuleLosses(hidden=1.0, layers=1.0, attention=1.0, logits=0.1),
                replacing=Replacing(),
                optimisation=self.optimisation(steps, 5e-4),
            )
        result = {
            "plugins and modules": self.measured(
                name, folder / "backbone", contents(plugins, [modules / f"g{g}" for g in GRANULARITIES]), dev
            )
        }
        for granularity, spec in LEFT_OUT.items():
            output = folder / f"left-{granularity}"
            if not output.exists():
                finetune(
                    resolve_source(str(self.left_out(folder, granularity))),
                    *cut,
                    Run(output, progress=Printed()),
                    optimisation=self.optimisation(steps, 1e-4),
                )
            result[f"left out {spec}"] = self.measured(f"{name}-left-{granularity}", output, {}, dev)
        return {"examples": {"train": len(cut[0]), "dev": len(dev)}, "ways": result}

    def left_out(self, folder: Path, granularity: int) -> Path:
        """The fine-tuned classifier with one of so many layers, saved as a model of its own."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        output = folder / f"start-{granularity}"
        model: Any = AutoModelForSequenceClassification.from_pretrained(folder / "backbone")
        layers = model.bert.encoder.layer
        kept = [layers[group.like] for group in even_groups(len(layers), granularity)]
        model.bert.encoder.layer = nn.ModuleList(kept)
        model.config.num_hidden_layers = len(kept)
        model.save_pretrained(output)
        AutoTokenizer.from_pretrained(folder / "backbone").save_pretrained(output)
        return output

    def speed(self, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
        """The speed of each variant in each precision, over that of the original in float32."""
        calls: dict[str, Callable[[], object]] = {}
        for precision in PRECISIONS:
            bundle = Bundle.load(self.work / "bundles" / f"SST-2-{precision}")
            inputs = speed_inputs(bundle.manifest.backbone.inputs, 30000, *shape)
            for variant in bundle.manifest.variants:
                if variant.name in self.names():
                    session = bundle.session(variant=variant.name)
                    calls[f"{precision} {variant.name}"] = partial(session.run, inputs)
        timings, _ = time_in_turns(calls, max_rounds=rounds, block_seconds=0.3)
        first = timings[f"{PRECISIONS[0]} ratio-1"]
        return {
            precision: {
                name: {
                    "median_ms": round(timings[f"{precision} {name}"].median_ms, 3),
                    "speedup": asdict(speedup(first, timings[f"{precision} {name}"])),
                }
                for name in self.names()
            }
            for precision in PRECISIONS
        }

    @staticmethod
    def names() -> list[str]:
        """The names of all variants."""
        named = [parse_assembly(spec) for spec in (*ASSEMBLIES, *BOTH)]
        assembled = [each.name + (f"_ratio-{k}" if k else "") for each, k in named]
        return ["ratio-1", *(f"ratio-{k}" for k in RATIOS), *assembled]


def contents(plugins: Path, modules: list[Path]) -> dict[str, Any]:
    """Plugins, modules, and assemblies of them."""
    return {
        "plugins": [{"ratio": k, "source": str(plugins / f"ratio-{k}")} for k in RATIOS],
        "modules": [{"source": str(folder)} for folder in modules],
        "assemblies": [*ASSEMBLIES, *BOTH],
    }


def main(
    data: Annotated[Path, typer.Option(help="The data folder.")],
    work: Annotated[Path, typer.Option(help="Where intermediate results are kept.")],
    output: Path = Path("benchmarks/results/curve-cpu.json"),
    steps: Annotated[int, typer.Option(help="Of pre-training on text, for STS-B.")] = 1000,
    adaptation_steps: Annotated[int, typer.Option(help="Of adaptation to a task.")] = 1000,
    only: Annotated[
        list[str] | None, typer.Option(help="SST-2, AG News, STS-B or speed; default: all.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Of the timing.")] = 8,
    threads: int | None = None,
) -> None:
    """Measure quality."""
    if threads is not None:
        torch.set_num_threads(threads)
    curve = Curve(data, work, steps, 32, adaptation_steps)
    result: dict[str, Any] = {"tasks": {}, "speed": {}}
    if output.exists():
        result = json.loads(output.read_text(encoding="utf-8"))
    settings = json.loads((work / "settings.json").read_text(encoding="utf-8"))
    for name in only or ("SST-2", "AG News", "STS-B", SPEED):
        if name == SPEED:
            for rows, length in SHAPES:
                measured = curve.kept(f"speed-{rows}x{length}", partial(curve.speed, (rows, length), rounds))
                result["speed"][f"{rows}x{length}"] = {**measured, **describe()}
                write_result(output, result)
        else:
            found = {"ways": curve.similarity()} if name == "STS-B" else curve.task(name)
            result["tasks"][name] = {**found, "settings": settings, **describe()}
            write_result(output, result)


if __name__ == "__main__":
    typer.run(main)
