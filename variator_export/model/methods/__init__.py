"""The registry of methods that make variants of a backbone."""

from variator_export.bundle.manifest import Variant
from variator_export.core.encoder_size import EncoderSize
from variator_export.core.registry import Registry
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


# The text by whose multiply-accumulates variants are ordered.
_TOKENS = 128


def work_of(variant: Variant, size: EncoderSize) -> int:
    """The multiply-accumulates of one text of 128 tokens, by which variants are ordered."""
    return method_of(variant).macs(size, variant, 1, _TOKENS)


def method_of(variant: Variant) -> Method:
    """Find the method of a bundle's variant.

    Raises:
        UserError: The method belongs to a distribution that is not installed.
    """
    return METHODS.find(variant.method)
