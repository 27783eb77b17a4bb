"""Publishing a bundle atomically: readers see either the complete old bundle or the complete new one.

A build writes into a hidden folder beside the bundle (`.NAME.staging`) and finally swaps the two in one
system call. Readers ignore the leftovers of a killed build, and the next build removes them.
"""

import contextlib
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
    """Lock a bundle for writing and yield an empty staging folder; both are released with the block.

    The lock belongs to the process, so a killed build frees it.

    Raises:
        UserError: Another build holds the lock, or the folder cannot be written.
    """
    bundle = bundle.absolute()
    staging = _beside(bundle, "staging")
    with writing_to(bundle):
        bundle.parent.mkdir(parents=True, exist_ok=True)
        if bundle.is_mount():
            raise UserError(
                f"{bundle} is a mount point, which cannot be swapped for a new bundle.",
                f"Choose a folder below it: --output {bundle / 'bundle'}",
            )
        lock = _lock(bundle)
        try:
            os.truncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            _finish_swap(bundle)
            _remove_leftover(staging)
            staging.mkdir()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
        finally:
            if not bundle.exists():  # a build that was refused leaves nothing
                _beside(bundle, "lock").unlink(missing_ok=True)
            os.close(lock)


def _lock(bundle: Path, *, wait: bool = False) -> int:
    """Lock a bundle and return the descriptor of its lock file.

    Raises:
        UserError: Another build holds the lock, unless the call waits for it.
    """
    path = _beside(bundle, "lock")
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise UserError(
                f"Another build is writing to {bundle} (process {owner}).",
                "Wait until it finishes, or choose another folder with --output.",
            ) from None
        except BaseException:
            os.close(lock)
            raise
        # The file may have been removed, with its lock, after this process opened it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(lock)):
                return lock
        os.close(lock)


def publish(staging: Path, bundle: Path) -> None:
    """Replace the bundle with the staged folder atomically, after its bytes have reached the disk."""
    bundle = bundle.absolute()
    for folder, _, files in os.walk(staging):
        for name in files:
            if not (Path(folder) / name).is_symlink():
                _sync(Path(folder) / name)
        _sync(Path(folder))
    if not bundle.exists():
        staging.rename(bundle)
    elif _exchange(staging, bundle):
        shutil.rmtree(staging, ignore_errors=True)  # the old bundle
    else:
        # A file system without exchange (NFS): the bundle is briefly absent; `recover` repairs a kill here.
        previous = _beside(bundle, "previous")
        shutil.rmtree(previous, ignore_errors=True)
        bundle.rename(previous)
        staging.rename(bundle)
        shutil.rmtree(previous, ignore_errors=True)
    _sync(bundle.parent)


def recover(bundle: Path) -> None:
    """Finish the swap of a killed build, on a file system that cannot exchange two folders."""
    bundle = bundle.absolute()
    if bundle.exists() or not _beside(bundle, "previous").exists():
        return
    lock = _lock(bundle, wait=True)
    try:
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


def _remove_leftover(staging: Path) -> None:
    """Remove the leftovers of a killed build, which may include another user's files."""
    try:
        if staging.is_dir() and not staging.is_symlink():
            shutil.rmtree(staging)
        else:
            staging.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"The leftovers of an earlier build in {staging} cannot be removed: {error}.",
            f"Remove them as their owner: rm -rf '{staging}'",
        ) from error


_ADVICE = {
    errno.ENOSPC: "Free some space, or choose another disk with --output.",
    errno.EDQUOT: "Free some of your quota, or choose another disk with --output.",
    errno.EFBIG: "Choose a disk that accepts files of this size with --output.",
    errno.EROFS: "Choose a writable folder with --output.",
    errno.EACCES: "Choose a folder that you may write to with --output.",
    errno.EPERM: "Choose a folder that you may write to with --output.",
    errno.ENOTDIR: "Choose a path whose parents are folders with --output.",
    errno.ENOENT: "Choose a folder that can be created with --output.",
    errno.EEXIST: "Choose a path whose parents are folders with --output.",
    errno.ENAMETOOLONG: "Choose a shorter name with --output.",
    errno.EXDEV: "Choose a folder that is not part of a container's image with --output.",
    errno.ENOLCK: "Choose a file system that supports locks with --output.",
    errno.EIO: "Check the disk, or choose another one with --output.",
}


@contextmanager
def writing_to(path: Path, state: str = "The previous content is unchanged.") -> Iterator[None]:
    """Turn write errors of the operating system into one clear error.

    Args:
        path: The bundle. An error about a file elsewhere is raised unchanged.
        state: The state of the bundle after the error, for the message.

    Raises:
        UserError: The disk is full, or the folder cannot be written.
    """
    path = path.absolute()
    try:
        yield
    except OSError as error:
        if error.errno not in _ADVICE or not _concerns(error, path):
            raise
        raise UserError(
            f"Cannot write to {path}: {os.strerror(error.errno).lower()}. {state}", _ADVICE[error.errno]
        ) from error


def _concerns(error: OSError, bundle: Path) -> bool:
    """Whether an error is about the bundle, a file written beside it, or one of its parent folders."""
    if not error.filename:
        return True
    named = Path(os.fsdecode(error.filename)).absolute()
    if bundle.is_relative_to(named) or named.is_relative_to(bundle):
        return True
    if not named.is_relative_to(bundle.parent) or named == bundle.parent:
        return False
    return named.relative_to(bundle.parent).parts[0].startswith(f".{bundle.name}.")


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one system call, Linux renameat2(2); False if the system cannot."""
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
