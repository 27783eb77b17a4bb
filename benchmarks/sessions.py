"""One session for every ratio against one for each: what the any-ratio graph costs, and the memory it saves.

    python benchmarks/sessions.py --output benchmarks/results/sessions-cpu.json

MiniLM and a T5-base encoder with random weights, at ratios 1, 2, 4 and 8. The null plugin is ratio 1 inside
the any-ratio graph: a plugin of zeros. Switching changes the ratio before every call, beside a session that
stays at each. Memory is that of a process of its own which has run every ratio once at (8, 128).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import describe, make_t5_base, minilm_folder, write_result
from variator_export.benchmark.speed_table import speed_inputs
from variator_export.benchmark.timing import Timings, speedup, time_in_turns
from variator_export.building.recipe_build import build
from variator_export.recipe.recipe import Recipe
from variator_export.sessions import Bundle

RATIOS = (1, 2, 4, 8)
SHAPES = ((1, 32), (8, 128), (1, 512))


def build_bundle(backbone: Path, name: str, folder: Path) -> Path:
    """A bundle with untrained plugins; it is verified before anything is timed."""
    recipe = {
        "name": name,
        "backbone": {"source": str(backbone)},
        "plugins": [{"ratio": k, "initialise": {"seed": k}} for k in RATIOS if k != 1],
        "speed": None,
    }
    return build(Recipe.model_validate(recipe), folder / f"{name}-bundle").bundle


def any_over_bound(bundle: Bundle, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """The any-ratio session beside the sessions of one ratio each."""
    inputs = speed_inputs(bundle.manifest.backbone.inputs, 30000, *shape)
    shared = bundle.session()
    calls: dict[str, Callable[[], object]] = {}
    for k in RATIOS:
        own = bundle.session(variant=k)
        calls[f"bound {k}"] = lambda own=own: own.run(inputs)
        calls[f"any {k}"] = lambda k=k: shared.run(inputs, ratio=k)
    timings, _ = time_in_turns(calls, max_rounds=rounds, block_seconds=0.5)
    return {
        "median_ms": {name: round(found.median_ms, 3) for name, found in timings.items()},
        "null_plugin_over_ratio_1": asdict(speedup(timings["any 1"], timings["bound 1"])),
        "any_over_bound": {
            str(k): asdict(speedup(timings[f"any {k}"], timings[f"bound {k}"])) for k in RATIOS if k != 1
        },
    }


def switching(bundle: Bundle, shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """A session that changes its ratio before every call, beside one that stays at each for a while."""
    inputs = speed_inputs(bundle.manifest.backbone.inputs, 30000, *shape)
    session = bundle.session()

    def stay(k: int) -> Callable[[], object]:
        return lambda: session.run(inputs, ratio=k)

    def change() -> object:
        return [session.run(inputs, ratio=k) for k in RATIOS]

    timings, _ = time_in_turns(
        {**{f"stay {k}": stay(k) for k in RATIOS}, "change": change}, max_rounds=rounds, block_seconds=0.5
    )
    # Of the same rounds: the sum of one call at each ratio.
    stays = sum(timings[f"stay {k}"].block_medians_ms for k in RATIOS)
    together = Timings(tuple(tuple((float(total),) for total in opening) for opening in stays))
    return {
        "one_call_at_each_ms": {
            "staying": round(together.median_ms, 3),
            "changing": round(timings["change"].median_ms, 3),
        },
        "changing_over_staying": asdict(speedup(timings["change"], together)),
    }


_MEMORY = """
import json, sys
from variator_export.sessions import Bundle
from variator_export.benchmark.speed_table import speed_inputs
folder, kind, ratios = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
bundle = Bundle.load(folder)
inputs = speed_inputs(bundle.manifest.backbone.inputs, 30000, 8, 128)
if kind == "shared":
    shared = bundle.session()
    sessions = [shared]
    for k in ratios: shared.run(inputs, ratio=k)
elif kind == "own":
    sessions = [bundle.session(variant=k) for k in ratios]
    for session in sessions: session.run(inputs)
found = dict(line.split(":") for line in open("/proc/self/smaps_rollup").read().splitlines()[1:])
print(json.dumps({name: int(found[name].split()[0]) * 1024 for name in ("Rss", "Anonymous")}))
"""


def memory(bundle: Path) -> dict[str, Any]:
    """Bytes of a process: resident, and of that anonymous (not mapped from a file)."""

    def of(kind: str, ratios: tuple[int, ...]) -> dict[str, int]:
        command = [sys.executable, "-c", _MEMORY, str(bundle), kind, json.dumps(ratios)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return {"resident_bytes": found["Rss"], "anonymous_bytes": found["Anonymous"]}

    result: dict[str, Any] = {
        "without_a_session": of("none", ()),
        "one_session_for_all": of("shared", RATIOS),
        "one_session_for_each": of("own", RATIOS),
        "ratio_1_only": of("own", (1,)),
    }
    base = result["without_a_session"]["resident_bytes"]
    grown = [
        result[name]["resident_bytes"] - base for name in ("one_session_for_each", "one_session_for_all")
    ]
    result["each_over_all"] = round(grown[0] / grown[1], 2)
    return result


def main() -> None:
    """Measure both models and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {"minilm": minilm_folder(), "t5-base-encoder": make_t5_base(folder / "t5-base")}
        for name, backbone in models.items():
            path = build_bundle(backbone, name, folder)
            bundle = Bundle.load(path)
            shapes = [
                {
                    "batch_size": shape[0],
                    "sequence_length": shape[1],
                    **any_over_bound(bundle, shape, options.rounds),
                    **switching(bundle, shape, options.rounds),
                }
                for shape in SHAPES
            ]
            results.append({"model": name, "shapes": shapes, "memory": memory(path)})
    write_result(options.output, {**describe(), "rounds": options.rounds, "results": results})


if __name__ == "__main__":
    main()
