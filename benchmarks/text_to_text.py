"""Whole requests of a T5-base, from token ids to generated tokens, by ratio, batch and beams.

    python benchmarks/text_to_text.py --output benchmarks/results/text-to-text-cpu.json

Random weights, float32, 512 tokens in and 64 out. Each measurement runs the ways in turns: our session at
ratio 1 and at ratio 4, eager PyTorch's `generate` at both, and CTranslate2 where it can be imported. For our
session the time is split: encoder, decoder steps in the runtime, and the loop around them. The speed-up that
the encoder's saving allows is that of a request whose other parts take their time at ratio 1.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from common import copy_tokenizer, describe, write_result

from variator_export import Bundle, build
from variator_export.core.environment import is_importable
from variator_export.engines.eager import EagerModel
from variator_export.engines.onnxruntime.graph import IoBindingRunner
from variator_export.engines.target import GeneratingSession
from variator_export.model.backbone import load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.methods import method_of
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import Recipe

SHAPES = ((1, 1), (8, 1), (1, 4))  # batch, beams
LENGTH, NEW_TOKENS, ROUNDS = 512, 64, 5


def save_model(folder: Path) -> None:
    """A T5-base with random weights; MiniLM's tokenizer stands in for its own."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        **{"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    copy_tokenizer(folder)


def build_bundle(source: Path, folder: Path) -> Bundle:
    """The bundle at ratios 1 and 4."""
    recipe = {
        "name": "t5",
        "backbone": {"source": str(source)},
        "plugins": [{"ratio": 4, "initialise": {}}],
        "targets": ["onnxruntime"],
        "speed": None,
    }
    build(Recipe.model_validate(recipe), folder)
    return Bundle.load(folder)


class Split:
    """The time of runs in the runtime: encoder first, then the decoder's steps."""

    def __init__(self) -> None:
        self.runs: list[float] = []
        self._run = IoBindingRunner.run_values

    def run_values(self, runner: IoBindingRunner, *arguments: Any) -> Any:
        """Time `IoBindingRunner.run_values`."""
        started = time.perf_counter()
        found = self._run(runner, *arguments)
        self.runs.append(time.perf_counter() - started)
        return found


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def our_request(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of one of our requests, in parts."""
    split = Split()
    with mock.patch.object(IoBindingRunner, "run_values", lambda *arguments: split.run_values(*arguments)):
        whole = timed(call)
    encoder, steps = split.runs[0], sum(split.runs[1:])
    return {"request_s": whole, "encoder_s": encoder, "steps_s": steps, "loop_s": whole - encoder - steps}


def ctranslate2_model(source: Path, folder: Path) -> Any:
    """The model in CTranslate2, float32; None where it cannot be had."""
    if not is_importable("ctranslate2"):
        return None
    import ctranslate2

    ctranslate2.converters.TransformersConverter(str(source)).convert(str(folder), force=True)
    return ctranslate2.Translator(str(folder), compute_type="float32", intra_threads=torch.get_num_threads())


def measure(bundle: Bundle, source: Path, other: Any) -> list[dict[str, Any]]:
    """All shapes; the ways of a shape in turns."""
    session = bundle.session()
    assert isinstance(session, GeneratingSession)
    backbone = load_backbone(read_backbone_info(resolve_source(str(source))), 0)
    eager = {
        variant.ratio: EagerModel(
            backbone, method_of(variant).eager(backbone, bundle.variant_folder(variant)), attention="sdpa"
        )
        for variant in bundle.manifest.variants
    }
    rng = np.random.default_rng(0)
    vocabulary = transformers.AutoTokenizer.from_pretrained(source).convert_ids_to_tokens(range(30522))
    results = []
    for batch, beams in SHAPES:
        ids = rng.integers(1000, 30000, (batch, LENGTH))
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "num_beams": beams}
        ours: dict[int, list[dict[str, float]]] = {ratio: [] for ratio in eager}
        theirs: dict[str, list[float]] = {}
        for number in range(ROUNDS + 1):
            for ratio, model in eager.items():
                request = our_request(partial(session.generate, inputs, ratio, **settings))
                seconds = timed(partial(model.generate, inputs, **settings))
                if number:  # the first is a warm-up
                    ours[ratio].append(request)
                    theirs.setdefault(f"eager, ratio {ratio}", []).append(seconds)
            if other is not None:
                texts = [[vocabulary[token] for token in row] for row in ids]
                seconds = timed(
                    partial(
                        other.translate_batch,
                        texts,
                        beam_size=beams,
                        max_decoding_length=NEW_TOKENS,
                        min_decoding_length=NEW_TOKENS,
                        max_input_length=0,
                    )
                )
                if number:
                    theirs.setdefault("CTranslate2, float32", []).append(seconds)
        medians = {
            ratio: {part: float(np.median([run[part] for run in runs])) for part in runs[0]}
            for ratio, runs in ours.items()
        }
        one, four = medians[1], medians[4]
        speedups = [a["request_s"] / b["request_s"] for a, b in zip(ours[1], ours[4], strict=True)]
        allowed = one["request_s"] / (one["request_s"] - one["encoder_s"] + four["encoder_s"])
        result = {
            **{"batch": batch, "beams": beams, "input_tokens": LENGTH, "new_tokens": NEW_TOKENS},
            "ours": medians,
            "others_s": {name: float(np.median(seconds)) for name, seconds in theirs.items()},
            "speedup": float(np.median(speedups)),
            "speedup_range": [min(speedups), max(speedups)],
            "allowed_by_the_encoder": allowed,
            "encoder_share": one["encoder_s"] / one["request_s"],
            "loop_share_of_a_step": one["loop_s"] / (one["steps_s"] + one["loop_s"]),
        }
        results.append(result)
        print(json.dumps(result), flush=True)
    return results


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where model and bundle are built, or are already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        source, target = folder / "source", folder / "bundle"
        if not source.exists():
            save_model(source)
        bundle = build_bundle(source, target)
        other = ctranslate2_model(source, folder / "ctranslate2")
        found = measure(bundle, source, other)
        sizes = {name: entry.size_bytes for name, entry in bundle.manifest.files.items()}
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors") and "/" not in name)
    plugins = sum(size for name, size in sizes.items() if name.startswith("plugins/"))
    described = describe("ctranslate2") | {"threads": torch.get_num_threads()}
    write_result(
        options.output,
        described | {"bundle_over_weights": sum(sizes.values()) / (weights + plugins), "requests": found},
    )


if __name__ == "__main__":
    main()
