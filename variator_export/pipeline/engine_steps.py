"""The steps of a build that make engines of verified graphs."""

from typing import Any

from variator_export.core.hashing import sha256_file
from variator_export.core.json_file import write_json
from variator_export.core.manifest import EngineEntry
from variator_export.engines.tensorrt.isolated import build_engine
from variator_export.pipeline.context import BuildContext
from variator_export.pipeline.plan import VariantPlan

BUILT_ONLY = "built, not verified on a device"


def make_engines(context: BuildContext, variants: list[VariantPlan]) -> list[EngineEntry]:
    """The engines that are asked for, and those of other targets that are there and still right."""
    old = context.workshop.old
    there = {engine.target for engine in old.manifest.engines} if old is not None else set()
    entries = []
    for target in sorted(there | set(context.recipe.targets)):
        if target == "onnxruntime":
            continue  # it runs the graphs as they are
        for plan in variants:
            if target in context.recipe.targets:
                _build(context, target, plan)
            elif not _keep(context, target, plan):
                continue
            engine, sidecar = _paths(context, target, plan)
            entries.append(
                EngineEntry(
                    target=target,
                    precision=context.recipe.precision,
                    variant=plan.name,
                    engine=engine,
                    sidecar=sidecar,
                )
            )
    return entries


def _paths(context: BuildContext, target: str, plan: VariantPlan) -> tuple[str, str]:
    """Where an engine and its sidecar lie inside the bundle."""
    folder = f"engines/{target}/{context.recipe.precision}"
    return f"{folder}/{plan.name}.engine", f"{folder}/{plan.name}.json"


def _keep(context: BuildContext, target: str, plan: VariantPlan) -> bool:
    """Keep an engine for a target that was not asked for, if nothing that it depends on has changed."""
    old = context.workshop.old
    name = f"engine/{target}/{plan.name}"
    if old is None or name not in old.manifest.steps:
        return False
    # Its TensorRT need not be installed here.
    version = str(old.manifest.steps[name].get("version"))
    depends_on = _depends_on(context, plan, version)
    return context.workshop.keep(name, _paths(context, target, plan), depends_on)


def _depends_on(context: BuildContext, plan: VariantPlan, version: str) -> dict[str, Any]:
    return {
        **context.sources_of_graph(plan),
        "graph": context.workshop.sha256(f"{plan.name}.onnx"),
        "profile": context.recipe.engine.model_dump(mode="json"),
        "version": version,
        "made_by": context.made_by,
    }


def _build(context: BuildContext, target: str, plan: VariantPlan) -> None:
    """An engine for one variant and its sidecar."""
    workshop, recipe = context.workshop, context.recipe
    engine, sidecar = _paths(context, target, plan)
    depends_on = _depends_on(context, plan, context.engine_versions[target])

    def make() -> None:
        profile = _profile(context)
        path = workshop.staging / engine
        path.write_bytes(build_engine(target, workshop.staging / f"{plan.name}.onnx", profile))
        write_json(
            workshop.staging / sidecar,
            {
                "status": BUILT_ONLY,
                "target": target,
                "version": context.engine_versions[target],
                "variant": plan.name,
                "ratio": plan.ratio,
                "precision": recipe.precision,
                "profile": {name: [list(shape) for shape in shapes] for name, shapes in profile.items()},
                "engine": {"sha256": sha256_file(path), "size_bytes": path.stat().st_size},
                "made_from": {
                    "graph": workshop.sha256(f"{plan.name}.onnx"),
                    **context.sources_of_graph(plan),
                },
                "made_by": context.made_by,
            },
        )

    workshop.step(f"engine/{target}/{plan.name}", depends_on, [engine, sidecar], make)


def _profile(context: BuildContext) -> dict[str, tuple[Any, Any, Any]]:
    """(min, opt, max) shapes of every input, within the model's limit."""
    limit = context.info.max_length
    lengths = [min(n, limit) if limit is not None else n for n in context.recipe.engine.sequence_length]
    low, opt, high = zip(context.recipe.engine.batch_size, lengths, strict=True)
    return dict.fromkeys(context.info.spec.family.inputs, (low, opt, high))
