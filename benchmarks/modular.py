"""Assemblies of MiniLM: what each costs, what one session for all of them saves, and what each loses.

    python benchmarks/modular.py --pairs STS-B/dev.tsv --work work --output results/modular-cpu.json

Every assembly of the shipped modules (granularity 2 and 3), and some with compression plugins, in one bundle,
in which each was verified against eager PyTorch. Quality: similarity of the sentence pairs. Speed: each
variant's own graph, in turns. One session: the graph of all assemblies beside the own graphs, a change of the
assembly before every call beside staying, and the memory of a process of its own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import describe, write_result
from variator_export.benchmark.speed_table import speed_inputs
from variator_export.benchmark.timing import Timings, speedup, time_in_turns
from variator_export.building.recipe_build import build
from variator_export.core.assembly import Assembly, possible_spans
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.model.methods import method_of
from variator_export.model.modular.files import load_module_config
from variator_export.model.source import modules_folder
from variator_export.quality.evaluation import Request, evaluate_bundle
from variator_export.recipe.recipe import Recipe
from variator_export.recipe.recipe_file import load_recipe
from variator_export.sessions import Bundle

MODULES = ("recipes:minilm/g2", "recipes:minilm/g3")
SHAPES = ((1, 32), (8, 128), (32, 128))
# With a plugin of each of these ratios.
BOTH = ("enc=2,1x4", "enc=2x3", "enc=3x2")
RATIOS = (2, 4, 8)
# The assemblies that a session changes between.
CHANGED = ("ratio-1", "enc-2x3", "enc-3x2")
_LAYERS = 6


def all_assemblies() -> list[str]:
    """Every assembly of the shipped modules but the original."""
    configs = [load_module_config(modules_folder(source)) for source in MODULES]
    spans = {group.span for config in configs for group in config.modules}
    found = [Assembly(tuple(s.granularity for s in each)) for each in possible_spans(_LAYERS, spans)]
    return [str(assembly) for assembly in found if not assembly.is_original]


def build_bundle(folder: Path, precision: str) -> tuple[Path, float]:
    """The bundle, verified; and the seconds that its build took."""
    recipe = {
        **load_recipe("minilm").model_dump(mode="json"),
        "modules": [{"source": source} for source in MODULES],
        "assemblies": [*all_assemblies(), *(f"{spec};k={k}" for spec in BOTH for k in RATIOS)],
        "targets": ["onnxruntime"],
        "precision": precision,
        "speed": None,
    }
    begin = time.monotonic()
    built = build(Recipe.model_validate(recipe), folder / f"minilm-{precision}").bundle
    return built, round(time.monotonic() - begin, 1)


def quality_of(bundle: Bundle, pairs: Path) -> dict[str, Any]:
    """Spearman, cosine and loss of each variant on sentence pairs."""
    examples = read_examples(str(pairs), Columns("sentence1", "sentence2", "score"))
    quality = evaluate_bundle(bundle, Request(None, examples), runtimes=("onnxruntime",))
    return {
        row.variant: {
            "metrics": row.metrics,
            "lost": row.relative_loss,
            "lost_interval": row.loss_interval,
        }
        for row in quality.rows
    }


def speeds(bundle: Bundle, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The time of each variant's own graph, over that of the original, and what its MACs allow."""
    inputs = speed_inputs(bundle.manifest.backbone.inputs, 30000, *shape)
    manifest = bundle.manifest
    sessions = {v.name: bundle.session(variant=v.name) for v in manifest.variants}
    calls: dict[str, Callable[[], object]] = {
        name: lambda session=session: session.run(inputs) for name, session in sessions.items()
    }
    timings, _ = time_in_turns(calls, max_rounds=rounds, block_seconds=0.3)
    size = manifest.backbone.encoder_size
    macs = {v.name: method_of(v).macs(size, v, *shape) for v in manifest.variants}
    first = manifest.baseline.name
    return {
        name: {
            "median_ms": round(found.median_ms, 3),
            "speedup": asdict(speedup(timings[first], found)),
            "allowed": round(macs[first] / macs[name], 4),
        }
        for name, found in timings.items()
    }


def shared_over_own(bundle: Bundle, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The graph of all assemblies beside the own graphs, and a change before every call beside staying."""
    inputs = speed_inputs(bundle.manifest.backbone.inputs, 30000, *shape)
    shared = bundle.session()
    calls: dict[str, Callable[[], object]] = {}
    for name in CHANGED:
        own = bundle.session(variant=name)
        calls[f"own {name}"] = lambda own=own: own.run(inputs)
        calls[f"shared {name}"] = lambda name=name: shared.run(inputs, ratio=name)
    calls["change"] = lambda: [shared.run(inputs, ratio=name) for name in CHANGED]
    timings, _ = time_in_turns(calls, max_rounds=rounds, block_seconds=0.5)
    stays = sum(timings[f"shared {name}"].block_medians_ms for name in CHANGED)
    together = Timings(tuple(tuple((float(total),) for total in opening) for opening in stays))
    changing, staying = timings["change"].median_ms, together.median_ms
    return {
        "shared_over_own": {
            name: asdict(speedup(timings[f"shared {name}"], timings[f"own {name}"])) for name in CHANGED
        },
        "changing_over_staying": asdict(speedup(timings["change"], together)),
        "change_ms": round((changing - staying) / len(CHANGED), 3),
    }


_MEMORY = """
import json, sys
from variator_export.sessions import Bundle
from variator_export.benchmark.speed_table import speed_inputs
folder, kind = sys.argv[1:]
bundle = Bundle.load(folder)
inputs = speed_inputs(bundle.manifest.backbone.inputs, 30000, 8, 128)
names = [v.name for v in bundle.manifest.variants if v.plugin is None]
sessions = [bundle.session()] if kind == "shared" else []
if kind == "own":
    sessions = [bundle.session(variant=name) for name in names]
if kind == "original":
    sessions = [bundle.session(variant=names[0])]
for name in names if kind == "shared" else ():
    sessions[0].run(inputs, ratio=name)
for session in sessions if kind != "shared" else ():
    session.run(inputs)
found = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
print(json.dumps({name: int(found[name].split()[0]) * 1024 for name in ("Rss", "Anonymous")}))
"""


def memory(bundle: Path) -> dict[str, Any]:
    """Bytes of a process: resident, and of that anonymous (not mapped from a file)."""

    def of(kind: str) -> dict[str, int]:
        command = [sys.executable, "-c", _MEMORY, str(bundle), kind]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return {"resident_bytes": found["Rss"], "anonymous_bytes": found["Anonymous"]}

    return {
        "without_a_session": of("none"),
        "the_original_alone": of("original"),
        "one_session_for_all_assemblies": of("shared"),
        "one_session_for_each_assembly": of("own"),
    }


def main() -> None:
    """Measure, and write the result after each part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--precision", action="append", choices=("float32", "int8"))
    options = parser.parse_args()
    result: dict[str, Any] = {**describe(), "assemblies": len(all_assemblies()) + 1, "precisions": {}}
    for precision in options.precision or ("float32", "int8"):
        path, seconds = build_bundle(options.work, precision)
        bundle = Bundle.load(path)
        found: dict[str, Any] = {"variants": len(bundle.manifest.variants), "build_seconds": seconds}
        result["precisions"][precision] = found
        found["quality"] = quality_of(bundle, options.pairs)
        write_result(options.output, result)
        found["memory"] = memory(path)
        for shape in SHAPES:
            name = f"{shape[0]}x{shape[1]}"
            found.setdefault("one_session", {})[name] = shared_over_own(bundle, shape, options.rounds)
            write_result(options.output, result)
            found.setdefault("speed", {})[name] = speeds(bundle, shape, options.rounds)
            write_result(options.output, result)
    result["load_average_1min_after"] = describe()["machine"].get("load_average_1min")
    write_result(options.output, result)


if __name__ == "__main__":
    main()
