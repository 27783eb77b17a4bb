"""Several recipes in one command."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import call

from variator_export.building import parallel as side_by_side
from variator_export.building.parallel import Order, build_all
from variator_export.core import interrupts
from variator_export.core.errors import EXIT_BUG, UserError
from variator_export.core.progress import Progress, StepReport
from variator_export.recipe.recipe import Recipe, SpeedRecipe


def _recipe(small_recipe: Recipe, name: str, **changes: object) -> Recipe:
    return small_recipe.model_copy(update={"name": name, "ratios": (2,), **changes})


@pytest.fixture
def folder(small_recipe: Recipe, tmp_path: Path) -> Path:
    """One that works, one whose plugin is not there, one whose speed is measured."""
    works = _recipe(small_recipe, "works").model_dump(mode="json")
    for name, changes in {
        "works": {},
        "fails": {"plugins": [{"source": "./nowhere"}], "ratios": None},
        "timed": {"speed": {"batch_size": 1, "sequence_length": 8, "rounds": 2, "block_seconds": 0.01}},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(json.dumps({**works, "name": name, **changes}))
    return tmp_path


def test_one_that_fails_does_not_stop_the_others_and_the_command_goes_on(folder: Path) -> None:
    command = ["build", "works.yaml", "fails.yaml", "timed.yaml", "--jobs", "2", "--output", "out"]
    result = call(*command, "--format", "json", cwd=folder)
    assert result.returncode == 1, result.stderr
    builds = {build["recipe"]: build for build in json.loads(result.stdout)["builds"]}
    assert [build["state"] for build in builds.values()] == ["published", "failed", "published"]
    assert "nowhere does not exist" in builds["fails"]["error"]["message"]
    assert builds["works"]["speed"] is None
    assert len(builds["timed"]["speed"]["rows"]) == 4
    assert sorted(path.name for path in (folder / "out").iterdir() if path.is_dir()) == ["timed", "works"]

    recipe = (folder / "works.yaml").read_text()
    (folder / "fails.yaml").write_text(recipe.replace('"works"', '"fails"'))
    again = call(*command, cwd=folder)
    assert again.returncode == 0, again.stderr
    states = [line.split("│")[2].strip() for line in again.stdout.splitlines() if line.startswith("│")]
    assert states == ["up to date", "published", "up to date"]
    assert "works  reused" in again.stderr


def test_what_is_refused_before_anything_is_built(folder: Path) -> None:
    for arguments, code, words in (
        (("works.yaml", "fails.yaml", "--backbone", "x"), 2, "--backbone is for one recipe, but 2"),
        (("works.yaml", "fails.yaml", "--push-to-hub", "a/b"), 2, "--push-to-hub is for one recipe"),
        (("works.yaml", "--all"), 2, "--all and recipes were both given"),
        (("works.yaml", "gone.yaml"), 1, "gone.yaml cannot be read"),
        (("works.yaml", "copy.yaml"), 1, "Two recipes have the same folder"),
    ):
        (folder / "copy.yaml").write_text((folder / "works.yaml").read_text())
        result = call("build", *arguments, cwd=folder)
        assert (result.returncode, words in result.stderr) == (code, True), result.stderr
    assert not (folder / "artifacts").exists()


class _Started(Progress):
    """Says when the first step is done."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def finished(self, report: StepReport) -> None:
        del report
        self.event.set()


@pytest.fixture
def process_of() -> Iterator[object]:
    def find(name: str) -> int:
        return next(c.pid for c in multiprocessing.active_children() if c.name == f"build {name}" and c.pid)

    yield find
    assert not multiprocessing.active_children()


def test_a_killed_build_is_named_and_the_other_one_is_built(
    small_recipe: Recipe, tmp_path: Path, process_of: object
) -> None:
    told = {"killed": _Started(), "lives": _Started()}
    orders = [Order(_recipe(small_recipe, name), tmp_path / name) for name in told]

    def kill() -> None:
        told["killed"].event.wait(60)
        os.kill(process_of("killed"), signal.SIGKILL)  # type: ignore[operator]

    thread = threading.Thread(target=kill)
    thread.start()
    killed, lives = build_all(orders, jobs=2, progress_of=told.__getitem__)
    thread.join()
    assert (lives.state, lives.exit_code) == ("published", 0)
    assert (killed.state, killed.exit_code) == ("failed", 1)
    assert "was ended by SIGKILL" in str(killed.error)
    again = build_all(orders)
    assert [outcome.state for outcome in again] == ["published", "up to date"]


@pytest.mark.usefixtures("process_of")
def test_an_interrupted_command_leaves_no_process_behind(
    small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As the command line does: without it, a library that swallows the KeyboardInterrupt hides it.
    monkeypatch.setattr(interrupts, "_seen", False)
    # A shell starts what it puts into the background with Ctrl-C ignored, and tests may run there.
    pytests = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts.install()
    told = _Started()
    order = Order(_recipe(small_recipe, "a", speed=SpeedRecipe()), tmp_path / "a")

    def interrupt() -> None:
        told.event.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            build_all([order], progress_of=lambda _: told)
        thread.join()
    finally:
        signal.signal(signal.SIGINT, pytests)
    assert not (tmp_path / "a" / "manifest.json").exists()


def _fails(*_: object, **__: object) -> None:
    raise ZeroDivisionError("a bug")


def test_a_bug_in_a_build_keeps_its_traceback(
    small_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_by_side, "build", _fails)
    context = multiprocessing.get_context("fork")  # which inherits the planted bug
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    (outcome,) = build_all([Order(_recipe(small_recipe, "a"), tmp_path / "a")])
    assert outcome.exit_code == EXIT_BUG
    assert "ZeroDivisionError: a bug" in str(outcome.error)
    assert isinstance(outcome.error, UserError)
