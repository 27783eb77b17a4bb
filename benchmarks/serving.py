"""A server under real load: what each policy carries within a latency goal, and what it loses for that.

    python benchmarks/serving.py --data ../shared/data --output benchmarks/results/serving-cpu.json

Two traces of the Azure LLM inference data set (CC-BY-4.0; conversations, which arrive steadily, and code,
which comes in bursts) are replayed against `variator-export serve` on this machine, with texts of the traces'
lengths, cut at 512 tokens. The load is a share of what ratio 1 carries: the time that the session needs for
all texts of the trace in a loop without a server, in the batches that the server would make. The servers of
all policies run side by side, and one after the other meets a load while the others wait; then comes the next
load. Each round replays another part of the trace, whose capacity is measured first.

Also: the server's overhead (the same texts through the server with enough requests in flight, over the loop),
and the time that a choice takes, by the server's own metric.
"""

import argparse
import asyncio
import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import describe, minilm_folder, write_result
from serving_load import (
    Outcome,
    TracePoint,
    free_port,
    read_corpus,
    read_trace,
    replay,
    saturate,
    texts_of_lengths,
)
from variator_export.building.recipe_build import build
from variator_export.recipe.recipe import Recipe
from variator_export.serving.batcher import Batcher, Row
from variator_export.serving.model import ModelOptions, ServedModel
from variator_export.text.tokenizer import token_row

LONGEST = 512
GOAL_MS = 500.0
LOADS = (0.5, 0.7, 0.85, 1.0, 1.15)
POLICIES: dict[str, tuple[str, ...]] = {
    "k=1": ("--policy", "static", "--ratio", "1"),
    "k=2": ("--policy", "static", "--ratio", "2"),
    "k=4": ("--policy", "static", "--ratio", "4"),
    "k=8": ("--policy", "static", "--ratio", "8"),
    "slack": ("--policy", "slack"),
    "backlog": ("--policy", "backlog"),
}
# Where a trace's part begins, and how many requests it has: some minutes at the load that ratio 1 carries.
PARTS = {"conv": 2000, "code": 2000}


def build_bundle(folder: Path, data: Path, precision: str) -> Path:
    """MiniLM at ratios 1, 2, 4 and 8, taking 512 tokens as its graph does, with what each ratio loses."""
    backbone = folder / "backbone"
    if not backbone.exists():
        shutil.copytree(minilm_folder(), backbone)
        settings = backbone / "sentence_bert_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"max_seq_length": LONGEST}))
    recipe = {
        "name": "minilm",
        "backbone": {"source": str(backbone)},
        "plugins": [{"ratio": k, "source": f"recipes:minilm/ratio-{k}"} for k in (2, 4, 8)],
        "precision": precision,
        "targets": ["onnxruntime"],
        "speed": None,
    }
    bundle = folder / precision
    build(Recipe.model_validate(recipe), bundle)
    subprocess.run(
        [
            *(sys.executable, "-m", "variator_export", "evaluate", str(bundle)),
            *("--data", str(data / "STS-B/dev.tsv"), "--text-column", "sentence1"),
            *("--pair-column", "sentence2", "--label-column", "score"),
        ],
        check=True,
        capture_output=True,
    )
    return bundle


@contextlib.contextmanager
def serving(bundle: Path, *arguments: str) -> Iterator[tuple[str, int, int]]:
    """A server in a process of its own: its host, port and process id."""
    port = free_port()
    command = [sys.executable, "-m", "variator_export", "serve", str(bundle), "--slo-ms", f"{GOAL_MS:g}"]
    process = subprocess.Popen([*command, "--port", str(port), *arguments], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("listening"):
                break
        else:
            raise RuntimeError(f"the server did not start: {process.wait()}")
        yield "127.0.0.1", port, process.pid
    finally:
        process.terminate()
        process.wait(60)


class Loop:
    """The session called in a loop, with the batches that the server would make of a full queue."""

    def __init__(self, model: ServedModel, texts: Sequence[str]) -> None:
        self._model = model
        self._rows = [token_row(encoding) for encoding in model.text.encode(texts)]
        batcher = Batcher(model.max_batch_tokens, 64)
        for number, tokens in enumerate(self._rows):
            batcher.add(Row(len(tokens.ids), (0,), 0.0, float(number), payload=tokens))
        self._batches = []
        while len(batcher):
            rows = batcher.peek(lambda _: True)
            for row in rows:
                batcher.discard(row)
            self._batches.append([row.payload for row in rows])

    def seconds(self, level: int, share: float = 1.0) -> float:
        """Seconds for all texts, from the first share of them, at a level."""
        batches = self._batches[: max(int(share * len(self._batches)), 1)]
        variant = self._model.variants.all[level]
        rows = sum(len(batch) for batch in batches)
        started = time.perf_counter()
        for batch in batches:
            self._model.run(batch, variant)
        return (time.perf_counter() - started) * len(self._rows) / rows


def summarise(outcomes: Sequence[Outcome], losses: dict[int, float]) -> dict[str, Any]:
    """A replay in numbers. Requests that were refused count as not within the goal."""
    answered = [o for o in outcomes if o.status == 200]
    refused = sum(o.status == 429 for o in outcomes)
    assert len(answered) + refused == len(outcomes), {o.status for o in outcomes}
    times = np.array([o.ms for o in answered])
    lost = [np.mean([losses[ratio] for ratio in o.ratios]) for o in answered]
    return {
        "requests": len(outcomes),
        "within_goal": float((times <= GOAL_MS).sum() / len(outcomes)),
        "refused": refused / len(outcomes),
        "p50_ms": round(float(np.percentile(times, 50)), 1),
        "p99_ms": round(float(np.percentile(times, 99)), 1),
        "lost": float(np.mean(lost)),
        "ratios": {str(k): sum(o.ratios == (k,) for o in answered) / len(answered) for k in losses},
    }


def choosing_ms(address: tuple[str, int]) -> float:
    """The mean time of a choice in milliseconds, by the server's metrics."""
    text = urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics").read().decode()
    total, count = (
        float(re.search(rf"^variator_choosing_seconds_{name} (\S+)", text, re.MULTILINE)[1])  # type: ignore[index]
        for name in ("sum", "count")
    )
    return 1e3 * total / count


def measure(
    bundle: Path,
    traces: dict[str, list[list[TracePoint]]],
    corpus: str,
    loads: Sequence[float],
    policies: Sequence[str],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """All policies at all loads of all traces, in turns. `keep` gets what is known after each load."""
    model = ServedModel.open(bundle, ModelOptions(calibration_seconds=4.0))
    losses = {v.ratio: v.loss or 0.0 for v in model.variants.all}
    result: dict[str, Any] = {"losses": losses, "max_batch_tokens": model.max_batch_tokens, "traces": {}}
    texts = {
        name: [
            texts_of_lengths(corpus, model.text.encoder, [point.tokens for point in part]) for part in parts
        ]
        for name, parts in traces.items()
    }
    for name, parts in traces.items():
        loops = [Loop(model, found) for found in texts[name]]
        loops[0].seconds(0, 0.1)
        outcomes: dict[tuple[str, float], list[list[Outcome]]] = {}
        of_trace: dict[str, Any] = {
            "requests": sum(map(len, parts)),
            "tokens": sum(point.tokens for part in parts for point in part),
            "capacity_s_by_ratio": {
                str(v.ratio): loops[0].seconds(level, 0.34) for level, v in enumerate(model.variants.all)
            },
            "rounds": [],
        }
        result["traces"][name] = of_trace
        with contextlib.ExitStack() as stack:
            # All servers at once: one that is idle needs no processor, and each load meets all of them.
            servers = {
                policy: stack.enter_context(serving(bundle, *POLICIES[policy]))[:2] for policy in policies
            }
            for part, words, loop in zip(parts, texts[name], loops, strict=True):
                capacity = float(np.median([loop.seconds(0, 0.34) for _ in range(3)]))
                of_trace["rounds"].append({"requests": len(part), "capacity_s": capacity})
                for load in loads:
                    scale = capacity / load / part[-1].at_s
                    due = [point.at_s * scale for point in part]
                    for policy, address in servers.items():
                        found = asyncio.run(replay(address, "/embed", "inputs", words, due))
                        outcomes.setdefault((policy, load), []).append(found)
                        print(name, policy, load, json.dumps(summarise(found, losses)), flush=True)
                    of_trace["runs"] = [
                        {"policy": policy, "load": load}
                        | with_rates(pooled(rounds, losses), of_trace["rounds"][: len(rounds)], load)
                        for (policy, load), rounds in outcomes.items()
                    ]
                    keep(result)
            of_trace["choosing_ms"] = {policy: choosing_ms(server) for policy, server in servers.items()}
    first = next(iter(texts.values()))[0]
    result["overhead"] = overhead(bundle, model, first)
    return result


def pooled(rounds: Sequence[Sequence[Outcome]], losses: dict[int, float]) -> dict[str, Any]:
    """All rounds of a policy at a load, and the share within the goal in each."""
    together = summarise([outcome for found in rounds for outcome in found], losses)
    return together | {"within_goal_by_round": [summarise(r, losses)["within_goal"] for r in rounds]}


def with_rates(run: dict[str, Any], rounds: Sequence[dict[str, Any]], load: float) -> dict[str, Any]:
    """A run with the requests that came in a second, and those that were answered within the goal."""
    seconds = sum(found["capacity_s"] for found in rounds) / load
    rate = run["requests"] / seconds
    return run | {
        "requests_per_second": round(rate, 2),
        "within_goal_per_second": round(rate * run["within_goal"], 2),
    }


def overhead(bundle: Path, model: ServedModel, texts: Sequence[str], rounds: int = 5) -> dict[str, Any]:
    """The server with enough requests in flight, over the session in a loop, in turns."""
    part = texts[: len(texts) // 4]
    own = Loop(model, part)
    arguments = ("--policy", "static", "--ratio", "1", "--no-refuse-late")
    with serving(bundle, *arguments) as (host, port, _):
        address = (host, port)
        asyncio.run(saturate(address, "/embed", "inputs", part[:50], 32))
        times = [
            (asyncio.run(saturate(address, "/embed", "inputs", part, 64)), own.seconds(0))
            for _ in range(rounds)
        ]
    ratios = [server / alone for server, alone in times]
    return {
        "server_s": [round(server, 3) for server, _ in times],
        "loop_s": [round(alone, 3) for _, alone in times],
        "ratio": float(np.median(ratios)),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with azure-llm-2023, corpus and STS-B"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where bundles are built, or are from an earlier run")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--requests", type=int, default=300, help="of each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trace", action="append", choices=sorted(PARTS))
    parser.add_argument("--load", action="append", type=float)
    parser.add_argument("--policy", action="append", choices=list(POLICIES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        bundle = folder / options.precision
        if not bundle.exists():
            bundle = build_bundle(folder, options.data, options.precision)
        corpus = read_corpus(options.data)
        traces = {
            name: [
                read_trace(
                    options.data / f"azure-llm-2023/azure_{name}.csv",
                    PARTS[name] + number * options.requests,
                    options.requests,
                    LONGEST,
                )
                for number in range(options.rounds)
            ]
            for name in options.trace or PARTS
        }
        described = describe("starlette", "uvicorn", "tokenizers")
        described |= {"precision": options.precision, "goal_ms": GOAL_MS, "longest_tokens": LONGEST}
        loads, policies = options.load or LOADS, options.policy or list(POLICIES)
        keep = lambda found: write_result(options.output, described | found)  # noqa: E731
        keep(measure(bundle, traces, corpus, loads, policies, keep))


if __name__ == "__main__":
    main()
