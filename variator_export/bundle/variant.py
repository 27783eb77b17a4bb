"""Variants, plugins and modules in `manifest.json`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.parts import with_plugins
from variator_export.core.assembly import DECODER_STACK, Assembly, parse_assembly
from variator_export.core.errors import UserError
from variator_export.core.parts import DECODER


def decoder_name(assembly: Assembly | None) -> str:
    """The name of an assembly's decoder (`Variant.decoder_name`)."""
    if assembly is None or not assembly.has_modules(DECODER_STACK):
        return ANY_RATIO
    return assembly.of_stack(DECODER_STACK).name


# Names stand in file names and in messages.
LONGEST_NAME = 200


class ManifestPart(BaseModel):
    """Base of all parts of a manifest: frozen, refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PluginEntry(ManifestPart):
    """The plugin of a variant. `trained` is False for a plugin that was initialised but not trained."""

    folder: str
    source: str
    sha256: str
    masking: Literal["none", "exclude-padding"]
    bottleneck_size: int
    trained: bool


class ModulesEntry(ManifestPart):
    """A folder of modules. `trained` is False for modules that are copies of layers.

    Attributes:
        stack: The stack that the modules are for.
        granularity: The number of layers that each module replaces.
        groups: The first and the last layer that each module replaces, and the layer that it is like.
    """

    folder: str
    source: str
    sha256: str
    stack: Literal["encoder", "decoder"]
    granularity: int
    groups: tuple[tuple[int, int, int], ...]
    trained: bool


class PrecisionProof(ManifestPart):
    """The precisions in which a graph computes its matrix products, counted on the graph.

    Attributes:
        macs: The share of multiply-accumulates in the bundle's precision. The modules that are declared
            float32 are not counted.
        float32_modules: The share of all multiply-accumulates for each module declared float32, by module.
    """

    macs: float
    float32_modules: dict[str, float]


class Variant(ManifestPart):
    """One way to run the backbone.

    Attributes:
        method: The method that built the variant (`model.methods`).
        baseline: Whether the variant is the plain backbone, which the other variants are compared with.
        plugin: The variant's plugin. None for the baseline, and for an assembly without one.
        assembly_spec: The assembly, as its specification; None for the original layers.
        modules: Names of the manifest's modules that the assembly uses.
        graphs: ONNX files by part of the model; an encoder has one part, `model`. All variants whose decoder
            has the same layers share its file.
    """

    name: str = Field(max_length=LONGEST_NAME)
    method: str = Field(max_length=LONGEST_NAME)
    baseline: bool = False
    ratio: int
    plugin: PluginEntry | None
    assembly_spec: str | None = None
    modules: tuple[str, ...] = ()
    graphs: dict[str, str]
    reference: str
    precision_proof: PrecisionProof

    @field_validator("assembly_spec")
    @classmethod
    def _is_an_assembly(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_assembly(value)
            except UserError as error:
                raise ValueError(error.message) from error
        return value

    @property
    def assembly(self) -> Assembly | None:
        """The assembly; None for the original layers."""
        return None if self.assembly_spec is None else parse_assembly(self.assembly_spec)[0]

    def answers_to(self, choice: int | str) -> bool:
        """Whether a name or a ratio means this variant. A ratio alone means the original layers."""
        return choice == self.name or (choice == self.ratio and self.assembly_spec is None)

    @property
    def decoder_name(self) -> str:
        """The name of the variant's decoder, of a model that generates text: `any-ratio`, which is the
        original for all variants, or that of its assembly, which several variants may share."""
        return decoder_name(self.assembly)

    @property
    def decoder_graph(self) -> str:
        """The graph of the variant's decoder, of a model that generates text."""
        return self.graphs[DECODER]

    @property
    def graph(self) -> str:
        """The variant's own graph, of the part that plugins are in."""
        return with_plugins(self.graphs)

    @property
    def plugin_files(self) -> tuple[str, ...]:
        """The files that decide what the variant's plugin computes."""
        if self.plugin is None:
            return ()
        return f"{self.plugin.folder}/plugin_config.json", f"{self.plugin.folder}/plugin.safetensors"

    @property
    def plugin_state(self) -> str:
        """The state of the variant's plugin, as text for people."""
        if self.plugin is None:
            return "none"
        return "trained" if self.plugin.trained else "initialised only"
