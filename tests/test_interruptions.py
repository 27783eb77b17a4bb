"""Ctrl-C and kill -9 in every step of a build, for real: the bundle that was there stays whole."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import interrupted_build
import pytest
from artefacts import Artefacts

from variator_export import Bundle, build
from variator_export.core.environment import installed_version
from variator_export.recipe.recipe import Recipe

# Steps of a build that makes everything again, and of one that adds a ratio.
AFRESH = ["backbone", "plugin/ratio-2", "trace"]
ADDING = [
    "plugin/ratio-3",
    "bind/ratio-3",
    "verify/ratio-3",
    f"engine/tensorrt-rtx/portable-{installed_version('tensorrt-rtx')}/ratio-3",
    "publish",
    "report speed",
]


@pytest.fixture(scope="module")
def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["interrupted_build"])
    return context


@pytest.fixture(scope="module")
def start(small_recipe: Recipe, artefacts: Artefacts) -> tuple[Path, Path, Path]:
    """A recipe of ratios 2 and 3, a bundle with ratio 2, and what it becomes when ratio 3 is added."""
    folder = artefacts.folder("start", lambda folder: _make_start(small_recipe, folder))
    return folder / "recipe.yaml", folder / "old", folder / "new"


def _make_start(small_recipe: Recipe, folder: Path) -> None:
    recipe = small_recipe.model_copy(
        update={"plugins": small_recipe.plugins[:2], "targets": ("tensorrt-rtx",)}
    )
    document = recipe.model_dump(mode="json")
    document["speed"] = {"batch_size": 1, "sequence_length": 8, "rounds": 2, "block_seconds": 0.01}
    (folder / "recipe.yaml").write_text(json.dumps(document))
    build(recipe.model_copy(update={"ratios": (2,)}), folder / "old")
    shutil.copytree(folder / "old", folder / "new")
    build(recipe, folder / "new")


def _identity(bundle: Path) -> dict[str, Any]:
    """The manifest, without the hashes of engines: builders do not promise equal bytes."""
    found: dict[str, Any] = json.loads((bundle / "manifest.json").read_text())
    files = {name: None if name.startswith("engines/") else entry for name, entry in found["files"].items()}
    return {**found, "files": files}


def _interrupt(
    server: multiprocessing.context.ForkServerContext,
    arguments: list[str],
    step: str,
    number: int,
    delay_seconds: float,
) -> int | None:
    """Start a build, send it a signal in a step, and give back its exit code."""
    ours, theirs = server.Pipe()
    child = server.Process(target=interrupted_build.run, args=(arguments, theirs, step == "trace"))
    child.start()
    theirs.close()
    while True:
        assert ours.poll(60), f"never came to {step}"
        if ours.recv() == step:
            break
    time.sleep(delay_seconds)
    with contextlib.suppress(ProcessLookupError):  # it may be done by then
        os.kill(child.pid or 0, number)
    child.join(60)
    return child.exitcode


@pytest.mark.parametrize("step", [*AFRESH, *ADDING])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "kill-9"])
def test_an_interrupted_build_leaves_a_whole_bundle(
    server: multiprocessing.context.ForkServerContext,
    start: tuple[Path, Path, Path],
    tmp_path: Path,
    step: str,
    number: signal.Signals,
) -> None:
    recipe, old, new = start
    bundle = tmp_path / "b"
    shutil.copytree(old, bundle)
    arguments = ["build", str(recipe), "--output", str(bundle)]
    arguments += ["--replace", "--ratio", "2"] if step in AFRESH else []
    longest = {"trace": 2.0, "report speed": 0.001}.get(step, 0.05)
    moment = random.Random(f"{step}{number}").uniform(0, longest)
    code = _interrupt(server, arguments, step, number, moment)
    expected = {signal.SIGINT: (130,), signal.SIGKILL: (-9,)}[number]
    assert code in (*expected, 0) if step in ("publish", "report speed") else code in expected
    opened = Bundle.load(bundle)
    opened.check_all()
    assert _identity(bundle) in (_identity(old), _identity(new))
    if step not in ("publish", "report speed"):
        assert (bundle / "manifest.json").read_bytes() == (old / "manifest.json").read_bytes()
    if number == signal.SIGINT:
        assert sorted(path.name for path in tmp_path.iterdir()) == [".b.lock", "b"], "nothing is left over"
    session = opened.session()
    inputs = opened.text_encoder().encode(["Yes."], opened.manifest.backbone.inputs, 64)
    assert session.run(inputs, ratio=2)["last_hidden_state"].shape == (1, 4, 32)


def test_the_next_build_removes_what_a_killed_one_left(
    server: multiprocessing.context.ForkServerContext, start: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    recipe, old, new = start
    bundle = tmp_path / "b"
    shutil.copytree(old, bundle)
    arguments = ["build", str(recipe), "--output", str(bundle)]
    assert _interrupt(server, arguments, "verify/ratio-3", signal.SIGKILL, 0.0) == -9
    assert (tmp_path / ".b.staging").exists(), "it was killed too early to show anything"
    document = Recipe.model_validate(json.loads(recipe.read_text()))
    build(document.model_copy(update={"speed": None}), bundle)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.lock", "b"]
    assert _identity(bundle)["files"] == _identity(new)["files"], "and ends as if nothing happened"
