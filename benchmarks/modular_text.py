"""Assemblies of models that generate text: exact match over the speed of whole requests.

    python benchmarks/modular_text.py --data DATA --modules MODULES --work WORK --output modular-text-cpu.json

DATA is the output of examples/t5-demo/make_data.py, MODULES that of examples/t5-demo/train_modules.sh. The
demo T5 has four encoder and two decoder layers: its assemblies, some with compression plugins, are verified
in one bundle, evaluated on the held-out passages, and timed in whole requests. A T5-base with random weights
has twelve and twelve: its layers are left out as modules of granularity 2, 3, 4 and 6 would, which takes the
time that such modules take, from one module in the encoder to two layers in each stack.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from common import describe, write_result
from text_to_text import save_model
from variator_export.benchmark.schedule import TimingSettings
from variator_export.benchmark.speed_table import speed_inputs
from variator_export.benchmark.text_benchmark import RequestShape, bench_text
from variator_export.benchmark.timing import speedup, time_in_turns
from variator_export.building.recipe_build import build
from variator_export.core.assembly import DECODER_STACK, ENCODER_STACK, parse_assembly
from variator_export.core.parts import DECODER, ENCODER
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.graph.assemblies.variant import leave_out_layers
from variator_export.graph.bind import bind_baseline_loaded
from variator_export.graph.defaults import load_without_defaults
from variator_export.graph.trace import trace
from variator_export.model.backbone import Backbone, load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.source import resolve_source
from variator_export.quality.evaluation import Request, evaluate_bundle
from variator_export.recipe.recipe import Recipe
from variator_export.recipe.recipe_file import load_recipe
from variator_export.sessions import Bundle
from variator_export.verification.generation.decoder import RunnerDecoder

DEMO = ("enc=1x2,2", "enc=2x2", "enc=4", "dec=2", "enc=1x2,2;dec=2", "enc=2x2;dec=2", "enc=4;dec=2")
DEMO_WITH_PLUGINS = ("enc=2x2;k=4", "enc=2x2;dec=2;k=4")
# The passages have about 85 tokens, the answers 11.
DEMO_SHAPES = (RequestShape(1, 96, 12, 1), RequestShape(8, 96, 12, 1))
BASE = (
    *("enc=2,1x10", "enc=2x6", "enc=6,6", "dec=2x6", "dec=6,6"),
    *("enc=2x6;dec=2x6", "enc=3x4;dec=3x4", "enc=4x3;dec=4x3", "enc=6,6;dec=6,6"),
)
BASE_SHAPES = ((1, 512, 4), (1, 512, 32), (8, 128, 32))


def demo(data: Path, modules: Path, work: Path) -> dict[str, Any]:
    """Exact match and speed of the demo's assemblies."""
    recipe = {
        **load_recipe("t5-demo").model_dump(mode="json"),
        "modules": [{"source": str(modules / name)} for name in ("g2", "g4", "decoder-g2")],
        "assemblies": [*DEMO, *DEMO_WITH_PLUGINS],
    }
    begin = time.monotonic()
    built = build(Recipe.model_validate(recipe), work / "t5-demo").bundle
    seconds = round(time.monotonic() - begin, 1)
    examples = read_examples(str(data / "dev.jsonl"), Columns("text", None, "label"))
    quality = evaluate_bundle(Bundle.load(built), Request(None, examples), runtimes=("onnxruntime",))
    speed = bench_text(built, DEMO_SHAPES, runtimes=["onnxruntime"], settings=TimingSettings(openings=2))
    return {
        "build_seconds": seconds,
        "quality": {
            row.variant: {"metrics": row.metrics, "lost_interval": row.loss_interval} for row in quality.rows
        },
        "speed": {str(result.shape): [dict(row) for row in result.rows] for result in speed.shapes},
    }


class Base:
    """A T5-base with random weights, traced."""

    def __init__(self, work: Path) -> None:
        folder = work / "t5-base"
        if not (folder / "config.json").exists():
            save_model(folder)
        self.folder = work / "t5-base-graphs"
        info = read_backbone_info(resolve_source(str(folder)))
        self.backbone: Backbone = load_backbone(info, 0)
        if not (self.folder / f"{DECODER}.onnx").exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            for part, model in trace(self.backbone, self.folder, "weights.safetensors").items():
                ir.save(model, self.folder / f"{part}.onnx")

    def request(self, spec: str | None, shape: tuple[int, int, int]) -> Callable[[], object]:
        """A function that runs a request of (rows, tokens in, tokens out); None for the original."""
        assembly = parse_assembly(spec or "k=2")[0]
        info = self.backbone.info
        runners: dict[str, OnnxRuntimeRunner] = {}
        for part in (ENCODER, DECODER):
            model = load_without_defaults(self.folder / f"{part}.onnx")
            for stack in (ENCODER_STACK, DECODER_STACK):
                if spec is not None and (stack == DECODER_STACK or part == ENCODER):
                    spans = assembly.spans(stack, info.stack_layers[stack])
                    leave_out_layers(model, info, stack, [span.last for span in spans])
            if part == ENCODER:
                model = bind_baseline_loaded(model)
            graph = ir.to_proto(model).SerializeToString()
            runners[part] = OnnxRuntimeRunner(graph, weights=self.folder)
        assert info.decoder_size is not None
        layers = len(assembly.spans(DECODER_STACK, info.decoder_size.num_layers))
        size = replace(info.decoder_size, num_layers=layers)
        rows, length, new_tokens = shape
        inputs = speed_inputs(info.spec.family.inputs, info.config.vocab_size, rows, length)

        def run() -> None:
            states = runners[ENCODER].run(inputs)
            call = RunnerDecoder(runners[DECODER], size, inputs["attention_mask"], states)
            tokens = np.zeros(rows, np.int64)
            for _ in range(new_tokens):
                tokens = call.step(tokens).argmax(axis=-1)

        return run

    def speeds(self, shape: tuple[int, int, int], rounds: int) -> Mapping[str, Any]:
        """The time of whole requests, in turns, each assembly with the original."""
        found: dict[str, Any] = {}
        original = self.request(None, shape)
        for spec in BASE:
            calls = {"original": original, spec: self.request(spec, shape)}
            timings, _ = time_in_turns(calls, max_rounds=rounds, block_seconds=1.0)
            found[spec] = {
                "original_ms": round(timings["original"].median_ms, 2),
                "request_ms": round(timings[spec].median_ms, 2),
                "speedup": asdict(speedup(timings["original"], timings[spec])),
            }
        return found


def main() -> None:
    """Measure, and write the result after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--modules", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    result: dict[str, Any] = {**describe()}
    result["demo"] = demo(options.data, options.modules, options.work)
    write_result(options.output, result)
    base = Base(options.work)
    result["t5-base"] = {}
    for shape in BASE_SHAPES:
        result["t5-base"]["x".join(map(str, shape))] = base.speeds(shape, options.rounds)
        write_result(options.output, result)


if __name__ == "__main__":
    main()
