"""Sessions on engines, as far as a machine without a GPU can tell. None is run here."""

import dataclasses
import gc
import shutil
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from artefacts import Artefacts
from command_line import call
from conftest import BLOCK, plugin_shapes
from host_gpu import BoundContext, HostConfig, HostGpu, HostTensor

from variator_export import Bundle, UserError
from variator_export.building.compile_engines import compile_engines
from variator_export.building.steps.engines import EngineOrder
from variator_export.core.gpu import Gpu
from variator_export.engines import choice
from variator_export.engines.compatibility import TargetMachine
from variator_export.engines.request import Profile, any_ratio_profiles
from variator_export.engines.tensorrt import plan as opening
from variator_export.engines.tensorrt import session
from variator_export.engines.tensorrt.api import FLAVOURS
from variator_export.engines.tensorrt.execution import choose_profile
from variator_export.recipe.recipe import EngineRecipe, ShapeSet

SETS = {
    "interactive": ShapeSet(batch_size=(1, 1, 4), sequence_length=(1, 16, 64)),
    "batch": ShapeSet(batch_size=(1, 32, 32), sequence_length=(1, 64, 64)),
}


@pytest.fixture(scope="module")
def compiled(artefacts: Artefacts, small_bundle: Path) -> Path:
    order = EngineOrder(EngineRecipe(profiles=SETS), ("tensorrt-rtx",), ("ratio-2",))

    def make(folder: Path) -> None:
        shutil.copytree(small_bundle, folder, dirs_exist_ok=True)
        compile_engines(folder, order)

    return artefacts.folder("engines/sets", make)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = TargetMachine("this machine", "sm89", {"tensorrt-rtx": "1.7.1.116"})
    monkeypatch.setattr(choice, "this_machine", lambda: place)


def test_an_engine_that_does_not_run_here_is_not_replaced_by_anything(compiled: Path) -> None:
    bundle = Bundle.load(compiled)
    with pytest.raises(UserError, match=r"no engine of ratio-2 for this machine.*this machine has no GPU"):
        bundle.session("tensorrt-rtx", 2)
    with pytest.raises(UserError, match="no engine of ratio-3 for tensorrt-rtx") as raised:
        bundle.session("tensorrt-rtx", 3)
    assert "compile" in str(raised.value.hint)
    assert "--variant ratio-3" in str(raised.value.hint)
    with pytest.raises(UserError, match="no engine of any-ratio for tensorrt"):
        bundle.session("tensorrt")
    result = call("run", str(compiled), "--target", "tensorrt-rtx", "--ratio", "2", "--text", "Yes.")
    assert (result.returncode, "this machine has no GPU" in result.stderr) == (1, True)


@pytest.mark.usefixtures("on_a_gpu")
def test_an_engine_that_was_only_built_is_not_run_unless_that_is_asked_for(compiled: Path) -> None:
    bundle = Bundle.load(compiled)
    with pytest.raises(UserError, match="was built and never verified on a device") as raised:
        bundle.session("tensorrt-rtx", 2)
    assert "--allow-unverified" in str(raised.value.hint)
    with pytest.raises(UserError, match=r"CUDA sees no GPU here: \w.* \(cudaError\w+\)"):
        bundle.session("tensorrt-rtx", 2, allow_unverified=True)


def test_an_engine_needs_neither_torch_nor_transformers(compiled: Path) -> None:
    code = BLOCK + (
        "from variator_export import Bundle\n"
        "from variator_export.engines import choice\n"
        "from variator_export.engines.compatibility import TargetMachine\n"
        "place = TargetMachine('this machine', 'sm89', {'tensorrt-rtx': '1.7.1.116'})\n"
        "choice.this_machine = lambda: place\n"
        f"Bundle.load({str(compiled)!r}).session('tensorrt-rtx', 2, allow_unverified=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UserError: CUDA sees no GPU here" in result.stderr


@pytest.mark.usefixtures("on_a_gpu")
def test_a_plan_is_not_opened_before_it_is_what_its_sidecar_says(
    compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "CudaDevice", lambda: None)
    monkeypatch.setattr(opening, "load_tensorrt", lambda _: pytest.fail("the plan would have been opened"))
    folder = tmp_path / "small"
    shutil.copytree(compiled, folder)
    (entry,) = Bundle.load(folder).engines("tensorrt-rtx", "ratio-2")
    plan = bytearray((folder / entry.engine).read_bytes())
    plan[-1] ^= 1
    (folder / entry.engine).write_bytes(plan)
    with pytest.raises(UserError, match="has the sha256"):
        Bundle.load(folder).session("tensorrt-rtx", 2, allow_unverified=True)
    monkeypatch.setattr(opening, "plan_contradicts", lambda *_: "it is not a plan")
    with pytest.raises(UserError, match=r"its sidecar says tensorrt-rtx .*, and it is not a plan"):
        Bundle.load(compiled).session("tensorrt-rtx", 2, allow_unverified=True)


def test_the_profile_is_that_of_the_ratio_and_the_nearest_shape(small_bundle: Path) -> None:
    backbone = Bundle.load(small_bundle).manifest.backbone
    profiles = any_ratio_profiles(SETS, backbone, backbone.part, plugin_shapes((1, 1), (2, 5), (4, 5)))

    def chosen(batch: int, length: int, k: int, m: int) -> str:
        of_inputs = dict.fromkeys(backbone.inputs, (batch, length))
        plugin = {
            "compress.weight": (2, k, k, 32),
            "compress.bias": (2, k),
            "decompress.down.weight": (2, m, 64),
        }
        plugin |= {"decompress.down.bias": (2, m), "decompress.up.weight": (2, 32, m)}
        shapes = of_inputs | {f"plugin.{name}": shape for name, shape in plugin.items()}
        return profiles[choose_profile(profiles, shapes)].name

    assert chosen(1, 8, 4, 5) == "4x5 interactive"
    assert chosen(32, 64, 4, 5) == "4x5 batch"
    assert chosen(4, 64, 2, 5) == "2x5 batch"
    assert chosen(1, 64, 1, 1) == "1x1 interactive"
    for wrong in ((33, 8, 4, 5), (1, 65, 4, 5), (1, 8, 3, 5), (1, 8, 4, 64)):
        with pytest.raises(UserError, match=r"No profile of the engine is for the shapes.*4x5 batch \("):
            chosen(*wrong)
    one = [Profile(name="only", shapes={"input_ids": ((1, 1), (1, 8), (1, 16))})]
    assert choose_profile(one, {"input_ids": (1, 16)}) == 0


class _Context(BoundContext):
    """Gives each token its id in all 32 dimensions."""

    def get_tensor_shape(self, _: str) -> tuple[int, ...]:
        return (*self.shapes["input_ids"], 32)

    def compute(self, _: object, tensors: Mapping[str, HostTensor]) -> None:
        tensors["last_hidden_state"].values[...] = tensors["input_ids"].values[..., None]


class _Plan:
    """In the place of an open plan."""

    outputs = ("last_hidden_state",)
    input_types: Mapping[str, str] = {}
    trt = mock.MagicMock()

    def last_messages(self) -> str:
        return "out of memory"

    def __init__(self, gpu: HostGpu, profiles: Sequence[Profile] = ()) -> None:
        self.profiles = profiles
        self.made: list[weakref.ref[_Context]] = []
        self.refuses = False
        self.engine = types.SimpleNamespace(
            create_execution_context=lambda _: self._make(gpu),
            create_runtime_config=HostConfig,
            get_tensor_dtype=lambda _: types.SimpleNamespace(name="FLOAT"),
        )

    def _make(self, gpu: HostGpu) -> _Context | None:
        if self.refuses:
            return None
        context = _Context(gpu, self.profiles)
        self.made.append(weakref.ref(context))
        return context

    def alive(self) -> int:
        gc.collect()
        return sum(context() is not None for context in self.made)


def _ids(bundle: Bundle, value: int, length: int) -> dict[str, np.ndarray]:
    return dict.fromkeys(bundle.manifest.backbone.inputs, np.full((1, length), value, np.int64))


@pytest.mark.parametrize("records_itself", [False, True], ids=["stream", "context"])
@pytest.mark.parametrize("graphs", [False, True], ids=["no graphs", "graphs"])
@pytest.mark.usefixtures("on_a_gpu")
def test_each_call_has_its_own_inputs_and_holds_its_memory(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool, records_itself: bool
) -> None:
    gpu = HostGpu()
    plan = _Plan(gpu)
    monkeypatch.setattr(session, "open_engine", lambda *_, **__: plan)
    flavour = dataclasses.replace(FLAVOURS["tensorrt-rtx"], captures_cuda_graphs=records_itself)
    monkeypatch.setitem(FLAVOURS, "tensorrt-rtx", flavour)
    bundle = Bundle.load(compiled)

    def open_session() -> session.TensorRtSession:
        return session.TensorRtSession(
            bundle, "tensorrt-rtx", 2, allow_unverified=True, cuda_graphs=graphs, device=gpu
        )

    opened = open_session()
    for length in range(1, 13):
        for value in (3, 5):
            found = opened.run(_ids(bundle, value, length))["last_hidden_state"]
            assert found.shape == (1, length, 32)
            assert (found == value).all()
    assert gpu.replays == (24 if graphs and not records_itself else 0)
    assert plan.alive() == (8 if graphs else 1), "the last eight shapes are kept"
    opened.run(_ids(bundle, 1, 5))  # the oldest of them, which is the newest now
    made = len(plan.made)
    opened.run(_ids(bundle, 1, 1))
    opened.run(_ids(bundle, 1, 5))
    assert len(plan.made) == made + (1 if graphs else 0)
    prepared = opened.prepare(_ids(bundle, 7, 4))
    gc.collect()
    prepared()
    plan.refuses = True
    with pytest.raises(UserError, match=r"refused an execution context of engines/.*\n  out of memory"):
        open_session().run(_ids(bundle, 1, 4))


@pytest.fixture
def opened_on(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[session.TensorRtSession, HostGpu, _Plan]]:
    """A session on an engine of both sets of shapes, its device and what stands for the plan."""

    def open_session(
        *, records_itself: bool = False, **options: Any
    ) -> tuple[session.TensorRtSession, HostGpu, _Plan]:
        bundle, gpu = Bundle.load(compiled), HostGpu()
        (entry,) = bundle.engines("tensorrt-rtx", "ratio-2")
        profiles = [Profile.model_validate(found) for found in bundle.sidecar(entry)["profiles"]]
        plan = _Plan(gpu, profiles)
        monkeypatch.setattr(session, "open_engine", lambda *_, **__: plan)
        flavour = dataclasses.replace(FLAVOURS["tensorrt-rtx"], captures_cuda_graphs=records_itself)
        monkeypatch.setitem(FLAVOURS, "tensorrt-rtx", flavour)
        made = session.TensorRtSession(
            bundle, "tensorrt-rtx", 2, allow_unverified=True, device=gpu, **options
        )
        return made, gpu, plan

    return open_session


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("graphs", [False, True], ids=["no graphs", "graphs"])
def test_threads_share_a_session(
    opened_on: Callable[..., tuple[session.TensorRtSession, HostGpu, _Plan]], compiled: Path, graphs: bool
) -> None:
    opened, _, _ = opened_on(cuda_graphs=graphs)
    bundle = Bundle.load(compiled)

    def answers_are_their_own(value: int) -> bool:
        found = [opened.run(_ids(bundle, value, length)) for length in (4, 9, 4, 30) * 5]
        return all((each["last_hidden_state"] == value).all() for each in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(answers_are_their_own, range(1, 9)))


@pytest.mark.usefixtures("on_a_gpu")
def test_each_profile_has_a_context(
    opened_on: Callable[..., tuple[session.TensorRtSession, HostGpu, _Plan]], compiled: Path
) -> None:
    opened, _, plan = opened_on()
    names = Bundle.load(compiled).manifest.backbone.inputs
    for rows in (1, 32, 4, 32, 1):
        ids = np.full((rows, 16), rows, np.int64)
        assert (opened.run(dict.fromkeys(names, ids))["last_hidden_state"] == rows).all()
    assert len(plan.made) == 2, "one for each profile, and no change between them"
    assert plan.alive() == 2


def test_a_profile_for_one_shape_is_chosen_for_that_shape() -> None:
    ends = {"wide": ((1, 1), (32, 128), (64, 512)), "one": ((32, 128),) * 3, "other": ((1, 128),) * 3}
    profiles = [Profile(name=name, shapes={"input_ids": shapes}) for name, shapes in ends.items()]
    assert [profile.is_fixed for profile in profiles] == [False, True, True]
    for shape, fixed, name in (
        ((32, 128), True, "one"),
        ((32, 128), False, "wide"),
        ((32, 127), True, "wide"),
        ((1, 128), True, "other"),
        ((1, 128), False, "wide"),
    ):
        assert profiles[choose_profile(profiles, {"input_ids": shape}, fixed=fixed)].name == name
    with pytest.raises(UserError, match="No profile of the engine is for the shapes"):
        choose_profile(profiles[1:], {"input_ids": (1, 128)}, fixed=False)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_session_without_profiles_for_one_shape_needs_both_kinds(
    opened_on: Callable[..., tuple[session.TensorRtSession, HostGpu, _Plan]],
) -> None:
    with pytest.raises(UserError, match="has no profiles for one shape beside wide ones") as raised:
        opened_on(fixed_profiles=False)
    assert "engine.profiles" in str(raised.value.hint)


@pytest.mark.usefixtures("on_a_gpu")
def test_a_context_outlives_its_work(
    opened_on: Callable[..., tuple[session.TensorRtSession, HostGpu, _Plan]], compiled: Path
) -> None:
    for graphs, by_context in ((False, False), (True, False), (True, True)):
        opened, gpu, plan = opened_on(cuda_graphs=graphs, records_itself=by_context)
        bundle = Bundle.load(compiled)
        for length in range(1, 12):  # recordings are dropped while their work waits
            left = opened.run_on_device(_ids(bundle, 5, length))
        opened.prepare(_ids(bundle, 5, 3))()
        del opened
        assert plan.alive() == 0
        assert (gpu.download(left["last_hidden_state"]) == 5).all()


@pytest.mark.usefixtures("on_a_gpu")
def test_compiled_kernels_are_kept_for_the_next_process(
    opened_on: Callable[..., tuple[session.TensorRtSession, HostGpu, _Plan]],
    compiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = Bundle.load(compiled)

    def run() -> None:
        opened, _, _ = opened_on()
        opened.run(_ids(bundle, 3, 4))
        del opened
        gc.collect()

    run()
    (file,) = (tmp_path / "variator-export" / "kernels").iterdir()
    assert file.name.endswith("-a_GPU.cache")
    assert file.read_bytes() == b"kernels"
    before = file.stat().st_mtime_ns
    run()
    assert file.stat().st_mtime_ns == before, "nothing was compiled"
    file.write_bytes(b"of another version")
    run()
    assert file.read_bytes() == b"kernels"
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("no folder")
    with pytest.warns(UserWarning, match="Compiled kernels are not kept for the next process"):
        run()


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "LAZY"),
        ({"specialization": "none"}, "NONE"),
        ({"specialization": "eager"}, "EAGER"),
        ({"cuda_graphs": True}, "EAGER"),
    ],
    ids=str,
)
def test_kernels_are_compiled_for_shapes_when_the_caller_says(
    opened_on: Callable[..., tuple[session.TensorRtSession, HostGpu, _Plan]],
    compiled: Path,
    options: dict[str, Any],
    expected: str,
) -> None:
    opened, _, plan = opened_on(**options)
    HostConfig.made.clear()
    opened.run(_ids(Bundle.load(compiled), 3, 4))
    kinds = plan.trt.DynamicShapesKernelSpecializationStrategy
    (config,) = HostConfig.made
    assert config.dynamic_shapes_kernel_specialization_strategy is getattr(kinds, expected)


@pytest.mark.usefixtures("on_a_gpu")
def test_an_engine_that_cannot_be_recorded_says_so_and_runs(
    opened_on: Callable[..., tuple[session.TensorRtSession, HostGpu, _Plan]], compiled: Path
) -> None:
    opened, gpu, _ = opened_on(cuda_graphs=True)
    gpu.cannot_record = True
    with pytest.warns(UserWarning, match=r"runs without a CUDA graph on .*the stream cannot be recorded"):
        found = opened.run(_ids(Bundle.load(compiled), 3, 4))
    assert (found["last_hidden_state"] == 3).all()
    assert (opened.run(_ids(Bundle.load(compiled), 4, 4))["last_hidden_state"] == 4).all()
    assert gpu.replays == 0


@pytest.mark.usefixtures("on_a_gpu")
def test_a_later_tensorrt_needs_the_lean_runtime_of_the_builder(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(opening, "require_tensorrt", lambda _: "1.8.0.1")
    bundle = Bundle.load(compiled)
    (entry,) = bundle.engines("tensorrt-rtx", "ratio-2")
    sidecar = {**bundle.sidecar(entry), "cuda": "13"}
    with pytest.raises(
        UserError, match=r"was built by tensorrt-rtx 1\.7\.\S+, and 1\.8\.0\.1 is installed"
    ) as raised:
        opening.open_engine(bundle, entry, sidecar, lean_runtime=None)
    assert "pip install tensorrt-lean-cu13-libs, version 1.7.1" in str(raised.value.hint)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="There is no file"):
        opening.open_engine(bundle, entry, sidecar, lean_runtime=tmp_path / "missing.so")
    (tmp_path / "library.so").write_bytes(b"no library")
    with pytest.raises(UserError, match=f"cannot load the lean runtime {tmp_path}/library.so"):
        opening.open_engine(bundle, entry, sidecar, lean_runtime=Path("library.so"))
    monkeypatch.setattr(opening, "require_tensorrt", lambda _: "1.7.1")
    monkeypatch.setattr(opening, "OpenPlan", lambda *_, lean_runtime: lean_runtime)
    unused = opening.open_engine(bundle, entry, sidecar, lean_runtime=tmp_path / "library.so")
    assert unused is None, "TensorRT itself opens what it built"


def test_an_engine_of_the_installed_version_is_preferred(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.load(compiled)
    (entry,) = bundle.engines("tensorrt-rtx", "ratio-2")
    sidecar = bundle.sidecar(entry)
    later = {**sidecar["options"], "version_compatible": True}
    sidecars = {version: {**sidecar, "version": version, "options": later} for version in ("1.6.0", "1.7.0")}
    entries = [entry.model_copy(update={"version": version}) for version in sidecars]
    monkeypatch.setattr(bundle, "engines", lambda *_: entries)
    monkeypatch.setattr(bundle, "sidecar", lambda entry: sidecars[entry.version])
    for installed, chosen in (("1.7.0", "1.7.0"), ("1.6.0", "1.6.0"), ("1.8.0", "1.6.0")):
        place = TargetMachine("this machine", "sm89", {"tensorrt-rtx": installed})
        monkeypatch.setattr(choice, "this_machine", lambda place=place: place)
        assert choice.choose_engine(bundle, "tensorrt-rtx", "ratio-2")[0].version == chosen


def test_a_plan_that_does_not_open_is_refused_in_tensorrts_words(capfd: pytest.CaptureFixture[str]) -> None:
    """TensorRT for RTX itself refuses it; its own logger would write into standard output."""
    with pytest.raises(
        UserError, match=r"cannot open this plan. In its own words:\n  .*plan\.header"
    ) as raised:
        opening.OpenPlan("tensorrt-rtx", b"vtrt" + bytes(100), "this plan", "Build it again.")
    assert raised.value.hint == "Build it again."
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("on_a_gpu")
def test_another_gpu_than_the_first_is_refused(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "first_gpu", lambda: Gpu("another GPU", "sm89"))
    with pytest.raises(
        UserError, match="has made a GPU CUDA's current GPU, and the first one is another GPU"
    ):
        session.TensorRtSession(
            Bundle.load(compiled), "tensorrt-rtx", 2, allow_unverified=True, device=HostGpu()
        )
