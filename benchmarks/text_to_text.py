"""Whole requests of a T5-base, from token ids to generated tokens, by ratio, batch and beams.

    python benchmarks/text_to_text.py --optimum PYTHON --output benchmarks/results/text-to-text-cpu.json

Random weights, float32, 512 tokens in and 64 out. Each measurement runs the ways in turns: our session at
ratio 1 and at ratio 4, eager PyTorch's `generate` at both, and CTranslate2 where it can be imported.
PYTHON is an interpreter with optimum-onnx, which needs an older transformers (text_to_text_optimum.py):
its own export and session then run too. For our session the time is split: encoder, decoder steps in the
runtime, and the loop around them. The speed-up that the encoder's saving allows is that of a request
whose other parts take their time at ratio 1. The bundle of ratios 1, 2, 4 and 8 is built in a process of
its own, for its peak memory.
"""

import argparse
import json
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
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
LENGTH, NEW_TOKENS = 512, 64
# Our rounds, which are compared in pairs, and those in which the others run too.
ROUNDS, ROUNDS_OF_ALL = 8, 4
RATIOS = (1, 4)


def save_model(folder: Path) -> None:
    """A T5-base with random weights; MiniLM's tokenizer stands in for its own."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        **{"vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
        **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1},
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    copy_tokenizer(folder)
    # CTranslate2 asks the tokenizer for these.
    settings = folder / "tokenizer_config.json"
    tokens = {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | tokens))


def build_bundle(source: Path, folder: Path) -> float:
    """Build the bundle at four ratios; the peak memory of the process in bytes."""
    recipe = {
        "name": "t5",
        "backbone": {"source": str(source)},
        "plugins": [{"ratio": ratio, "initialise": {}} for ratio in (2, 4, 8)],
        "targets": ["onnxruntime"],
        "speed": None,
    }
    build(Recipe.model_validate(recipe), folder)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Optimum:
    """Optimum's export and session, in a process of its own interpreter.

    Args:
        python: The interpreter.
        source: The model.
        folder: Where Optimum's export goes.
    """

    def __init__(self, python: Path, source: Path, folder: Path) -> None:
        script = Path(__file__).with_name("text_to_text_optimum.py")
        self._process = subprocess.Popen(
            [python, script, source, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.versions: dict[str, str] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("Optimum's process ended; its message is above.")
        return json.loads(line)

    def seconds(self, ids: np.ndarray, beams: int) -> float:
        """Seconds of a request."""
        assert self._process.stdin is not None
        order = {"ids": ids.tolist(), "beams": beams, "new_tokens": NEW_TOKENS}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


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


def measure(bundle: Bundle, source: Path, other: Any, optimum: Optimum | None) -> list[dict[str, Any]]:
    """All shapes; the ways of a shape in turns."""
    session = bundle.session()
    assert isinstance(session, GeneratingSession)
    backbone = load_backbone(read_backbone_info(resolve_source(str(source))), 0)
    eager = {
        variant.ratio: EagerModel(
            backbone, method_of(variant).eager(backbone, bundle.variant_files(variant)), attention="sdpa"
        )
        for variant in bundle.manifest.variants
        if variant.ratio in RATIOS
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
                if number:  # the first is a warm-up
                    ours[ratio].append(request)
                if number > ROUNDS_OF_ALL:
                    continue
                seconds = timed(partial(model.generate, inputs, **settings))
                if number:
                    theirs.setdefault(f"eager, ratio {ratio}", []).append(seconds)
            if number > ROUNDS_OF_ALL:
                continue
            if optimum is not None:
                seconds = optimum.seconds(ids, beams)
                if number:
                    theirs.setdefault("Optimum, its own export", []).append(seconds)
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
        one, pairs = medians[1], list(zip(ours[1], ours[4], strict=True))
        speedups = [a["request_s"] / b["request_s"] for a, b in pairs]
        allowed = [a["request_s"] / (a["request_s"] - a["encoder_s"] + b["encoder_s"]) for a, b in pairs]
        reached = [found / possible for found, possible in zip(speedups, allowed, strict=True)]
        result = {
            **{"batch": batch, "beams": beams, "input_tokens": LENGTH, "new_tokens": NEW_TOKENS},
            "ours": medians,
            "others_s": {name: float(np.median(seconds)) for name, seconds in theirs.items()},
            "speedup": float(np.median(speedups)),
            "speedup_range": [min(speedups), max(speedups)],
            "allowed_by_the_encoder": float(np.median(allowed)),
            "reached": float(np.median(reached)),
            "reached_range": [min(reached), max(reached)],
            "encoder_share": one["encoder_s"] / one["request_s"],
            "loop_share_of_a_step": one["loop_s"] / (one["steps_s"] + one["loop_s"]),
            "rounds": ours,
        }
        results.append(result)
        print(json.dumps(result), flush=True)
    return results


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--optimum", type=Path, help="an interpreter with optimum-onnx")
    parser.add_argument("--folder", type=Path, help="where model and bundle are built, or are already")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        source, target = folder / "source", folder / "bundle"
        if not source.exists():
            save_model(source)
        # A fresh process: this one has loaded much already.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            peak = pool.submit(build_bundle, source, target).result()
        bundle = Bundle.load(target)
        other = ctranslate2_model(source, folder / "ctranslate2")
        optimum = None if options.optimum is None else Optimum(options.optimum, source, folder / "optimum")
        found = measure(bundle, source, other, optimum)
        if optimum is not None:
            optimum.close()
        sizes = {name: entry.size_bytes for name, entry in bundle.manifest.files.items()}
    weights = sum(size for name, size in sizes.items() if name.endswith(".safetensors") and "/" not in name)
    plugins = sum(size for name, size in sizes.items() if name.startswith("plugins/"))
    described = describe("ctranslate2") | {
        "threads": torch.get_num_threads(),
        "optimum": None if optimum is None else optimum.versions,
        "ratios_in_the_bundle": [variant.ratio for variant in bundle.manifest.variants],
        "weights_bytes": weights,
        "bundle_over_weights": sum(sizes.values()) / (weights + plugins),
        "peak_memory_of_the_build_bytes": peak,
    }
    write_result(options.output, described | {"requests": found})


if __name__ == "__main__":
    main()
