"""The head of a plan: what it says of itself without being deserialised, which would run what is in it.

Its layout is not documented. trtexec (--getPlanVersionOnly) reads the version from the same place: four bytes
from the 24th on. Plans of TensorRT for RTX 1.7.1 have their size before it.
"""

from variator_export.engines.tensorrt.api import FLAVOURS

HEADER_BYTES = 28
_VERSION = slice(24, 28)


def read_plan_version(plan: bytes) -> str | None:
    """The version of the TensorRT that wrote a plan, `1.7.1.116`; None: it does not look like one."""
    if len(plan) < HEADER_BYTES or plan[:4] not in {flavour.magic for flavour in FLAVOURS.values()}:
        return None
    return ".".join(map(str, plan[_VERSION]))


def plan_contradicts(plan: bytes, target: str, version: str) -> str | None:
    """What in a plan's head cannot be, if it is what its sidecar says; None: nothing.

    Args:
        plan: Its first bytes.
        target: That of the sidecar.
        version: Of TensorRT, by the sidecar.
    """
    magic = FLAVOURS[target].magic
    if plan[:4] != magic:
        others = [name for name, flavour in FLAVOURS.items() if flavour.magic == plan[:4]]
        return f"it is {f'a plan of {others[0]}' if others else 'no plan'}"
    found = read_plan_version(plan)
    if found is not None and found.split(".")[:3] != version.split(".")[:3]:
        return f"it was written by version {found}"
    return None
