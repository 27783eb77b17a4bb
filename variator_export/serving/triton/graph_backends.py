"""Models of Triton's own TensorRT and ONNX Runtime backends: one for each variant."""

from collections.abc import Mapping
from typing import Any

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import BACKBONE_WEIGHTS, EngineEntry, Variant
from variator_export.core.errors import UsageError, UserError
from variator_export.engines.batches import BATCH_SIZE
from variator_export.engines.compatibility import AMPERE_PLUS
from variator_export.engines.targets import TARGETS
from variator_export.model.methods import method_of
from variator_export.serving.triton.engine_files import (
    engines_by_gpu,
    largest_batch,
    require_plan,
    require_verified_somewhere,
)
from variator_export.serving.triton.model import ExportOptions, PlannedModel
from variator_export.serving.triton.prototext import map_entries
from variator_export.serving.triton.settings import string_parameters
from variator_export.serving.triton.tensors import graph_tensors

# The targets whose provider Triton's ONNX Runtime backend has without further settings.
_ONNX_TARGETS = ("onnxruntime", "onnxruntime-cuda")


def tensorrt_models(bundle: BundleFiles, options: ExportOptions) -> list[PlannedModel]:
    """A `tensorrt_plan` model for each variant, with a plan for each compute capability.

    Raises:
        UserError: A variant has no engine for a GPU, or engines that Triton cannot open or choose between.
        UsageError: An option does not fit.
    """
    engines = {
        variant.name: engines_by_gpu(bundle, variant, options.compute_capabilities, options.tensorrt_version)
        for variant in _variants(bundle, options)
    }
    versions = sorted({entry.version for by_gpu in engines.values() for entry in by_gpu.values()})
    if len(versions) > 1:
        raise UserError(
            f"{bundle.path} has engines by TensorRT {' and '.join(versions)}; a Triton has one TensorRT.",
            f"Name its version: --tensorrt-version {versions[-1]}",
        )
    return [_tensorrt_model(bundle, name, by_gpu, options) for name, by_gpu in engines.items()]


def _tensorrt_model(
    bundle: BundleFiles, variant: str, engines: Mapping[str, EngineEntry], options: ExportOptions
) -> PlannedModel:
    entries = list(dict.fromkeys(engines.values()))
    sidecars = [bundle.sidecar(entry) for entry in entries]
    for entry, sidecar in zip(entries, sidecars, strict=True):
        if not options.allow_unverified:
            require_verified_somewhere(bundle, entry)
        require_plan(bundle, entry, sidecar)
        if sidecar["profiles"] != sidecars[0]["profiles"]:
            raise UserError(
                f"{entry.engine} has other optimization profiles than {entries[0].engine}; a model of Triton "
                "has the same for every GPU.",
                f"Compile them with one recipe: variator-export compile {bundle.path} --target tensorrt "
                "--recipe FILE",
            )
    limit, scheduling = largest_batch(bundle, entries[0]), options.scheduling
    plans = {entry: f"{entry.platform}.plan" for entry in entries}
    by_gpu = {gpu: plans[entry] for gpu, entry in engines.items()}
    profiles = [str(number) for number in range(len(sidecars[0]["profiles"]))]
    config: dict[str, Any] = {
        "platform": "tensorrt_plan",
        "backend": "tensorrt",
        "max_batch_size": scheduling.batch_size(limit, limit),
        **_graph_config(bundle, options, gpu=True),
        "cc_model_filenames": map_entries(
            {_triton_capability(gpu): name for gpu, name in by_gpu.items() if gpu != AMPERE_PLUS}
        ),
    }
    # Without a choice, Triton uses the first profile only.
    config["instance_group"]["profile"] = profiles
    if AMPERE_PLUS in by_gpu:  # Triton takes it for every GPU that has no plan of its own
        config["default_model_filename"] = by_gpu[AMPERE_PLUS]
    return PlannedModel(
        f"{options.name}-{variant}",
        (variant,),
        config,
        {name: bundle.file(entry.engine) for entry, name in plans.items()},
        needs=f"TensorRT {entries[0].version} in Triton, on {', '.join(by_gpu)}",
    )


def onnxruntime_models(bundle: BundleFiles, options: ExportOptions) -> list[PlannedModel]:
    """An `onnxruntime_onnx` model for each variant. Each has its own copy of the weights.

    ONNX Runtime opens external data only below the folder of the graph, and refuses links.

    Raises:
        UserError: ONNX Runtime cannot run the bundle.
        UsageError: An option does not fit.
    """
    if options.target not in _ONNX_TARGETS:
        raise UsageError(
            f"--target {options.target} is not for Triton's ONNX Runtime backend.",
            f"Choose one of {', '.join(_ONNX_TARGETS)}, or --backend python.",
        )
    target = TARGETS.find(options.target)
    target.require(bundle)
    models = []
    for variant in _variants(bundle, options):
        own = method_of(variant).tensor_files(variant, bundle.manifest.precision)
        weights = [BACKBONE_WEIGHTS, *own]
        config = {
            "platform": "onnxruntime_onnx",
            "backend": "onnxruntime",
            "max_batch_size": options.scheduling.batch_size(BATCH_SIZE),
            **_graph_config(bundle, options, gpu=target.gpu),
        }
        if options.threads is not None:
            parameters = {"intra_op_thread_count": str(options.threads)}
            config["parameters"] = map_entries(string_parameters(parameters))
        models.append(
            PlannedModel(
                f"{options.name}-{variant.name}",
                (variant.name,),
                config,
                {"model.onnx": bundle.graph(variant.graph), **{name: bundle.file(name) for name in weights}},
                needs=f"an ONNX Runtime in Triton that runs opset {bundle.manifest.opset}",
            )
        )
    return models


def _graph_config(bundle: BundleFiles, options: ExportOptions, *, gpu: bool) -> dict[str, Any]:
    part = bundle.manifest.backbone.part
    return {
        "input": graph_tensors(part.inputs),
        "output": graph_tensors(part.outputs),
        "instance_group": options.scheduling.instance_group(gpu=gpu),
        "dynamic_batching": options.scheduling.dynamic_batching(),
    }


def _variants(bundle: BundleFiles, options: ExportOptions) -> list[Variant]:
    if options.variants is None:
        return list(bundle.manifest.variants)
    return [bundle.variant(name) for name in options.variants]


def _triton_capability(gpu: str) -> str:
    """A compute capability as Triton writes it: `8.9` for `sm89`, `12.0` for `sm120`."""
    digits = gpu.removeprefix("sm")
    return f"{digits[:-1]}.{digits[-1]}"
