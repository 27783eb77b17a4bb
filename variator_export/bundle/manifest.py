"""`manifest.json`: what is in a bundle, what it was made from, and by what (docs/bundle.md).

It holds only what the inputs determine: no dates, no timings.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from variator_export.bundle.parts import MODEL, PartEntry, only_part
from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json_object
from variator_export.core.validation import describe_validation_error

MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 3
# Of the multiply-accumulates, in the precision that was asked for.
LEAST_SHARE = 0.95


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Part):
    """A file of the bundle."""

    sha256: str
    size_bytes: int


class BackboneEntry(_Part):
    """The backbone, as far as a session has to know it.

    Attributes:
        task: What it does, as Optimum names it; None in bundles of before that was written down.
        parts: Its parts by name, with their inputs and outputs.
        max_length: The longest input in tokens; None: there is no limit.
        encoder_size: The sizes that the analytic count of multiply-accumulates needs.
    """

    source: str
    architecture: str
    task: str | None = None
    model_type: str
    weights_sha256: str
    hidden_size: int
    num_layers: int
    parts: dict[str, PartEntry]
    pad_token_id: int
    max_length: int | None
    encoder_size: dict[str, int]

    @property
    def part(self) -> PartEntry:
        """The part of a model that has one."""
        return only_part(self.parts)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs of a model of one part."""
        return self.part.input_names

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs of a model of one part, in order."""
        return self.part.output_names

    @property
    def token_outputs(self) -> tuple[str, ...]:
        """Those with one row per token."""
        return self.part.token_outputs

    def within_limit(self, length: int) -> int:
        """A length in tokens, cut to the model's limit if it has one."""
        return length if self.max_length is None else min(length, self.max_length)


class PluginEntry(_Part):
    """The plugin of a variant. `trained` is False for a plugin that was only initialised."""

    folder: str
    source: str
    sha256: str
    masking: Literal["none", "exclude-padding"]
    bottleneck_size: int
    trained: bool


class PrecisionProof(_Part):
    """In which type the matrix products of a graph are computed, counted on the graph.

    Attributes:
        macs: The share of multiply-accumulates in the bundle's precision, of all but those of the modules
            that are declared float32.
        float32_modules: The share of all of each of those, by the module.
    """

    macs: float
    float32_modules: dict[str, float]


class Variant(_Part):
    """One way to run the backbone.

    Attributes:
        method: By which method it was made (`model.methods`).
        baseline: Whether it is the backbone itself, which the others are compared with.
        plugin: None for the baseline.
        graphs: ONNX files by their part of the model; an encoder has one, `model`.
    """

    name: str
    method: str
    baseline: bool = False
    ratio: int
    plugin: PluginEntry | None
    graphs: dict[str, str]
    reference: str
    precision_proof: PrecisionProof

    @property
    def graph(self) -> str:
        """The graph of a model of one part."""
        return only_part(self.graphs)

    @property
    def plugin_state(self) -> str:
        """Of its plugin, for people."""
        if self.plugin is None:
            return "none"
        return "trained" if self.plugin.trained else "initialised only"


class EngineEntry(_Part):
    """A compiled engine.

    Attributes:
        variant: What it runs: a variant, or `any-ratio` for all of them.
        part: The part of the model that it is.
        platform: The GPUs it is for: `sm89`, `sm86+sm89`, `ampere-plus`, or `portable` for all of its target.
        version: Of the TensorRT that built it.
    """

    target: str
    precision: str
    variant: str
    part: str = MODEL
    platform: str
    version: str
    engine: str
    sidecar: str

    @property
    def files(self) -> tuple[str, str]:
        """Its two files."""
        return self.engine, self.sidecar


class Manifest(_Part):
    """The content of `manifest.json`.

    Attributes:
        made_by: Versions of what made the graphs, and the digest of the code that made them.
        recipe: The resolved recipe, without how to measure the speed.
        any_ratio: The graph that takes plugins as inputs, by part of the model.
        steps: For every step of the build, all that its result depends on.
    """

    format: Literal["variator-bundle"] = "variator-bundle"
    schema_version: Literal[3] = 3
    made_by: dict[str, str | None]
    recipe: dict[str, Any]
    backbone: BackboneEntry
    precision: str
    any_ratio: dict[str, str]
    variants: tuple[Variant, ...]
    engines: tuple[EngineEntry, ...] = ()
    steps: dict[str, dict[str, Any]] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)

    @property
    def any_ratio_graph(self) -> str:
        """The graph for all variants of a model of one part."""
        return only_part(self.any_ratio)

    @property
    def baseline(self) -> Variant:
        """The variant that the others are compared with."""
        return next(variant for variant in self.variants if variant.baseline)

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_manifest(bundle: Path) -> Manifest:
    """Read and check `manifest.json`; the files it lists are not opened.

    Raises:
        UserError: There is none, it is broken, of a newer schema, or names a path outside the bundle.
    """
    path = bundle / MANIFEST_NAME
    if not bundle.is_dir():
        raise UserError(
            f"There is no bundle at {bundle}.", f"Build one: variator-export build RECIPE --output {bundle}"
        )
    if not path.is_file() or path.is_symlink():
        raise UserError(
            f"{bundle} is no bundle: it has no file {MANIFEST_NAME}.",
            "Give the folder that variator-export build wrote.",
        )
    content = read_json_object(path, rebuild_hint(bundle))
    version = content.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise UserError(
            f"{path} has the schema version {version}; this version of variator-export reads up to "
            f"{SCHEMA_VERSION}.",
            "Upgrade: pip install -U variator-export",
        )
    if isinstance(version, int) and version < SCHEMA_VERSION:
        raise UserError(
            f"{path} has the schema version {version}, of an earlier version of variator-export; this one "
            f"reads {SCHEMA_VERSION}.",
            f"Build it again: variator-export build RECIPE --replace --output {bundle}",
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"{path} is no bundle manifest: {describe_validation_error(error, Manifest)}",
            rebuild_hint(bundle),
        ) from error
    for name in _named_paths(manifest):
        check_inside(name, path)
    unlisted = sorted(_named_paths(manifest) - manifest.files.keys())
    if unlisted:
        raise UserError(f"{path} names {unlisted[0]} without its hash.", rebuild_hint(bundle))
    return manifest


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, perhaps a damaged one; another program's manifest.json does not count."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / "any-ratio.onnx").exists()
    return isinstance(content, dict) and content.get("format") == "variator-bundle"


def check_inside(name: str, where: Path) -> None:
    """Refuse a path that could leave the bundle.

    Raises:
        UserError: It is absolute, has '..' or a backslash.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not name or "\0" in name:
        raise UserError(
            f"{where} names the path {name!r}, which leaves the bundle.",
            "Do not use this bundle: get it again from where it was built.",
        )


def _named_paths(manifest: Manifest) -> set[str]:
    paths = {*manifest.files, *manifest.any_ratio.values()}
    for variant in manifest.variants:
        paths |= {*variant.graphs.values(), variant.reference}
        if variant.plugin is not None:
            paths |= {
                f"{variant.plugin.folder}/plugin_config.json",
                f"{variant.plugin.folder}/plugin.safetensors",
            }
    for engine in manifest.engines:
        paths |= set(engine.files)
    return paths


def rebuild_hint(bundle: Path) -> str:
    """How to replace a damaged bundle."""
    return (
        "Copy it again from where it was built, or build it again from its recipe: "
        f"variator-export build RECIPE --replace --output {bundle}"
    )
