"""`variator-export serve`."""

from pathlib import Path
from typing import Annotated

import typer

from variator_export.cli import options, run_options
from variator_export.cli.output import Output
from variator_export.core.environment import require
from variator_export.core.errors import UsageError, UserError
from variator_export.serving.model import ModelOptions, ServedModel
from variator_export.serving.policies import POLICIES

_SHORTEST_KEY = 16


def serve_command(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    slo_ms: Annotated[
        float,
        typer.Option(
            "--slo-ms",
            metavar="MS",
            help="The latency goal of a request. The ratio follows the load so that requests meet it.",
        ),
    ] = 200.0,
    max_loss: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Run no ratio that loses more than this share of the metric: 1.5% or 0.015.",
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The metric of the loss. Default: the main metric of the bundle's task."
        ),
    ] = None,
    allow_unknown_quality: Annotated[
        bool,
        typer.Option("--allow-unknown-quality", help="Serve a bundle that `evaluate` has not measured."),
    ] = False,
    policy: Annotated[
        str,
        typer.Option(
            metavar="P",
            help="What chooses the ratio: backlog (best quality that drains the queue in half the goal), "
            "slack (best quality that answers the first request in time) or static (always --ratio).",
        ),
    ] = "backlog",
    ratio: Annotated[
        str | None, typer.Option(metavar="K", help="The ratio or variant of --policy static. Default: 1.")
    ] = None,
    index: Annotated[
        bool,
        typer.Option("--index", help="Serve ratio 1 only and without a goal, to make an index with."),
    ] = False,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address to listen on; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="The port; 0 for a free one.")
    ] = 8080,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Ask for a key: a file with one key on each line. /health and /ready need none.",
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name in requests. Default: the recipe's.")
    ] = None,
    target: run_options.RunTargetOption = "onnxruntime",
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Threads of an operator on a CPU. Default: all cores."),
    ] = None,
    max_texts: Annotated[
        int, typer.Option(min=1, metavar="N", help="The largest number of texts in a request.")
    ] = 2048,
    max_body_mb: Annotated[
        float, typer.Option(min=0.001, metavar="MB", help="The largest body of a request in megabytes.")
    ] = 8.0,
    max_queue: Annotated[
        int, typer.Option(min=1, metavar="N", help="The largest number of texts that wait.")
    ] = 20_000,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="The largest number of padded tokens in a batch. Default: measured at start.",
        ),
    ] = None,
    max_connections: Annotated[
        int, typer.Option(min=1, metavar="N", help="The largest number of open connections.")
    ] = 4096,
    receive_timeout: Annotated[
        float,
        typer.Option(
            "--receive-timeout",
            min=0.1,
            metavar="S",
            help="The time in which a request must have arrived; slower clients are let go.",
        ),
    ] = 10.0,
    refuse_late: Annotated[
        bool,
        typer.Option(
            help="Whether to refuse (429) requests that could not meet the goal, or to answer them late."
        ),
    ] = True,
    truncate: run_options.TruncateOption = True,
    calibration_seconds: Annotated[
        float,
        typer.Option(min=0.0, metavar="S", help="The time to measure batches at start."),
    ] = 4.0,
    allow_unverified: options.AllowUnverifiedOption = False,
    lean_runtime: options.LeanRuntimeOption = None,
) -> None:
    """Serve a bundle over HTTP; the ratio follows the load.

    The endpoints are those of OpenAI (/v1/embeddings) and of text-embeddings-inference (/embed, /predict,
    /info), with /metrics for Prometheus and a live page at /. A request may pin a ratio (`minilm@4`) or
    bound the loss (`x-variator-max-loss: 1%`), and learns what it got (`x-variator-ratio`). SIGTERM answers
    what was accepted; SIGHUP takes a new bundle over.

    **Examples**

    `variator-export serve artifacts/minilm --slo-ms 200 --max-loss 1.5%`

    `variator-export serve artifacts/minilm --index --port 8081`
    """
    for module in ("starlette", "uvicorn", "orjson", "prometheus_client"):
        require(module, "serve", "Serving")
    from variator_export.serving.http.server import bind, serve
    from variator_export.serving.http.settings import ServerSettings
    from variator_export.serving.http.state import ServerState

    printer = Output()
    if not slo_ms > 0:
        raise UsageError(f"--slo-ms {slo_ms:g} is not above 0.", "Give milliseconds, for example 200.")
    options.choose("--policy", policy, POLICIES)
    if ratio is not None and policy != "static":
        raise UsageError(
            "--ratio is the ratio of --policy static.", "Add --policy static, or leave --ratio out."
        )
    if index and (policy != "backlog" or max_loss is not None):
        raise UsageError("--index serves ratio 1, which loses nothing.", "Leave --policy and --max-loss out.")
    keys = () if api_key_file is None else read_keys(api_key_file)
    opened = ModelOptions(
        target=target,
        threads=threads,
        metric=metric,
        max_loss=None if max_loss is None else options.parse_loss(max_loss),
        index=index,
        allow_unknown_quality=allow_unknown_quality,
        calibration_seconds=calibration_seconds,
        allow_unverified=allow_unverified,
        lean_runtime=lean_runtime,
    )
    bound = bind(host, port)
    printer.hint(f"opening {bundle}, and measuring its batches for {calibration_seconds:g} s")
    model = ServedModel.open(bundle, opened)
    if ratio is not None:
        model.variants.named(ratio)
    settings = ServerSettings(
        goal_ms=slo_ms,
        policy=policy,
        static_variant=ratio,
        model_name=served_model_name,
        api_keys=keys,
        max_body_bytes=int(max_body_mb * 1e6),
        max_texts=max_texts,
        max_queue_rows=max_queue,
        max_batch_tokens=max_batch_tokens,
        max_connections=max_connections,
        refuse_late=refuse_late and not index,
        receive_timeout_s=receive_timeout,
        truncate=truncate,
    )
    _tell(printer, model, settings.goal_ms, host, bool(keys))
    state = ServerState(model, settings, lambda: ServedModel.open(bundle, opened))
    answered = serve(state, bound, on_started=lambda address: printer.hint(f"listening on {address}"))
    printer.hint(
        "stopped; what was accepted is answered" if answered else "stopped; what waited was given up"
    )


def read_keys(path: Path) -> tuple[str, ...]:
    """Read API keys, one on each line.

    Raises:
        UserError: The file cannot be read, or holds no key, or one that is too short to be a secret.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}.", "Give a text file with a key on each line."
        ) from error
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise UserError(f"{path} holds no key.", f"Write one: openssl rand -hex 32 > {path}")
    if any(len(key) < _SHORTEST_KEY for key in keys):
        raise UserError(
            f"{path} holds a key of fewer than {_SHORTEST_KEY} characters, which can be guessed.",
            f"Write a longer one: openssl rand -hex 32 > {path}",
        )
    return keys


def _tell(printer: Output, model: ServedModel, goal_ms: float, host: str, has_key: bool) -> None:
    """Say what is served, and warn of what may surprise."""
    longest = model.text.encoder.max_length or 512
    for variant in model.variants.all:
        loss = "loss unknown" if variant.loss is None else f"loses {variant.loss:.2%}"
        ms = model.cost.batch_ms(variant.name, 1, longest)
        printer.hint(f"{variant.name}: {loss}, about {ms:.0f} ms for {longest} tokens")
    fastest = model.cost.batch_ms(model.variants.all[-1].name, 1, longest)
    if fastest > goal_ms / 2:
        printer.hint(
            f"warning: a text of {longest} tokens takes {fastest:.0f} ms at the fastest ratio; a goal of "
            f"{goal_ms:g} ms leaves little room for others."
        )
    for name in model.untrained:
        printer.hint(f"warning: the plugin of {name} was only initialised; its outputs are meaningless.")
    if not has_key and host not in ("127.0.0.1", "::1", "localhost"):
        printer.hint(
            f"warning: {host} can be reached from other machines, and no key is asked for (--api-key-file)."
        )
