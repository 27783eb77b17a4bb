"""Bundles on the Hugging Face Hub: a copy on this machine without the links of huggingface_hub's cache."""

import logging
import os
import shutil
from pathlib import Path

from variator_export.bundle.manifest import MANIFEST_NAME
from variator_export.core.hub import (
    HUB_PREFIX,
    download,
    looks_like_repository,
    parse_hub_source,
    pin_revision,
)

_LOG = logging.getLogger(__name__)
_CACHED = "models--"


def bundle_folder(source: str | Path) -> Path:
    """The folder of a bundle: a folder on this machine, or a copy of a repository.

    The cache of huggingface_hub consists of links, which ONNX Runtime refuses for weights. A repository is
    therefore copied once for each commit, next to that cache. So is a folder of that cache, with a message.

    Args:
        source: A folder, or `ORGANISATION/NAME[@REVISION]`, with or without `hub:` before it. A folder of
            that name has priority.

    Raises:
        UserError: The hub does not have the repository or revision, or cannot be reached; or the repository
            holds no bundle.
    """
    text = str(source)
    if not text.startswith(HUB_PREFIX) and (Path(source).exists() or not looks_like_repository(text)):
        return _without_links(Path(source))
    pinned = pin_revision(parse_hub_source(text))
    copy = _copy_of(pinned.label, str(pinned.revision))
    if not copy.exists():
        _copy(download(pinned, ["*"], [(MANIFEST_NAME,)]), copy)
    return copy


def _without_links(folder: Path) -> Path:
    """The copy of a folder of huggingface_hub's cache; another folder itself.

    That cache is `models--ORGANISATION--NAME/snapshots/COMMIT`, with links into `blobs` beside `snapshots`.
    """
    snapshot = folder.absolute()
    repository = snapshot.parent.parent
    in_cache = snapshot.parent.name == "snapshots" and repository.name.startswith(_CACHED)
    if not in_cache or not (snapshot / MANIFEST_NAME).is_symlink():
        return folder
    copy = _copy_of(repository.name.removeprefix(_CACHED), snapshot.name)
    if not copy.exists():
        _copy(snapshot, copy)
        _LOG.warning("%s consists of links, which ONNX Runtime refuses: copied to %s", folder, copy)
    return copy


def _copy_of(repository: str, commit: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "variator-export" / repository.replace("/", "--") / commit


def _copy(cached: Path, copy: Path) -> None:
    """Copy a folder, following its links; the copy appears whole or not at all."""
    unfinished = copy.with_name(f".{copy.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(cached, unfinished)
    try:
        unfinished.rename(copy)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished, ignore_errors=True)
        if not copy.exists():
            raise
