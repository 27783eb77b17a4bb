"""Engines from a finished bundle, joined from several machines, and which machine can run them."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from conftest import BLOCK, plugin_shapes
from signed import sign

from variator_export import Bundle, UserError
from variator_export.building.compile_engines import compile_engines, merge_engines
from variator_export.building.steps.engines import EngineOrder
from variator_export.bundle.engine_records import ENGINE_RECORDS, EngineRecord, records_document
from variator_export.bundle.reports import store_report
from variator_export.core.errors import UsageError
from variator_export.core.gpu import Gpu
from variator_export.core.hashing import sha256_file
from variator_export.engines import compatibility
from variator_export.engines.compatibility import TargetMachine, can_run, parse_machine
from variator_export.engines.request import EngineRequest, Profile, any_ratio_profiles
from variator_export.engines.tensorrt import api, target
from variator_export.engines.tensorrt.building.builder_process import build_engine
from variator_export.engines.tensorrt.building.timing_cache import TimingCache, timing_cache_path
from variator_export.engines.tensorrt.plan_header import plan_contradicts
from variator_export.recipe.builder_options import BuilderOptions
from variator_export.recipe.recipe import EngineRecipe, ShapeSet

SETS = {
    "interactive": ShapeSet(batch_size=(1, 1, 1), sequence_length=(1, 8, 16)),
    "batch": ShapeSet(batch_size=(1, 4, 8), sequence_length=(1, 16, 512)),
}


def _order(**options: Any) -> EngineOrder:
    only = options.pop("only", ("ratio-2",))
    jobs = options.pop("jobs", 1)
    return EngineOrder(EngineRecipe(profiles=SETS, **options), ("tensorrt-rtx",), only, jobs)


def _profiles(bundle: Bundle, plugin: tuple[int, int]) -> list[Profile]:
    backbone = bundle.manifest.backbone
    return any_ratio_profiles({"d": ShapeSet()}, backbone, backbone.part, plugin_shapes(plugin))


def test_one_engine_runs_every_ratio_with_a_profile_for_each_and_each_set_of_shapes(
    bundle_copy: Path,
) -> None:
    compile_engines(bundle_copy, _order(only=("any-ratio",)))
    bundle = Bundle.load(bundle_copy)
    (entry,) = bundle.engines("tensorrt-rtx", "any-ratio")
    sidecar = json.loads(bundle.file(entry.sidecar).read_text())
    names = [profile["name"] for profile in sidecar["profiles"]]
    assert names == [f"{k}x{5 if k > 1 else 1} {name}" for k in (1, 2, 3, 4) for name in SETS]
    shapes = sidecar["profiles"][5]["shapes"]  # ratio 3, batches
    assert shapes["plugin.compress.weight"] == [[2, 3, 3, 32]] * 3
    assert shapes["input_ids"] == [[1, 1], [4, 16], [8, 64]], "within the model's limit"
    engine = bundle.file(entry.engine)
    weights = (bundle_copy / "weights.safetensors").stat().st_size
    assert weights < engine.stat().st_size, "the weights are in it"
    assert sidecar["made_from"]["graph"] == bundle.manifest.files["any-ratio.onnx"].sha256


def test_an_image_with_tensorrt_alone_compiles(bundle_copy: Path) -> None:
    command = [
        "compile",
        str(bundle_copy),
        "--target",
        "tensorrt-rtx",
        "--variant",
        "ratio-2",
        "--format",
        "json",
    ]
    code = BLOCK + f"sys.argv[1:] = {command!r}\nfrom variator_export.cli.main import main\nmain()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    document = json.loads(result.stdout)
    assert [entry["variant"] for entry in document["engines"]] == ["ratio-2"]
    assert document["published"]
    again = json.loads(call(*command).stdout)
    assert (again["published"], again["steps"][0]["action"]) == (False, "reused")
    seconds = json.loads((bundle_copy / "reports" / "engines.json").read_text())
    assert seconds[document["engines"][0]["engine"]]["seconds"] > 0


def test_engines_for_several_gpus_are_built_side_by_side_and_merged(
    bundle_copy: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(bundle_copy, here)
    shutil.copytree(bundle_copy, there)
    compile_engines(here, _order(compute_capabilities=["sm89", "sm86+sm120"], jobs=2))
    compile_engines(there, _order(only=("ratio-3",)))
    merged = merge_engines(here, [there])
    assert {(e.platform, e.variant) for e in merged.engines} == {
        ("sm89", "ratio-2"),
        ("sm86+sm120", "ratio-2"),
        ("portable", "ratio-3"),
    }
    bundle = Bundle.load(here)
    bundle.check_all()
    assert not merge_engines(here, [there]).published
    # Another build finds the same engine by the same name.
    assert not compile_engines(here, _order(only=("ratio-3",))).published

    before = (here / "manifest.json").read_bytes()
    path = there / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["ratio-2.onnx"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is no copy of"):
        merge_engines(here, [there])
    assert (here / "manifest.json").read_bytes() == before


def test_two_different_engines_of_one_place_are_not_merged(bundle_copy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle_copy, other)
    compile_engines(bundle_copy, _order())
    wider = {"wide": ShapeSet(batch_size=(1, 16, 64), sequence_length=(1, 32, 64))}
    compile_engines(other, EngineOrder(EngineRecipe(profiles=wider), ("tensorrt-rtx",), ("ratio-2",)))
    with pytest.raises(UserError, match="have different engines engines/tensorrt-rtx"):
        merge_engines(bundle_copy, [other])


def test_equivalent_engines_are_merged_and_a_verified_one_is_kept(bundle_copy: Path, tmp_path: Path) -> None:
    """Builders do not promise equal bytes."""
    compile_engines(bundle_copy, _order())
    (entry,) = Bundle.load(bundle_copy).engines("tensorrt-rtx", "ratio-2")
    other = tmp_path / "other"
    shutil.copytree(bundle_copy, other)
    engine = other / entry.engine
    engine.write_bytes(engine.read_bytes() + b"0")
    path = other / entry.sidecar
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention": "fused", "kernels": None}))
    sign(other)
    assert not merge_engines(bundle_copy, [other]).published, "one is as good as the other"
    record = EngineRecord(sha256_file(engine), "NVIDIA L4", True, 1.0, 4.0, "8x16", "stored", "2026-01-01")
    store_report(other, ENGINE_RECORDS, records_document([record]), "nothing")
    assert merge_engines(bundle_copy, [other]).published
    assert sha256_file(bundle_copy / entry.engine) == sha256_file(engine)
    assert "verified on NVIDIA L4" in Bundle.load(bundle_copy).engine_status(entry)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compute-capability", "sm90"], "cannot build for sm90; it supports sm75, sm80"),
        (
            ["--strip-weights"],
            "strip_weights is not for the target tensorrt-rtx: it builds such engines only",
        ),
        (["--timing-cache", "use"], "timing_cache is not for the target tensorrt-rtx: it times no kernels"),
        (["--variant", "ratio-9"], "has no variant 'ratio-9'"),
        (["--compute-capability", "h100"], "--compute-capability 'h100' is not a compute capability"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_the_bundle_stays(
    small_bundle: Path, arguments: list[str], words: str
) -> None:
    before = (small_bundle / "manifest.json").read_bytes()
    result = call("compile", str(small_bundle), "--target", "tensorrt-rtx", *arguments)
    assert result.returncode in (1, 2)
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert (small_bundle / "manifest.json").read_bytes() == before


def test_what_a_target_cannot_do_is_refused_with_the_reason(
    small_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options, words in (
        ({"version_compatible": True}, "version_compatible is not for the target tensorrt-rtx"),
        ({"hardware_compatibility": "ampere-plus"}, "hardware_compatibility is not for the target"),
    ):
        with pytest.raises(UserError, match=words):
            compile_engines(small_bundle, _order(**options))
    monkeypatch.setattr(api, "installed_version", lambda _: "11.4.0.106")
    monkeypatch.setattr(target, "first_gpu", lambda: None)
    with pytest.raises(UserError, match="builds for the GPU of the machine, and CUDA's driver finds none"):
        compile_engines(small_bundle, EngineOrder(EngineRecipe(), ("tensorrt",)))
    both = EngineRecipe(version_compatible=True, strip_weights=True)
    with pytest.raises(UserError, match="version_compatible and strip_weights exclude each other"):
        compile_engines(small_bundle, EngineOrder(both, ("tensorrt",)))
    with pytest.raises(UserError, match="compute_capabilities is not for the target tensorrt"):
        compile_engines(
            small_bundle, EngineOrder(EngineRecipe(compute_capabilities=("sm89",)), ("tensorrt",))
        )
    portable = EngineRecipe(hardware_compatibility="ampere-plus")
    with pytest.raises(UserError, match="A timing cache belongs to one GPU, and CUDA's driver finds none"):
        compile_engines(small_bundle, EngineOrder(portable, ("tensorrt",), timing_cache="require"))


def test_gpus_in_another_order_are_the_same() -> None:
    recipe = EngineRecipe(compute_capabilities=("sm120+sm86", "sm86+sm120", "sm89+sm89"))
    assert recipe.compute_capabilities == ("sm86+sm120", "sm89")


def test_a_workspace_that_is_too_small_fails_in_the_builders_words(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    profiles = tuple(_profiles(bundle, (1, 1)))
    options = BuilderOptions(workspace_mib=1)
    request = EngineRequest(
        target="tensorrt-rtx", graph="any-ratio.onnx", what="any-ratio", profiles=profiles, options=options
    )
    with pytest.raises(UserError, match=r"built no engine for any-ratio.*OutOfMemory|within workspace limit"):
        build_engine(request, small_bundle)


def test_ctrl_c_ends_the_builder_and_leaves_the_bundle(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the builder runs; its process goes with the command."""
    before = (bundle_copy / "manifest.json").read_bytes()
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remember(*arguments: Any, **options: Any) -> Any:
        started.append(popen(*arguments, **options))
        monkeypatch.setattr(started[0], "communicate", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        return started[0]

    monkeypatch.setattr(
        "variator_export.engines.tensorrt.building.builder_process.subprocess.Popen", remember
    )
    with pytest.raises(KeyboardInterrupt):
        compile_engines(bundle_copy, _order())
    assert started[0].poll() is not None
    assert (bundle_copy / "manifest.json").read_bytes() == before
    assert not (bundle_copy.parent / f".{bundle_copy.name}.staging").exists()


def test_how_far_a_build_is_comes_from_the_builder(small_bundle: Path) -> None:
    told: list[tuple[str, int, int]] = []
    bundle = Bundle.load(small_bundle)
    profiles = tuple(_profiles(bundle, (2, 5)))
    request = EngineRequest(
        target="tensorrt-rtx", graph="any-ratio.onnx", what="any-ratio", profiles=profiles
    )
    build_engine(request, small_bundle, lambda *done: told.append(done))
    assert told
    phase, step, steps = told[-1]
    assert step == steps
    assert phase


OWN_VERSION, LATER_VERSIONS = ({"options": {"version_compatible": later}} for later in (False, True))
SIDECAR = {"target": "tensorrt", "version": "11.4.0.106", "platform": "sm90", **OWN_VERSION}
RTX = {"target": "tensorrt-rtx", "version": "1.7.1.116", "platform": "portable", **OWN_VERSION}


@pytest.mark.parametrize(
    ("sidecar", "machine", "words"),
    [
        (SIDECAR, "sm90,tensorrt-11.4", None),
        (SIDECAR, "sm90,tensorrt-11", None),
        (SIDECAR, "sm90,tensorrt-11.3", "built by tensorrt 11.4.0.106, and that machine has 11.3"),
        (SIDECAR, "sm80,tensorrt-11.4", "built for sm90, and that machine has sm80"),
        (SIDECAR, "sm90,tensorrt-rtx-1.7", "that machine has no tensorrt"),
        ({**SIDECAR, "platform": "ampere-plus"}, "sm120,tensorrt-11.4", None),
        ({**SIDECAR, "platform": "ampere-plus"}, "sm75,tensorrt-11.4", "built for sm80 and later"),
        ({**SIDECAR, **LATER_VERSIONS}, "sm90,tensorrt-11.5", None),
        (
            {**SIDECAR, **LATER_VERSIONS},
            "sm90,tensorrt-11.3",
            "built by tensorrt 11.4.0.106",
        ),
        (
            {**SIDECAR, **LATER_VERSIONS},
            "sm90,tensorrt-12.0",
            "built by tensorrt 11.4.0.106",
        ),
        (RTX, "sm89,tensorrt-rtx-1.7.1", None),
        (RTX, "sm90,tensorrt-rtx-1.7", "built for sm80, sm86, sm89, sm120, sm121"),
        (RTX, "sm75,tensorrt-rtx-1.7", "built for sm80, sm86, sm89, sm120, sm121"),
        ({**RTX, "platform": "sm75"}, "sm75,tensorrt-rtx-1.7", None),
        ({**RTX, "platform": "sm86+sm120"}, "sm120,tensorrt-rtx-1.7", None),
        ({**RTX, "platform": "sm86+sm120"}, "sm89,tensorrt-rtx-1.7", "built for sm86 and sm120"),
    ],
)
def test_which_machine_can_run_an_engine(sidecar: dict[str, Any], machine: str, words: str | None) -> None:
    verdict = can_run(sidecar, parse_machine(machine))
    assert verdict.runs is (words is None), verdict
    if words is not None:
        assert words in verdict.why
        assert verdict.remedy


def test_a_later_version_needs_the_lean_runtime() -> None:
    sidecar = {**SIDECAR, **LATER_VERSIONS, "cuda": "13"}
    verdict = can_run(sidecar, parse_machine("sm90,tensorrt-11.5"))
    assert verdict.runs
    assert "pip install tensorrt-lean-cu13-libs, version 11.4.0.106" in verdict.why
    assert "lean" not in can_run(sidecar, parse_machine("sm90,tensorrt-11.4")).why


def test_this_machine_and_machines_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_run(RTX, TargetMachine("this machine", None, {"tensorrt-rtx": "1.7.1.116"})).runs
    monkeypatch.setattr(compatibility, "first_gpu", lambda: Gpu("NVIDIA L4", "sm89"))
    assert can_run(RTX, compatibility.this_machine()).runs
    for text in ("h100", "sm90", "tensorrt-11.4", "sm86,sm89,tensorrt-11.4", ""):
        with pytest.raises(UsageError, match="--for"):
            parse_machine(text)


def test_doctor_says_what_an_engine_needs_and_sees_a_plan_of_another_kind(bundle_copy: Path) -> None:
    compile_engines(bundle_copy, _order())
    assert "does not run on this machine: this machine has no GPU" in call("doctor", str(bundle_copy)).stdout
    named = call("doctor", str(bundle_copy), "--for", "sm89,tensorrt-rtx-1.7", "--format", "json")
    (engine,) = json.loads(named.stdout)["bundle"]["engines"]
    assert (engine["variant"], engine["runs"], engine["remedy"]) == ("ratio-2", True, None)
    assert call("doctor", "--for", "sm89,tensorrt-rtx-1.7").returncode == 2

    plan = (bundle_copy / Bundle.load(bundle_copy).engines("tensorrt-rtx", "ratio-2")[0].engine).read_bytes()
    assert plan_contradicts(plan, "tensorrt-rtx", "1.7.1.116") is None
    assert plan_contradicts(plan, "tensorrt-rtx", "1.6.0.1") == "it was written by version 1.7.1.116"
    assert plan_contradicts(plan, "tensorrt", "11.4.0") == "it is a plan of tensorrt-rtx"
    assert plan_contradicts(b"PK" + plan, "tensorrt-rtx", "1.7.1") == "it is not a plan"


class _Cache:
    """A timing cache of which only the names of kernels matter."""

    def __init__(self, content: bytes) -> None:
        self.names = set(content.split())

    def combine(self, other: "_Cache", ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.names |= other.names
        return True

    def serialize(self) -> bytes:
        return b" ".join(sorted(self.names))


class _Config:
    """A builder configuration that holds a timing cache."""

    def __init__(self) -> None:
        self.cache: _Cache | None = None

    def create_timing_cache(self, content: bytes) -> _Cache | None:
        return None if content.startswith(b"broken") else _Cache(content)

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache
        return True

    def get_timing_cache(self) -> _Cache | None:
        return self.cache


def test_two_builds_share_a_timing_cache(tmp_path: Path) -> None:
    path = tmp_path / "times" / "gpu.cache"
    builds: list[tuple[TimingCache, _Config]] = [(TimingCache(path), _Config()) for _ in range(2)]
    for cache, config in builds:
        cache.load(config, must_exist=False)
    for name, (cache, config) in zip((b"first", b"second"), builds, strict=True):
        assert config.cache is not None
        config.cache.names.add(name)
        cache.store(config)
    assert path.read_bytes() == b"first second"
    assert sorted(p.name for p in path.parent.iterdir()) == ["gpu.cache", "gpu.lock"]
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match="refuses the timing cache"):
        TimingCache(path).load(_Config(), must_exist=True)
    path.unlink()
    with pytest.raises(UserError, match="There is no timing cache"):
        TimingCache(path).load(_Config(), must_exist=True)


def test_a_timing_cache_is_of_one_gpu_and_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    make: Callable[..., Path] = timing_cache_path
    path = make("NVIDIA H200", "13", "11.4.0.106")
    assert path == tmp_path / "variator-export/timing/NVIDIA_H200-cuda13-tensorrt11.4.0.106.cache"
    others = {make("NVIDIA L4", "13", "11.4.0.106"), make("NVIDIA H200", "12", "11.4.0.106")}
    assert path not in others | {make("NVIDIA H200", "13", "11.3.0.1")}
