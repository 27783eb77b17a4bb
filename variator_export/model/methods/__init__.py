"""The registry of methods that make variants of a backbone."""

from collections.abc import Mapping

from variator_export.bundle.manifest import BackboneEntry, EngineEntry, ModulesEntry, Variant
from variator_export.core.assembly import DECODER_STACK
from variator_export.core.registry import Registry
from variator_export.model.macs import decoder_macs
from variator_export.model.methods.base import Method

METHODS = Registry(
    kind="method",
    group="variator_export.methods",
    contract=Method,
    own={
        "none": "variator_export.model.methods.baseline:BASELINE",
        "variator": "variator_export.model.methods.variator:VARIATOR",
        "modular": "variator_export.model.methods.modular:MODULAR",
    },
)


# Tokens of the text by whose multiply-accumulates variants are ordered; and of the text generated from it.
_TOKENS, _NEW_TOKENS = 128, 32


def work_of(variant: Variant, backbone: BackboneEntry) -> int:
    """The multiply-accumulates of one text of 128 tokens, and of 32 generated ones, which order variants."""
    encoder = method_of(variant).macs(backbone.encoder_size, variant, 1, _TOKENS)
    if not backbone.generates:
        return encoder
    size = backbone.decoder_of(variant.assembly)
    return encoder + decoder_macs(size, backbone.hidden_size, _TOKENS, _NEW_TOKENS)


def engine_tensors(
    entry: EngineEntry, variant: Variant | None, modules: Mapping[str, ModulesEntry]
) -> tuple[str, ...]:
    """The files that the graph of an engine refers to, besides the backbone's weights.

    Args:
        entry: The engine.
        variant: The variant that it runs; of a decoder's engine, one that has the decoder. None for an engine
            that takes plugins as inputs.
        modules: The bundle's modules, by name.
    """
    if variant is None:
        return ()
    if entry.is_shared:
        own = tuple(name for name in variant.modules if modules[name].stack == DECODER_STACK)
        variant = variant.model_copy(update={"plugin": None, "modules": own})
    return method_of(variant).tensor_files(variant, entry.precision)


def method_of(variant: Variant) -> Method:
    """Find the method of a bundle's variant.

    Raises:
        UserError: The method belongs to a distribution that is not installed.
    """
    return METHODS.find(variant.method)
