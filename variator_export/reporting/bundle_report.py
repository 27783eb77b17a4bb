"""The HTML report of a bundle: its contents, verification, gain in speed and loss in quality."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.manifest import Variant
from variator_export.bundle.reports import PAGE
from variator_export.core.environment import require
from variator_export.core.errors import UserError
from variator_export.core.json_file import write_text
from variator_export.reporting.dominated import Dominated
from variator_export.reporting.page import Section, number, render
from variator_export.reporting.recommendation import Goals, Recommendation, overview
from variator_export.reporting.sections import (
    engines_section,
    quality_section,
    speed_section,
    trade_off_section,
    verification_section,
)
from variator_export.reporting.sources import Sources
from variator_export.sessions import Bundle


@dataclass(frozen=True)
class Report:
    """Result of writing a report.

    Attributes:
        page: The HTML file.
        plots: Files of the plots; empty if no folder for plots was given.
        missing: Commands that would add the missing parts to the page.
        recommendations: The recommended variant for the goals, or for the usual losses by metric.
        recommended: The recommendations in words.
        dominated: The variants that are slower and worse than another one.
        warnings: Reasons to doubt the page's numbers.
    """

    page: Path
    plots: Sequence[Path]
    missing: Sequence[str]
    recommendations: Sequence[Recommendation]
    recommended: Sequence[str]
    dominated: Sequence[Dominated]
    warnings: Sequence[str]


def report(
    bundle: str | Path,
    output: str | Path | None = None,
    *,
    plots: Path | None = None,
    goals: Goals | None = None,
) -> Report:
    """Write the report as one self-contained HTML page, which needs no network.

    Args:
        bundle: The bundle's folder.
        output: The file to write; None for reports/report.html in the bundle.
        plots: A folder to write the plots to, as PNG and SVG; None to write none.
        goals: What the deployment allows, to recommend a variant for; None for losses of 1, 2 and 5 %.

    Raises:
        UserError: The bundle is damaged, a package that draws the report is not installed, or what the goals
            are about was not measured; or the output's folder does not exist.
    """
    for module in ("jinja2", "matplotlib"):
        require(module, "report", "Writing a report")
    if output is not None and not Path(output).absolute().parent.is_dir():
        raise UserError(
            f"There is no folder {Path(output).parent} to write the report to.",
            "Create it, or choose another --output.",
        )
    opened = Bundle.load(bundle)
    opened.refuse_decoder("report")
    opened.check_all()
    sources = Sources(opened)
    recommended = sources.recommendations(goals)
    in_words = overview(recommended) if goals is None else [found.text() for found in recommended]
    gains = trade_off_section(sources)
    makers = (speed_section, quality_section, verification_section, engines_section)
    sections = [section for make in makers if (section := make(sources)) is not None]
    page = Path(output) if output is not None else opened.path / PAGE
    write_text(
        page, _render(sources, gains, sections, [*in_words, *(found.text() for found in sources.dominated)])
    )
    written = []
    if plots is not None:
        from variator_export.reporting.plots import save

        for plot in (plot for section in ([gains] if gains else []) + sections for plot in section.plots):
            for suffix in (".png", ".svg"):
                written.append(plots / f"{plot.name}{suffix}")
                save(plot.figure, written[-1])
    return Report(
        page, written, sources.missing(), recommended, in_words, sources.dominated, sources.warnings()
    )


def _render(
    sources: Sources,
    gains: Section | None,
    sections: Sequence[Section],
    recommended: Sequence[str],
) -> str:
    bundle = sources.bundle
    manifest = bundle.manifest
    total = sum(entry.size_bytes for entry in manifest.files.values())
    weights = manifest.files["weights.safetensors"].size_bytes
    content = {
        "name": bundle.path.resolve().name,
        "verdict": sources.verdict,
        "verdict_text": sources.verdict_text(),
        "backbone": manifest.backbone,
        "precision": manifest.precision,
        "gains": gains,
        "warnings": sources.warnings(),
        "recommended": recommended,
        "variants": [
            *(_variant_row(bundle, variant) for variant in sources.variants),
            *_shared_rows(bundle),
        ],
        "sizes": f"{len(manifest.files)} files, {total / 1e6:.1f} MB, of which {weights / 1e6:.1f} MB are "
        "the backbone's weights, shared by all graphs.",
        "sections": sections,
        "commands": "\n".join(sources.commands()),
        "recipe": yaml.safe_dump(manifest.recipe, sort_keys=False, allow_unicode=True),
        "made_by": [(key, value or "not installed") for key, value in manifest.made_by.items()],
    }
    return render(content)


def _variant_row(bundle: Bundle, variant: Variant) -> dict[str, str]:
    files, plugin = bundle.manifest.files, variant.plugin
    size = files[f"{plugin.folder}/plugin.safetensors"].size_bytes if plugin else None
    return {
        "name": variant.name
        if variant.assembly_spec is None
        else f"{variant.name} ({variant.assembly_spec})",
        "ratio": str(variant.ratio),
        "plugin": variant.plugin_state,
        "masking": plugin.masking if plugin else "",
        "bottleneck": str(plugin.bottleneck_size) if plugin else "",
        "graph_kb": f"{files[variant.graphs['model']].size_bytes / 1e3:.0f}",
        "plugin_mb": number(size and size / 1e6, ".2f"),
        "engines": "; ".join(bundle.engine_states(variant.name)) or "none",
    }


def _shared_rows(bundle: Bundle) -> list[dict[str, str]]:
    """The graphs that take plugins as inputs: of the original layers, and of every assembly."""
    manifest = bundle.manifest
    graphs = {ANY_RATIO: manifest.any_ratio_graph}
    if manifest.any_assembly_graph is not None:
        graphs["any-assembly (every assembly)"] = manifest.any_assembly_graph
    return [
        {
            "name": name,
            "ratio": "every",
            "plugin": "given in each call",
            **dict.fromkeys(("masking", "bottleneck", "plugin_mb"), ""),
            "graph_kb": f"{manifest.files[graph].size_bytes / 1e3:.0f}",
            "engines": "; ".join(bundle.engine_states(name)) or "none",
        }
        for name, graph in graphs.items()
    ]
