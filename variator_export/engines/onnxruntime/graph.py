"""Graphs on ONNX Runtime: on the CPU, and on NVIDIA GPUs through its providers."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.core.axes import InputShapes
from variator_export.core.environment import (
    default_threads,
    install_command,
    require_onnxruntime,
)
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays, named_outputs
from variator_export.engines.onnxruntime.compiler import compilable
from variator_export.engines.onnxruntime.plugin_provider import is_plugin, plugin_devices
from variator_export.engines.onnxruntime.providers import CPU, Provider

if TYPE_CHECKING:  # code that runs graphs needs no pydantic
    from variator_export.engines.request import Profile

# On a CPU the fused SkipLayerNormalization is slower than the addition and the normalization it replaces:
# 548 against 505 ms for MiniLM at (32, 128) on two cores.
_SLOWER_FUSIONS = ["SkipLayerNormFusion"]
# It moves a QuantizeLinear in front of a Squeeze, for which ONNX Runtime has no kernel in float8.
_BREAKS_FLOAT8 = ["QDQPropagationTransformer"]
# Suffix of the events in which ONNX Runtime reports the time of an operator itself.
_KERNEL = "_kernel_time"
# Where the weights of a graph in memory lie.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# TensorProto.BFLOAT16
_ONNX_BFLOAT16 = 16


def _open(
    graph: Path | bytes,
    threads: int | None,
    weights: Path | None = None,
    profile: str | None = None,
    provider: Provider = CPU,
    *,
    as_it_comes: bool = False,
    profiles: Sequence["Profile"] = (),
) -> Any:
    available = require_provider(provider)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    if weights is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights))
    if (number := threads or default_threads()) is not None:
        options.intra_op_num_threads = number
    if provider.device != "cpu":
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    disabled = _SLOWER_FUSIONS + _BREAKS_FLOAT8 if provider is CPU and not as_it_comes else None
    devices = plugin_devices(provider) if is_plugin(provider, available) else []
    name, compiler_options = "a graph in memory" if isinstance(graph, bytes) else graph, {}
    if provider.compiler is not None and isinstance(graph, Path):
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(graph.parent))
        form = compilable(graph)
        compiler_options, graph = provider.compiler.options(form, profiles), form.content
    chain: list[Any] | None = [own for own in provider.chain(compiler_options) if own[0] in available]
    if devices:
        options.add_provider_for_devices(devices[:1], compiler_options)
        chain = None
    try:
        session = onnxruntime.InferenceSession(
            graph if isinstance(graph, bytes) else str(graph),
            options,
            providers=chain,
            disabled_optimizers=disabled,
        )
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {name}: {error}",
            "Build the bundle again from its recipe with this version.",
        ) from error
    # If a provider cannot start, ONNX Runtime falls back to the CPU and only logs that.
    if session.get_providers()[0] != provider.name:
        raise UserError(
            f"ONNX Runtime {onnxruntime.__version__} has {provider.name}, but cannot start it here, and "
            f"would run on {session.get_providers()[0]} instead.",
            f"It needs {provider.needs}, and a GPU; ONNX Runtime's own message is on standard error. Or "
            "choose the target onnxruntime, which runs on the CPU.",
        )
    if provider.device != "cpu" and hasattr(session, "get_provider_graph_assignment_info"):  # since 1.24
        provider.require_products(placement(session))
    return session


def placement(session: Any) -> list[tuple[str, str]]:
    """The provider and the operator type of each node of a session that recorded them."""
    return [
        (str(part.ep_name), str(node.op_type))
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def require_provider(provider: Provider) -> list[str]:
    """The names of the providers of the installed ONNX Runtime.

    Raises:
        UserError: ONNX Runtime is not installed, or does not have the provider, and nothing adds it.
    """
    require_onnxruntime()
    import onnxruntime

    available: list[str] = onnxruntime.get_available_providers()
    if provider.name not in available and not is_plugin(provider, available):
        raise UserError(
            f"The installed ONNX Runtime has no {provider.name}; it has {', '.join(available)}.",
            _how_to_get(provider) + " Or choose the target onnxruntime, which runs on the CPU.",
        )
    return available


def _how_to_get(provider: Provider) -> str:
    if provider.plugin is not None:
        return f"It needs {provider.needs}: pip install {provider.plugin.replace('_', '-')}."
    return f"It needs {provider.needs}: {install_command('onnxruntime-gpu')} in place of onnxruntime."


def _call(
    session: Any,
    inputs: Mapping[str, np.ndarray],
    options: Any = None,
    outputs: Sequence[str] | None = None,
) -> Arrays:
    names = [output.name for output in session.get_outputs()] if outputs is None else outputs
    try:
        found = session.run(names, dict(inputs), options)  # takes no name for all names
        return dict(zip(names, found, strict=True)) if names else {}
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise _failed(inputs, error) from error


def _failed(inputs: Mapping[str, np.ndarray], error: Exception) -> UserError:
    shapes = {name: array.shape for name, array in inputs.items()}
    return UserError(
        f"ONNX Runtime failed on inputs of the shapes {shapes}: {error}",
        "Check that every token id is in the model's vocabulary.",
    )


@dataclass(frozen=True)
class OperatorTime:
    """Time of one operator of a graph.

    Attributes:
        node: Name of the node; ONNX Runtime names fused operators itself.
        operator: Type of the operator, for example `MatMul`.
        milliseconds: Median over the runs.
    """

    node: str
    operator: str
    milliseconds: float


def profile_operators(
    graph: Path, inputs: Mapping[str, np.ndarray], *, runs: int = 10, threads: int | None = None
) -> list[OperatorTime]:
    """Time every operator of a graph over `runs` runs, after the same number of warm-up runs."""
    with TemporaryDirectory() as folder:
        session = _open(graph, threads, profile=f"{folder}/profile")
        for _ in range(2 * runs):
            _call(session, inputs)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            key = (event["name"].removesuffix(_KERNEL), event["args"]["op_name"])
            durations.setdefault(key, []).append(event["dur"] / 1e3)
    return [OperatorTime(*key, float(np.median(found[-runs:]))) for key, found in durations.items()]


class OnnxRuntimeRunner:
    """A graph of one ratio, or an any-ratio graph together with the plugin to run, on the CPU.

    Args:
        graph: The ONNX file, or its content.
        extra: Inputs that stay the same from call to call (`plugin_layout.stack_for_graph`).
        outputs: Where the graph has outputs (`Manifest.shared_outputs`).
        threads: Threads of one operator; None for `OMP_NUM_THREADS`, or all cores if that is not set.
        weights: Folder of the weights that the graph refers to, if the graph is given by its content.
        as_it_comes: Whether to run with all of ONNX Runtime's optimizations, including those disabled here
            because they are slower.
    """

    def __init__(
        self,
        graph: Path | bytes,
        extra: Mapping[str, np.ndarray] | None = None,
        *,
        outputs: Mapping[str, str] | None = None,
        threads: int | None = None,
        weights: Path | None = None,
        as_it_comes: bool = False,
    ) -> None:
        self._session = _open(graph, threads, weights, as_it_comes=as_it_comes)
        self._extra, self._outputs = dict(extra or {}), outputs

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run the graph once; int64 inputs (B, S)."""
        return named_outputs(_call(self._session, {**inputs, **self._extra}), self._outputs)

    def run_with_adapter(self, inputs: Mapping[str, np.ndarray], adapter: Path) -> Arrays:
        """Run the graph once with a plugin from an adapter file, in place of the `extra` inputs."""
        from onnxruntime import LoraAdapter, RunOptions

        # The adapter must outlive the call: the options do not hold it.
        loaded, options = LoraAdapter(), RunOptions()
        loaded.Load(str(adapter))
        options.add_active_adapter(loaded)
        return _call(self._session, inputs, options)

    def with_plugin(
        self, extra: Mapping[str, np.ndarray], outputs: Mapping[str, str] | None = None
    ) -> "OnnxRuntimeRunner":
        """Reuse the session with another plugin or assembly, without loading anything again."""
        other = object.__new__(OnnxRuntimeRunner)
        other._session, other._extra, other._outputs = self._session, dict(extra), outputs
        return other


class IoBindingRunner:
    """A graph on a device: plugins are copied to it once, outputs back after each run (IO binding).

    Args:
        graph: The ONNX file.
        provider: The provider that runs the graph.
        threads: Threads of one operator on the CPU; None for `OMP_NUM_THREADS`, or all cores if that is not
            set.
        profiles: Shapes that a provider that compiles the graph compiles it for.
        bind: Whether to bind inputs and outputs; None to bind on a GPU only. On a CPU nothing is copied
            anyway, and binding costs 4 % at (1, 32) (MiniLM, ratio 4).

    Attributes:
        outputs: Names of the graph's outputs.
    """

    def __init__(
        self,
        graph: Path,
        provider: Provider,
        *,
        threads: int | None = None,
        profiles: Sequence["Profile"] = (),
        bind: bool | None = None,
    ) -> None:
        self._session = _open(graph, threads, provider=provider, profiles=profiles)
        self._profiles = tuple(profiles)
        self._device = provider.device
        self._binds = provider.device != "cpu" if bind is None else bind
        self.outputs = [output.name for output in self._session.get_outputs()]

    def upload(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Copy arrays to the device; the result can be an input of every run."""
        if not self._binds:
            return dict(arrays)
        from onnxruntime import OrtValue

        return {name: OrtValue.ortvalue_from_numpy(a, self._device, 0) for name, a in arrays.items()}

    def prepare(self, inputs: Mapping[str, np.ndarray], uploaded: Mapping[str, Any]) -> Callable[[], object]:
        """Prepare a run for timing.

        The returned function runs on inputs that are already on the device, and leaves the outputs there.
        """
        if not self._binds:
            return functools.partial(_call, self._session, {**inputs, **uploaded})
        return functools.partial(self._session.run_with_iobinding, self._bind(inputs, uploaded))

    def _bind(self, inputs: Mapping[str, np.ndarray], uploaded: Mapping[str, Any]) -> Any:
        binding = self._session.io_binding()
        for name, value in {**self.upload(inputs), **uploaded}.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name, self._device)
        return binding

    def run(
        self, inputs: Mapping[str, np.ndarray], uploaded: Mapping[str, Any], outputs: Sequence[str]
    ) -> Arrays:
        """Run the graph once; int64 inputs (B, S), and the uploaded arrays."""
        if not self._binds:
            return _call(self._session, {**inputs, **uploaded}, outputs=outputs)
        found = self._run(inputs, uploaded).get_outputs()
        return {name: found[self.outputs.index(name)].numpy() for name in outputs}

    def run_values(self, inputs: Mapping[str, np.ndarray], uploaded: Mapping[str, Any]) -> dict[str, Any]:
        """Run the graph once, as `run` does, and leave the outputs on the device.

        Returns:
            Values by name that can be inputs of another run. The runner must bind.
        """
        return dict(zip(self.outputs, self._run(inputs, uploaded).get_outputs(), strict=True))

    def _run(self, inputs: Mapping[str, np.ndarray], uploaded: Mapping[str, Any]) -> Any:
        if self._profiles:
            shapes = {name: array.shape for name, array in inputs.items()}
            shapes |= {name: tuple(value.shape()) for name, value in uploaded.items()}
            if not self.covers(shapes):
                raise UserError(
                    f"The graph was compiled for {self.limits}, and not for {shapes}.",
                    "Name these shapes in engine.profiles of the recipe and build the bundle again, or "
                    "choose the target onnxruntime-cuda.",
                )
        try:
            binding = self._bind(inputs, uploaded)
            self._session.run_with_iobinding(binding)
            return binding
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise _failed(inputs, error) from error

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """A value on the device that holds nothing: one of its sizes is 0."""
        from onnxruntime import OrtValue

        if dtype == "bfloat16":  # numpy has no such type
            array = np.empty(shape, np.uint16)
            return OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
        return OrtValue.ortvalue_from_numpy(np.empty(shape, dtype), self._device, 0)

    def take(self, value: Any, rows: np.ndarray) -> Any:
        """Some rows of a value on the device."""
        from onnxruntime import OrtValue

        return OrtValue.ortvalue_from_numpy(value.numpy()[rows], self._device, 0)

    def reorder(self, value: Any, rows: np.ndarray) -> Any:
        """A value with as many rows, each a copy of one of them. On a CPU the value is overwritten."""
        if self._device != "cpu":
            return self.take(value, rows)
        array, moved = value.numpy(), np.flatnonzero(rows != np.arange(len(rows)))  # a view of its memory
        array[moved] = array[rows[moved]]
        return value

    def covers(self, shapes: InputShapes) -> bool:
        """Whether the graph takes these shapes: every one, unless a provider compiled it for some."""
        return not self._profiles or any(profile.covers(shapes) for profile in self._profiles)

    @property
    def limits(self) -> str:
        """The shapes that the graph takes, in words."""
        return "; ".join(map(str, self._profiles)) or "every shape"

    def download(self, value: Any) -> np.ndarray:
        """A value on the device as an array."""
        return np.asarray(value.numpy())
