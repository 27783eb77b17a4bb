"""The verified graphs of a bundle, from which engines are built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.manifest import BackboneEntry, EngineEntry, ModulesEntry, Variant
from variator_export.bundle.parts import plugin_part
from variator_export.core.axes import InputShapes
from variator_export.core.parts import DECODER
from variator_export.model.methods import engine_tensors, method_of


@dataclass(frozen=True)
class EngineSources:
    """The verified part of a bundle, from which engines are built.

    Attributes:
        backbone: The backbone.
        variants: The variants, including the baseline.
        modules: The folders of modules by name.
        any_ratio: The graphs that serve all variants of the original layers, by part.
        precision: Precision of the graphs.
    """

    backbone: BackboneEntry
    variants: Sequence[Variant]
    modules: Mapping[str, ModulesEntry]
    any_ratio: Mapping[str, str]
    precision: str

    @property
    def part(self) -> str:
        """The part that plugins are in."""
        return plugin_part(self.any_ratio)

    @property
    def decoders(self) -> dict[str, Variant]:
        """The first variant with each decoder, by the decoder's name: each decoder is one engine."""
        return {
            variant.decoder_name: variant for variant in reversed(self.variants) if DECODER in variant.graphs
        }

    def graph_of(self, entry: EngineEntry) -> str | None:
        """The graph that an engine is built from; None if it does not exist any more."""
        if (variant := entry.variant_in(self.variants)) is not None:
            return variant.graphs.get(entry.part)
        return self.any_ratio.get(entry.part) if entry.variant == ANY_RATIO else None

    def tensors_of(self, entry: EngineEntry) -> tuple[str, ...]:
        """The files that the graph of an engine refers to, besides the backbone's weights."""
        return engine_tensors(entry, entry.variant_in(self.variants), self.modules)

    def input_shapes(self) -> dict[str, InputShapes]:
        """Return the shapes of the graph inputs that carry a variant, by label, in order of ratio."""
        # The engine for all ratios has the original layers alone.
        own = [variant for variant in self.variants if variant.assembly_spec is None]
        ordered = sorted(own, key=lambda variant: (variant.ratio, variant.name))
        methods = [(method_of(variant), variant) for variant in ordered]
        return {
            method.shape_label(variant): method.graph_input_shapes(self.backbone, variant)
            for method, variant in methods
        }
