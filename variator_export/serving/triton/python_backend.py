"""The model of Triton's Python backend: one session for every ratio, with the weights in memory once."""

from importlib.resources import files

from variator_export.bundle.engine_records import ANY_RATIO, ENGINE_RECORDS
from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import MANIFEST_NAME, EngineEntry, Manifest
from variator_export.core.errors import UsageError, UserError
from variator_export.engines.batches import BATCH_SIZE
from variator_export.engines.target import EngineTarget
from variator_export.engines.targets import TARGETS
from variator_export.serving.triton.engine_files import largest_batch, require_verified_somewhere
from variator_export.serving.triton.model import ExportOptions, PlannedModel
from variator_export.serving.triton.prototext import map_entries
from variator_export.serving.triton.settings import string_parameters
from variator_export.serving.triton.tensors import python_inputs, python_outputs

# The bundle's folder below that of the version.
_BUNDLE = "bundle"


def python_models(bundle: BundleFiles, options: ExportOptions) -> list[PlannedModel]:
    """The one model of a bundle.

    Raises:
        UserError: The target cannot run the bundle, or the bundle has no engine for it.
        UsageError: An option does not fit.
    """
    variant = _only_variant(bundle, options)
    default = bundle.variant(options.default_variant or variant or bundle.manifest.default_variant).name
    if variant not in (None, default):
        raise UsageError(
            f"--default-variant {default} is not {variant}, which the model runs alone.", "Leave it out."
        )
    target = TARGETS.find(options.target)
    target.require(bundle)
    engines = _engines(bundle, target, variant, options) if isinstance(target, EngineTarget) else []
    limit = min((largest_batch(bundle, entry) for entry in engines), default=None)
    parameters = {
        "bundle": options.bundle_path or _BUNDLE,
        "target": options.target,
        "default_variant": default,
        "variant": variant,
        "threads": None if options.threads is None else str(options.threads),
        "allow_unverified": "true" if options.allow_unverified else None,
        "EXECUTION_ENV_PATH": options.execution_env,
    }
    given = {name: value for name, value in parameters.items() if value is not None}
    scheduling, backbone = options.scheduling, bundle.manifest.backbone
    config = {
        "backend": "python",
        "max_batch_size": scheduling.batch_size(BATCH_SIZE, limit),
        "input": python_inputs(backbone),
        "output": python_outputs(backbone),
        "instance_group": scheduling.instance_group(gpu=target.gpu),
        "dynamic_batching": scheduling.dynamic_batching(),
        "parameters": map_entries(string_parameters(given)),
    }
    model_py = (files(__package__) / "entry.py").read_text(encoding="utf-8")
    texts, copied = {"model.py": model_py}, {}
    if options.bundle_path is None:
        manifest = _with_engines(bundle.manifest, engines)
        texts[f"{_BUNDLE}/{MANIFEST_NAME}"] = manifest.to_json()
        copied = {f"{_BUNDLE}/{name}": bundle.file(name) for name in manifest.files}
        if engines and (records := bundle.path / ENGINE_RECORDS).is_file():
            copied[f"{_BUNDLE}/{ENGINE_RECORDS}"] = records
    names = (variant,) if variant else tuple(v.name for v in bundle.manifest.variants)
    needs = f"Python 3.11 or later in Triton, with variator-export and {target.distributions[0]}"
    return [PlannedModel(options.name, names, config, copied, texts, needs)]


def _only_variant(bundle: BundleFiles, options: ExportOptions) -> str | None:
    """The one variant to run alone; None to run every ratio."""
    if options.variants is None:
        return None
    if len(options.variants) > 1:
        raise UsageError(
            "The Python backend runs one variant, or all of them in one session.",
            "Name one --variant, or leave it out.",
        )
    return bundle.variant(options.variants[0]).name


def _engines(
    bundle: BundleFiles, target: EngineTarget, variant: str | None, options: ExportOptions
) -> list[EngineEntry]:
    """The engines that the session may open, one for each GPU and version."""
    name = variant or ANY_RATIO
    found = bundle.engines(target.name, name)
    if not found:
        raise UserError(
            f"{bundle.path} has no engine of {name} for {target.name}.",
            f"Build it: variator-export compile {bundle.path} --target {target.name} --variant {name}",
        )
    if not options.allow_unverified:
        for entry in found:
            require_verified_somewhere(bundle, entry)
    return found


def _with_engines(manifest: Manifest, engines: list[EngineEntry]) -> Manifest:
    """The manifest of a copy with these engines alone: others may be many times the size of the rest."""
    left_out = {name for entry in manifest.engines if entry not in engines for name in entry.files}
    kept = {name: entry for name, entry in manifest.files.items() if name not in left_out}
    return manifest.model_copy(update={"engines": tuple(engines), "files": kept})
