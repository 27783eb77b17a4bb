"""Publishing a bundle: whoever looks sees the whole old one or the whole new one.

A build writes into a hidden folder beside the bundle (`.NAME.staging`) and at its end swaps the two in one
system call. What a killed build leaves behind is ignored by readers and removed by the next build.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from variator_export.core.errors import UserError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def _beside(bundle: Path, kind: str) -> Path:
    return bundle.parent / f".{bundle.name}.{kind}"


@contextmanager
def exclusive(bundle: Path) -> Iterator[Path]:
    """Hold a bundle for writing and give an empty staging folder; both end with the block.

    The lock belongs to the process: a killed build frees it.

    Raises:
        UserError: Another build holds it, or nothing can be written there.
    """
    bundle = bundle.absolute()
    staging = _beside(bundle, "staging")
    with writing_to(bundle):
        bundle.parent.mkdir(parents=True, exist_ok=True)
        if bundle.is_mount():
            raise UserError(
                f"{bundle} is a mount point, which cannot be swapped for a new bundle.",
                f"Give a folder below it: --output {bundle / 'bundle'}",
            )
        lock = os.open(_beside(bundle, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
                raise UserError(
                    f"Another build is writing to {bundle} (process {owner}).",
                    "Wait until it ends, or choose another folder with --output.",
                ) from None
            os.truncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            _finish_swap(bundle)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            os.close(lock)


def publish(staging: Path, bundle: Path) -> None:
    """Put the staged folder in the bundle's place, atomically, after its bytes have reached the disk."""
    bundle = bundle.absolute()
    for folder, _, files in os.walk(staging):
        for name in files:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    if not bundle.exists():
        staging.rename(bundle)
    elif not _exchange(staging, bundle):
        # A file system without exchange (NFS): for a moment there is no bundle; `recover` mends a kill here.
        previous = _beside(bundle, "previous")
        shutil.rmtree(previous, ignore_errors=True)
        bundle.rename(previous)
        staging.rename(bundle)
        shutil.rmtree(previous, ignore_errors=True)
    _sync(bundle.parent)


def recover(bundle: Path) -> None:
    """Finish what a build was killed in, on a file system that cannot exchange two folders."""
    bundle = bundle.absolute()
    if bundle.exists() or not _beside(bundle, "previous").exists():
        return
    lock = os.open(_beside(bundle, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _finish_swap(bundle)
    finally:
        os.close(lock)


def _finish_swap(bundle: Path) -> None:
    previous = _beside(bundle, "previous")
    if not previous.exists():
        return
    if bundle.exists():
        shutil.rmtree(previous, ignore_errors=True)
    else:
        previous.rename(bundle)


@contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into one clear error.

    Raises:
        UserError: The disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "Free some space, or choose another disk with --output.",
            errno.EDQUOT: "Free some of your quota, or choose another disk with --output.",
            errno.EROFS: "Choose a folder that can be written with --output.",
            errno.EACCES: "Choose a folder that you may write with --output.",
            errno.EPERM: "Choose a folder that you may write with --output.",
            errno.ENOTDIR: "Choose a path whose parents are folders with --output.",
        }
        if error.errno not in advice:
            raise
        raise UserError(
            f"Cannot write to {path}: {os.strerror(error.errno).lower()}. What was there is unchanged.",
            advice[error.errno],
        ) from error


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one system call; False where that cannot be done (Linux renameat2(2))."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    result = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
