"""The Hugging Face Hub: reading repositories at a commit, and writing to repositories.

huggingface_hub manages the cache, the token (`HF_TOKEN`, or `hf auth login`), the endpoint (`HF_ENDPOINT`)
and the offline mode (`HF_HUB_OFFLINE`). Each of its errors becomes one clear `UserError`.
"""

import contextlib
import dataclasses
import errno
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variator_export.core.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

HUB_PREFIX = "hub:"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_SOURCE = re.compile(rf"(?P<repo>{_NAME}(?:/{_NAME})?)(?P<sub>(?:/{_NAME})*)(?:@(?P<revision>[^@\s]+))?")
_BARE = re.compile(rf"{_NAME}/{_NAME}(@[^@\s]+)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PICKLES = re.compile(r"\.(bin|ckpt|h5|msgpack|pt|pth|pkl)$")


@dataclass(frozen=True)
class HubSource:
    """A repository, or a folder in it, at a revision.

    Attributes:
        repo: The repository id, ORGANISATION/NAME; the oldest models have only a NAME.
        subfolder: The folder inside the repository; empty for the root.
        revision: A branch, tag or commit. None for `main`.
    """

    repo: str
    subfolder: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        folder = f"/{self.subfolder}" if self.subfolder else ""
        return f"{HUB_PREFIX}{self.repo}{folder}" + (f"@{self.revision}" if self.revision else "")

    @property
    def label(self) -> str:
        """The source's name, without the revision and without the prefix."""
        return str(dataclasses.replace(self, revision=None)).removeprefix(HUB_PREFIX)


def looks_like_repository(source: str) -> bool:
    """Whether a source is written as ORGANISATION/NAME or ORGANISATION/NAME@REVISION."""
    return _BARE.fullmatch(source) is not None


def parse_hub_source(source: str) -> HubSource:
    """Read `hub:ORGANISATION/NAME[/FOLDER][@REVISION]`.

    Raises:
        UserError: The source has another form.
    """
    match = _SOURCE.fullmatch(source.removeprefix(HUB_PREFIX))
    if match is None or ".." in source:
        raise UserError(
            f"{source} is not a repository of the hub.",
            f"Write {HUB_PREFIX}ORGANISATION/NAME, with @REVISION for a branch, tag or commit.",
        )
    return HubSource(match["repo"], match["sub"].removeprefix("/"), match["revision"])


def pin_revision(source: HubSource, *, cached: bool = False) -> HubSource:
    """The source at the current commit of its revision, so that every later step reads the same files.

    Without `HF_HUB_OFFLINE` the hub is always asked, because a branch may have moved since it was cached.

    Raises:
        UserError: The repository or revision does not exist, permission or network is missing, or the source
            was never read before and the hub is not asked (offline, or `cached`).
    """
    if source.revision is not None and _COMMIT.fullmatch(source.revision):
        return source
    from huggingface_hub import HfApi
    from huggingface_hub.constants import is_offline_mode

    with _errors(source, cached=cached):
        if cached or is_offline_mode():
            found = HfApi().resolve_revision(source.repo, revision=source.revision, local_files_only=True)
            commit = str(found.resolved)
        else:
            # This call fails where the next one would fall back to the cache.
            HfApi().model_info(source.repo, revision=source.revision)
            commit = str(HfApi().resolve_revision(source.repo, revision=source.revision).resolved)
    return dataclasses.replace(source, revision=commit)


def download(
    source: HubSource, patterns: Sequence[str], needed: Sequence[Sequence[str]], *, cached: bool = False
) -> Path:
    """Download files of a repository into the cache of huggingface_hub.

    Args:
        source: The source to read; `pin` it to read the same commit again.
        patterns: Patterns of the files to download, relative to the source's folder.
        needed: Groups of patterns. Each group must match at least one file, which is checked before any large
            download.
        cached: Read only the cache, without network access.

    Returns:
        The source's folder in the cache.

    Raises:
        UserError: Same conditions as `pin`, or a needed file is missing.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    pinned = pin_revision(source, cached=cached)
    prefix = f"{source.subfolder}/" if source.subfolder else ""
    files = {"revision": pinned.revision, "allow_patterns": [prefix + pattern for pattern in patterns]}
    with _errors(source, cached=cached), _bars():
        try:
            # A commit does not change, so a complete copy in the cache needs no network.
            root = Path(snapshot_download(pinned.repo, **files, local_files_only=True))
            if not all(any(match for p in group for match in root.glob(prefix + p)) for group in needed):
                raise LocalEntryNotFoundError(f"{source.label} is not in the cache")
        except (IncompleteSnapshotError, LocalEntryNotFoundError):
            if cached or is_offline_mode():
                raise
            _refuse_missing(pinned, prefix, needed)
            root = Path(snapshot_download(pinned.repo, **files))
    return root / source.subfolder


def commit(
    repo: str,
    operations: "Sequence[CommitOperationAdd | CommitOperationDelete]",
    message: str,
    *,
    revision: str | None,
    private: bool | None,
) -> str:
    """Write to a repository in one atomic commit; the repository is created if it does not exist.

    Returns:
        The URL of the commit.

    Raises:
        UserError: Token, permission or network is missing, or the hub refuses the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _errors(HubSource(repo, revision=revision), writing=True), _bars():
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        info = api.create_commit(repo, list(operations), commit_message=message, revision=revision)
    return str(info.commit_url)


def require_token() -> None:
    """Require a token, which writing needs; only the hub can check whether the token may write.

    Raises:
        UserError: No token is set.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise _no_token()


def _no_token() -> UserError:
    return UserError("No token for the hub is set.", "Set HF_TOKEN, or run: hf auth login")


def files_of(repo: str, revision: str | None) -> set[str] | None:
    """The files of a repository; None if the repository or the branch does not exist yet.

    Raises:
        UserError: Permission or network is missing.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    with _errors(HubSource(repo, revision=revision), writing=True):
        try:
            return set(_file_names(repo, revision))
        except GatedRepoError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return None


def _file_names(repo: str, revision: str | None) -> list[str]:
    """The names of a repository's files. `list_repo_files` would retry for 25 s without a network."""
    from huggingface_hub import HfApi

    return [sibling.rfilename for sibling in HfApi().model_info(repo, revision=revision).siblings or ()]


def _refuse_missing(source: HubSource, prefix: str, needed: Sequence[Sequence[str]]) -> None:

    there = sorted(_file_names(source.repo, source.revision))
    inside = [name.removeprefix(prefix) for name in there if name.startswith(prefix)]
    pickles = [name for name in inside if _PICKLES.search(name)]
    for group in needed:
        if any(fnmatch(name, pattern) for name in inside for pattern in group):
            continue
        if pickles and any(pattern.endswith(".safetensors") for pattern in group):
            raise UserError(
                f"{source} has no {group[0]}, only {', '.join(pickles)}, which can run code when loaded.",
                "Choose a revision with safetensors (many repositories have a refs/pr/N with them), or "
                "convert it if you trust it: AutoModel.from_pretrained(ID).save_pretrained(FOLDER)",
            )
        raise UserError(
            f"{source} has no {group[0]}; it has {', '.join(inside[:8]) or 'nothing'}.",
            "Name the right repository or folder.",
        )


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """Show the progress bars of huggingface_hub on a terminal only."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


@contextlib.contextmanager
def _errors(source: HubSource, *, writing: bool = False, cached: bool = False) -> Iterator[None]:
    """Turn errors of huggingface_hub and the network into a `UserError`."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{source} is gated: its owners decide who may read it.",
            f"Accept its terms on its page, then set HF_TOKEN or run: hf auth login ({_short(error)})",
        ) from error
    except errors.RepositoryNotFoundError as error:
        where = "write to" if writing else "read"
        raise UserError(
            f"The hub has no repository {source.repo}, or you may not {where} it.",
            f"Check its name; to {where} a private one, set HF_TOKEN or run: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"The repository {source.repo} has no revision {source.revision}.",
            "Give a branch, a tag or a full commit hash after the @.",
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise _no_token() from error
    except errors.HFValidationError as error:
        raise UserError(f"{source.repo} is not a repository of the hub: {_short(error)}") from error
    except (
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.IncompleteSnapshotError,
        errors.RevisionResolutionError,
    ) as error:
        raise _unreachable(source, error, cached) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise UserError(
                f"The hub does not let you {'write' if writing else 'read'} {source.repo}: {_short(error)}",
                "Set HF_TOKEN to a token that may, or run: hf auth login",
            ) from error
        raise UserError(
            f"The hub returned {status} for {source}: {_short(error)}", "Try again later."
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(
                f"The disk filled up while downloading {source}.",
                "Free some space, or put the cache elsewhere: HF_HUB_CACHE=FOLDER",
            ) from error
        if error.errno is None:  # raised by huggingface_hub itself, for example for a truncated file
            raise UserError(f"{source} cannot be downloaded: {_short(error)}", "Try again.") from error
        raise
    except httpx2.TransportError as error:
        raise _unreachable(source, error, cached) from error


def _unreachable(source: HubSource, error: Exception, cached: bool) -> UserError:
    from huggingface_hub.constants import is_offline_mode

    if cached:
        return UserError(f"{source} is not in the cache.", "Read it once while online.")
    if is_offline_mode():
        return UserError(
            f"{source} is not complete in the cache, and HF_HUB_OFFLINE forbids downloading it.",
            "Read it once while online, or give a local folder.",
        )
    return UserError(
        f"The hub cannot be reached for {source}: {_short(error)}",
        "Check the network and HF_ENDPOINT. HF_HUB_OFFLINE=1 uses the files that earlier runs cached; "
        "a local folder needs no hub.",
    )


def _short(error: Any) -> str:
    """The last non-empty line of a message; the first is often a URL."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
