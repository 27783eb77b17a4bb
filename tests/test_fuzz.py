"""Damaged and hostile files: every command ends with one clear error, and with no traceback, hang or flood.

A few hundred cases by default; `make fuzz` tries thousands. Each case has a seed, which the failure shows.
"""

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from artefacts import Artefacts
from command_line import call
from conftest import ratio_2_and_any_ratio
from signed import sign

from variator_export import Bundle
from variator_export.verification.eager_bundle import backbone_of_bundle

CASES = int(os.environ.get("VARIATOR_FUZZ_CASES", "6"))
SEED = int(os.environ.get("VARIATOR_FUZZ_SEED", "0"))
LONGEST_SECONDS = 5.0
LONGEST_OUTPUT = 20_000
# What a command may allocate beyond what the tests' own process has.
MOST_BYTES = 1 << 30

HOSTILE: list[Any] = [
    None, True, 0, -1, 1, 2, 7, 10**9, 10**30, 0.5, -0.0, float("nan"), float("inf"), "", "x", "\ud800",
    "../x", "/etc/passwd", "a\0b", "é" * 10, "x" * 100_000, [], [[]], [None], ["x"], {}, {"": 0},
    {"x": {"y": []}},
]  # fmt: skip

# Files of a bundle and the commands that read them. `sign` makes the manifest's hashes right again.
JSON_FILES = {
    "manifest.json": (["inspect"], ["run"], ["verify"]),
    "config.json": (["run"], ["verify"]),
    "tokenizer_config.json": (["run"],),
    "sentence_bert_config.json": (["run"],),
    "config_sentence_transformers.json": (["run"],),
    "plugins/ratio-4/plugin_config.json": (["run"], ["verify"]),
    "reports/verification.json": (["inspect"], ["report"]),
    "reports/benchmark.json": (["inspect"], ["report"]),
    "reports/quality.json": (["inspect"], ["report"]),
    "reports/engines.json": (["inspect"],),
}
BYTE_FILES = {
    "manifest.json": (["inspect"], ["run"]),
    "tokenizer.json": (["run"],),
    "any-ratio.onnx": (["run"],),
    "ratio-4.onnx": (["run"],),
    "plugins/ratio-4/plugin.safetensors": (["run"],),
    "weights.safetensors": (["run"],),
    "reference/ratio-4.safetensors": (["verify"],),
}
ARGUMENTS = {
    "inspect": ["{bundle}"],
    "run": ["{bundle}", "--ratio", "4", "--text", "The ferry leaves."],
    "verify": ["{bundle}", "--reference", "stored", "--ratio", "4"],
    "report": ["{bundle}", "--output", "{bundle}/page.html"],
    "engine": ["{bundle}", "--ratio", "2", "--text", "The ferry leaves.", "--target", "tensorrt-rtx"],
}


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document, its root aside."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _leaves(inner, (*path, key))


def _mutated(document: Any, rng: random.Random) -> Any:
    """A document with one to three values exchanged, removed or added."""
    changed = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(_leaves(changed))
        if not places:
            return copy.deepcopy(rng.choice(HOSTILE))
        *parents, last = rng.choice(places)
        inner = changed
        for key in parents:
            inner = inner[key]
        action = rng.random()
        if action < 0.15:
            del inner[last]
        elif action < 0.25 and isinstance(inner, dict):
            inner[rng.choice(["x", "\ud800", ""])] = copy.deepcopy(rng.choice(HOSTILE))
        else:
            inner[last] = copy.deepcopy(rng.choice(HOSTILE))
    return changed


def _damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes that are cut, overwritten or repeated somewhere."""
    place = rng.randrange(len(content))
    kind = rng.randrange(4)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + rng.randbytes(rng.randrange(1, 9)) + content[place + 4 :]
    if kind == 2:
        header = rng.randrange(min(400, len(content)))
        return content[:header] + rng.randbytes(4) + content[header + 4 :]
    return content[:place] + content[max(0, place - 64) :]


def _check(command: list[str], bundle: Path, what: str) -> None:
    arguments = [part.format(bundle=bundle) for part in ARGUMENTS[command[0]]]
    started = time.monotonic()
    with _little_memory():
        result = call("run" if command == ["engine"] else command[0], *arguments)
    seconds = time.monotonic() - started
    shown = result.stderr[-2000:]
    assert result.returncode in (0, 1, 2, 3), f"{what}: {command[0]} ended with {result.returncode}: {shown}"
    assert "Traceback" not in result.stderr, f"{what}: {shown}"
    assert len(result.stderr) < LONGEST_OUTPUT, f"{what}: {len(result.stderr)} characters of errors"
    assert seconds < LONGEST_SECONDS, f"{what}: {command[0]} took {seconds:.1f} s"


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Let this process map only `MOST_BYTES` more than it has: more ends in a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def fuzzed(embedding_bundle: Path, tmp_path: Path) -> Path:
    bundle = tmp_path / "bundle"
    shutil.copytree(embedding_bundle, bundle)
    for name in ("sentence_bert_config.json", "config_sentence_transformers.json"):
        content = {"max_seq_length": 32} if "bert" in name else {"prompts": {"q": "q: "}}
        (bundle / name).write_text(json.dumps(content))
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["files"][name] = {"sha256": "0" * 64, "size_bytes": 0}
        (bundle / "manifest.json").write_text(json.dumps(manifest))
    for name in ("verification", "benchmark", "quality", "engines"):
        path = bundle / "reports" / f"{name}.json"
        if not path.exists():
            path.write_text(
                json.dumps({"graphs": {"ratio-1": "x"}, "findings": {"ratio-1": []}, "shapes": []})
            )
    sign(bundle)
    return bundle


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_files_with_other_values(fuzzed: Path, name: str) -> None:
    original = {path: (fuzzed / path).read_bytes() for path in (name, "manifest.json")}
    for case in range(SEED, SEED + CASES):
        rng = random.Random(f"{name} {case}")
        document = _mutated(json.loads(original[name]), rng)
        text = json.dumps(document, ensure_ascii=rng.random() < 0.9)
        (fuzzed / name).write_bytes(text.encode(errors="surrogatepass"))
        if name not in ("manifest.json",) and not name.startswith("reports/"):
            sign(fuzzed)
        for command in JSON_FILES[name]:
            _check(command, fuzzed, f"{name}, case {case}")
        for path, content in original.items():
            (fuzzed / path).write_bytes(content)


@pytest.mark.parametrize("name", BYTE_FILES)
def test_files_with_other_bytes(fuzzed: Path, name: str) -> None:
    original = {path: (fuzzed / path).read_bytes() for path in (name, "manifest.json")}
    for case in range(SEED, SEED + CASES):
        rng = random.Random(f"bytes of {name} {case}")
        (fuzzed / name).write_bytes(_damaged(original[name], rng))
        if name != "manifest.json":
            sign(fuzzed)
        for command in BYTE_FILES[name]:
            _check(command, fuzzed, f"{name}, case {case}")
        for path, content in original.items():
            (fuzzed / path).write_bytes(content)


def test_recipes_with_other_values(tmp_path: Path) -> None:
    recipe = {
        "name": "x",
        "backbone": {"source": "nowhere", "sha256": "0" * 64},
        "plugins": [{"ratio": 4, "initialise": {"seed": 1, "bottleneck_size": 5}}],
        "engine": {"profiles": {"p": {"batch_size": [1, 2, 4], "sequence_length": [1, 16, 64]}}},
        "verify": {"texts": ["a"], "seed": 0},
        "speed": {"batch_size": 1, "sequence_length": 8},
    }
    for case in range(SEED, SEED + CASES * 4):
        rng = random.Random(f"recipe {case}")
        text = json.dumps(_mutated(recipe, rng))
        (tmp_path / "recipe.yaml").write_text(text)
        started = time.monotonic()
        result = call("build", "recipe.yaml", "--output", "b", cwd=tmp_path)
        assert result.returncode in (1, 2), f"case {case}: {result.stderr[-2000:]}"
        assert "Traceback" not in result.stderr, f"case {case}: {result.stderr[-2000:]}"
        assert len(result.stderr) < LONGEST_OUTPUT, f"case {case}: {len(result.stderr)} characters"
        assert time.monotonic() - started < LONGEST_SECONDS, f"case {case}"


def test_sidecars_with_other_values(artefacts: Artefacts, small_bundle: Path, tmp_path: Path) -> None:
    """The JSON file beside an engine, which says where and how it was built."""
    bundle = shutil.copytree(ratio_2_and_any_ratio(artefacts, small_bundle), tmp_path / "bundle")
    sidecar = next(bundle.glob("engines/**/ratio-2.json"))
    original = {path: path.read_bytes() for path in (sidecar, bundle / "manifest.json")}
    for case in range(SEED, SEED + CASES):
        rng = random.Random(f"sidecar {case}")
        document = _mutated(json.loads(original[sidecar]), rng)
        sidecar.write_bytes(json.dumps(document).encode(errors="surrogatepass"))
        sign(bundle)
        for command in (["inspect"], ["engine"]):
            _check(command, bundle, f"sidecar, case {case}")
        for path, content in original.items():
            path.write_bytes(content)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_a_recorded_folder_with_other_values(fuzzed: Path, value: Any) -> None:
    for document in (value, {"folder": value}):
        (fuzzed / "reports" / "backbone.json").write_text(json.dumps(document))
        assert Path(backbone_of_bundle(Bundle.load(fuzzed))).is_dir()  # where the manifest says
