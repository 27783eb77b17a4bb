"""The registry of methods that make variants of a backbone."""

from variator_export.bundle.manifest import BackboneEntry, Variant
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


def method_of(variant: Variant) -> Method:
    """Find the method of a bundle's variant.

    Raises:
        UserError: The method belongs to a distribution that is not installed.
    """
    return METHODS.find(variant.method)
