"""The findings of a bundle's reports about its current graphs and engines. Outdated reports are ignored."""

import functools
import shlex
from collections.abc import Mapping
from typing import Any

from variator_export.benchmark.runtimes import RUNTIMES
from variator_export.benchmark.schedule import TimingSettings
from variator_export.benchmark.stored import stored_benchmark
from variator_export.bundle.manifest import Variant
from variator_export.bundle.quality_report import counted_metrics, quality_of_graphs
from variator_export.bundle.reports import (
    VERIFICATION_REPORT,
    build_verification_report,
    engine_verification_report,
    read_report,
)
from variator_export.engines.targets import GRAPHS, TARGETS
from variator_export.model.methods import work_of
from variator_export.reporting.dominated import Dominated, dominated_variants
from variator_export.reporting.recommendation import USUAL_LOSSES, Goals, Recommendation, recommend
from variator_export.sessions import Bundle

_VERIFICATION_KEYS = ("graphs", "findings", "passed", "reference", "verified_at", "machine")


class Sources:
    """The reports of a bundle that apply to its current graphs and engines.

    Attributes:
        variants: Variants of the bundle: the baseline, then the others from the most work to the least.
        graphs: The sha256 of each variant's graph.
        benchmark: What `bench` measured on these graphs; None if there is nothing.
        qualities: Reports of `evaluate`, one for each task and data set.
        verified: Report of `verify` on the graphs; None if there is none.
        verified_engines: Reports of `verify` on engines, by target.
        built: Verification report of the build for each variant; None if there is none.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        manifest = bundle.manifest

        def order(variant: Variant) -> tuple[bool, int, int, str]:
            return not variant.baseline, -work_of(variant, manifest.backbone), variant.ratio, variant.name

        self.variants = sorted(manifest.variants, key=order)
        self.graphs = bundle.graph_hashes()
        self.benchmark = stored_benchmark(bundle)
        self.qualities = quality_of_graphs(bundle.path, bundle.variant_hashes(), manifest.baseline.name)
        self.verified = self._of_now(VERIFICATION_REPORT)
        others = [name for name in TARGETS.names() if name != GRAPHS]
        engines = {target: self._of_now(engine_verification_report(target)) for target in others}
        self.verified_engines = {target: found for target, found in engines.items() if found is not None}
        self.built = {
            v.name: read_report(bundle.path, build_verification_report(v.name), "findings", "reference")
            for v in self.variants
        }

    def _of_now(self, name: str) -> dict[str, Any] | None:
        found = read_report(self.bundle.path, name, *_VERIFICATION_KEYS)
        now = {name: entry.sha256 for name, entry in self.bundle.manifest.files.items()}
        # A graph refers to its plugin by name, so its own hash says nothing about the plugin's numbers.
        computes = self.bundle.variant_hashes()
        if found is None or any(computes.get(name) != value for name, value in found["variants"].items()):
            return None
        same = all(now.get(name) == sha256 for name, sha256 in found["graphs"].items())
        return found if same else None

    @property
    def verdict(self) -> str:
        """The verdict: `passed`, `partly` (not all variants were verified), `failed` or `built`.

        `failed` covers graphs and engines. `built` means that `verify` has not run since the build.
        """
        engines_failed = any(not found["passed"] for found in self.verified_engines.values())
        return "failed" if engines_failed else self._graphs_verdict

    @property
    def _graphs_verdict(self) -> str:
        if self.verified is None:
            return "built"
        if not self.verified["passed"]:
            return "failed"
        return "passed" if self.verified["findings"].keys() >= self.graphs.keys() else "partly"

    def verdict_text(self) -> str:
        """Return the verdict on graphs and engines in words."""
        built = "Every graph agreed with eager PyTorch when it was built; `verify` has not been run since."
        of_all = [*([self.verified] if self.verified else []), *self.verified_engines.values()]
        return " ".join([*([] if self.verified else [built]), *map(_outcome, of_all)])

    def warnings(self) -> list[str]:
        """Return the reasons to doubt the page's numbers."""
        untrained = [v.name for v in self.variants if v.plugin is not None and not v.plugin.trained]
        found = []
        if untrained:
            names = ", ".join(untrained)
            found.append(f"The plugins of {names} were only initialised: their outputs are not useful.")
        for quality in self.qualities:
            found += [f"{quality['task']} on {quality['data']}: {text}" for text in quality["warnings"]]
        if self.benchmark is not None and not self.benchmark["settled"]:
            found.append(
                "The speed did not settle in every opening: other programs were running, or the clock speed "
                "changed."
            )
        return found

    def recommendations(self, goals: Goals | None) -> list[Recommendation]:
        """Return the recommended variant for the goals, or for the usual losses if quality is known.

        Raises:
            UserError: What the goals are about was not measured.
        """
        metrics = dict.fromkeys(name for quality in self.qualities for name in counted_metrics(quality))
        usual = [Goals(max_loss=lost, metrics=(name,)) for name in metrics for lost in USUAL_LOSSES]
        wanted = usual if goals is None else [goals]
        names = [variant.name for variant in self.variants]
        return [recommend(goal, names, self.qualities, self.benchmark) for goal in wanted]

    @functools.cached_property
    def dominated(self) -> list[Dominated]:
        """The variants that are slower and worse than another one."""
        names = [variant.name for variant in self.variants]
        return dominated_variants(names, self.qualities, self.benchmark)

    def missing(self) -> list[str]:
        """Return the commands that would add to the page."""
        path = shlex.quote(str(self.bundle.path))
        return [
            *([] if self._graphs_verdict in ("passed", "failed") else [f"variator-export verify {path}"]),
            *([] if self._all_timed() else [f"variator-export bench {path}"]),
            *([] if self._all_evaluated() else [f"variator-export evaluate {path} --data FILE"]),
        ]

    def _all_timed(self) -> bool:
        rows = [row for shape in (self.benchmark or {"shapes": []})["shapes"] for row in shape["rows"]]
        return self.graphs.keys() <= {row["variant"] for row in rows}

    def _all_evaluated(self) -> bool:
        return any(self.graphs.keys() <= quality["variants"].keys() for quality in self.qualities)

    def findings(self) -> dict[str, list[Mapping[str, Any]]]:
        """Return the findings by variant, and those on engines by variant and target.

        Findings of `verify` take precedence over findings of the build.
        """
        found = {name: report["findings"] for name, report in self.built.items() if report}
        found |= self.verified["findings"] if self.verified else {}
        for target, report in self.verified_engines.items():
            found |= {f"{name}, {target}": findings for name, findings in report["findings"].items()}
        return found

    def commands(self) -> list[str]:
        """Return the commands that reproduce the page, except for numbers that depend on the machine."""
        name = shlex.quote(self.bundle.path.resolve().name)
        targets = sorted({entry.target for entry in self.bundle.manifest.engines})
        return [
            f"variator-export build recipe.yaml --output {name}      # the recipe below",
            f"variator-export verify {name}",
            *(f"variator-export verify {name} --target {target}" for target in targets),
            f"variator-export bench {name}{_bench_options(self.benchmark)}",
            *(f"variator-export evaluate {name}{options}" for options in _evaluate_options(self.qualities)),
            f"variator-export report {name}",
        ]


def _outcome(found: Mapping[str, Any]) -> str:
    target = found.get("target", "onnxruntime")
    of_what = ", ".join(found["findings"]) + (f" on {target}" if target != GRAPHS else "")
    where = found.get("gpu") or found["machine"]["cpu"] or "an unknown CPU"
    verdict = "passed" if found["passed"] else "FAILED"
    return f"Verification of {of_what} {verdict} at {found['verified_at']} on {where}."


def _bench_options(benchmark: Mapping[str, Any] | None) -> str:
    if benchmark is None:
        return ""
    shapes, settings = benchmark["shapes"], benchmark["settings"]
    rows = [row for shape in shapes for row in shape["rows"]]
    options = [f"--shape {shape['batch_size']}x{shape['sequence_length']}" for shape in shapes]
    options += [f"--runtime {name}" for name in RUNTIMES if any(row["runtime"] == name for row in rows)]
    usual = vars(TimingSettings())
    options += [
        f"--{key.replace('_', '-')} {value:g}" for key, value in settings.items() if value != usual.get(key)
    ]
    options += ["--profile"] if any(shape["profiles"] for shape in shapes) else []
    return "".join(f" {option}" for option in options)


def _evaluate_options(qualities: list[dict[str, Any]]) -> list[str]:
    found = []
    for quality in qualities:
        columns = quality["columns"]
        names = {"text": columns.get("text"), "pair": columns.get("pair"), "label": columns.get("target")}
        options = [f"--data {shlex.quote(quality['data'])}"]
        options += [f"--{key}-column {shlex.quote(str(name))}" for key, name in names.items() if name]
        options += [] if columns.get("header", True) else ["--no-header"]
        options += [f"--task {quality['task']}"]
        options += [f"--max-tokens {quality['max_tokens']}"] if quality["max_tokens"] else []
        found.append("".join(f" {option}" for option in options))
    return found or [" --data FILE"]
