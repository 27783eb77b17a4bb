"""`variator-export export-triton`."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from variator_export.cli import completion, options
from variator_export.cli.output import Format, Output
from variator_export.core.errors import UsageError
from variator_export.engines.targets import GRAPHS, TARGETS
from variator_export.serving.triton.model import ExportOptions
from variator_export.serving.triton.repository import BACKENDS, Exported, export_repository
from variator_export.serving.triton.settings import Scheduling

_CAPABILITY = re.compile(r"sm\d{2,3}")
_VERSION = re.compile(r"\d+(\.\d+)*")


def export_triton_command(
    bundle: Annotated[
        str, typer.Argument(help="The bundle's folder, or ORGANISATION/NAME[@REVISION] on the hub.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="The model repository to write.")],
    backend: Annotated[
        str,
        typer.Option(
            metavar="B",
            help="python: one model that runs every ratio, from texts or token ids. onnxruntime, tensorrt: a "
            "model for each ratio, from token ids, in Triton's own backend.",
        ),
    ] = "python",
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name. Default: that of the bundle.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="T",
            help=f"python, onnxruntime: the target to run on: {', '.join(TARGETS.names())}. "
            f"Default: {GRAPHS}.",
            autocompletion=completion.run_targets,
        ),
    ] = None,
    variant: options.OnlyVariantsOption = None,
    default_variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="python: the variant or ratio of requests that name none. Default: that of the bundle.",
        ),
    ] = None,
    bundle_path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="python: the bundle's folder on the server. Default: a copy in the repository.",
        ),
    ] = None,
    execution_env: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="python: the packed Python environment on the server (EXECUTION_ENV_PATH). Default: "
            "Triton's own Python.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="python, onnxruntime: threads of one operator on a CPU."),
    ] = None,
    max_batch_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="The largest batch, in rows. Default: 32; of engines, theirs."),
    ] = None,
    preferred_batch_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1, metavar="N", help="A size at which a batch runs without waiting; may be repeated."
        ),
    ] = None,
    max_queue_delay_ms: Annotated[
        float, typer.Option(min=0, metavar="MS", help="How long a request may wait for others to join it.")
    ] = 0.0,
    queue_timeout_ms: Annotated[
        float | None,
        typer.Option(min=0.001, metavar="MS", help="How long a request may wait before it is refused."),
    ] = None,
    max_queue_size: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Waiting requests from which on others are refused."),
    ] = None,
    priority_levels: Annotated[
        int, typer.Option(min=0, max=100, metavar="N", help="Priorities that requests may name.")
    ] = 0,
    instances: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Instances for each device. Each one of python has its own weights."
        ),
    ] = 1,
    gpu: Annotated[
        list[int] | None,
        typer.Option(min=0, metavar="ID", help="A GPU that has instances; may be repeated. Default: all."),
    ] = None,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM",
            help="tensorrt: a GPU to export engines for, sm89; may be repeated. Default: all that there are.",
        ),
    ] = None,
    tensorrt_version: Annotated[
        str | None, typer.Option(metavar="V", help="tensorrt: the version of the engines to export, 11.4.")
    ] = None,
    allow_unverified: options.AllowUnverifiedOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model repository that exists.")
    ] = False,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Write a model repository for Triton Inference Server from a bundle.

    The repository appears whole or not at all. Nothing needs Triton here.

    **Examples**

    `variator-export export-triton artifacts/minilm --output models`

    `variator-export export-triton artifacts/minilm --output models --max-batch-size 64
    --max-queue-delay-ms 2 --queue-timeout-ms 500 --default-variant 4`

    `variator-export export-triton artifacts/minilm --output models --backend tensorrt
    --compute-capability sm89`
    """
    options.choose("--backend", backend, tuple(BACKENDS))
    if target is not None:
        options.choose("--target", target, TARGETS.names())
    _refuse_options_of_others(
        backend,
        {
            "--target": (target, ("python", "onnxruntime")),
            "--threads": (threads, ("python", "onnxruntime")),
            "--default-variant": (default_variant, ("python",)),
            "--bundle-path": (bundle_path, ("python",)),
            "--execution-env": (execution_env, ("python",)),
            "--compute-capability": (compute_capability, ("tensorrt",)),
            "--tensorrt-version": (tensorrt_version, ("tensorrt",)),
        },
    )
    for capability in compute_capability or ():
        if not _CAPABILITY.fullmatch(capability):
            raise UsageError(
                f"--compute-capability {capability!r} is not a compute capability.",
                "--compute-capability sm89",
            )
    if tensorrt_version is not None and not _VERSION.fullmatch(tensorrt_version):
        raise UsageError(
            f"--tensorrt-version {tensorrt_version!r} is not a version.", "--tensorrt-version 11.4"
        )
    scheduling = Scheduling(
        max_batch_size=max_batch_size,
        preferred_batch_sizes=tuple(dict.fromkeys(preferred_batch_size or ())),
        max_queue_delay_ms=max_queue_delay_ms,
        queue_timeout_ms=queue_timeout_ms,
        max_queue_size=max_queue_size,
        priority_levels=priority_levels,
        instances=instances,
        gpus=tuple(dict.fromkeys(gpu or ())),
    )
    chosen = ExportOptions(
        backend=backend,
        name=name if name is not None else Path(bundle.partition("@")[0]).resolve().name,
        target=target or GRAPHS,
        variants=tuple(dict.fromkeys(map(_ratio_or_name, variant))) if variant else None,
        default_variant=None if default_variant is None else _ratio_or_name(default_variant),
        bundle_path=bundle_path,
        execution_env=execution_env,
        threads=threads,
        compute_capabilities=tuple(dict.fromkeys(compute_capability or ())),
        tensorrt_version=tensorrt_version,
        allow_unverified=allow_unverified,
        scheduling=scheduling,
    )
    printer = Output(format)
    result = export_repository(bundle, output, chosen, overwrite=overwrite)
    _print(printer, result)


def _refuse_options_of_others(backend: str, given: Mapping[str, tuple[object, tuple[str, ...]]]) -> None:
    """Refuse options that the backend does not have, instead of ignoring them.

    Args:
        backend: The chosen backend.
        given: The value of each option, and the backends that have it.

    Raises:
        UsageError: An option of another backend was given.
    """
    for option, (value, owners) in given.items():
        if value and backend not in owners:
            raise UsageError(
                f"{option} is for --backend {' or '.join(owners)}, not {backend}.", f"Leave {option} out."
            )


def _ratio_or_name(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _print(printer: Output, result: Exported) -> None:
    if printer.is_json:
        printer.document({**asdict(result), "repository": str(result.repository)})
        return
    for model in result.models:
        printer.text(
            f"{model.name}: {', '.join(model.variants)}; {model.size_bytes / 1e6:.1f} MB; needs {model.needs}"
        )
    printer.text(f"written: {result.repository}")
    printer.hint(f"Serve it: {result.command}")
