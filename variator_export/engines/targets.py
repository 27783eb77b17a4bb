"""The registry of targets. To add a target, create a folder with a `Target` and a line here."""

from variator_export.core.registry import Registry, unknown_member
from variator_export.engines.target import EngineTarget, Target

_ONNXRUNTIME = "variator_export.engines.onnxruntime.target"
_TENSORRT = "variator_export.engines.tensorrt.target"

TARGETS: Registry[Target] = Registry(
    kind="target",
    group="variator_export.targets",
    contract=Target,  # type: ignore[type-abstract]
    own={
        "onnxruntime": f"{_ONNXRUNTIME}:CPU_TARGET",
        "onnxruntime-cuda": f"{_ONNXRUNTIME}:CUDA_TARGET",
        "onnxruntime-tensorrt": f"{_ONNXRUNTIME}:TENSORRT_TARGET",
        "onnxruntime-tensorrt-rtx": f"{_ONNXRUNTIME}:TENSORRT_RTX_TARGET",
        "openvino": "variator_export.engines.openvino.target:OPENVINO",
        "tensorrt-rtx": f"{_TENSORRT}:TENSORRT_RTX",
        "tensorrt": f"{_TENSORRT}:TENSORRT",
    },
)
# The target that runs graphs as they are, on any machine: every bundle supports it.
GRAPHS = "onnxruntime"


def engine_targets() -> dict[str, EngineTarget]:
    """The targets that build engines, by name."""
    return {name: target for name, target in TARGETS.all().items() if isinstance(target, EngineTarget)}


def find_engine_target(name: str) -> EngineTarget:
    """Find a target that builds engines.

    Raises:
        UserError: No such target has that name.
    """
    found = engine_targets()
    if name not in found:
        raise unknown_member("target for engines", name, list(found))
    return found[name]


def build_targets() -> tuple[str, ...]:
    """The targets that a bundle can be built for."""
    return (GRAPHS, *engine_targets())


def distributions() -> tuple[str, ...]:
    """Every distribution whose version identifies the software that ran."""
    return tuple(dict.fromkeys(d for target in TARGETS.all().values() for d in target.distributions))
