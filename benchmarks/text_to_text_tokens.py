"""Generated tokens of every family and ratio against transformers' `generate` on the eager model.

    python benchmarks/text_to_text_tokens.py --output benchmarks/results/text-to-text-tokens.json

Small random models of each family with random plugins of ratio 2, 3, 4 and 8, in float32: 200 inputs of 1 to
40 tokens each, by greedy search and with four beams. Where a row parts from eager PyTorch, both sequences are
scored in float64: a tie is a pair whose scores differ by less than rounding makes of a score. Of other
pairs, `in_float64` says which one transformers' search gives in float64.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from common import copy_tokenizer, describe, write_result
from variator_export import Bundle, build
from variator_export.engines.eager import EagerModel
from variator_export.engines.target import GeneratingSession
from variator_export.model.backbone import load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.methods import method_of
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import Recipe

INPUTS, BATCH, LONGEST, NEW_TOKENS = 200, 8, 40, 16
RATIOS = (2, 3, 4, 8)
SEARCHES: dict[str, dict[str, Any]] = {"greedy": {}, "four beams": {"num_beams": 4}}
VOCABULARY = 30522
# A score in float32 is off by some units of its last place, and a sequence is the sum of some scores.
ROUNDING = 1e-3
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "eos_token_id": 102}
_T5 = {"d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 3, "decoder_start_token_id": 0}
_BART = {
    **{"d_model": 64, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "init_std": 0.15},
    **{"max_position_embeddings": 128, "bos_token_id": 101, "decoder_start_token_id": 102},
}


def models() -> dict[str, transformers.PreTrainedModel]:
    """A small random model of each family, by its name."""
    torch.manual_seed(0)
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    made: dict[str, transformers.PreTrainedModel] = {
        "T5 v1.0": transformers.T5ForConditionalGeneration(transformers.T5Config(**_IDS, **_T5)),
        "T5 v1.1": transformers.T5ForConditionalGeneration(transformers.T5Config(**_IDS, **_T5, **gated)),
        "mT5": transformers.MT5ForConditionalGeneration(transformers.MT5Config(**_IDS, **_T5, **gated)),
    }
    for name in ("Bart", "MBart", "Pegasus"):
        config = getattr(transformers, f"{name}Config")(**_IDS, **_BART)
        made[name] = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    return made


def batches(seed: int) -> list[dict[str, np.ndarray]]:
    """200 random inputs, in batches of rows of different length."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(INPUTS // BATCH):
        lengths = rng.integers(1, LONGEST + 1, BATCH)
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        ids = np.where(mask > 0, rng.integers(103, VOCABULARY, mask.shape), 0)
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def score(eager: EagerModel, inputs: dict[str, np.ndarray], start: int, sequence: list[int]) -> float:
    """The log probability of a sequence."""
    tokens = np.array([[start, *sequence[:-1]]], np.int64)
    scores = torch.log_softmax(torch.from_numpy(eager.scores(inputs, tokens)[0]), -1)
    return float(scores[range(len(sequence)), sequence].sum())


def compare(bundle: Bundle, source: Path) -> dict[str, Any]:
    """The rows of every ratio and search that equal eager PyTorch's, and those that part at a tie."""
    backbone = load_backbone(
        read_backbone_info(resolve_source(str(source))), bundle.manifest.backbone.pad_token_id
    )
    session = bundle.session()
    assert isinstance(session, GeneratingSession)
    start = session.settings.decoder_start_token_id
    found: dict[str, Any] = {}
    for variant in bundle.manifest.variants:
        folder = bundle.variant_files(variant)
        eager = EagerModel(backbone, method_of(variant).eager(backbone, folder))
        double = backbone.to_dtype(torch.float64)
        exact = EagerModel(double, method_of(variant).eager(double, folder))
        for search, settings in SEARCHES.items():
            equal = ties = 0
            parted = []
            for inputs in batches(variant.ratio):
                ours = session.generate(inputs, variant.name, max_new_tokens=NEW_TOKENS, **settings).tokens
                theirs = eager.generate(inputs, max_new_tokens=NEW_TOKENS, **settings)[:, 1:].tolist()
                for row, (sequences, other) in enumerate(zip(ours, theirs, strict=True)):
                    own = sequences[0].tolist()
                    if own == other[: len(own)] and set(other[len(own) :]) <= {0}:
                        equal += 1
                        continue
                    one = {name: values[row : row + 1] for name, values in inputs.items()}
                    end = other.index(102) + 1 if 102 in other else len(other)
                    gap = score(exact, one, start, own) - score(exact, one, start, other[:end])
                    if abs(gap) < ROUNDING:
                        ties += 1
                        continue
                    # Beams may tie on the way to sequences that do not: float64 tells whose search is right.
                    double_tokens = exact.generate(one, max_new_tokens=NEW_TOKENS, **settings)[0, 1:].tolist()
                    sides = {"ours": own, "transformers": other[:end]}
                    right = [side for side, tokens in sides.items() if double_tokens[: len(tokens)] == tokens]
                    parted.append({"gap": gap, "in_float64": right})
            found[f"{variant.name}, {search}"] = {"equal": equal, "ties": ties, "parted": parted}
            print(bundle.path.name, variant.name, search, equal, ties, parted, flush=True)
    return found


def main() -> None:
    """Build, compare and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--family", action="append", choices=list(models()))
    options = parser.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, model in models().items():
            if options.family and name not in options.family:
                continue
            source, folder = Path(temporary, "source", name), Path(temporary, name)
            model.save_pretrained(source)
            copy_tokenizer(source)
            recipe = {
                "name": "small",
                "backbone": {"source": str(source)},
                "plugins": [{"ratio": k, "initialise": {"seed": k}} for k in RATIOS],
                "targets": ["onnxruntime"],
                "speed": None,
            }
            build(Recipe.model_validate(recipe), folder)
            result[name] = compare(Bundle.load(folder), source)
    counts = [of_search for of_family in result.values() for of_search in of_family.values()]
    totals = {key: sum(count[key] for count in counts) for key in ("equal", "ties")}
    totals["parted"] = sum(len(count["parted"]) for count in counts)
    print(json.dumps(totals))
    write_result(options.output, describe() | {"inputs": INPUTS, "totals": totals, "families": result})


if __name__ == "__main__":
    main()
