"""The kernels of an engine, for `variator-export inspect --kernels`."""

from dataclasses import asdict

from rich.table import Table

from variator_export.bundle.manifest import EngineEntry
from variator_export.cli.output import Output
from variator_export.core.errors import UserError
from variator_export.engines.targets import find_engine_target
from variator_export.sessions import Bundle

# Characters of a builder's name.
_LONG = 40


def print_kernels(printer: Output, bundle: Bundle, name: str) -> None:
    """Print the kernels of an engine in the order of their calls.

    Args:
        printer: The output.
        bundle: The bundle.
        name: Name of a variant, `any-ratio`, or the file of an engine.

    Raises:
        UserError: There is no such engine, or several, or its file does not tell.
    """
    entry = _find(bundle, name)
    schedule = find_engine_target(entry.target).schedule(bundle.file(entry.engine).read_bytes())
    if schedule is None:
        raise UserError(
            f"{entry.engine} does not tell its kernels: only plans of TensorRT for RTX are known to.",
            "Compile it for --target tensorrt-rtx too; or profile it on its GPU with NVIDIA Nsight Systems.",
        )
    if printer.is_json:
        kernels = [{**asdict(kernel), "is_of_plugin": kernel.is_of_plugin} for kernel in schedule.kernels]
        printer.document({"engine": entry.engine, **schedule.summary(), "kernels": kernels})
        return
    table = Table(title=entry.engine, title_justify="left")
    for column in ("layer", "kernel", "plugin", "modules", "builder's name"):
        table.add_column(column, overflow="fold")
    for kernel in schedule.kernels:
        layer = kernel.layer or ""
        modules = [module.removeprefix(layer).strip(".") for module in kernel.modules]
        table.add_row(
            layer,
            kernel.kind,
            "yes" if kernel.is_of_plugin else "",
            ", ".join(filter(None, modules)),
            kernel.name if len(kernel.name) < _LONG else f"{kernel.name[:_LONG]}…",
        )
    printer.table(table)
    counts = schedule.summary()
    printer.text(
        f"{len(schedule.kernels)} kernels: {counts['per_layer']} in a layer, {counts['elsewhere']} outside"
    )
    accumulates = counts["attention_accumulates"]
    attention = bundle.sidecar(entry).get("attention") or "not known"
    printer.text(f"attention: {attention}" + (f", accumulates in {accumulates}" if accumulates else ""))


def _find(bundle: Bundle, name: str) -> EngineEntry:
    found = [entry for entry in bundle.manifest.engines if name in (entry.engine, entry.variant)]
    if len(found) == 1:
        return found[0]
    there = ", ".join(entry.engine for entry in found or bundle.manifest.engines)
    if not there:
        raise UserError(
            f"{bundle.path} has no engines.",
            f"Compile one: variator-export compile {bundle.path} --target tensorrt-rtx",
        )
    raise UserError(
        f"{bundle.path} has {'several engines' if found else 'no engine'} {name}.", f"Name one of: {there}"
    )
