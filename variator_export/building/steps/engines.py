"""The steps that build engines from verified graphs. They need neither torch nor transformers."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from variator_export.building.staging import StagedBundle
from variator_export.building.steps.engine_sources import EngineSources
from variator_export.bundle.engine_records import ANY_RATIO
from variator_export.bundle.engine_sources import SOURCES, engine_sources
from variator_export.bundle.manifest import LEAST_SHARE, EngineEntry
from variator_export.bundle.reports import ENGINES_REPORT, read_report
from variator_export.core.environment import is_importable, machine
from variator_export.core.errors import NumbersDisagreeError
from variator_export.core.hashing import code_digest, sha256_file
from variator_export.core.json_file import write_json
from variator_export.core.parts import DECODER
from variator_export.core.progress import PhaseBars
from variator_export.engines.layers import precision_in_engine
from variator_export.engines.request import (
    BuiltEngine,
    EngineRequest,
    Profile,
    TimingCacheMode,
    any_ratio_profiles,
    variant_profiles,
)
from variator_export.engines.targets import find_engine_target
from variator_export.recipe.recipe import EngineRecipe


@dataclass(frozen=True)
class EngineOrder:
    """The engines to build.

    Attributes:
        options: Options for building the engines.
        targets: Targets to build for, without `onnxruntime`.
        only: Names of the variants to build, possibly including `any-ratio`; None to follow the options.
        jobs: Number of engines built at a time, each in its own process. Builds that time kernels on the
            GPU run one at a time all the same.
        timing_cache: Whether kernel timings are kept from one build to the next.
    """

    options: EngineRecipe
    targets: Sequence[str]
    only: Sequence[str] | None = None
    jobs: int = 1
    timing_cache: TimingCacheMode = "ignore"


@dataclass(frozen=True)
class _Planned:
    """An engine that is planned but not built yet."""

    entry: EngineEntry
    request: EngineRequest
    depends_on: Mapping[str, Any]

    @property
    def step(self) -> str:
        return engine_step(self.entry)


def check_order(order: EngineOrder, precision: str) -> dict[str, str]:
    """Check that every target can be built, and return the versions of the targets.

    Raises:
        UserError: A target is not installed, does not support the precision or the options, or needs a GPU
            that is missing.
    """
    found = {}
    for name in order.targets:
        target = find_engine_target(name)
        target.check_precision(precision)
        target.check_options(order.options, order.timing_cache)
        found[name] = target.version()
        target.platforms(order.options)
        target.check_gpus(precision, order.options)
    return found


def make_engines(
    staged: StagedBundle, sources: EngineSources, order: EngineOrder, versions: Mapping[str, str]
) -> list[EngineEntry]:
    """Build the requested engines and keep the existing engines that are still valid.

    Args:
        staged: The staged bundle that holds the graphs.
        sources: The graphs.
        order: The engines to build.
        versions: TensorRT version of each target (`check_order`).

    Returns:
        The entries of all engines, new and kept.

    Raises:
        UserError: The builder fails. The message contains the builder's own message.
    """
    planned = [
        plan
        for target in order.targets
        for platform in find_engine_target(target).platforms(order.options)
        for plan in _plan(staged, sources, order, target, platform, versions[target])
    ]
    planned = [_as_before(staged, sources, order, plan) for plan in planned]
    names = {plan.step for plan in planned}
    entries = [] if staged.old is None else list(staged.old.manifest.engines)
    kept = [e for e in entries if engine_step(e) not in names and _keep(staged, sources, e)]
    with _builders(staged, planned, order.jobs) as build:
        for plan in planned:
            staged.step(
                plan.step,
                plan.depends_on,
                plan.entry.files,
                lambda plan=plan: _make(staged, sources, plan, build(plan)),  # type: ignore[misc]
            )
    return sorted((*kept, *(plan.entry for plan in planned)), key=lambda entry: entry.engine)


def _plan(
    staged: StagedBundle,
    sources: EngineSources,
    order: EngineOrder,
    target: str,
    platform: str,
    version: str,
) -> Iterator[_Planned]:
    """Plan the engines of one target and platform."""
    options, backbone, chosen = order.options, sources.backbone, order.only
    folder = f"engines/{target}/{sources.precision}/{platform}-{version}"
    builder = find_engine_target(target)
    timing_cache = builder.timing_cache(order.timing_cache)

    def planned(name: str, part: str, graph: str, profiles: Sequence[Profile]) -> _Planned:
        file = f"{folder}/{PurePosixPath(graph).stem}"
        entry = EngineEntry(
            target=target,
            precision=sources.precision,
            variant=name,
            part=part,
            platform=platform,
            version=version,
            engine=f"{file}.engine",
            sidecar=f"{file}.json",
        )
        request = EngineRequest(
            target=target,
            graph=graph,
            what=PurePosixPath(graph).stem,
            profiles=tuple(profiles),
            options=options.builder,
            compute_capabilities=tuple(platform.split("+")) if options.compute_capabilities else (),
            timing_cache=timing_cache,
            timing_cache_mode=order.timing_cache,
        )
        depends_on = {
            **engine_sources(graph, sources.tensors_of(entry), staged.sha256),
            # The timing cache affects how long a build takes, not its result.
            "request": request.model_dump(mode="json", exclude={"timing_cache", "timing_cache_mode"}),
            "version": version,
            "code": code_digest(*builder.code),
        }
        return _Planned(entry, request, depends_on)

    for variant in sources.variants:
        if variant.name in chosen if chosen is not None else options.per_ratio:
            profiles = variant_profiles(options.profiles, backbone, backbone.part)
            yield planned(variant.name, sources.part, variant.graph, profiles)
    if ANY_RATIO in chosen if chosen is not None else options.any_ratio:
        every = any_ratio_profiles(options.profiles, backbone, backbone.part, sources.input_shapes())
        yield planned(ANY_RATIO, sources.part, sources.any_ratio[sources.part], every)
    # Every variant of the original layers needs the original decoder, whichever was chosen.
    needed = {ANY_RATIO} | {
        variant.decoder_name
        for variant in sources.variants
        if (variant.name in chosen if chosen is not None else options.per_ratio)
    }
    for name, variant in sources.decoders.items():
        if name in needed:
            profiles = variant_profiles(options.profiles, backbone, backbone.decoder_part(variant.assembly))
            yield planned(name, DECODER, variant.decoder_graph, profiles)


def _as_before(staged: StagedBundle, sources: EngineSources, order: EngineOrder, plan: _Planned) -> _Planned:
    """Keep an engine that all variants share when only some were asked for, if it was requested like this.

    A newer version of this package would otherwise replace it, and with it the record of its verification,
    without which no variant runs.
    """
    if staged.old is None or order.only is None or not plan.entry.is_shared:
        return plan
    before = staged.old.manifest.steps.get(plan.step, {})
    graph = sources.graph_of(plan.entry)
    assert graph is not None
    made_from = engine_sources(graph, sources.tensors_of(plan.entry), staged.sha256)
    same = ("request", "version", *made_from)
    if any(before.get(name) != plan.depends_on[name] for name in same):
        return plan
    return replace(plan, depends_on=before)


def engine_step(entry: EngineEntry) -> str:
    """Return the name of the step that built an engine."""
    return f"engine/{entry.target}/{entry.platform}-{entry.version}/{PurePosixPath(entry.engine).stem}"


def _keep(staged: StagedBundle, sources: EngineSources, entry: EngineEntry) -> bool:
    """Keep an engine that was not requested, provided that the files it was built from are unchanged."""
    assert staged.old is not None
    before = staged.old.manifest.steps.get(engine_step(entry), {})
    if (graph := sources.graph_of(entry)) is None:
        return False  # the variant or the part no longer exists
    # Only the files are compared: the engine may come from another machine, and its TensorRT version need
    # not be installed here.
    now = {**before, **engine_sources(graph, sources.tensors_of(entry), staged.sha256)}
    return staged.reuse_if_valid(engine_step(entry), entry.files, now)


@contextmanager
def _builders(
    staged: StagedBundle, planned: Sequence[_Planned], jobs: int
) -> Iterator[Callable[[_Planned], tuple[BuiltEngine, float]]]:
    """Provide the function that returns a built engine and its build time in seconds.

    With one job, the function builds the engine. With several jobs, all builds are submitted at once and the
    function waits for the one it is asked for.
    """

    timing, ended = threading.Lock(), threading.Event()

    def build(plan: _Planned, bars: "PhaseBars | None" = None) -> tuple[BuiltEngine, float]:
        builder = find_engine_target(plan.entry.target)
        with timing if builder.times_kernels else nullcontext():
            if ended.is_set():  # while this waited
                raise CancelledError
            start = time.monotonic()
            engine = builder.build(plan.request, staged.folder, bars.tell if bars else None)
            return engine, time.monotonic() - start

    if jobs == 1:

        def build_now(plan: _Planned) -> tuple[BuiltEngine, float]:
            with PhaseBars(staged.progress, f"{plan.entry.target} {plan.request.what}") as bars:
                return build(plan, bars)

        yield build_now
        return
    needed = [p for p in planned if staged.would_make(p.step, p.depends_on, p.entry.files)]
    if needed:
        staged.materialise()
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        running: dict[str, Future[tuple[BuiltEngine, float]]] = {
            p.step: pool.submit(build, p) for p in needed
        }
        try:
            yield lambda plan: running[plan.step].result()
        finally:
            ended.set()
            for future in running.values():
                future.cancel()


def _proof(sources: EngineSources, name: str) -> dict[str, Any]:
    """Return the evidence for the precision in which an engine's graph computes.

    The any-ratio graph serves all variants, so it gets the lowest share found in any of them.
    """
    found = [v.precision_proof for v in sources.variants if name in (v.name, ANY_RATIO)]
    least = min(found, key=lambda proof: proof.macs)
    return {"counted_on": "graph", **least.model_dump(mode="json")}


def _plan_proof(
    staged: StagedBundle, sources: EngineSources, entry: EngineEntry, engine: bytes
) -> dict[str, Any] | None:
    """Count the products that an engine computes in its precision, as far as its file tells.

    Raises:
        NumbersDisagreeError: More than 5 % of the multiply-accumulates are in another type.
    """
    products = find_engine_target(entry.target).products(engine)
    original = [v for v in sources.variants if v.assembly_spec is None]
    # The any-ratio graph is counted without the plugins' products, whose sizes differ with the ratio.
    variant = entry.variant_in(sources.variants) or min(original, key=lambda v: v.ratio)
    source = sources.graph_of(entry)
    assert source is not None
    # Counting the products of a graph needs the packages of the extra `export`.
    if not products or not all(map(is_importable, ("torch", "onnx_ir", "onnxscript"))):
        return None
    from variator_export.graph.macs import macs_by_node

    graph = staged.current(source)
    float32 = set(variant.precision_proof.float32_modules)
    if entry.part != sources.part:  # the proof names modules of the part with plugins; others are like them
        float32 = {name.rpartition(".")[2] for name in float32}
    macs = macs_by_node(graph, float32, variant.ratio)
    found = precision_in_engine(products, macs, entry.precision)
    if found is None:
        return None
    if found.other > 1 - LEAST_SHARE:
        raise NumbersDisagreeError(
            f"{entry.target} computes {found.other:.0%} of the products of {entry.engine} in another type "
            f"than {entry.precision}.",
            "This is a fault of the builder or of the graph: please report it with the recipe.",
        )
    return {"counted_on": "plan", **asdict(found)}


def _make(
    staged: StagedBundle, sources: EngineSources, plan: _Planned, built: tuple[BuiltEngine, float]
) -> None:
    """Write an engine, its sidecar, and its build time."""
    engine, seconds = built
    entry, request = plan.entry, plan.request
    path = staged.folder / entry.engine
    path.write_bytes(engine.content)
    builder = find_engine_target(entry.target)
    facts = builder.facts(engine.content)
    write_json(
        staged.folder / entry.sidecar,
        {
            "target": entry.target,
            "version": entry.version,
            "cuda": facts["cuda"],
            "platform": entry.platform,
            "variant": entry.variant,
            "part": entry.part,
            "precision": entry.precision,
            # Counted on the graphs with plugins.
            "precision_proof": _proof(sources, entry.variant) if entry.part == sources.part else None,
            "plan_proof": _plan_proof(staged, sources, entry, engine.content),
            "attention": engine.attention,
            "kernels": None if (kernels := builder.schedule(engine.content)) is None else kernels.summary(),
            "options": request.options.model_dump(mode="json"),
            "compute_capabilities": list(request.compute_capabilities),
            "profiles": [profile.model_dump(mode="json") for profile in request.profiles],
            "engine": {
                "sha256": sha256_file(path),
                "size_bytes": len(engine.content),
                "plan_version": facts["plan_version"],
            },
            "made_from": {name: plan.depends_on[name] for name in SOURCES if name in plan.depends_on},
        },
    )
    # Build times differ even between builds of equal inputs, so they go into a report, not into the bundle.
    report = staged.folder / ENGINES_REPORT
    before = read_report(staged.folder, ENGINES_REPORT) or (
        read_report(staged.old.path, ENGINES_REPORT) if staged.old else None
    )
    report.parent.mkdir(exist_ok=True)
    write_json(report, {**(before or {}), entry.engine: {"seconds": round(seconds, 2), "machine": machine()}})
