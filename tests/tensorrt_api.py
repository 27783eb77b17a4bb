"""Runs our TensorRT code against the real bindings of one TensorRT, without its libraries.

    python tests/tensorrt_api.py MODULE TARGET [--without CLASS.NAME] [--bundle FOLDER]

The bindings are imported with libraries that hold nothing but the symbols they ask for (`STUB`). In the place
of objects stand ones that know the real class: a name that it does not have, a wrong number of arguments or
an unknown keyword is a problem, and what a method gives is an object of the class that its documentation
names. Prints the problems and the names that were used, as JSON.
"""

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import itertools
import json
import re
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest

from variator_export.bundle.files import BundleFiles
from variator_export.engines import choice
from variator_export.engines.compatibility import TargetMachine
from variator_export.engines.request import EngineRequest, Profile
from variator_export.engines.tensorrt import execution, log, plan, session
from variator_export.engines.tensorrt.building import attention, timing_cache
from variator_export.engines.tensorrt.building import builder as build
from variator_export.engines.tensorrt.reproduction_script import script_for_tensorrt
from variator_export.recipe.builder_options import BuilderOptions

# Of libnvinfer, libnvinfer_plugin and libnvonnxparser.
STUB = "".join(
    f"void *{name}(void) {{ return 0; }}\n"
    for name in (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
        "initLibNvInferPlugins",
    )
)
# Roots of the expressions in our code that are objects of TensorRT.
ROOTS = (
    *("trt", "builder", "network", "parser", "config", "layer", "made", "error", "cache", "found", "there"),
    *("runtime", "engine", "context", "refitter", "parser", "inspector", "attention", "maker", "selected"),
)
_SIGNATURE = re.compile(r"^(?:\d+\. )?\w*\((?P<arguments>.*)\) -> (?P<result>.+?)$", re.MULTILINE)


class Recorder:
    """What was used and what was wrong with it."""

    def __init__(self, module: Any, removed: str | None) -> None:
        self.module, self.removed, self.refuses = module, removed, ""
        self.problems: list[str] = []
        self.used: set[str] = set()

    def has(self, owner: Any, name: str) -> bool:
        label = getattr(owner, "__name__", "module").rpartition(".")[2]
        self.used.add(name)
        if f"{label}.{name}" == self.removed or not hasattr(owner, name):
            self.problems.append(f"{label} has no {name}")
            return False
        return True

    def fake(self, text: str) -> Any:
        """What documentation calls a type."""
        # Some signatures have the C++ name: nvonnxparser::IParserError.
        name = re.split(r"[.:]", text.split(" |")[0])[-1].strip("[] ")
        real = getattr(self.module, name, None) or getattr(self.module, name.removeprefix("I"), None)
        if inspect.isclass(real) and not hasattr(real, "__members__"):
            return Fake(self, real)
        return {"bool": True, "int": 1, "str": "node", "bytes": b"x"}.get(text.split("[")[0])

    def call(self, owner: str, method: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Compare a call with the documented signatures."""
        found = [m for m in _SIGNATURE.finditer(method.__doc__ or "") if "*args" not in m["arguments"]]
        reasons = []
        for match in found:
            parts = [part.strip() for part in _split(match["arguments"])]
            names = [part.split(":")[0].strip() for part in parts if part and not part.startswith("self")]
            needed = [p for p in parts if p and not p.startswith("self") and "=" not in p]
            if not len(needed) <= len(arguments) + len(keywords) <= len(names):
                reasons.append(f"takes {', '.join(names) or 'nothing'}")
            elif unknown := keywords.keys() - set(names):
                reasons.append(f"knows no {', '.join(sorted(unknown))}")
            else:
                return self.fake(match["result"].strip())
        if found:
            self.problems.append(
                f"{owner} {reasons[0]}; it was given {len(arguments)} and {sorted(keywords)}"
            )
        return None


def _split(arguments: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth = [""], 0
    for letter in arguments:
        depth += letter in "([{"
        depth -= letter in ")]}"
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


# What objects say in our tests, by class and name.
ANSWERS: dict[tuple[str, str], Any] = {
    ("INetworkDefinition", "num_inputs"): 1,
    ("INetworkDefinition", "num_layers"): 1,
    ("OnnxParser", "num_errors"): 1,
    ("OnnxParserRefitter", "num_errors"): 1,
    ("ITensor", "name"): "input_ids",
    ("ITensor", "shape"): (-1, -1),
}


# What refitting gives, what it gives when it fails, and in which way of failing.
_OF_REFITTING: dict[str, tuple[Any, Any, str]] = {
    "OnnxParserRefitter.refit_from_file": (True, False, "parses"),
    "Refitter.get_missing_weights": ([], ["weight"], "missing"),
    "Refitter.refit_cuda_engine": (True, False, "refits"),
}


class Missing:
    """In the place of what the real class does not have, so that all problems are found in one run."""

    def __getattr__(self, name: str) -> "Missing":
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "Missing":
        return self


class Fake:
    """An object of a real class."""

    def __init__(self, recorder: Recorder, real: Any) -> None:
        object.__setattr__(self, "_recorder", recorder)
        object.__setattr__(self, "_real", real)

    def __getattr__(self, name: str) -> Any:
        recorder, real = self._recorder, self._real
        if not recorder.has(real, name):
            return Missing()
        if (answer := ANSWERS.get((real.__name__, name))) is not None:
            return answer
        member = inspect.getattr_static(real, name)
        if isinstance(member, property):
            kind = _SIGNATURE.search(member.fget.__doc__ or "")
            if real.__name__ == "ILayer" and name == "type":
                return recorder.module.LayerType.ATTENTION_INPUT
            if real.__name__ == "IConstantLayer":
                return {"type": recorder.module.LayerType.CONSTANT}.get(name, self.__dict__["numbers"])
            if real.__name__ == "IElementWiseLayer":
                return {
                    "type": recorder.module.LayerType.ELEMENTWISE,
                    "op": recorder.module.ElementWiseOperation.AND,
                }.get(name)
            return recorder.fake(kind["result"]) if kind else None
        label = f"{real.__name__}.{name}"

        def method(*arguments: Any, **keywords: Any) -> Any:
            result = recorder.call(label, getattr(real, name), arguments, keywords)
            if label in ("OnnxParser.parse_from_file", "OnnxParser.parse"):
                return recorder.parses
            if label in _OF_REFITTING:
                given, refused, unless = _OF_REFITTING[label]
                return refused if recorder.refuses == unless else given
            if label == "Builder.build_serialized_network":
                return b"engine" if recorder.parses else None
            return {
                "ITimingCache.serialize": b"times",
                "IRuntimeCache.serialize": b"kernels",
                "ICudaEngine.get_tensor_name": "last_hidden_state",
                "ICudaEngine.get_tensor_dtype": recorder.module.DataType.FLOAT,
                "ICudaEngine.get_tensor_mode": recorder.module.TensorIOMode.OUTPUT,
                "IExecutionContext.get_tensor_shape": (1, 4, 32),
                "EngineInspector.get_engine_information": '{"Layers": ["name"]}',
            }.get(label, result)

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        recorder, real = self._recorder, self._real
        if name == "__class__":
            assert issubclass(value, real), f"{value} is no {real}"
            object.__setattr__(self, "_real", value)
            return
        if recorder.has(real, name) and inspect.getattr_static(real, name).fset is None:
            recorder.problems.append(f"{real.__name__}.{name} cannot be set")
        if name == "progress_monitor":
            for part in ("phase_start", "step_complete", "phase_finish"):
                recorder.has(recorder.module.IProgressMonitor, part)
            value.phase_start("phase", None, 2)
            assert value.step_complete("phase", 0)
            value.phase_finish("phase")


class FakeModule:
    """The module: real enums and base classes; constructors give fakes."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        recorder = self._recorder
        if not recorder.has(recorder.module, name):
            return Missing()
        real = getattr(recorder.module, name)
        if hasattr(real, "__members__"):
            return _Enum(recorder, real)
        if name not in ("Builder", "OnnxParser", "Runtime", "Refitter", "OnnxParserRefitter"):
            return real

        def construct(*arguments: Any) -> Fake:
            if name == "Builder" and hasattr(arguments[0], "messages"):  # TensorRT's own would print
                for severity in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                    if recorder.has(recorder.module.ILogger, severity):
                        arguments[0].log(getattr(recorder.module.ILogger, severity), "words")
            recorder.call(f"{name}.__init__", real.__init__, arguments, {})
            return Fake(recorder, real)

        return construct


class _Enum:
    def __init__(self, recorder: Recorder, real: Any) -> None:
        self._recorder, self._real = recorder, real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name) if self._recorder.has(self._real, name) else Missing()


def run(module: Any, target: str, removed: str | None) -> Recorder:
    """Run our code with every option that the target has."""
    recorder = Recorder(module, removed)
    build.load_tensorrt = lambda _: FakeModule(recorder)  # type: ignore[assignment]
    profile = Profile(name="default", shapes={"input_ids": ((1, 1), (2, 2), (4, 4))})
    options: dict[str, list[Any]] = {"tf32": [False, True], "optimization_level": [3], "workspace_mib": [64]}
    if target == "tensorrt-rtx":
        options["compute_capabilities"] = [("sm89", "sm120")]
    else:
        options |= {
            "hardware_compatibility": ["ampere-plus", "same-compute-capability"],
            "version_compatible": [True],
            "timing_cache_mode": ["use", "require"],
            "strip_weights": [False, True],
        }
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "times.cache"
        for values in itertools.product(*options.values()):
            chosen = dict(zip(options, values, strict=True))
            own = {name: chosen.pop(name) for name in BuilderOptions.model_fields if name in chosen}
            request = EngineRequest(
                target=target,
                graph="graph.onnx",
                what="ratio-4",
                profiles=(profile,),
                options=BuilderOptions(**own),
                timing_cache=str(cache),
                **chosen,
            )
            recorder.parses = True  # type: ignore[attr-defined]
            assert build.build_engine_here(request, lambda *_: None).content == b"engine"
        graph = onnx.helper.make_graph([], "any-ratio", [], [])
        onnx.save(onnx.helper.make_model(graph), Path(folder) / "any-ratio.onnx")
        plugin = {"plugin.compress.bias": ((1, 1), (1, 1), (1, 1))}
        every_ratio = request.model_copy(
            update={
                "graph": str(Path(folder) / "any-ratio.onnx"),
                "profiles": (Profile(name="1x1 default", shapes={**profile.shapes, **plugin}),),
            }
        )
        # The network has the inputs of one ratio, whatever was parsed.
        with mock.patch.object(build, "_make_profile", return_value=None):
            assert build.build_engine_here(every_ratio, lambda *_: None).content == b"engine"
        change_attention(recorder)
        recorder.parses = False  # type: ignore[attr-defined]
        with contextlib.suppress(build.UserError):  # with the parser's errors in it
            build.build_engine_here(request)
    return recorder


def change_attention(recorder: Recorder) -> None:
    """Run what the forms of attention do to a network, whose layers are all of one kind here."""
    trt, real = FakeModule(recorder), recorder.module
    network, tensor = Fake(recorder, real.INetworkDefinition), Fake(recorder, real.ITensor)
    mask = attention._or_everything(trt, network, tensor)
    assert attention.apply_form(trt, network, "decomposed")
    reader = Fake(recorder, real.ILayer)
    attention._widen(trt, network, Fake(recorder, real.IAttention), mask, {"input_ids": [(reader, 0)]})
    for kind in ("SELECT", "SLICE"):
        recorder.has(real.LayerType, kind)
    named = {name: types.SimpleNamespace(name=name, shape=(-1, 1, 1, -1)) for name in ("mask", "both", "one")}
    inputs = [named["both"], *(types.SimpleNamespace(name=name) for name in ("kept", "hidden"))]
    select = types.SimpleNamespace(type=real.LayerType.SELECT, get_input=inputs.__getitem__)
    makers: dict[str, Any] = {"mask": select, "both": Fake(recorder, real.IElementWiseLayer)}
    for name, number in (("kept", 0), ("hidden", -40000)):
        makers[name] = Fake(recorder, real.IConstantLayer)
        object.__setattr__(makers[name], "numbers", np.array([number]))
    assert attention._seen_keys(trt, makers, named["mask"]) is None, "the terms have other axes here"


class HostDevice:
    """The device of a session, in the host's memory."""

    stream = 0
    name = "a GPU"
    lock = threading.RLock()

    def synchronize(self) -> None:
        pass

    def overwrite(self, tensor: Any, array: Any) -> None:
        tensor.values[...] = array

    def capture(self, enqueue: Any) -> Any:
        enqueue()
        return lambda: None

    def upload(self, array: Any) -> Any:
        return types.SimpleNamespace(data_ptr=lambda: 1, values=array, shape=array.shape)

    def empty(self, shape: Any, dtype: str) -> Any:
        return self.upload(np.zeros(tuple(shape), dtype))

    def download(self, tensor: Any) -> Any:
        return tensor.values

    def download_all(self, tensors: Any) -> Any:
        return {name: tensor.values for name, tensor in tensors.items()}


def run_sessions(recorder: Recorder, folder: Path, target: str) -> None:
    """Open the engines of a bundle and run each once; the plans are those of TensorRT for RTX."""
    bundle = BundleFiles(folder)
    plan.load_tensorrt = lambda _: FakeModule(recorder)  # type: ignore[assignment]
    plan.plan_contradicts = lambda *_: None  # type: ignore[assignment]
    choice.this_machine = lambda: TargetMachine("this machine", "sm89", {"tensorrt-rtx": "1.7"})
    choose = session.choose_engine
    strips = target == "tensorrt"
    # TensorRT is a later one than the builder, so that its lean runtime is loaded.
    plan.require_tensorrt = lambda _: "1.8" if strips else "1.7"  # type: ignore[assignment]

    def stand_in(bundle: BundleFiles, _: str, name: str) -> Any:
        entry, sidecar = choose(bundle, "tensorrt-rtx", name)
        options = {**sidecar["options"], "strip_weights": strips}
        return entry.model_copy(update={"target": target}), {**sidecar, "options": options}

    session.choose_engine = stand_in
    names = bundle.manifest.backbone.inputs
    inputs = {name: np.ones((1, 4), np.int64) for name in names}
    for (variant, ratio), graphs in itertools.product(((None, 2), (None, 1), (2, None)), (False, True)):
        opened = session.TensorRtSession(
            bundle,
            target,
            variant,
            allow_unverified=True,
            lean_runtime=Path(__file__) if strips else None,
            cuda_graphs=graphs,
            device=HostDevice(),
        )
        assert opened.layers() == ["name"]
        for _ in range(2):
            found = opened.run(inputs, ratio)
            assert found["last_hidden_state"].shape == (1, 4, 32)
    plan.require_tensorrt = lambda _: "1.7"  # type: ignore[assignment]
    if strips:
        for answer in ("parses", "refits", "missing"):
            recorder.refuses = answer  # type: ignore[attr-defined]
            with pytest.raises(session.UserError, match="cannot put the bundle's weights into"):
                session.TensorRtSession(bundle, target, 2, allow_unverified=True, device=HostDevice())
        entries = bundle.manifest.files
        entries["weights.safetensors"] = entries["weights.safetensors"].model_copy(
            update={"sha256": "0" * 64}
        )
        with pytest.raises(session.UserError, match=r"weights.safetensors is not the one that it was built"):
            session.TensorRtSession(bundle, target, 2, allow_unverified=True, device=HostDevice())


def run_script(recorder: Recorder, target: str) -> None:
    """Run the program of a reproduction, which is no module of ours."""
    values = np.ones((1, 4, 32), np.float32)
    torch = mock.MagicMock()
    torch.empty.return_value.float.return_value.cpu.return_value.numpy.return_value = values
    loaded = {"output": mock.MagicMock(**{"numpy.return_value": values})}
    loaded["input_ids"] = mock.MagicMock(shape=(1, 4))
    name = recorder.module.__name__
    stand_ins = {
        name: FakeModule(recorder),
        "torch": torch,
        "safetensors.torch": mock.MagicMock(**{"load_file.return_value": loaded}),
    }
    options = {"tf32": False, "optimization_level": 3, "workspace_mib": 64}
    options["hardware_compatibility"] = "none" if target == "tensorrt-rtx" else "ampere-plus"
    script = script_for_tensorrt(name, {"options": options}) + "assert np.array_equal(found, expected)\n"
    for dtype in execution.TYPES:
        recorder.has(recorder.module.DataType, dtype)
    recorder.parses = True  # type: ignore[attr-defined]
    shown = io.StringIO()
    with mock.patch.dict(sys.modules, stand_ins), contextlib.redirect_stdout(shown):
        exec(compile(script, "reproduce.py", "exec"), {"__name__": "__main__"})


def names_in_our_code() -> set[str]:
    """Every attribute that our code takes of what may be an object of TensorRT."""
    found = set()
    for module in (attention, build, timing_cache, plan, session, execution, log):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute):
                root = node.value
                while isinstance(root, ast.Attribute | ast.Call):
                    root = root.value if isinstance(root, ast.Attribute) else root.func
                if isinstance(root, ast.Name) and root.id in ROOTS:
                    found.add(node.attr)
                # self._context.NAME
                if isinstance(node.value, ast.Attribute) and node.value.attr in ROOTS:
                    found.add(node.attr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("module")
    parser.add_argument("target")
    parser.add_argument("--without")
    parser.add_argument("--bundle", type=Path)
    options = parser.parse_args()
    recorder = run(importlib.import_module(options.module), options.target, options.without)
    run_script(recorder, options.target)
    if options.bundle is not None:
        run_sessions(recorder, options.bundle, options.target)
    unused = sorted(names_in_our_code() - recorder.used)
    print(
        json.dumps(
            {"problems": sorted(set(recorder.problems)), "used": sorted(recorder.used), "unused": unused}
        )
    )


if __name__ == "__main__":
    main()
