"""Publication: whoever looks sees the whole old bundle or the whole new one."""

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from small_disk import run_on_small_disk

from variator_export.bundle import publishing as store
from variator_export.bundle.publishing import exclusive, publish, recover
from variator_export.core.errors import UserError

# A stand-in for a bundle: as many files as one has, all of one generation.
_FILES = [f"{folder}{n}.bin" for folder in ("", "plugins/a/", "engines/x/y/") for n in range(6)]


def _write(folder: Path, generation: int) -> None:
    for name in _FILES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(str(generation).encode() * 1000)
    (folder / "manifest.json").write_text(json.dumps(generation))


def _generation(bundle: Path) -> int:
    """Which generation a bundle is; fails on a mixture."""
    generation = json.loads((bundle / "manifest.json").read_text())
    for name in _FILES:
        assert (bundle / name).read_bytes() == str(generation).encode() * 1000, name
    return int(generation)


def _publish_for_ever(bundle: Path, can_exchange: bool, published: Any) -> None:
    if not can_exchange:
        store._exchange = lambda *_: False  # type: ignore[assignment]
    generation = 0
    while True:
        generation += 1
        with exclusive(bundle) as staging:
            _write(staging, generation)
            publish(staging, bundle)
        published.value = generation


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_kill_at_any_moment_leaves_a_whole_bundle(tmp_path: Path, can_exchange: bool) -> None:
    bundle = tmp_path / "bundle"
    moments = random.Random(0)
    context = multiprocessing.get_context("fork")
    published = context.Value("i", 0)
    seen = set()
    longest = 0.0  # how long five publications take here and now, so that a kill falls on any of them
    for _ in range(101):
        child = context.Process(target=_publish_for_ever, args=(bundle, can_exchange, published))
        started = time.monotonic()
        child.start()
        if longest:
            time.sleep(moments.uniform(0.0, longest))
        else:
            while published.value < 5:
                time.sleep(0.001)
            longest = time.monotonic() - started
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        recover(bundle)
        if bundle.exists():
            seen.add(_generation(bundle))
    assert len(seen) > 3, "the kills came too early to show anything"
    with exclusive(bundle) as staging:
        assert not list(staging.iterdir())
        _write(staging, 7)
        publish(staging, bundle)
    assert _generation(bundle) == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bundle.lock", "bundle"]


def test_a_reader_never_finds_the_bundle_gone(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    with exclusive(bundle) as staging:
        _write(staging, 1)
        publish(staging, bundle)
    child = multiprocessing.get_context("fork").Process(target=_publish_for_ever, args=(bundle, True))
    child.start()
    try:
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            folder = os.open(bundle, os.O_RDONLY)  # one generation, whatever happens to the name
            os.close(folder)
    finally:
        child.kill()
        child.join()


def test_a_failed_build_leaves_the_old_bundle_and_nothing_else(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    with exclusive(bundle) as staging:
        _write(staging, 1)
        publish(staging, bundle)

    def fail() -> None:
        with exclusive(bundle) as staging:
            _write(staging, 2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert _generation(bundle) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bundle.lock", "bundle"]


def _hold(bundle: Path, ready: object) -> None:
    with exclusive(bundle):
        ready.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_the_second_of_two_builds_is_told(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=_hold, args=(tmp_path / "bundle", ready))
    child.start()
    assert ready.wait(10)
    with (
        pytest.raises(UserError, match=rf"Another build is writing to .* \(process {child.pid}\)"),
        exclusive(tmp_path / "bundle"),
    ):
        pass
    child.kill()
    child.join()
    with exclusive(tmp_path / "bundle"):
        pass  # a killed build frees it


def test_a_swap_that_was_cut_in_two_is_finished(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    _write(tmp_path / ".bundle.previous", 1)
    recover(bundle)
    assert _generation(bundle) == 1
    _write(tmp_path / ".bundle.previous", 0)
    with exclusive(bundle):
        pass
    assert _generation(bundle) == 1
    assert not (tmp_path / ".bundle.previous").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_refusals_to_write_become_one_message(tmp_path: Path, code: int) -> None:
    with pytest.raises(UserError, match="Cannot write to") as raised, store.writing_to(tmp_path):
        raise OSError(code, "refused")
    assert "--output" in str(raised.value.hint)


def test_other_errors_of_the_system_stay_bugs(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="strange"), store.writing_to(tmp_path):
        raise OSError(errno.EBADF, "strange")


@pytest.mark.parametrize("blocker", ["file", "folder"])
def test_leftovers_are_removed_or_named(
    tmp_path: Path, blocker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = tmp_path / ".bundle.staging"
    staging.write_text("x") if blocker == "file" else staging.mkdir()
    with exclusive(tmp_path / "bundle"):
        pass
    staging.mkdir()

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "refused", str(staging))

    monkeypatch.setattr(store.shutil, "rmtree", refuse)
    with pytest.raises(UserError, match="leftovers of an earlier build"), exclusive(tmp_path / "bundle"):
        pass


@pytest.mark.parametrize("name", ["file.txt/bundle", "x" * 250])
def test_paths_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    with pytest.raises(UserError, match="Cannot write to"), exclusive(tmp_path / name):
        pass


def test_a_refusal_to_read_something_else_is_not_called_writing(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    with pytest.raises(PermissionError), exclusive(bundle):
        raise PermissionError(errno.EACCES, "refused", str(tmp_path / "plugin" / "plugin.safetensors"))


def test_a_mount_point_cannot_be_swapped(tmp_path: Path) -> None:
    script = f"""python -c "
from pathlib import Path
from variator_export.bundle.publishing import exclusive
with exclusive(Path('{tmp_path}/disk')): pass" """
    result = run_on_small_disk(script, tmp_path / "disk", size="1m")
    assert "is a mount point" in result.stderr
