"""Bundles with wrong content and right hashes, as a faulty export or somebody with time would leave them."""

import json
from pathlib import Path

from variator_export.bundle.manifest import MANIFEST_NAME
from variator_export.core.hashing import sha256_file


def sign(bundle: Path, *, steps: bool = True) -> None:
    """Write the hashes of the files as they are now.

    Args:
        bundle: The bundle's folder.
        steps: Whether to write them into the build's steps too, as if it had built these files.
    """
    path = bundle / MANIFEST_NAME
    text = path.read_text()
    manifest = json.loads(text)
    for name, entry in manifest["files"].items():
        found = sha256_file(bundle / name)
        if steps:
            text = text.replace(entry["sha256"], found)
        entry["sha256"], entry["size_bytes"] = found, (bundle / name).stat().st_size
    signed = json.loads(text) | {"files": manifest["files"]}
    path.write_text(json.dumps(signed if steps else manifest))
