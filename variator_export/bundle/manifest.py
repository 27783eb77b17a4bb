"""`manifest.json`: the contents of a bundle, the inputs it was built from, and the tools (docs/bundle.md).

The manifest holds only values that the inputs determine: no dates, no timings.
"""

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from variator_export.bundle.backbone_entry import BackboneEntry as BackboneEntry
from variator_export.bundle.branches import Branch, projection_outputs, switches
from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.parts import with_plugins
from variator_export.bundle.variant import LONGEST_NAME, ManifestPart
from variator_export.bundle.variant import ModulesEntry as ModulesEntry
from variator_export.bundle.variant import PluginEntry as PluginEntry
from variator_export.bundle.variant import PrecisionProof as PrecisionProof
from variator_export.bundle.variant import Variant as Variant
from variator_export.bundle.variant_files import MODULE_CONFIG_NAME, MODULE_TENSORS_NAME
from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json_object
from variator_export.core.parts import DECODER, MODEL
from variator_export.core.validation import describe_validation_error

MANIFEST_NAME = "manifest.json"
BACKBONE_CONFIG = "config.json"
BACKBONE_WEIGHTS = "weights.safetensors"
# The scales of a static quantisation, from which `verify` quantises the backbone again.
CALIBRATION = "calibration.safetensors"
SCHEMA_VERSION = 4
# The minimum share of multiply-accumulates that must be in the requested precision.
LEAST_SHARE = 0.95


# The sizes of an input.
Sizes = tuple[Annotated[int, Field(ge=0, le=2**31 - 1)], ...]


class FileEntry(ManifestPart):
    """A file of the bundle."""

    sha256: str
    size_bytes: int


class SidecarProfile(BaseModel):
    """An optimization profile: (min, opt, max) of each input's shape."""

    name: str = Field(max_length=LONGEST_NAME)
    shapes: dict[str, tuple[Sizes, Sizes, Sizes]]


class Sidecar(BaseModel):
    """The fields of an engine's sidecar file that are read to choose, open and verify the engine.

    The file holds more: what the engine was made from, and facts for people.
    """

    model_config = ConfigDict(extra="allow")

    target: str = Field(max_length=LONGEST_NAME)
    version: str = Field(pattern=r"^\d{1,6}(\.\d{1,9}){1,4}$")
    platform: str = Field(max_length=LONGEST_NAME)
    options: dict[str, bool | int | str | None]
    compute_capabilities: list[str]
    profiles: list[SidecarProfile]
    made_from: dict[str, Any]

    @field_validator("options")
    @classmethod
    def _options_are_there(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in ("tf32", "version_compatible", "strip_weights"):
            if not isinstance(value.get(name), bool):
                raise ValueError(f"{name} is missing, or not true or false")
        return value


class EngineEntry(ManifestPart):
    """A compiled engine.

    Attributes:
        variant: The variant that the engine runs, or `any-ratio` for all of them; of the decoder, its name
            (`Variant.decoder_name`).
        part: The part of the model that the engine runs.
        platform: The GPUs that the engine supports: `sm89`, `sm86+sm89`, `ampere-plus`, or `portable` for
            all GPUs of its target.
        version: The version of TensorRT that built the engine.
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
    def is_shared(self) -> bool:
        """Whether the engine runs a decoder: one such engine runs all variants with these layers."""
        return self.part == DECODER

    def variant_in(self, variants: Iterable[Variant]) -> Variant | None:
        """The variant that the engine runs; of a decoder, the first that has it.

        None if the engine runs every variant, or the one that it was built for is not there.
        """
        names = ((v.decoder_name if self.is_shared else v.name, v) for v in variants)
        return next((variant for name, variant in names if name == self.variant), None)

    @property
    def takes_plugins(self) -> bool:
        """Whether plugins are inputs of the engine, which so runs every variant."""
        return self.variant == ANY_RATIO and not self.is_shared

    @property
    def files(self) -> tuple[str, str]:
        """The engine file and its sidecar."""
        return self.engine, self.sidecar


class Manifest(ManifestPart):
    """The content of `manifest.json`.

    Attributes:
        made_by: Versions of the libraries that built the graphs, and the digest of the code that built them.
        recipe: The resolved recipe, without the settings of the speed measurement.
        opset: The ONNX opset of the graphs.
        any_ratio: The graphs that accept plugins as inputs, by part of the model.
        modules: The folders of modules by name.
        any_assembly_graph: The graph that takes plugins as inputs and runs every assembly, of the part that
            plugins are in; None without assemblies.
        branches: The branches of that graph.
        default_variant: The name of the variant that a session runs unless a call chooses another.
        steps: Everything that the result of a build step depends on, by step.
    """

    format: Literal["variator-bundle"] = "variator-bundle"
    schema_version: Literal[4] = 4
    made_by: dict[str, str | None]
    recipe: dict[str, Any]
    backbone: BackboneEntry
    precision: str
    opset: int
    any_ratio: dict[str, str]
    default_variant: str
    variants: tuple[Variant, ...]
    modules: dict[str, ModulesEntry] = Field(default_factory=dict)
    any_assembly_graph: str | None = None
    branches: tuple[Branch, ...] = ()
    engines: tuple[EngineEntry, ...] = ()
    steps: dict[str, dict[str, Any]] = Field(default_factory=dict)
    files: dict[str, FileEntry] = Field(default_factory=dict)

    @property
    def any_ratio_graph(self) -> str:
        """The graph that runs all variants, of the part that plugins are in."""
        return with_plugins(self.any_ratio)

    @property
    def baseline(self) -> Variant:
        """The variant that the other variants are compared with."""
        return next(variant for variant in self.variants if variant.baseline)

    @model_validator(mode="after")
    def _default_exists(self) -> "Manifest":
        if self.default_variant not in (variant.name for variant in self.variants):
            raise ValueError(f"default_variant is {self.default_variant}, which is no variant")
        return self

    @model_validator(mode="after")
    def _modules_exist(self) -> "Manifest":
        if (self.any_assembly_graph is None) != (not self.branches):
            raise ValueError("any_assembly_graph and branches belong together")
        for variant in self.variants:
            if variant.assembly_spec is not None and not self.branches:
                raise ValueError(f"{variant.name} is an assembly, and there are no branches")
            if lacking := {*variant.modules} - self.modules.keys():
                raise ValueError(f"{variant.name} uses the modules {min(lacking)}, which are not listed")
        return self

    def shared_graphs(self, variant: Variant) -> tuple[str, ...]:
        """The graphs that take plugins as inputs and can run a variant, of the part that plugins are in."""
        own = (self.any_ratio_graph,) if variant.assembly_spec is None else ()
        return tuple(dict.fromkeys((*own, self.session_graph)))

    def is_untrained(self, variant: Variant) -> bool:
        """Whether a variant has a plugin or modules that were not trained."""
        plugin = variant.plugin is not None and not variant.plugin.trained
        return plugin or any(not self.modules[name].trained for name in variant.modules)

    @property
    def session_graph(self) -> str:
        """The graph that runs all variants in one session, of the part that plugins are in."""
        return self.any_assembly_graph or self.any_ratio_graph

    def switches(self, variant: Variant) -> np.ndarray | None:
        """The value of `assembly.branches` for a variant; None for a bundle without assemblies."""
        if not self.branches:
            return None
        return switches(self.branches, variant.assembly, variant.modules, self.backbone.stack_layers)

    def by_decoder(self, name: str | None = None) -> list[Variant]:
        """One variant for each decoder, of a model that generates text; or the named variant alone."""
        chosen = [variant for variant in self.variants if name in (None, variant.name)]
        return list({variant.decoder_name: variant for variant in reversed(chosen)}.values())

    def shared_outputs(self, variant: Variant, graph: str) -> dict[str, str] | None:
        """Where a graph that takes plugins as inputs has a variant's outputs (`projection_outputs`).

        Returns:
            Names by those of the variant's own graph, for those that differ; None if none does.
        """
        if graph != self.any_assembly_graph:
            return None
        return projection_outputs(self.branches, variant.assembly, self.backbone.stack_layers)

    def to_json(self) -> str:
        """The text of `manifest.json`."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_manifest(bundle: Path) -> Manifest:
    """Read and check `manifest.json`; the files it lists are not opened.

    Raises:
        UserError: The manifest is missing or broken, has another schema version, or names a path outside the
            bundle.
    """
    path = bundle / MANIFEST_NAME
    if not bundle.is_dir():
        raise UserError(
            f"There is no bundle at {bundle}.", f"Build one: variator-export build RECIPE --output {bundle}"
        )
    if not path.is_file() or path.is_symlink():
        raise UserError(
            f"{bundle} is not a bundle: it has no file {MANIFEST_NAME}.",
            "Name a folder that variator-export build wrote.",
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
            f"{path} is not a bundle manifest: {describe_validation_error(error, Manifest)}",
            rebuild_hint(bundle),
        ) from error
    for name in _named_paths(manifest):
        check_inside(name, path)
    unlisted = sorted(_named_paths(manifest) - manifest.files.keys())
    if unlisted:
        raise UserError(f"{path} names {unlisted[0]} without its hash.", rebuild_hint(bundle))
    for name in (BACKBONE_CONFIG, BACKBONE_WEIGHTS):
        if name not in manifest.files:
            raise UserError(f"{path} does not list {name}, which every bundle has.", rebuild_hint(bundle))
    return manifest


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle, even a damaged one; another program's manifest.json does not count."""
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
        UserError: The path is absolute, or contains '..' or a backslash.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or not name or "\0" in name:
        raise UserError(
            f"{where} names the path {name!r}, which leaves the bundle.",
            "Do not use this bundle; copy it again from where it was built.",
        )


def _named_paths(manifest: Manifest) -> set[str]:
    paths = {*manifest.files, *manifest.any_ratio.values()}
    for variant in manifest.variants:
        paths |= {*variant.graphs.values(), variant.reference, *variant.plugin_files}
    if manifest.any_assembly_graph is not None:
        paths.add(manifest.any_assembly_graph)
    for modules in manifest.modules.values():
        paths |= {f"{modules.folder}/{name}" for name in (MODULE_CONFIG_NAME, MODULE_TENSORS_NAME)}
    for engine in manifest.engines:
        paths |= set(engine.files)
    return paths


def rebuild_hint(bundle: Path) -> str:
    """The hint for replacing a damaged bundle."""
    return (
        "Copy it again from where it was built, or rebuild it from its recipe: "
        f"variator-export build RECIPE --replace --output {bundle}"
    )
