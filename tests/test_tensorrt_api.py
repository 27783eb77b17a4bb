"""Our TensorRT code against the names and arguments of three versions."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artefacts import Artefacts
from conftest import ratio_2_and_any_ratio

sys.path.insert(0, str(Path(__file__).parent))
from tensorrt_api import STUB

SCRIPT = Path(__file__).parent / "tensorrt_api.py"
# The oldest and the newest that the target `tensorrt` is meant for.
VERSIONS = ("10.16.1.11", "11.4.0.106")
# Ours, or of objects of our own.
NOT_OF_TENSORRT = {"__class__", "__init__", "message", "load", "store", "items", "bottleneck_size", "ratio"}
OF_RTX_ONLY = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
OF_RTX_ONLY |= {
    "set_execution_context_allocation_strategy",
    "CudaGraphStrategy",
    "WHOLE_GRAPH_CAPTURE",
    "cuda_graph_strategy",
    "create_runtime_config",
    "create_runtime_cache",
    "set_runtime_cache",
    "DynamicShapesKernelSpecializationStrategy",
    "dynamic_shapes_kernel_specialization_strategy",
}


@pytest.fixture(scope="module")
def bindings(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """The environment in which a version's bindings can be imported: no library of NVIDIA is in it."""

    def fetch(version: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp(f"bindings-{version}")
        wheel = f"tensorrt-cu13-bindings=={version}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(folder),
            wheel,
        ]
        subprocess.run(command, check=True)
        zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder / "site")
        (folder / "stub.c").write_text(STUB)
        major = version.split(".")[0]
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            library = f"lib{name}.so.{major}"
            compiler = ["cc", "-shared", "-fPIC", "-o", str(folder / library), f"-Wl,-soname,{library}"]
            subprocess.run([*compiler, str(folder / "stub.c")], check=True)
        paths = [str(folder / "site"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        return {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    return fetch


@pytest.fixture(scope="module")
def with_engines(artefacts: Artefacts, small_bundle: Path) -> Path:
    """A bundle with an engine of ratio 2 and one for every ratio."""
    return ratio_2_and_any_ratio(artefacts, small_bundle)


def _compare(module: str, target: str, environment: dict[str, str], *options: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), module, target, *options]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_and_argument_is_one_of_tensorrt(
    version: str, bindings: Callable[[str], dict[str, str]], with_engines: Path
) -> None:
    environment = bindings(version)
    found = _compare("tensorrt_bindings", "tensorrt", environment, "--bundle", str(with_engines))
    assert found["problems"] == []
    assert set(found["unused"]) <= NOT_OF_TENSORRT | OF_RTX_ONLY, "names that no option of ours reaches"


def test_every_name_and_argument_is_one_of_tensorrt_for_rtx(with_engines: Path, tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    found = _compare("tensorrt_rtx", "tensorrt-rtx", cache, "--bundle", str(with_engines))
    assert found["problems"] == []
    assert found["used"]
    assert not OF_RTX_ONLY & set(found["unused"])


@pytest.mark.parametrize(
    "name", ["IBuilderConfig.set_memory_pool_limit", "BuilderFlag.TF32", "tensorrt_rtx.OnnxParser"]
)
def test_a_name_that_goes_is_found(name: str) -> None:
    found = _compare("tensorrt_rtx", "tensorrt-rtx", {}, "--without", name)
    owner, _, attribute = name.partition(".")
    assert f"{owner} has no {attribute}" in found["problems"]
