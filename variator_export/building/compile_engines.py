"""Engines for an existing bundle: compiling them on the machine that needs them, and merging bundles.

Merging collects the engines that were compiled on several machines in one bundle.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variator_export.building.staging import StagedBundle
from variator_export.building.steps.engine_sources import EngineSources
from variator_export.building.steps.engines import (
    EngineOrder,
    check_order,
    engine_step,
    make_engines,
)
from variator_export.bundle.engine_records import ANY_RATIO, ENGINE_RECORDS, read_records, records_document
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import EngineEntry, Manifest
from variator_export.bundle.publishing import exclusive
from variator_export.bundle.reports import store_report
from variator_export.core.errors import UserError
from variator_export.core.progress import Progress, StepReport
from variator_export.recipe.recipe import EngineRecipe
from variator_export.verification.stored_recipe import recipe_of

# Fields of a sidecar that say from what an engine was built, and how.
_REQUEST = (
    *("target", "version", "cuda", "platform", "variant", "part", "precision"),
    *("options", "compute_capabilities", "profiles", "made_from"),
)


@dataclass(frozen=True)
class CompileResult:
    """Result of compiling or merging engines.

    Attributes:
        bundle: The bundle's folder.
        published: False if the bundle was already up to date.
        steps: One report for each step that was run or reused.
        engines: All engines that the bundle has now.
    """

    bundle: Path
    published: bool
    steps: tuple[StepReport, ...]
    engines: tuple[EngineEntry, ...]


def recipe_of_engines(bundle: Path) -> EngineRecipe:
    """Return the engine options that a bundle was built with."""
    return recipe_of(BundleFiles(bundle)).engine


def compile_engines(bundle: Path, order: EngineOrder, progress: Progress | None = None) -> CompileResult:
    """Build engines from a bundle's graphs. Needs neither torch, nor transformers, nor the backbone.

    Args:
        bundle: The bundle. Its existing engines are kept.
        order: The engines to build.
        progress: Receives progress reports.

    Raises:
        UserError: The bundle is damaged or does not have a requested variant, this machine cannot build for
            a target, or the builder fails. The bundle is left unchanged.
    """
    bundle = bundle.resolve()
    # A damaged bundle is rejected before its folder is locked.
    there = BundleFiles(bundle)
    versions = check_order(order, there.manifest.precision)
    with exclusive(bundle) as staging:
        old = BundleFiles(bundle)
        manifest = old.manifest
        _check_names(old, order.only)
        staged = StagedBundle(staging, old, progress or Progress())
        staged.take_over()
        sources = EngineSources(
            manifest.backbone, manifest.variants, manifest.modules, manifest.any_ratio, manifest.precision
        )
        engines = tuple(make_engines(staged, sources, order, versions))
        published = staged.finish(_with_engines(manifest, engines), bundle)
    return CompileResult(bundle, published, tuple(staged.reports), engines)


def merge_engines(bundle: Path, others: Sequence[Path], progress: Progress | None = None) -> CompileResult:
    """Copy engines into a bundle from copies of it that were compiled on other machines.

    Args:
        bundle: The bundle that receives the engines.
        others: Bundles with the same graphs, weights and plugins.
        progress: Receives progress reports.

    Raises:
        UserError: A bundle has different graphs, or an engine under the same path that was built from other
            files or with other options. Nothing is changed.
    """
    bundle = bundle.resolve()
    BundleFiles(bundle)
    with exclusive(bundle) as staging:
        old = BundleFiles(bundle)
        staged = StagedBundle(staging, old, progress or Progress())
        staged.take_over()
        found: dict[str, tuple[EngineEntry, BundleFiles]] = {}
        for source in (old, *(BundleFiles(path) for path in others)):
            _check_same(old, source)
            for entry in source.manifest.engines:
                there = found.setdefault(entry.engine, (entry, source))
                if there[1] is not source and not _is_equal(entry, there[1], source):
                    kept, left = there[1], source
                    # Both were built alike. A record of verification is of one of them.
                    if _is_verified(source, entry) and not _is_verified(kept, entry):
                        kept, left = source, kept
                        found[entry.engine] = entry, source
                    staged.progress.note(
                        f"{entry.engine} of {kept.path} is kept, which was built like that of {left.path}."
                        + ("" if _is_verified(kept, entry) else " Verify it before it runs.")
                    )
        for entry, source in found.values():
            _take(staged, source, entry)
        engines = tuple(found[name][0] for name in sorted(found))
        published = staged.finish(_with_engines(old.manifest, engines), bundle)
        _join_records(bundle, others)
    return CompileResult(bundle, published, tuple(staged.reports), engines)


def _join_records(bundle: Path, others: Sequence[Path]) -> None:
    """Copy the records that list which GPU has verified which engine."""
    merged = BundleFiles(bundle)
    there = {merged.manifest.files[entry.engine].sha256 for entry in merged.manifest.engines}
    own = read_records(bundle)
    more = [record for other in others for record in read_records(other) if record.sha256 in there]
    if any(record not in own for record in more):
        state = "The engines were joined; the records of their verification are not stored."
        store_report(bundle, ENGINE_RECORDS, records_document([*own, *more]), state)


def _check_names(bundle: BundleFiles, only: Sequence[str] | None) -> None:
    for name in only or ():
        if name != ANY_RATIO:
            bundle.variant(name)


def _with_engines(manifest: Manifest, engines: Sequence[EngineEntry]) -> Manifest:
    targets = sorted({*manifest.recipe["targets"], *(entry.target for entry in engines)})
    return manifest.model_copy(
        update={"engines": tuple(engines), "recipe": {**manifest.recipe, "targets": targets}}
    )


def _check_same(bundle: BundleFiles, other: BundleFiles) -> None:
    """Reject a bundle whose files, other than engines, differ."""
    files, others = (
        {name: entry.sha256 for name, entry in b.manifest.files.items() if not name.startswith("engines/")}
        for b in (bundle, other)
    )
    different = sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name))
    if different:
        raise UserError(
            f"{other.path} is no copy of {bundle.path}: {', '.join(different[:3])} differ.",
            "Compile copies of the same bundle on each machine, then merge the copies.",
        )


def _is_equal(entry: EngineEntry, first: BundleFiles, second: BundleFiles) -> bool:
    """Whether two engines of the same target, platform, version and variant have the same bytes.

    Builders do not promise equal bytes. Engines of other bytes are equivalent if they were built from the
    same files in the same way.

    Raises:
        UserError: They are not even equivalent.
    """
    engine = entry.engine
    if first.manifest.files[engine].sha256 == second.manifest.files[engine].sha256:
        return True
    one, other = _request(first, entry), _request(second, entry)
    if one == other:
        return False
    differing = sorted(name for name in _REQUEST if one[name] != other[name])
    raise UserError(
        f"{first.path} and {second.path} have different engines {engine}: {', '.join(differing)} differ.",
        "Leave out one of the two bundles, or compile both with the same options.",
    )


def _is_verified(bundle: BundleFiles, entry: EngineEntry) -> bool:
    return any(record.passed for record in bundle.engine_records(entry))


def _request(bundle: BundleFiles, entry: EngineEntry) -> dict[str, Any]:
    """What an engine was built from, and how; not what became of it, such as its kernels."""
    sidecar = bundle.sidecar(entry)
    return {name: sidecar.get(name) for name in _REQUEST}


def _take(staged: StagedBundle, source: BundleFiles, entry: EngineEntry) -> None:
    """Copy an engine, its sidecar and the record of the step that built it."""
    step = engine_step(entry)
    depends_on = source.manifest.steps.get(step, {})
    if staged.old is not None and source.path == staged.old.path:
        staged.reuse_if_valid(step, entry.files, depends_on)
        return

    def copy() -> None:
        for name in entry.files:
            shutil.copyfile(source.file(name), staged.folder / name)

    old = None if staged.old is None else staged.old.manifest.files.get(entry.engine)
    differs = old is not None and old.sha256 != source.manifest.files[entry.engine].sha256
    staged.step(
        step, depends_on, entry.files, copy, f"the engine of {source.path} is taken" if differs else None
    )
