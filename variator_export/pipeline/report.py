"""A page about a bundle: what is in it, whether it is verified, what it gains and what it loses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from variator_export.bundle import Bundle
from variator_export.core.engine_records import ANY_RATIO
from variator_export.core.environment import require
from variator_export.core.json_file import write_text
from variator_export.core.manifest import Variant
from variator_export.pipeline.bench import quality_of_graphs
from variator_export.pipeline.reports import BENCHMARK_REPORT, PAGE, VERIFICATION_REPORT, read_report
from variator_export.pipeline.steps import report_path
from variator_export.stages.budget import MULTIPLE
from variator_export.stages.page import Column, Plot, Section, TableOf, number, render
from variator_export.stages.speed import SPEED_COLUMNS, speed_cells


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: The HTML file.
        plots: The pictures' files, if they were asked for.
        missing: What the page would show besides: a command for each.
    """

    page: Path
    plots: Sequence[Path]
    missing: Sequence[str]


def report(bundle: str | Path, output: str | Path | None = None, *, plots: Path | None = None) -> Report:
    """Write one HTML page that needs no network.

    Args:
        bundle: The bundle's folder.
        output: The file; None: reports/report.html in the bundle.
        plots: A folder to write the pictures into, as PNG and SVG; None: none.

    Raises:
        UserError: The bundle is damaged, or what draws is not installed.
    """
    for module in ("jinja2", "matplotlib"):
        require(module, "report", "Writing a report")
    opened = Bundle.load(bundle)
    sources = _Sources(opened)
    trade_off = sources.trade_off()
    sections = [s for s in (sources.speed(), sources.quality(), sources.verification()) if s is not None]
    page = Path(output) if output is not None else opened.path / PAGE
    write_text(page, _render(opened, sources, trade_off, sections))
    written = []
    if plots is not None:
        from variator_export.stages.plots import save

        drawn = [plot for section in sections for plot in section.plots]
        for plot in [trade_off, *drawn] if trade_off else drawn:
            for suffix in (".png", ".svg"):
                written.append(plots / f"{plot.name}{suffix}")
                save(plot.figure, written[-1])
    return Report(page, written, sources.missing())


class _Sources:
    """The reports that a bundle holds of the graphs that it has now; those of others do not count."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        manifest = bundle.manifest
        self.variants = sorted(manifest.variants, key=lambda v: (v.ratio, v.name))
        self.graphs = {v.name: manifest.files[v.graphs["model"]].sha256 for v in manifest.variants}
        benchmark = read_report(bundle.path, BENCHMARK_REPORT, "graphs", "shapes", "break_even", "conditions")
        self.benchmark = benchmark if benchmark and benchmark["graphs"] == self.graphs else None
        self.qualities = quality_of_graphs(bundle.path, self.graphs)
        verified = read_report(bundle.path, VERIFICATION_REPORT, "graphs", "findings", "passed", "reference")
        now = {name: entry.sha256 for name, entry in manifest.files.items()}
        self.verified = (
            verified
            if verified and all(now.get(name) == sha256 for name, sha256 in verified["graphs"].items())
            else None
        )
        self.built = {
            v.name: read_report(bundle.path, report_path(v.name), "findings", "reference")
            for v in self.variants
        }

    @property
    def verdict(self) -> str:
        """`passed`, `partly`: not all variants were looked at, `failed`, or `built`: when it was built."""
        if self.verified is None:
            return "built"
        if not self.verified["passed"]:
            return "failed"
        return "passed" if self.verified["findings"].keys() >= self.graphs.keys() else "partly"

    def missing(self) -> list[str]:
        """Commands that would add to the page."""
        path = self.bundle.path
        return [
            *([] if self.verdict in ("passed", "failed") else [f"variator-export verify {path}"]),
            *([] if self.benchmark else [f"variator-export bench {path}"]),
            *([] if self.qualities else [f"variator-export evaluate {path} --data FILE"]),
        ]

    def findings(self) -> dict[str, list[Mapping[str, Any]]]:
        """What was looked at, by variant: by `verify`, or else by the build."""
        found = {name: report["findings"] for name, report in self.built.items() if report}
        return {**found, **(self.verified["findings"] if self.verified else {})}

    def trade_off(self) -> Plot | None:
        """Speed against quality, at the largest shape, of the graphs on ONNX Runtime."""
        from variator_export.stages.plots import trade_off_plot

        if self.benchmark is None or not self.qualities:
            return None
        shape = max(self.benchmark["shapes"], key=lambda s: s["batch_size"] * s["sequence_length"])
        quality = self.qualities[0]
        rows = [row for row in shape["rows"] if row["runtime"] == "onnxruntime"]
        points = [
            (row["variant"], row["speedup"], quality["variants"][row["variant"]]["lost"] or 0.0)
            for row in rows
            if row["variant"] in quality["variants"]
        ]
        if not points:
            return None
        at = f"{shape['batch_size']} x {shape['sequence_length']} tokens"
        caption = (
            f"Speed-up on ONNX Runtime at {at} over the fastest run without plugins, and the share of "
            f"{quality['metric']} on {quality['data']} that is lost: right is faster, up is better."
        )
        return Plot("trade-off", trade_off_plot(points, quality["metric"], at), caption)

    def speed(self) -> Section | None:
        """Latency by shape, speed-up against its limit, where time goes."""
        from variator_export.stages.plots import latency_plot, speedup_plot

        if self.benchmark is None:
            return None
        shapes = self.benchmark["shapes"]
        runtimes = dict.fromkeys(row["runtime"] for s in shapes for row in s["rows"] if row["ratio"] > 1)
        plots = [Plot("latency", latency_plot(shapes), "Median latency; dashed: without plugins.")]
        plots += [
            Plot(
                f"speed-up-{runtime}",
                speedup_plot(shapes, runtime),
                f"Speed-up on {runtime} over the fastest run without plugins of its family, with its 95 % "
                "interval. A dash is what the saved multiply-accumulates would allow.",
            )
            for runtime in runtimes
        ]
        machine = self.benchmark["machine"]
        text = (
            f"Measured {self.benchmark['measured_at']} on {machine['cpu'] or 'an unknown CPU'}, "
            f"{machine['cpu_cores']} cores"
            + (f", {', '.join(gpus)}" if (gpus := self.benchmark["conditions"]["after"]["gpu"]) else "")
            + ("." if self.benchmark["settled"] else ". Not every shape settled.")
        )
        tables = [_speed_table(shape) for shape in shapes]
        columns = [Column("variant", text=True), Column("runtime", text=True), Column("pays", text=True)]
        pays = [
            [
                entry["variant"],
                entry["runtime"],
                "from {} x {} on".format(*entry["pays_from"]) if entry["pays_from"] else "at no shape",
            ]
            for entry in self.benchmark["break_even"]
        ]
        tables.append(TableOf(columns, pays, "From which shape on a ratio pays"))
        return Section("Speed", text, plots, tables)

    def quality(self) -> Section | None:
        """What each ratio loses."""
        if not self.qualities:
            return None
        columns = [Column("variant", text=True)]
        for quality in self.qualities:
            columns += [Column(f"{quality['metric']}, {quality['data']}"), Column("lost")]
        rows = []
        for variant in self.variants:
            cells = [variant.name]
            for quality in self.qualities:
                found = quality["variants"].get(variant.name, {})
                cells += [number(found.get("value"), ".4f"), number(found.get("lost"), ".2%")]
            rows.append(cells)
        return Section("Quality", tables=[TableOf(columns, rows)])

    def verification(self) -> Section | None:
        """How far every graph is from eager PyTorch."""
        from variator_export.stages.plots import error_plot

        findings = self.findings()
        if not findings:
            return None
        precision = self.bundle.manifest.precision
        worst = {
            f"{variant}, {precision}": max((f["used"] or 0.0 for f in found), default=0.0)
            for variant, found in findings.items()
        }
        built = next((report for report in self.built.values() if report), None)
        reference = (self.verified or built or {}).get("reference")
        groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
        for variant, found in findings.items():
            for finding in found:
                groups.setdefault((variant, finding["graph"], finding["check"]), []).append(finding)
        rows = []
        for (variant, graph, check), found in groups.items():
            failed = sum(not finding["passed"] for finding in found)
            largest = max(found, key=lambda f: float("inf") if f["used"] is None else f["used"])
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
        text = (
            f"Compared with {reference}. Worst is a multiple of the rounding error that eager PyTorch itself "
            f"makes in {precision}; {MULTIPLE:g} are allowed."
        )
        plot = Plot("error", error_plot(worst, MULTIPLE), "The worst deviation of each variant.")
        return Section("Verification", text, [plot], [TableOf(columns, rows)])


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
    title = f"{shape['batch_size']} x {shape['sequence_length']} tokens"
    return TableOf(columns, rows, title if shape["settled"] else f"{title} (did not settle)")


def _render(bundle: Bundle, sources: _Sources, trade_off: Plot | None, sections: Sequence[Section]) -> str:
    manifest = bundle.manifest
    total = sum(entry.size_bytes for entry in manifest.files.values())
    weights = manifest.files["weights.safetensors"].size_bytes
    content = {
        "name": bundle.path.resolve().name,
        "verdict": sources.verdict,
        "verdict_text": _verdict_text(sources),
        "backbone": manifest.backbone,
        "precision": manifest.precision,
        "trade_off": trade_off,
        "variants": [
            *(_variant_row(bundle, variant) for variant in sources.variants),
            _any_ratio_row(bundle),
        ],
        "sizes": f"{len(manifest.files)} files, {total / 1e6:.1f} MB, of which {weights / 1e6:.1f} MB are "
        "the backbone's weights, which all graphs share.",
        "sections": sections,
        "commands": _commands(bundle),
        "recipe": yaml.safe_dump(manifest.recipe, sort_keys=False, allow_unicode=True),
        "made_by": [(key, value or "not installed") for key, value in manifest.made_by.items()],
    }
    return render(content)


def _verdict_text(sources: _Sources) -> str:
    found = sources.verified
    if found is None:
        return "Every graph agreed with eager PyTorch when it was built; `verify` has not run on it since."
    outcome = f"of {', '.join(found['findings'])} {'passed' if found['passed'] else 'FAILED'}"
    where = found["machine"]["cpu"] or "an unknown CPU"
    return f"Verification {outcome} at {found['verified_at']} on {where}."


def _variant_row(bundle: Bundle, variant: Variant) -> dict[str, str]:
    files, plugin = bundle.manifest.files, variant.plugin
    size = files[f"{plugin.folder}/plugin.safetensors"].size_bytes if plugin else None
    return {
        "name": variant.name,
        "ratio": str(variant.ratio),
        "plugin": variant.plugin_state,
        "masking": plugin.masking if plugin else "",
        "bottleneck": str(plugin.bottleneck_size) if plugin else "",
        "graph_kb": f"{files[variant.graphs['model']].size_bytes / 1e3:.0f}",
        "plugin_mb": number(size and size / 1e6, ".2f"),
        "engines": "; ".join(bundle.engine_states(variant.name)) or "none",
    }


def _any_ratio_row(bundle: Bundle) -> dict[str, str]:
    graph = bundle.manifest.files[bundle.manifest.any_ratio["model"]]
    return {
        "name": ANY_RATIO,
        "ratio": "every",
        "plugin": "given in each call",
        **dict.fromkeys(("masking", "bottleneck", "plugin_mb"), ""),
        "graph_kb": f"{graph.size_bytes / 1e3:.0f}",
        "engines": "; ".join(bundle.engine_states(ANY_RATIO)) or "none",
    }


def _engine_targets(bundle: Bundle) -> list[str]:
    return sorted({entry.target for entry in bundle.manifest.engines})


def _commands(bundle: Bundle) -> str:
    name = bundle.path.name
    return "\n".join(
        (
            f"variator-export build recipe.yaml --output {name}      # the recipe below",
            f"variator-export verify {name}",
            *(f"variator-export verify {name} --target {target}" for target in _engine_targets(bundle)),
            f"variator-export bench {name}",
            f"variator-export evaluate {name} --data FILE",
            f"variator-export report {name}",
        )
    )
