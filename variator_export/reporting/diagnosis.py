"""Diagnosis of what this machine can build and run. Each module is imported in its own process."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from variator_export.bundle.manifest import EngineEntry
from variator_export.core.environment import conditions, is_importable, machine, require_onnxruntime
from variator_export.core.errors import UserError
from variator_export.core.extras import Extra, extras
from variator_export.core.gpu import Gpu, first_gpu
from variator_export.engines.compatibility import TargetMachine, Verdict, can_run, this_machine
from variator_export.engines.targets import TARGETS, engine_targets, find_engine_target
from variator_export.model.source import resolve_source
from variator_export.sessions import Bundle
from variator_export.verification.eager_bundle import backbone_of_bundle

# The timeout of a probe is long, because an import can take half a minute on a cold disk.
_TIMEOUT_SECONDS = 120
_PROBES = {
    "torch": "import torch as t; print(t.__version__, f'CUDA {t.version.cuda}', "
    "*[t.cuda.get_device_name(i) for i in range(t.cuda.device_count())], sep=', ')",
    "onnxruntime": "import onnxruntime as o; print(o.__version__, *o.get_available_providers(), sep=', ')",
    "openvino": "import openvino as o; print(o.__version__, *o.Core().available_devices, "
    "*o.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'), sep=', ')",
    **{target.module: target.probe for target in engine_targets().values()},
    "cuda.bindings": "import cuda.bindings as c; from cuda.bindings import runtime as r; "
    "error, n = r.cudaGetDeviceCount(); print(c.__version__, f'{n} GPUs' if n else error.name, sep=', ')",
}


@dataclass(frozen=True)
class Probe:
    """Result of importing a module.

    Attributes:
        module: Name of the module.
        works: Whether the module could be imported.
        answer: The module's version and devices, or the error.
    """

    module: str
    works: bool
    answer: str


@dataclass(frozen=True)
class Diagnosis:
    """Diagnosis of this machine.

    Attributes:
        machine: Processor, memory, operating system and Python.
        gpus: GPUs with driver and clocks as reported by nvidia-smi; None if nvidia-smi reports none.
        cuda_gpu: The GPU on which CUDA programs run, which engines are built for; None if there is none.
        extras: Extras of this package and whether their requirements are installed.
        probes: Results of importing the installed modules.
        bundle: What can be used of the bundle on this machine; None if no bundle was given.
        problems: Installed parts that do not work, each with a remedy.
    """

    machine: dict[str, Any]
    gpus: list[str] | None
    cuda_gpu: Gpu | None
    extras: list[Extra]
    probes: list[Probe]
    bundle: dict[str, Any] | None
    problems: list[str]


def diagnose(bundle: Path | None = None, place: TargetMachine | None = None) -> Diagnosis:
    """Inspect this machine, and a bundle on it.

    Args:
        bundle: The bundle's folder; None to inspect only the machine.
        place: The machine that the engines should run on; None for this machine.

    Raises:
        UserError: The folder holds no bundle, or a file of the bundle does not match its manifest.
    """
    opened = None
    if bundle is not None:
        opened = Bundle.load(bundle)
        opened.check_all()
    modules = [module for module in _PROBES if is_importable(module)]
    with ThreadPoolExecutor(max_workers=2) as pool:
        probes = list(pool.map(_probe, modules))
    found = extras()
    problems = [f"{probe.module} cannot be imported: {probe.answer}" for probe in probes if not probe.works]
    if is_importable("onnxruntime"):
        try:
            require_onnxruntime()
        except UserError as error:
            problems.append(f"{error.message} {error.hint}")
    for extra in found:
        wrong = [p for p in extra.dependencies if p.installed is not None and not p.fits]
        problems += [
            f"{part.distribution} {part.installed} is installed; {extra.name} needs {part.needed}. "
            f"{extra.install}"
            for part in wrong
        ]
    usable = None if opened is None else _look_at(opened, probes, place or this_machine())
    problems = list(dict.fromkeys(problems))
    return Diagnosis(machine(), conditions()["gpu"], first_gpu(), found, probes, usable, problems)


def _probe(module: str) -> Probe:
    command = [sys.executable, "-c", _PROBES[module]]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Probe(module, False, f"no answer within {_TIMEOUT_SECONDS} s")
    if ended.returncode < 0:
        return Probe(module, False, f"the process died of signal {-ended.returncode}")
    if ended.returncode > 0:
        lines = ended.stderr.strip().splitlines()
        return Probe(module, False, lines[-1] if lines else f"exit code {ended.returncode}")
    return Probe(module, True, ended.stdout.strip())


def _look_at(bundle: Bundle, probes: list[Probe], place: TargetMachine) -> dict[str, Any]:
    answers = {probe.module: probe.answer for probe in probes if probe.works}
    return {
        "path": str(bundle.path),
        "runs_on": [
            name
            for name, target in TARGETS.all().items()
            if target.runs_graphs(bundle, answers.get(target.module, ""))
        ],
        "backbone": _backbone(bundle),
        "machine": asdict(place),
        "engines": [_engine(bundle, entry, place) for entry in bundle.manifest.engines],
    }


def _engine(bundle: Bundle, entry: EngineEntry, place: TargetMachine) -> dict[str, Any]:
    """Describe an engine and whether a machine can run it. Only the header of the plan is read."""
    sidecar = bundle.sidecar(entry)
    wrong = find_engine_target(entry.target).contradiction(bundle.file(entry.engine), entry.version)
    if wrong is not None:
        remedy = "do not use this engine: get the bundle again from where it was built"
        verdict = Verdict(False, f"its sidecar says {entry.target} {entry.version}, and {wrong}", remedy)
    else:
        verdict = can_run(sidecar, place)
    names = ("target", "version", "platform", "variant", "part", "precision", "engine")
    named = {name: getattr(entry, name) for name in names}
    return {**named, "status": bundle.engine_status(entry), **asdict(verdict)}


def _backbone(bundle: Bundle) -> str:
    """Report whether the backbone is here, so that `verify` could compare with eager PyTorch."""
    entry = bundle.manifest.backbone
    try:
        resolve_source(backbone_of_bundle(bundle), entry.weights_sha256, cached=True)
    except UserError as error:
        return f"not here: {error.message}"
    return "here, with the weights that the bundle was built from"
