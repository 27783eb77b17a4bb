"""`variator-export doctor`."""

from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from variator_export.cli.output import Format, Output
from variator_export.core.errors import UsageError
from variator_export.core.extras import Extra
from variator_export.engines.compatibility import parse_machine
from variator_export.reporting.diagnosis import Diagnosis, diagnose


def doctor_command(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="A bundle to check as well: its hashes, and whether it runs here."),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SM,TENSORRT",
            help="Check the bundle's engines for this GPU and TensorRT, for example sm90,tensorrt-11.4. "
            "Default: the current machine.",
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Show what is installed, what this machine can build and run, and how to install what is missing.

    The exit code is 1 if something installed does not work.

    **Examples**

    `variator-export doctor`

    `variator-export doctor artifacts/minilm --for sm89,tensorrt-rtx-1.7`

    `variator-export doctor artifacts/minilm --format json`
    """
    printer = Output(format)
    if machine is not None and bundle is None:
        raise UsageError(
            "--for checks the engines of a bundle, and no bundle was given.",
            f"variator-export doctor BUNDLE --for {machine}",
        )
    found = diagnose(bundle, parse_machine(machine) if machine is not None else None)
    if printer.is_json:
        extras = [{**asdict(extra), "state": extra.state} for extra in found.extras]
        printer.document({**asdict(found), "extras": extras})
    else:
        _print(printer, found)
    if found.problems:
        raise typer.Exit(1)


def _print(printer: Output, found: Diagnosis) -> None:
    machine = found.machine
    memory = machine["memory_bytes"] / 2**30
    printer.text(
        f"{machine['cpu']}, {machine['cpu_cores']} cores, {memory:.0f} GiB, Python {machine['python']}"
    )
    if machine["int8_instructions"] is not None:
        names = ", ".join(machine["int8_instructions"])
        printer.text(f"int8 instructions: {names or 'none: int8 bundles are right here, but gain little'}")
    if machine["bfloat16_instructions"] is not None:
        printer.text(f"bfloat16 instructions: {', '.join(machine['bfloat16_instructions']) or 'none'}")
    printer.text(f"GPUs: {'; '.join(found.gpus) if found.gpus else 'none found by nvidia-smi'}")
    gpu = found.cuda_gpu
    printer.text(f"CUDA programs run on: {f'{gpu.name}, {gpu.capability}' if gpu else 'no GPU'}")
    printer.text()
    table = Table(title="What this installation can do", title_justify="left")
    for name in ("purpose", "state", "installed", "to install"):
        table.add_column(name, overflow="fold")
    for extra in found.extras:
        parts = ", ".join(
            f"{p.distribution} {p.installed}" for p in extra.dependencies if p.installed is not None
        )
        # A Text, because Rich would parse the brackets in a string as markup.
        install = Text("" if extra.state == "ready" else extra.install)
        table.add_row(extra.purpose, _state(extra), parts, install)
    printer.table(table)
    for probe in found.probes:
        printer.text(f"{probe.module}: {probe.answer}" if probe.works else f"{probe.module}: does not work")
    if found.bundle is not None:
        printer.text()
        printer.text(f"{found.bundle['path']}: every hash matches the manifest")
        printer.text(f"runs on: {', '.join(found.bundle['runs_on']) or 'nothing installed here'}")
        printer.text(f"its backbone is {found.bundle['backbone']}")
        for engine in found.bundle["engines"]:
            state = "runs" if engine["runs"] else "does not run"
            name = PurePosixPath(engine["engine"]).stem
            what = f"{name} for {engine['target']} {engine['version']} on {engine['platform']}"
            where = f"{state} on {found.bundle['machine']['name']}"
            printer.text(f"engine {what}, {engine['precision']}: {where}: {engine['why']}")
            if engine["remedy"] is not None:
                printer.text(f"  {engine['remedy']}")
    for problem in found.problems:
        printer.hint(f"problem: {problem}")


def _state(extra: Extra) -> str:
    missing = [d.distribution for d in extra.dependencies if d.installed is None]
    return f"without {', '.join(missing)}" if extra.state == "incomplete" else extra.state
