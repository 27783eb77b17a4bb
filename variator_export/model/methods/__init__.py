"""The methods by which variants of a backbone are made."""

from variator_export.bundle.manifest import Variant
from variator_export.core.registry import Registry
from variator_export.model.methods.base import Method

METHODS = Registry(
    kind="method",
    group="variator_export.methods",
    contract=Method,
    own={
        "none": "variator_export.model.methods.baseline:BASELINE",
        "variator": "variator_export.model.methods.variator:VARIATOR",
    },
)


def method_of(variant: Variant) -> Method:
    """The method of a bundle's variant.

    Raises:
        UserError: It is of a distribution that is not installed here.
    """
    return METHODS.find(variant.method)
