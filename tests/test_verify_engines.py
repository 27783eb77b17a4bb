"""Verifying engines, as far as a machine without a GPU can tell. No engine runs here.

Where an engine would run, its graph runs on ONNX Runtime: what is tested is what is looked at, what is
recorded, and who believes the record.
"""

import json
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest
from artefacts import Artefacts
from command_line import call
from conftest import ratio_2_and_any_ratio
from host_gpu import HostGpu, OpenGraph
from test_report import page_text

from variator_export import Bundle, UserError
from variator_export.benchmark.bundle_benchmark import bench
from variator_export.building.compile_engines import compile_engines, merge_engines
from variator_export.building.steps.engines import EngineOrder
from variator_export.bundle.engine_records import ENGINE_RECORDS, read_records
from variator_export.bundle.files import BundleFiles
from variator_export.cli.verification_files import junit_xml, markdown
from variator_export.core.gpu import Gpu
from variator_export.engines import choice
from variator_export.engines.compatibility import TargetMachine
from variator_export.engines.layers import EnginePrecision, precision_in_engine
from variator_export.engines.onnxruntime.session import OnnxRuntimeSession
from variator_export.engines.request import EngineRequest, Profile
from variator_export.engines.tensorrt import debug_engine, session
from variator_export.engines.tensorrt.building.builder_process import build_engine
from variator_export.engines.tensorrt.session import TensorRtSession
from variator_export.engines.tensorrt.target import TensorRtTarget
from variator_export.graph.defaults import load_without_defaults
from variator_export.graph.modules import module_outputs
from variator_export.recipe.recipe import EngineRecipe, ShapeSet
from variator_export.reporting.bundle_report import report
from variator_export.verification import runs as verify_targets
from variator_export.verification.bundle_verification import Verification, store_verification, verify
from variator_export.verification.invariances import EQUAL_ROWS, ROW_ALONE, ROW_ORDER
from variator_export.verification.judging.judge import REFERENCE

TARGET = "tensorrt-rtx"
Plant = Callable[[ir.Model], None]


class GraphInItsPlace(TensorRtSession):
    """A session whose engine is replaced by the graph, before anything of TensorRT is opened."""

    factor = 1.0
    kind = "FP32"

    def __init__(self, bundle: BundleFiles, target: str, variant: str | None, **_: Any) -> None:
        self._bundle, self._shapes = bundle, {}
        self._name = variant
        _, sidecar = choice.choose_engine(bundle, target, variant or "any-ratio")
        self._profiles = [Profile.model_validate(profile) for profile in sidecar["profiles"]]
        if variant is None:
            self._profiles = [p.model_copy(update={"shapes": _of_inputs(p)}) for p in self._profiles]
        self._graphs_session = OnnxRuntimeSession(bundle)

    def layers(self) -> list[Any]:
        """As TensorRT lists them: one for each product of the graph, but for one that it does not name."""
        graph = ir.load(self._bundle.path / "ratio-2.onnx").graph
        nodes = [node for node in graph if node.op_type in ("MatMul", "Gemm", "Attention")]
        told = [{"Name": "a reformat", "Inputs": [], "Metadata": ""}, "a name alone"]
        for node in nodes[1:]:
            inputs = [{"Name": "x", "Format/Datatype": f"Row major linear {self.kind}"}]
            inputs.append({"Name": "shape", "Format/Datatype": "Row major linear Int64"})
            told.append({"Inputs": inputs, "Metadata": f"[ONNX Layer: {node.name}]\u001e[ONNX Layer: bias]"})
        return told

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        ratio: int | str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        found = self._graphs_session.run(inputs, ratio or self._name or 1, outputs)
        return {name: self.factor * array for name, array in found.items()}


def _of_inputs(profile: Profile) -> dict[str, Any]:
    return {name: shapes for name, shapes in profile.shapes.items() if not name.startswith("plugin.")}


@pytest.fixture(scope="module")
def compiled(artefacts: Artefacts, small_bundle: Path) -> Path:
    return ratio_2_and_any_ratio(artefacts, small_bundle)


@pytest.fixture
def bundle(compiled: Path, tmp_path: Path) -> Path:
    shutil.copytree(compiled, tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    found = Gpu("NVIDIA of the test", "sm89")
    place = TargetMachine("this machine", "sm89", {TARGET: "1.7.1.116"})
    for module in (session, verify_targets):
        monkeypatch.setattr(module, "first_gpu", lambda: found)
    monkeypatch.setattr(choice, "this_machine", lambda: place)
    real = TensorRtTarget.open_engine

    def open_engine(self: TensorRtTarget, bundle: BundleFiles, variant: str | None, options: Any) -> Any:
        """`verify` opens what nobody has verified; sessions of users are real."""
        in_its_place = options.allow_unverified
        return (
            GraphInItsPlace(bundle, self.name, variant)
            if in_its_place
            else real(self, bundle, variant, options)
        )

    monkeypatch.setattr(TensorRtTarget, "open_engine", open_engine)
    return found


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Plant], list[EngineRequest]]:
    """Give all engines a fault; gives the requests of the engines that are built."""

    def plant(fault: Plant) -> list[EngineRequest]:
        requests, graphs = [], {}

        def build(request: EngineRequest, folder: Path, tell: Any) -> bytes:
            plan = build_engine(request, folder, tell)
            model = ir.load(folder / request.graph)
            ir.external_data.load_to_model(model)
            fault(model)
            graphs[plan.content] = ir.to_proto(model).SerializeToString()
            requests.append(request)
            return plan

        device = HostGpu()
        monkeypatch.setattr(GraphInItsPlace, "factor", 1.01)
        monkeypatch.setattr(debug_engine, "build_engine", build)
        monkeypatch.setattr(debug_engine, "CudaDevice", lambda: device)
        monkeypatch.setattr(debug_engine, "OpenPlan", lambda _, plan, *__: OpenGraph(graphs[plan], device))
        return requests

    return plant


def _verified(bundle: Path, variants: list[int] | None = None) -> Verification:
    result = verify(bundle, variants, target=TARGET, reference="stored")
    store_verification(result)
    return result


def _states(bundle: Path) -> dict[str, str]:
    opened = Bundle.load(bundle)
    return {entry.variant: opened.engine_status(entry) for entry in opened.manifest.engines}


def test_engines_are_not_verified_without_a_gpu(compiled: Path) -> None:
    result = call("verify", str(compiled), "--target", TARGET)
    assert result.returncode == 1
    assert "CUDA's driver finds no GPU on this machine" in result.stderr


@pytest.mark.usefixtures("gpu")
def test_two_engines_are_open_at_a_time(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds the weights of the model."""
    compile_engines(bundle, EngineOrder(EngineRecipe(), (TARGET,), ("ratio-3", "ratio-4")))
    opening, alive, most = TensorRtTarget.open_engine, weakref.WeakSet[Any](), [0]

    def counted(self: TensorRtTarget, *arguments: Any) -> Any:
        found = opening(self, *arguments)
        alive.add(found)
        most[0] = max(most[0], len(alive))
        return found

    monkeypatch.setattr(TensorRtTarget, "open_engine", counted)
    result = _verified(bundle)
    assert result.passed
    assert len(result.graphs) == 4
    assert most == [2]


@pytest.mark.usefixtures("gpu")
def test_what_a_gpu_has_verified_runs_there_and_nowhere_else(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _verified(bundle)
    assert not result.failures
    assert (result.gpu, result.ran) == ("NVIDIA of the test", f"as engines of {TARGET} on NVIDIA of the test")
    engines = {Path(name).stem for name in result.graphs}
    assert engines == {"ratio-2", "any-ratio"}, "ratio 3 and 4 have no engine of their own"
    assert {f.question.graph for f in result.findings["ratio-3"]} == {
        name for name in result.graphs if name.endswith("any-ratio.engine")
    }
    own = result.precisions["ratio-2"]
    assert 0.9 < own.asked < 1
    assert (own.other, own.unknown) == (0, pytest.approx(1 - own.asked))
    assert [r.precision is not None for r in read_records(bundle)].count(True) == 1
    for state in _states(bundle).values():
        assert state.startswith("verified on NVIDIA of the test (20")
        assert "times the error of eager PyTorch, allowed 4" in state
    page = report(bundle).page.read_text(encoding="utf-8")
    assert page.count("1.7.1.116 portable: verified on NVIDIA of the test (20") == 2
    assert f"verify {bundle.name} --target {TARGET}" in page
    assert "verified on NVIDIA of the test" in call("doctor", str(bundle), "--format", "json").stdout
    with pytest.raises(
        UserError, match=r"CUDA sees no GPU here: \w.* \(cudaError\w+\)"
    ):  # the next thing after the record
        Bundle.load(bundle).session(TARGET, 2)
    monkeypatch.setattr(session, "first_gpu", lambda: Gpu("another NVIDIA", "sm89"))
    with pytest.raises(
        UserError, match=r"verified on NVIDIA of the test .*, and this is another NVIDIA"
    ) as raised:
        Bundle.load(bundle).session(TARGET, 2)
    assert f"verify {bundle} --target {TARGET}" in str(raised.value.hint)


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_is_wrong_is_recorded_and_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _verified(bundle)
    monkeypatch.setattr(GraphInItsPlace, "factor", 1.01)
    assert _verified(bundle, [2]).failures
    page = page_text(report(bundle).page.read_text(encoding="utf-8"))
    assert "verification FAILED" in page, "though the graphs passed"
    assert f"Verification of ratio-2 on {TARGET} FAILED at 20" in page
    assert f"ratio-2, {TARGET} " in page
    states = _states(bundle)
    assert all(state.startswith("FAILED its verification on NVIDIA of the test") for state in states.values())
    with pytest.raises(UserError, match="FAILED its verification on NVIDIA of the test"):
        Bundle.load(bundle).session(TARGET, 2)
    monkeypatch.setattr(GraphInItsPlace, "kind", "FP16")
    monkeypatch.setattr(GraphInItsPlace, "factor", 1.0)
    result = _verified(bundle, [2])
    assert (result.failures, result.passed) == ([], False)
    assert re.match(r"\d+\.\d% of its .* in another type, TensorRT reports", result.imprecise["ratio-2"])
    assert _states(bundle)["ratio-2"].startswith("FAILED")
    (failure,) = ElementTree.fromstring(junit_xml(result).encode()).iter("failure")
    assert failure.get("message") == result.imprecise["ratio-2"]
    with pytest.raises(UserError, match="no engine of ratio-1 for tensorrt-rtx"):  # the baseline comes along
        bench(bundle, [(1, 8)], [2], runtimes=[TARGET])


@pytest.mark.usefixtures("gpu")
def test_an_engine_of_every_ratio_has_passed_when_every_ratio_has(bundle: Path) -> None:
    _verified(bundle, [2])
    states = _states(bundle)
    assert states["ratio-2"].startswith("verified on")
    assert states["any-ratio"] == "built, not verified on a device"


@pytest.mark.usefixtures("gpu")
def test_a_record_is_of_one_engine_and_goes_along_with_it(
    bundle: Path, compiled: Path, tmp_path: Path
) -> None:
    _verified(bundle)
    other = tmp_path / "other"
    shutil.copytree(compiled, other)
    assert not read_records(other)
    assert not merge_engines(other, [bundle]).published, "the engines are the same"
    assert _states(other) == _states(bundle)
    content = json.loads((other / ENGINE_RECORDS).read_text())
    for entry in content["engines"]:
        entry["sha256"] = "0" * 64
    (other / ENGINE_RECORDS).write_text(json.dumps(content))
    assert set(_states(other).values()) == {"built, not verified on a device"}
    (other / ENGINE_RECORDS).write_text("{")
    assert set(_states(other).values()) == {"built, not verified on a device"}


@pytest.mark.usefixtures("gpu")
def test_what_an_engine_has_no_profile_for_is_left_out_and_said(small_bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "narrow"
    shutil.copytree(small_bundle, folder)
    narrow = {"one": ShapeSet(batch_size=(1, 1, 1), sequence_length=(1, 16, 64))}
    compile_engines(folder, EngineOrder(EngineRecipe(profiles=narrow), (TARGET,), ("ratio-2",)))
    result = _verified(folder, [2])
    assert not result.failures
    rows = {f.question.input_shape[0] for f in result.findings["ratio-2"]}
    assert rows == {1}
    left_out = {left.check: left.what for left in result.left_out["ratio-2"]}
    assert {REFERENCE, EQUAL_ROWS, ROW_ORDER, ROW_ALONE} == left_out.keys()
    assert {"real text", "unusual text", "a row of padding"} <= {*left_out[REFERENCE]}
    assert left_out[EQUAL_ROWS] == ("it takes one row at a time",)
    suites = ElementTree.fromstring(junit_xml(result).encode())
    skipped = [case.get("message") or "" for case in suites.iter("skipped")]
    assert (suites.get("skipped"), len(skipped)) == ("4", 4)
    assert skipped[1] == "left out: it takes one row at a time"
    assert "## Left out" in markdown(result)
    assert json.loads(json.dumps(result.as_dict()))["left_out"]["ratio-2"][0]["check"] == REFERENCE
    page = page_text(report(folder).page.read_text(encoding="utf-8"))
    assert "equal rows in, equal rows out it takes one row at a time" in page
    too_long = {"long": ShapeSet(batch_size=(32, 32, 32), sequence_length=(64, 64, 64))}
    compile_engines(folder, EngineOrder(EngineRecipe(profiles=too_long), (TARGET,), ("ratio-2",)))
    with pytest.raises(UserError, match=r"None of the .* cases is within the profiles"):
        _verified(folder, [2])


def test_types_of_layers_are_counted_by_the_products_that_went_into_them() -> None:
    def layer(nodes: str, *formats: str) -> dict[str, Any]:
        inputs = [{"Name": "x", "Format/Datatype": text} for text in formats]
        return {"Inputs": inputs, "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in nodes)}

    macs = {"a": 50, "b": 30, "c": 15, "d": 5}
    layers = [layer("ab", "Half", "Int32"), layer("c", "FP16", "Row major linear FP32"), layer("z", "Float")]
    assert precision_in_engine(layers, macs, "float16") == EnginePrecision(0.8, 0.0, 0.2)
    layers[0] = layer("ab", "BFloat16")
    assert precision_in_engine(layers, macs, "float16") == EnginePrecision(0.0, 0.8, 0.2)
    assert precision_in_engine(["gemm", layer("z", "Half")], macs, "float16") is None
    assert precision_in_engine([], {}, "float32") is None


def _scale(bundle: Path, module: str) -> Plant:
    """What leaves a module is 1.01 times what it should be."""
    names = {
        module_outputs(load_without_defaults(bundle / name))[module]
        for name in ("ratio-2.onnx", "any-ratio.onnx")
    }

    def fault(model: ir.Model) -> None:
        values = ir.convenience.create_value_mapping(model.graph)
        (value,) = (values[name] for name in names if name in values)
        factor = ir.tensor(np.array(1.01, np.float32).astype(value.dtype.numpy()), name="factor")
        constant = ir.node("Constant", [], {"value": factor})
        scaled = ir.node("Mul", [value, constant.outputs[0]])
        scaled.outputs[0].type = value.type
        ir.convenience.replace_all_uses_with(value, scaled.outputs[0], replace_graph_outputs=True)
        scaled.replace_input_with(0, value)
        scaled.outputs[0].name, value.name = value.name, "before"
        model.graph.insert_after(value.producer(), [constant, scaled])

    return fault


@pytest.mark.parametrize(
    "module",
    [
        "encoder.layer.1.attention.self",
        "encoder.layer.0.intermediate.plugin.decompress",
        "encoder.layer.1.intermediate.plugin.compress",  # reads a boolean mask and, of any-ratio, a shape
    ],
)
@pytest.mark.usefixtures("gpu")
def test_the_module_is_named_at_which_an_engine_goes_wrong(
    bundle: Path, tmp_path: Path, planted: Callable[[Plant], list[EngineRequest]], module: str
) -> None:
    requests = planted(_scale(bundle, module))
    folder = tmp_path / "fault"
    result = verify(bundle, [2], target=TARGET, profile_shapes="none", reproduction=folder)
    assert f"the first module that exceeds its budget is {module}" in markdown(result)
    assert [Path(b.graph).name for b in result.bisections] == ["ratio-2.engine", "any-ratio.engine"]
    for bisection in result.bisections:
        assert bisection.first is not None
        assert bisection.first.module == module
        assert bisection.outputs_failed
        assert len(bisection.modules) == bisection.num_modules > 30
    # As the engine of the bundle, but for the profile, of which one is enough, and for what it is called.
    (sidecar,) = bundle.glob("engines/*/*/*/ratio-2.json")
    first, built = requests[0], json.loads(sidecar.read_text())
    assert (first.target, first.options.tf32, first.compute_capabilities) == (TARGET, False, ())
    assert [profile.model_dump(mode="json") for profile in first.profiles] == built["profiles"][:1]
    assert [profile.name for profile in requests[-1].profiles] == ["2x5 default"]
    for engine in ("ratio-2.engine", "any-ratio.engine"):
        shown = subprocess.run(
            [sys.executable, "reproduce.py"],
            cwd=folder / "ratio-2" / engine,
            capture_output=True,
            text=True,
            check=False,
        )
        assert re.search(r"an engine was built; PyTorch \S+ sees no GPU to run it on", shown.stderr)


@pytest.mark.usefixtures("gpu")
def test_an_engine_that_is_right_when_it_is_built_again_is_said_to_be_the_fault(
    bundle: Path, tmp_path: Path, planted: Callable[[Plant], list[EngineRequest]]
) -> None:
    requests = planted(lambda _: None)
    result = verify(bundle, [2], target=TARGET, profile_shapes="none", reproduction=tmp_path / "fault")
    for bisection in result.bisections:
        assert bisection.first is None
        version = re.escape(f"built again, by {TARGET} 1.7.1")
        assert re.search(rf": {version}\S*, it is right: the fault is in this file", str(bisection))
    assert len(requests) == 4, "one with all values as outputs, and one with none"
