"""The sections of a report's page, built from a bundle's reports."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from variator_export.benchmark.speed_table import SPEED_COLUMNS, speed_cells
from variator_export.bundle.quality_report import between, counted_metrics
from variator_export.reporting.page import Column, Plot, Section, TableOf, number
from variator_export.reporting.sources import Sources
from variator_export.verification.judging.error_budget import GIVEN_MULTIPLE, MULTIPLE
from variator_export.verification.judging.judge import QUANTIZATION_UNIT

if TYPE_CHECKING:
    from variator_export.reporting.plots import TradeOff

# Number of modules of a profile that are shown.
_PROFILE_ROWS = 8
# Number of shapes that the plot of speed and quality shows.
_MOST_PANELS = 4
# Runtimes of the uncompressed model, which lose nothing.
_SAME_NUMBERS = ("eager", "torch.compile", "torch.onnx", "onnxruntime-optimizer", "openvino")


def trade_off_section(sources: Sources) -> Section | None:
    """Show each variant's loss in quality next to its speed-up at every shape, on ONNX Runtime."""
    from variator_export.reporting.plots import trade_off_plot

    if sources.benchmark is None or not sources.qualities:
        return None
    gained = {
        _at(shape): {row["variant"]: row for row in shape["rows"] if row["runtime"] == "onnxruntime"}
        for shape in sources.benchmark["shapes"]
    }
    if not any(gained.values()):
        return None
    columns = [Column("variant", text=True), Column("ratio"), *_quality_columns(sources)]
    columns += [Column(f"speed-up, {shape}") for shape in gained]
    rows = []
    for variant in sources.variants:
        of_shapes = [found.get(variant.name) for found in gained.values()]
        speedups = ["-" if row is None else f"{row['speedup']:.2f}x" for row in of_shapes]
        rows.append([variant.name, str(variant.ratio), *_quality_cells(sources, variant.name), *speedups])
    plots = []
    for place, quality in enumerate(sources.qualities):
        if panels := _trade_offs(sources, quality):
            caption = (
                f"Quality left, the share of {quality['metric']} on {quality['data']}, and the speed-up on "
                "ONNX Runtime over the fastest run without plugins, by shape (rows x tokens): up and to the "
                "right is better. A hollow point is slower and worse than another."
            )
            name = f"trade-off{f'-{place + 1}' if place else ''}"
            plots.append(Plot(name, trade_off_plot(panels, quality["metric"]), caption))
    return Section("Speed gained and quality lost", "", plots, [TableOf(columns, rows)])


def _trade_offs(sources: Sources, quality: Mapping[str, Any]) -> list["TradeOff"]:
    """Each variant's speed-up and loss at every shape, and the runs without plugins for comparison."""
    from variator_export.reporting.plots import TradeOff

    assert sources.benchmark is not None
    lost = {name: found["lost"] for name, found in quality["variants"].items() if found["lost"] is not None}
    labels = {v.name: f"k={v.ratio}" if v.name == f"ratio-{v.ratio}" else v.name for v in sources.variants}
    panels = []
    for shape in sources.benchmark["shapes"][:_MOST_PANELS]:
        own = {row["variant"]: row for row in shape["rows"] if row["runtime"] == "onnxruntime"}
        points = [
            (labels[name], own[name]["speedup"], lost[name])
            for name in labels
            if name in own and name in lost
        ]
        if not points:
            continue
        one = next(iter(own.values()))
        reference = one["median_ms"] * one["speedup"]
        panels.append(
            TradeOff(
                f"{shape['batch_size']} x {shape['sequence_length']}",
                {sources.bundle.manifest.precision: points},
                {
                    row["runtime"]: (reference / row["median_ms"], 0.0)
                    for row in shape["rows"]
                    if row["is_baseline"] and row["runtime"] in _SAME_NUMBERS
                },
                {labels[found.variant] for found in sources.dominated},
            )
        )
    return panels


def speed_section(sources: Sources) -> Section | None:
    """Show latency by shape, speed-up and its limit, the shape from which a ratio pays off, and profiles."""
    from variator_export.reporting.plots import latency_plot, speedup_plot

    benchmark = sources.benchmark
    if benchmark is None:
        return None
    shapes = benchmark["shapes"]
    runtimes = dict.fromkeys(row["runtime"] for s in shapes for row in s["rows"] if not row["is_baseline"])
    plots = [Plot("latency", latency_plot(shapes), "Median latency; dashed: without plugins.")]
    plots += [
        Plot(
            f"speed-up-{runtime}",
            speedup_plot(shapes, runtime),
            f"Speed-up on {runtime} over the fastest run without plugins in the same family of runtimes, "
            "with its 95 % interval. A dash marks the limit set by the saved multiply-accumulates.",
        )
        for runtime in runtimes
    ]
    machine, openings = benchmark["machine"], benchmark["settings"].get("openings", 1)
    gpus = benchmark["conditions"]["after"]["gpu"]
    text = (
        f"Measured {benchmark['measured_at']} on {machine['cpu'] or 'an unknown CPU'}, "
        f"{machine['cpu_cores']} cores{', ' + ', '.join(gpus) if gpus else ''}. "
        + ("" if benchmark["settled"] else "Not every opening settled. ")
        + (f"Intervals are over {openings} openings." if openings > 1 else "Intervals are of one opening.")
    )
    tables = [_speed_table(shape) for shape in shapes]
    columns = [Column("variant", text=True), Column("runtime", text=True), Column("pays off", text=True)]
    pays = [
        [
            entry["variant"],
            entry["runtime"],
            "from {} x {}".format(*entry["pays_from"]) if entry["pays_from"] else "at no shape",
        ]
        for entry in benchmark["break_even"]
    ]
    tables.append(TableOf(columns, pays, "Shape from which a ratio pays off"))
    for shape in shapes:
        tables += [_profile_table(shape, variant, rows) for variant, rows in shape["profiles"].items()]
    return Section("Speed", text, plots, tables)


def quality_section(sources: Sources) -> Section | None:
    """Show the quality of each variant and what it loses."""
    if not sources.qualities:
        return None
    columns = [Column("variant", text=True), *_quality_columns(sources)]
    rows = [[variant.name, *_quality_cells(sources, variant.name)] for variant in sources.variants]
    return Section("Quality", tables=[TableOf(columns, rows)])


def verification_section(sources: Sources) -> Section | None:
    """Show how far every graph and every engine deviates from eager PyTorch."""
    from variator_export.reporting.plots import error_plot

    findings = sources.findings()
    if not findings:
        return None
    precision = sources.bundle.manifest.precision
    worst = {
        f"{variant}, {precision}": max(map(_share_of_limit, found), default=0.0) * MULTIPLE
        for variant, found in findings.items()
    }
    built = next((report for report in sources.built.values() if report), None)
    reference = (sources.verified or built or {}).get("reference")
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for variant, found in findings.items():
        for finding in found:
            groups.setdefault((variant, finding["graph"], finding["check"]), []).append(finding)
    rows = []
    for (variant, graph, check), found in groups.items():
        failed = sum(not finding["passed"] for finding in found)
        largest = max(found, key=_badness)
        rows.append(
            [
                variant,
                graph,
                check,
                str(len(found)),
                number(largest["used"], ".2f"),
                number(largest.get("relative_frobenius"), ".1e"),
                number(largest.get("max_abs"), ".1e"),
                "passed" if not failed else f"{failed} FAILED",
            ]
        )
    columns = [Column(name, text=True) for name in ("variant", "graph", "check")]
    columns += [Column(name) for name in ("cases", "worst", "rel. Frobenius", "max abs", "")]
    tables = [TableOf(columns, rows)]
    left_out = [
        [name, left["graph"], left["check"], ", ".join(left["what"])]
        for report in sources.verified_engines.values()
        for name, found in report.get("left_out", {}).items()
        for left in found
    ]
    if left_out:
        columns = [Column(name, text=True) for name in ("variant", "engine", "check", "what")]
        tables.append(TableOf(columns, left_out, "Left out"))
    losses = [loss for report in sources.built.values() for loss in _losses(report)]
    if losses:
        names = ("variant", "output")
        numbers = ("cosine", "least_cosine", "agreement", "limit")
        columns = [Column(name, text=True) for name in names]
        columns += [Column(name) for name in ("mean cosine", "least cosine", "same class", "limit")]
        cells = [
            [*(str(loss.get(n)) for n in names), *(number(_number(loss.get(n)), ".4f") for n in numbers)]
            for loss in losses
        ]
        tables.append(TableOf(columns, cells, f"{precision} against float32 at the same ratio"))
    text = (
        f"Compared with {reference}. Worst is a multiple of the rounding error of eager PyTorch itself in "
        f"{precision}; up to {MULTIPLE:g} is allowed."
    )
    if losses:
        text = (
            f"Compared with {reference}. Worst is a multiple of {QUANTIZATION_UNIT}, of which {MULTIPLE:g} "
            "are allowed; given the graph's rounding, of the rounding error of eager PyTorch in float32, of "
            f"which {GIVEN_MULTIPLE:g} are allowed."
        )
    plot = Plot("error", error_plot(worst, MULTIPLE), "The worst deviation of each variant.")
    return Section("Verification", text, [plot], tables)


def engines_section(sources: Sources) -> Section | None:
    """Show the engines: what their builders say of the kernels, and whether they were verified."""
    bundle = sources.bundle
    rows = []
    for entry in bundle.manifest.engines:
        sidecar = bundle.sidecar(entry)
        kernels = sidecar.get("kernels") or {}
        rows.append(
            [
                f"{entry.target} {entry.version} {entry.platform}",
                f"{entry.variant}, {entry.part}",
                sidecar.get("attention") or "",
                kernels.get("attention_accumulates") or "",
                *(str(kernels.get(name) or "") for name in ("per_layer", "elsewhere")),
                bundle.engine_status(entry),
            ]
        )
    if not rows:
        return None
    texts, numbers = ("target", "engine", "attention", "accumulates in"), ("per layer", "elsewhere")
    columns = [Column(name, text=True) for name in texts] + [Column(name) for name in numbers]
    table = TableOf([*columns, Column("", text=True)], rows)
    text = (
        "Kernels per layer and elsewhere, where an engine tells them; "
        "variator-export inspect BUNDLE --kernels ENGINE lists them."
    )
    return Section("Engines", text, tables=[table])


def _badness(finding: Mapping[str, Any]) -> float:
    """Return a finding's deviation; infinity for NaN or a graph that did not run."""
    return math.inf if finding["used"] is None else float(finding["used"])


def _share_of_limit(finding: Mapping[str, Any]) -> float:
    """Return a finding's deviation as a share of what is allowed."""
    allowed = finding.get("allowed", MULTIPLE)
    return _badness(finding) / (allowed if isinstance(allowed, int | float) and allowed > 0 else MULTIPLE)


def _losses(report: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return what quantisation changes in one variant, as far as the report can be read."""
    found = (report or {}).get("quantization")
    return [loss for loss in found if isinstance(loss, dict)] if isinstance(found, list) else []


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _at(shape: Mapping[str, Any]) -> str:
    return f"{shape['batch_size']} x {shape['sequence_length']}"


def _quality_columns(sources: Sources) -> list[Column]:
    names = []
    for quality in sources.qualities:
        names += [f"{quality['metric']}, {quality['data']} ({quality['examples']} examples)", "lost"]
        names += counted_metrics(quality)[1:]
    return [Column(name) for name in names]


def _quality_cells(sources: Sources, variant: str) -> list[str]:
    cells = []
    for quality in sources.qualities:
        entry = quality["variants"].get(variant, {})
        cells.append(number(entry.get("value"), ".4f") + between(entry.get("interval"), ".4f"))
        cells.append(number(entry.get("lost"), ".2%") + between(entry.get("loss_interval"), ".2%"))
        others = counted_metrics(quality)[1:]
        cells += [number(entry.get("metrics", {}).get(name), ".4f") for name in others]
    return cells


def _speed_table(shape: Mapping[str, Any]) -> TableOf:
    columns = [Column("runtime", text=True), Column("variant", text=True)]
    columns += [Column(name) for name in (*SPEED_COLUMNS, "MACs", "on graph")]
    rows = [
        [
            row["runtime"],
            row["variant"],
            *speed_cells(row),
            f"{row['macs'] / 1e9:.2f} G",
            number(row["graph_macs"] and row["graph_macs"] / 1e9, ".2f", " G"),
        ]
        for row in shape["rows"]
    ]
    title = f"{_at(shape)} tokens"
    return TableOf(columns, rows, title if shape["settled"] else f"{title} (not every opening settled)")


def _profile_table(shape: Mapping[str, Any], variant: str, found: list[Mapping[str, Any]]) -> TableOf:
    rows = [
        [row["module"], f"{row['milliseconds']:.2f}", f"{row['share']:.1%}", ", ".join(row["operators"])]
        for row in found[:_PROFILE_ROWS]
    ]
    columns = [Column("module", text=True), Column("ms"), Column("share"), Column("operators", text=True)]
    return TableOf(columns, rows, f"Where {variant} spends its time at {_at(shape)} tokens")
