"""The folder of an unfinished run, `OUTPUT.parts`: its lock, its identity, and how it becomes the output."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variator_export.bundle.publishing import writing_to
from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_json
from variator_export.core.json_file import read_json_object
from variator_export.serving.offline.parts import PATTERN, Parts, whole_file

_JOB, _LOCK, _ASSEMBLED = "job.json", "lock", "assembled"


@dataclass(frozen=True)
class UnfinishedRun:
    """A run that holds the lock of its output.

    Attributes:
        output: The file that the run writes.
        parts: The finished chunks.
        identity: Everything that the bytes of the output depend on.
        finished: The result, if an earlier run of this identity put the output in its place and was killed
            before it removed the parts. None otherwise.
    """

    output: Path
    parts: Parts
    identity: Mapping[str, Any]
    finished: Mapping[str, Any] | None

    def finish(self, count: int, shape: tuple[int, int], result: Mapping[str, Any]) -> None:
        """Put the parts together, move the output into its place, and remove the parts.

        Args:
            count: Number of parts.
            shape: The number of texts and the hidden size.
            result: The result to return if the run is killed while it removes the parts.

        Raises:
            UserError: The output cannot be written, or the disk is full.
        """
        folder = self.parts.folder
        self.parts.assemble(count, shape, folder / _ASSEMBLED)
        with writing_to(self.output):
            _write_job(folder, self.identity, result)
            (folder / _ASSEMBLED).replace(self.output)
            _sync(self.output.parent)
        _clear(folder)


def parts_folder(output: Path) -> Path:
    """The folder of the parts of an output."""
    return output.with_name(f"{output.name}.parts")


@contextmanager
def claim(
    output: Path, identity: Mapping[str, Any], *, with_text: bool, restart: bool, replace: bool
) -> Iterator[UnfinishedRun]:
    """Lock an output for this run, and find the parts of an unfinished one.

    The lock belongs to the process, so a killed run frees it. At the end, a folder without parts is removed.

    Args:
        output: The file to write.
        identity: Everything that the bytes of the output depend on.
        with_text: Whether the output repeats the texts.
        restart: Whether to discard an unfinished run.
        replace: Whether an existing output may be replaced.

    Raises:
        UserError: Another run is writing the output, the output exists already, or an unfinished run has
            another identity. The message says what differs.
    """
    output = output.absolute()
    folder = parts_folder(output)
    if not output.parent.is_dir():
        raise UserError(f"There is no folder {output.parent}.", f"Create it: mkdir -p {output.parent}")
    if output.is_dir():
        raise UserError(f"The output {output} is a folder.", "Name a file with --output.")
    with writing_to(folder, "Nothing was written."):
        lock = _lock(folder, output)
    try:
        with writing_to(folder, "Nothing was written."):
            finished = _prepare(folder, output, json.loads(json.dumps(identity)), restart, replace)
        parts = Parts(folder, sha256_json(identity), output.suffix, with_text)
        yield UnfinishedRun(output, parts, identity, finished)
    finally:
        if next(folder.glob(PATTERN), None) is None:
            _clear(folder)
            with contextlib.suppress(OSError):
                (folder / _LOCK).unlink()
                folder.rmdir()
        os.close(lock)


def _prepare(
    folder: Path, output: Path, identity: dict[str, Any], restart: bool, replace: bool
) -> dict[str, Any] | None:
    """Check what is there and write the identity. Returns the result of a run that is finished already."""
    path = folder / _JOB
    hint = f"Discard the unfinished run with --restart, or remove {folder}."
    found = read_json_object(path, hint) if path.exists() and not restart else {}
    finished = found.get("finished") if not (folder / _ASSEMBLED).exists() and output.exists() else None
    if finished is not None and found.get("identity") == identity:
        _clear(folder)
        return dict(finished)
    if output.exists() and not replace:
        raise UserError(
            f"{output} is there already.", "Choose another file with --output, or replace it: --replace"
        )
    unfinished = finished is None and any(folder.glob(PATTERN))
    if unfinished and found and found.get("identity") != identity:
        raise UserError(
            f"{folder} holds an unfinished run with other settings: "
            f"{_difference(found.get('identity', {}), identity)}.",
            "Run it with those settings to finish it, choose another --output, or discard it: --restart",
        )
    if not unfinished or not found:
        _clear(folder)
    _write_job(folder, identity, None)
    return None


def _difference(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name} is {json.dumps(now.get(name))}, was {json.dumps(there.get(name))}"
        for name in dict.fromkeys([*now, *there])
        if there.get(name) != now.get(name)
    )


def _write_job(folder: Path, identity: Mapping[str, Any], finished: Mapping[str, Any] | None) -> None:
    with whole_file(folder / _JOB) as file:
        file.write(json.dumps({"identity": identity, "finished": finished}, indent=2).encode() + b"\n")


def _lock(folder: Path, output: Path) -> int:
    """Lock the folder and return the descriptor of its lock file."""
    path = folder / _LOCK
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            _sync(folder.parent)
        try:
            if not path.exists() and any(folder.iterdir()):
                raise UserError(
                    f"{folder} is a folder that no run of embed wrote.",
                    "Move it elsewhere, or choose another file with --output.",
                )
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # another run has just removed the folder
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(
                f"Another run is writing to {output}.",
                "Wait until it is finished, or choose another file with --output.",
            ) from None
        # The other run may have removed the file, with its lock, after this one opened it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(lock)):
                return lock
        os.close(lock)


def _clear(folder: Path) -> None:
    """Remove everything but the lock. The job comes last: it says that the rest may be removed."""
    for path in [*folder.glob(PATTERN), *folder.glob("*.tmp"), folder / _ASSEMBLED, folder / _JOB]:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
