"""The wheel: installed into an environment of its own, it builds from another folder."""

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from command_line import process_environment
from documented import REPOSITORY

from variator_export import __version__


def test_an_installed_wheel_builds_from_elsewhere(small_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("variator_export", "recipes"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"variator_export-{__version__}-py3-none-any.whl"
    shutil.rmtree(source)

    own = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(own)], check=True)
    (site,) = own.glob("lib/python3*/site-packages")
    # The dependencies of this environment, without its own installation of the package.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*pip, "--python", str(own), "install", "--no-deps", str(wheel)], check=True)

    def run(*command: str) -> str:
        environment = process_environment() | {"PATH": f"{own / 'bin'}:/usr/bin:/bin"}
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout

    where = run("python", "-c", "import variator_export; print(variator_export.__file__)")
    assert Path(where.strip()).is_relative_to(own)
    assert "minilm" in run("variator-export", "build", "minilm", "--show-recipe")
    find = "from variator_export.model.source import resolve_source; "
    shipped = run("python", "-c", f"{find}print(resolve_source('recipes:t5-demo/model').folder)").strip()
    assert {path.name for path in Path(shipped).iterdir()} >= {
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    command = ["variator-export", "build", "--backbone", str(small_model("bert")), "--untrained"]
    run(*command, "--ratio", "2", "--target", "onnxruntime", "--no-speed", "--output", "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert [variant["ratio"] for variant in manifest["variants"]] == [1, 2]
    install = json.loads(run("variator-export", "doctor", "--format", "json"))["extras"]
    assert {extra["install"] for extra in install if extra["name"] == "train"} == {
        f"pip install '{wheel}[train]'"
    }
