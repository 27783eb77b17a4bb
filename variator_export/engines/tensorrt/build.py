"""Building an engine in this process: strongly typed, one optimization profile.

`isolated.py` calls it in a process of its own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.engines.tensorrt.api import load_tensorrt

Shape = tuple[int, int]


def build_engine_here(target: str, graph: Path, profile: Mapping[str, tuple[Shape, Shape, Shape]]) -> bytes:
    """`isolated.build_engine` without the process of its own: the same arguments, result and errors."""
    trt = load_tensorrt(target)
    log = _make_logger(trt)
    try:
        builder = trt.Builder(log)
    except (RuntimeError, TypeError) as error:
        raise _failed(target, graph, "cannot start its builder", log, str(error)) from error
    # The network must outlive its parser: keep a name for it.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
        raise _failed(target, graph, "cannot parse the graph", log, errors)
    _allow_decomposed_attention(trt, network)
    config = builder.create_builder_config()
    config.add_optimization_profile(_make_profile(builder, network, graph, profile))
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise _failed(target, graph, "built no engine", log)
    return bytes(serialized)


def _allow_decomposed_attention(trt: Any, network: Any) -> None:
    """Let the builder take attention apart where it has no kernel for it (float32); otherwise it refuses."""
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            # The bindings give every layer its base class; its own is set by hand.
            layer.__class__ = trt.IAttentionBoundaryLayer
            layer.attention.decomposable = True


def _make_profile(
    builder: Any, network: Any, graph: Path, profile: Mapping[str, tuple[Shape, Shape, Shape]]
) -> Any:
    """The builder accepts wrong names and reversed shapes without a word, so they are checked here."""
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    if inputs != set(profile):
        raise UserError(
            f"The profile has shapes for {', '.join(sorted(profile))}; {graph.name} has the inputs "
            f"{', '.join(sorted(inputs))}.",
            "Give a shape for every input.",
        )
    made = builder.create_optimization_profile()
    for name, (low, opt, high) in profile.items():
        if not all(a <= b <= c for a, b, c in zip(low, opt, high, strict=True)):
            raise UserError(
                f"The profile of {name} must be min <= opt <= max, and is {low}, {opt}, {high}.",
                "Correct engine.batch_size or engine.sequence_length in the recipe.",
            )
        try:
            made.set_shape(name, low, opt, high)
        except RuntimeError as error:
            raise UserError(
                f"The builder refuses the profile {low}, {opt}, {high} of {name}: {error}",
                "Correct engine.batch_size or engine.sequence_length in the recipe.",
            ) from error
    return made


def _make_logger(trt: Any) -> Any:
    """A logger that keeps errors and warnings, where a failed build leaves its only reason."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                self.messages.append(message)

    return Log()


def _failed(target: str, graph: Path, what: str, log: Any, detail: str = "") -> UserError:
    words = "\n  ".join([*([detail] if detail else []), *log.messages[-8:]]) or "it gave no reason"
    return UserError(
        f"{target} {what} for {graph.name}. In its own words:\n  {words}",
        "Other targets are not affected: leave this one out with --target onnxruntime.",
    )
