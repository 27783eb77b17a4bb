"""Header of a plan, read without deserialising the plan, because that would run its code.

The layout is not documented. trtexec (--getPlanVersionOnly) reads the version from the same place: four bytes
at offset 24. Plans of TensorRT for RTX 1.7.1 store their size before the version.
"""

from variator_export.engines.tensorrt.api import FLAVOURS

HEADER_BYTES = 28
_VERSION = slice(24, 28)


def read_plan_version(plan: bytes) -> str | None:
    """Version of the TensorRT that wrote a plan, `1.7.1.116`; None if the bytes do not look like a plan."""
    if len(plan) < HEADER_BYTES or plan[:4] not in {flavour.magic for flavour in FLAVOURS.values()}:
        return None
    return ".".join(map(str, plan[_VERSION]))


def plan_contradicts(plan: bytes, target: str, version: str) -> str | None:
    """The contradiction between a plan's header and its sidecar, in words; None if there is none.

    Args:
        plan: First bytes of the plan.
        target: Target named in the sidecar.
        version: TensorRT version named in the sidecar.
    """
    magic = FLAVOURS[target].magic
    if plan[:4] != magic:
        others = [name for name, flavour in FLAVOURS.items() if flavour.magic == plan[:4]]
        return f"it is {f'a plan of {others[0]}' if others else 'not a plan'}"
    found = read_plan_version(plan)
    if found is not None and found.split(".")[:3] != version.split(".")[:3]:
        return f"it was written by version {found}"
    return None
