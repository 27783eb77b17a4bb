"""What several tests need and nobody changes: made once, by the first worker that asks, and shared by all."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # processes that tests start need no pytest
    import pytest


class Artefacts:
    """Folders that the workers of one run of the tests share.

    Args:
        root: Where they lie.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of a name; `make` fills it if it is not there yet, while other workers wait.

        A `make` that fails leaves nothing: the next test that asks tries again.
        """
        finished = self._root / name
        if finished.exists():
            return finished
        finished.parent.mkdir(parents=True, exist_ok=True)
        with finished.with_name(f".{finished.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not finished.exists():
                unfinished = finished.with_name(f".{finished.name}.unfinished")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                make(unfinished)
                unfinished.rename(finished)
        return finished


def artefacts_of_this_run(factory: "pytest.TempPathFactory") -> Artefacts:
    """Those of all workers of pytest-xdist, or of the one process that there is."""
    base = factory.getbasetemp()
    return Artefacts((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artefacts")
