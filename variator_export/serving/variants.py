"""The variants that a server chooses from, by quality, and the part of them that a request allows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.quality_report import counted_losses, quality_of_graphs
from variator_export.core.errors import UserError
from variator_export.model.methods import work_of


@dataclass(frozen=True)
class ServedVariant:
    """A variant that a server may choose.

    Attributes:
        name: The variant's name.
        ratio: The variant's compression ratio.
        assembly: Whether its layers are not the original ones. A ratio alone never means such a variant.
        baseline: Whether the variant is the uncompressed model, which comes first.
        work: The multiply-accumulates of a text of 128 tokens, and of 32 generated ones, as a share of those
            of the uncompressed model.
        loss: What the variant loses against the uncompressed model, as a share of the metric, from 0. None if
            it was not measured.
        automatic: Whether a policy may choose the variant. If not, a request must name it: another plugin of
            its ratio, or another assembly of less work, loses less.
    """

    name: str
    ratio: int
    loss: float | None
    automatic: bool = True
    work: float = 1.0
    assembly: bool = False
    baseline: bool = False

    @property
    def label(self) -> int | str:
        """What tells the variant apart in headers, metrics and pages: its ratio; of an assembly, its name."""
        return self.name if self.assembly else self.ratio


class Variants:
    """Variants from the most work to the least. Those that policies choose are also in order of quality.

    A level is an index into them.

    Attributes:
        all: The variants, by work and ratio.
        automatic: The levels that a policy may choose, ascending.
        metric: The metric of the losses. None if quality is not known.
    """

    def __init__(self, variants: Sequence[ServedVariant], metric: str | None = None) -> None:
        if not variants:
            raise ValueError("there must be a variant")
        self.all = tuple(sorted(variants, key=lambda v: (not v.baseline, -v.work, v.ratio, not v.automatic)))
        self.automatic = tuple(level for level, variant in enumerate(self.all) if variant.automatic)
        self.metric = metric

    @property
    def has_losses(self) -> bool:
        """Whether the loss of every variant is known."""
        return all(variant.loss is not None for variant in self.all)

    def within(self, max_loss: float, levels: Sequence[int] | None = None) -> tuple[int, ...]:
        """The levels that lose at most a share of the metric.

        Args:
            max_loss: The share.
            levels: The levels to choose from. None for those that a policy may choose.

        Raises:
            UserError: No variant loses so little, or the losses are not known.
        """
        if not self.has_losses:
            raise UserError(
                "The bundle has no stored evaluation, so a largest loss cannot be kept.",
                "Leave the loss out, name a ratio, or evaluate the bundle: variator-export evaluate BUNDLE",
            )
        asked = self.automatic if levels is None else levels
        found = tuple(level for level in asked if (self.all[level].loss or 0.0) <= max_loss)
        if not found:
            which = (
                "No variant" if levels is None else f"{self.all[asked[0]].name} is asked for, and no such one"
            )
            raise UserError(f"{which} loses at most {max_loss:.2%}; {self.text()}.", "Allow a larger loss.")
        return found

    def named(self, choice: str) -> tuple[int, ...]:
        """The one level of a variant's name or ratio.

        Raises:
            UserError: There is no such variant, or there are several of that ratio.
        """
        found = tuple(level for level, v in enumerate(self.all) if choice == v.name) or tuple(
            level for level, v in enumerate(self.all) if choice == str(v.ratio) and not v.assembly
        )
        if len(found) != 1:
            raise UserError(
                f"There {'are several variants' if found else 'is no variant'} {choice!r}; {self.text()}.",
                "Name one of them.",
            )
        return found

    def text(self) -> str:
        """The variants and what they lose, in words."""
        return "there is " + ", ".join(
            f"{v.name} (ratio {v.ratio}{'' if v.loss is None else f', loses {v.loss:.2%}'})" for v in self.all
        )


def level_of(allowed: Sequence[int], level: int) -> int:
    """The level at which a row runs if the policy chose a level: the fastest that is not below it in quality.

    A row that allows only faster levels gets the best of those.

    Args:
        allowed: The levels that the row allows, ascending.
        level: The policy's choice.
    """
    found = allowed[0]
    for other in allowed:
        if other > level:
            break
        found = other
    return found


def read_variants(
    bundle: BundleFiles, metric: str | None = None, *, allow_unknown_quality: bool = False
) -> Variants:
    """The variants of a bundle with the losses of its stored evaluation.

    A variant's loss is the largest over the data sets that were evaluated. No ratio counts as better than a
    smaller one of the same assembly: where it measured better, that is chance. Of several plugins of one
    ratio, policies choose the one that loses least, or the first if losses are not known. They choose no
    variant that loses more than another one of less work.

    Args:
        bundle: The bundle.
        metric: The metric whose loss counts. None for the main metric of the bundle's task.
        allow_unknown_quality: Serve a bundle without a stored evaluation. Policies then choose among all
            variants, by their work.

    Raises:
        UserError: The evaluation lacks a variant or the metric, or there is none.
    """
    variants = bundle.manifest.variants
    qualities = quality_of_graphs(bundle.path, bundle.variant_hashes(), bundle.manifest.baseline.name)
    found: dict[str, float] = {}
    metrics = set()
    for quality in qualities:
        metrics.add(metric or quality["metric"])
        for variant in variants:
            losses = counted_losses(quality, variant.name, [metric or quality["metric"]])
            for lost in losses.values():
                found[variant.name] = max(found.get(variant.name, lost), lost)
    missing = [v.name for v in variants if v.name not in found]
    if not missing:
        return Variants(_ordered(bundle, found), " and ".join(sorted(metrics)))
    if allow_unknown_quality:
        return Variants(_ordered(bundle, {}))
    what = f"of {metric} " if metric is not None else ""
    raise UserError(
        f"{bundle.path} has no stored evaluation {what}for {', '.join(missing)}: what a ratio loses is not "
        "known.",
        f"Measure it: variator-export evaluate {bundle.path} --data FILE; or serve without: "
        "--allow-unknown-quality",
    )


def _ordered(bundle: BundleFiles, losses: Mapping[str, float]) -> list[ServedVariant]:
    """Variants with their losses, by name; without any, policies choose among all."""
    served: list[ServedVariant] = []
    backbone = bundle.manifest.backbone
    variants = bundle.manifest.variants
    whole = work_of(bundle.manifest.baseline, backbone)
    for assembly in dict.fromkeys(variant.assembly_spec for variant in variants):
        least = 0.0
        of_assembly = [variant for variant in variants if variant.assembly_spec == assembly]
        for ratio in sorted({variant.ratio for variant in of_assembly}):
            of_ratio = [variant for variant in of_assembly if variant.ratio == ratio]
            of_ratio.sort(key=lambda variant: losses.get(variant.name, 0.0))
            least = max(least, losses.get(of_ratio[0].name, 0.0))
            served += [
                ServedVariant(
                    variant.name,
                    ratio,
                    max(losses[variant.name], least) if losses else None,
                    automatic=place == 0,
                    work=work_of(variant, backbone) / whole,
                    assembly=assembly is not None,
                    baseline=variant.baseline,
                )
                for place, variant in enumerate(of_ratio)
            ]
    return [replace(v, automatic=v.automatic and not _is_dominated(v, served)) for v in served]


def _is_dominated(variant: ServedVariant, others: Sequence[ServedVariant]) -> bool:
    """Whether a variant of less work loses less. Unknown losses say nothing."""
    return any(
        other.loss is not None
        and variant.loss is not None
        and other.work < variant.work
        and other.loss < variant.loss
        for other in others
        if other.automatic
    )
