"""Bundles on the Hugging Face Hub: a copy on this machine without the links of huggingface_hub's cache."""

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


def bundle_folder(source: str | Path) -> Path:
    """The folder of a bundle: a folder on this machine, or a copy of a repository.

    The cache of huggingface_hub consists of links, which ONNX Runtime refuses for weights. A repository is
    therefore copied once for each commit, next to that cache.

    Args:
        source: A folder, or `ORGANISATION/NAME[@REVISION]`, with or without `hub:` before it. A folder of
            that name has priority.

    Raises:
        UserError: The hub does not have the repository or revision, or cannot be reached; or the repository
            holds no bundle.
    """
    text = str(source)
    if not text.startswith(HUB_PREFIX) and (Path(source).exists() or not looks_like_repository(text)):
        return Path(source)
    pinned = pin_revision(parse_hub_source(text))
    from huggingface_hub import constants

    copies = Path(constants.HF_HOME) / "variator-export" / pinned.label.replace("/", "--")
    copy = copies / str(pinned.revision)
    if not copy.exists():
        cached = download(pinned, ["*"], [(MANIFEST_NAME,)])
        unfinished = copies / f".{copy.name}.{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(cached, unfinished)  # follows the links
        try:
            unfinished.rename(copy)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished, ignore_errors=True)
            if not copy.exists():
                raise
    return copy
