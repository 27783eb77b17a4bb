"""What `gpu.py` compares: each way to run a model, with inputs that lie on the device already."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir
import torch
from safetensors.numpy import save_file

from gpu_models import Model
from gpu_timing import Prepared, as_graph
from variator_export.benchmark.alternatives.aot_inductor import compile_ahead, load_compiled
from variator_export.core.errors import UserError
from variator_export.core.parts import MODEL
from variator_export.core.precision import find_precision
from variator_export.engines.base import Arrays
from variator_export.engines.onnxruntime.graph import IoBindingRunner
from variator_export.engines.onnxruntime.providers import PROVIDERS
from variator_export.graph.bind import bind, bind_baseline
from variator_export.graph.trace import trace
from variator_export.model.augmented import AugmentedModel, PlainModel
from variator_export.model.plugin import CompressionPlugin
from variator_export.model.plugin_layout import TENSORS_NAME, Plugin

# The ways of each part of the benchmark; the first part has none.
PARTS: dict[str, tuple[str, ...]] = {
    "device": (),
    "eager": ("eager", "eager, fused kernels"),
    "compiled": ("torch.compile", "torch.compile, one shape", "aot-inductor"),
    "graphs": ("onnxruntime", "tensorrt"),
}


class Way(Protocol):
    """One model at one ratio."""

    def run(self, inputs: Arrays) -> Arrays:
        """Run it once, for its numbers."""
        ...

    def prepare(self, inputs: Arrays) -> Prepared:
        """A run on inputs that are on the device, as a CUDA graph where that is possible."""
        ...


class TorchWay:
    """Eager PyTorch, torch.compile, or AOTInductor."""

    def __init__(
        self, module: AugmentedModel | PlainModel, names: tuple[str, ...], device: str, how: str, folder: Path
    ) -> None:
        self._device = device
        module = module.to(device)
        self._call: Callable[..., Any] = module
        if how == "torch.compile":
            self._call = _around(module, lambda inner: torch.compile(inner, dynamic=True))
        elif how == "torch.compile, one shape":
            # Without PyTorch's own CUDA graphs: each way is recorded in the same manner.
            mode = "max-autotune-no-cudagraphs"
            self._call = _around(module, lambda inner: torch.compile(inner, dynamic=False, mode=mode))
        elif how == "aot-inductor":
            package = folder / f"{id(self)}.pt2"
            shape = (3, 40) if isinstance(module, PlainModel) else (3, 5, module.ratio)
            example = {name: torch.ones(shape, dtype=torch.int64, device=device) for name in names}
            self._call = _around(module, lambda inner: _compile_ahead(inner, example, package))

    def run(self, inputs: Arrays) -> Arrays:
        with torch.inference_mode():
            outputs = self._call(self._upload(inputs))
        return {name: value.float().cpu().numpy() for name, value in outputs.items()}

    def prepare(self, inputs: Arrays) -> Prepared:
        tensors = self._upload(inputs)

        def call() -> None:
            with torch.inference_mode():
                self._call(tensors)

        return as_graph(call) if self._device == "cuda" else Prepared(call, None, "on a CPU")

    def _upload(self, inputs: Arrays) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}


def _around(
    module: AugmentedModel | PlainModel, compile: Callable[[torch.nn.Module], Callable[..., Any]]
) -> Callable[..., Any]:
    """Compiled once for every shape, as a server of texts needs it; windows are cut outside.

    PyTorch 2.13 cannot follow how a length is rounded up to windows: torch.export refuses it, and
    torch.compile with dynamic shapes gives outputs of the padded length.
    """
    if isinstance(module, PlainModel):
        return compile(module)
    run = compile(module.windowed)

    def call(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return module.unpad(run(module.pad(tensors)), tensors["input_ids"].shape[1])

    return call


def _compile_ahead(
    inner: torch.nn.Module, example: dict[str, torch.Tensor], package: Path
) -> Callable[..., Any]:
    """By AOTInductor; of the example's dimensions the batch and the tokens or windows vary."""
    ratio = example["input_ids"].shape[2] if example["input_ids"].dim() == 3 else 1
    compile_ahead(inner, example, package, 512 // ratio)
    return load_compiled(package)


class GraphWay:
    """Our graph on ONNX Runtime. Its CUDA graphs need inputs and outputs that stay where they are."""

    def __init__(self, graph: Path, device: str) -> None:
        target = "onnxruntime-cuda" if device == "cuda" else "onnxruntime"
        self._path, self._device = graph, device
        self._graph = IoBindingRunner(graph, PROVIDERS[target])

    def run(self, inputs: Arrays) -> Arrays:
        return self._graph.run(inputs, {}, self._graph.outputs)

    def prepare(self, inputs: Arrays) -> Prepared:
        if self._device != "cuda":
            return Prepared(self._graph.prepare(inputs, {}), None, "on a CPU")
        import onnxruntime

        stream = torch.cuda.Stream()
        own = {**PROVIDERS["onnxruntime-cuda"].options, "user_compute_stream": str(stream.cuda_stream)}
        outputs = self._graph.run_values(inputs, {})
        why: bool | str = True
        for graph in ("1", "0"):
            session = onnxruntime.InferenceSession(
                str(self._path), providers=[("CUDAExecutionProvider", {**own, "enable_cuda_graph": graph})]
            )
            binding = session.io_binding()
            for name, array in inputs.items():
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array, "cuda", 0)
                binding.bind_ortvalue_input(name, value)
            for name, value in outputs.items():
                binding.bind_ortvalue_output(name, value)
            try:
                for _ in range(2):  # the first run records
                    session.run_with_iobinding(binding)
                return Prepared(functools.partial(session.run_with_iobinding, binding), stream, why)
            except Exception as error:  # onnxruntime's exceptions have no common base class
                why = str(error).strip()[:200]
        raise UserError(f"ONNX Runtime fails: {why}", "See above.")


class EngineWay:
    """An engine of TensorRT, whose session records CUDA graphs."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def run(self, inputs: Arrays) -> Arrays:
        return dict(self._session.run(inputs))

    def prepare(self, inputs: Arrays) -> Prepared:
        stream = torch.cuda.ExternalStream(self._session.device.stream)
        return Prepared(self._session.prepare(inputs), stream, True)


class Ways:
    """Opens the ways to run one model.

    Args:
        model: The model.
        device: cuda or cpu.
        folder: For graphs and compiled packages.
    """

    def __init__(self, model: Model, device: str, folder: Path) -> None:
        self._model, self._device, self._folder = model, device, folder

    def open(self, runtime: str, ratio: int, attention: str = "sdpa") -> Way:
        """A way at a ratio.

        Raises:
            UserError: It cannot run here; the message says why.
        """
        if runtime == "onnxruntime":
            return GraphWay(self._graph(ratio), self._device)
        if runtime == "tensorrt":
            return EngineWay(self._session(ratio))
        model, plugin = self._model, self._model.plugins[ratio]
        module = make_module(model, plugin, attention, fused=runtime == "eager, fused kernels")
        names = model.backbone.spec.family.inputs
        return TorchWay(module, names, self._device, runtime, self._folder)

    def _graph(self, ratio: int) -> Path:
        any_ratio, graph = self._folder / "any-ratio.onnx", self._folder / f"ratio-{ratio}.onnx"
        if not any_ratio.exists():
            onnx_ir.save(trace(self._model.backbone, self._folder, "weights.safetensors")[MODEL], any_ratio)
        if not graph.exists():
            onnx_ir.save(self._bind(any_ratio, self._model.plugins[ratio]), graph)
        return graph

    def _bind(self, any_ratio: Path, plugin: Plugin | None) -> onnx_ir.Model:
        if plugin is None:
            return bind_baseline(any_ratio)
        location = f"plugins/ratio-{plugin.config.ratio}/{TENSORS_NAME}"
        (self._folder / location).parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: np.ascontiguousarray(array) for name, array in plugin.tensors.items()}
        save_file(tensors, self._folder / location)
        return bind(any_ratio, plugin.config, location)

    def _session(self, ratio: int) -> Any:
        """Of an engine, built from a bundle of the same model and plugins."""
        for needed in ("tensorrt", "pydantic"):
            if importlib.util.find_spec(needed) is None:
                raise UserError(f"{needed} is not installed.", "Install variator-export with tensorrt.")
        from gpu_engines import open_engine

        return open_engine(self._model, ratio, self._folder / "bundle")


def make_module(
    model: Model, plugin: Plugin | None, attention: str, *, fused: bool = False
) -> AugmentedModel | PlainModel:
    """The model as a PyTorch module, on the CPU. The caller moves it, so weights are not shared."""
    backbone = model.backbone.in_precision(find_precision(model.precision))
    module: AugmentedModel | PlainModel
    if plugin is None:
        module = PlainModel(backbone)
        inner: Any = module.model
    else:
        own = CompressionPlugin.from_file(plugin).to(backbone.dtype)
        module = AugmentedModel(backbone, own, fused=fused)
        inner = module.windowed.model
    if attention == "sdpa":
        inner.set_attn_implementation("sdpa")
    return module.eval()
