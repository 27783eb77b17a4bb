"""Installed packages, this machine, and how to install missing packages. Imports none of the packages."""

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from variator_export.core.errors import UserError

DISTRIBUTION = "variator-export"

# Distributions whose version can change the bytes of a bundle.
GRAPH_DISTRIBUTIONS = (
    "torch",
    "transformers",
    "tokenizers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "safetensors",
    "numpy",
)


def installed_version(distribution: str) -> str | None:
    """The version of a distribution, or None if the distribution is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(*distributions: str) -> dict[str, str | None]:
    """Versions by distribution; None for a distribution that is not installed."""
    return {name: installed_version(name) for name in distributions}


def platform_tag() -> str:
    """The platform that the last bit of a result depends on: system, processor family and Python."""
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{platform.system()}-{platform.machine()}-python{python}"


def install_command(extra: str) -> str:
    """The command that installs an extra of this package, from where the package itself was installed."""
    return f"pip install {_requirement(extra)}"


def _requirement(extra: str) -> str:
    """This package with an extra, as pip recorded its origin (PEP 610): a folder, a file, a repository.

    Without a record, the package came from an index.
    """
    named = f"{DISTRIBUTION}[{extra}]"
    try:
        origin = json.loads(
            importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json") or "{}"
        )
        url, version_control = str(origin["url"]), origin.get("vcs_info")
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return f"'{named}'"
    if version_control is not None:
        return f"'{named} @ {version_control['vcs']}+{url}@{version_control['commit_id']}'"
    path = unquote(urlsplit(url).path) if url.startswith("file:") else None
    if path is None:
        return f"'{named} @ {url}'"
    editable = "--editable " if (origin.get("dir_info") or {}).get("editable") else ""
    return f"{editable}'{path}[{extra}]'"


def is_importable(module: str) -> bool:
    """Whether a module can be imported, as far as can be determined without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def require(module: str, extra: str, purpose: str) -> None:
    """Raise a `UserError` with the install command if a module is missing."""
    if not is_importable(module):
        raise UserError(
            f"{purpose} needs the Python package {module.split('.')[0]}, which is not installed here.",
            f"Install it with: {install_command(extra)}",
        )


def require_export() -> None:
    """Raise a `UserError` unless all packages needed to export graphs are installed."""
    for module in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript"):
        require(module, "export", "Exporting graphs")


def require_onnxruntime() -> str:
    """The installed ONNX Runtime distribution.

    Raises:
        UserError: No distribution is installed, or two are, which overwrite each other's files.
    """
    found = [name for name in ("onnxruntime", "onnxruntime-gpu") if installed_version(name)]
    if len(found) > 1:
        raise UserError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files.",
            "Keep one: pip uninstall -y onnxruntime onnxruntime-gpu, then "
            f"{install_command('onnxruntime')} or {install_command('onnxruntime-gpu')}",
        )
    if not found:
        require("onnxruntime", "onnxruntime", "Running ONNX graphs")
        raise UserError(
            "A module onnxruntime exists, but no distribution onnxruntime or onnxruntime-gpu is installed.",
            f"Install one: {install_command('onnxruntime')}",
        )
    return found[0]


# The CPU's instructions for products of 8-bit integers: VNNI on x86, dot products and matrices on ARM.
_INT8_INSTRUCTIONS = ("avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm")
# Those for products in bfloat16: AVX-512 and AMX on x86, dot products and matrices on ARM.
_BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def _cpu_info(*keys: str) -> str | None:
    """The first value of one of these keys in /proc/cpuinfo; None if there is none."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in keys:
                return value.strip()
    return None


def _instructions(wanted: Sequence[str]) -> list[str] | None:
    """Which of these instructions the CPU has; None if they are unknown."""
    flags = _cpu_info("flags", "Features")
    return None if flags is None else [name for name in wanted if name in flags.split()]


def default_threads() -> int | None:
    """The number of threads that `OMP_NUM_THREADS` requests; None if it holds no positive number.

    PyTorch honours the variable. ONNX Runtime and OpenVINO do not by themselves, and would use cores that are
    not allotted to this container or this worker. Callers use all cores for None.
    """
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) > 0 else None


def conditions() -> dict[str, Any]:
    """Conditions that affect a measurement and may change between runs. Unknown values are None."""
    return {
        "cpu_clock_mhz": _cpu_clocks(),
        "cpu_governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": _gpus(),
    }


def _cpu_clocks() -> list[float] | None:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    return [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")] or None


def _first_line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


def _gpus() -> list[str] | None:
    """Name, driver and clocks of each GPU, as reported by nvidia-smi."""
    fields = "name,driver_version,clocks.sm,clocks.mem"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip().splitlines()


def machine() -> dict[str, Any]:
    """A description of this machine, stored with measurements. Unknown values are None."""
    return {
        "cpu": _cpu_info("model name") or platform.processor() or None,
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "int8_instructions": _instructions(_INT8_INSTRUCTIONS),
        "bfloat16_instructions": _instructions(_BFLOAT16_INSTRUCTIONS),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
