"""Consistency of a bundle: what is stored is what was built, verified and taken from the backbone.

The numerical checks run a graph on some inputs. They cannot see a weight that no input reaches, such as the
embedding of a token that no case contains, nor another tokenizer. These checks compare what is stored itself.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import BACKBONE_WEIGHTS, Variant, rebuild_hint
from variator_export.bundle.variant_files import MODULE_CONFIG_NAME, MODULE_TENSORS_NAME
from variator_export.core.errors import NumbersDisagreeError
from variator_export.core.hashing import sha256_file
from variator_export.model.modular.files import load_module_config
from variator_export.model.plugin_file import load_plugin_config
from variator_export.model.plugin_layout import CONFIG_NAME, TENSORS_NAME

if TYPE_CHECKING:
    from variator_export.model.backbone import Backbone

# Steps of the build whose result belongs to a variant.
_VERIFIED = "verify/"
_TEXTS = "verify/texts"


def check_steps(bundle: BundleFiles) -> None:
    """Compare a manifest with itself: the hashes of files with those that the build's steps recorded.

    A file that was exchanged together with its hash no longer has the hash that was verified.

    Raises:
        NumbersDisagreeError: Two values differ. The message names both.
    """
    for what, found, expected in _records(bundle):
        if found != expected:
            raise NumbersDisagreeError(
                f"{bundle.path}: {what} is {found}, but the build recorded {expected}.",
                rebuild_hint(bundle.path),
            )


def _records(bundle: BundleFiles) -> Iterator[tuple[str, Any, Any]]:
    """Yield what is compared: its name, its value in the manifest, and its value in a step."""
    manifest, steps = bundle.manifest, bundle.manifest.steps

    backbone, trace = steps.get("backbone", {}), steps.get("trace", {})
    yield "the backbone's hash", manifest.backbone.weights_sha256, backbone.get("weights_sha256")
    for name, expected in (backbone.get("files") or {}).items():
        yield name, _sha256(bundle, name), expected
    yield "the precision", manifest.precision, trace.get("precision")
    yield "the recipe's precision", manifest.recipe.get("precision"), trace.get("precision")
    yield "the pad token", manifest.backbone.pad_token_id, trace.get("pad_token_id")
    names = sorted(variant.name for variant in manifest.variants)
    verified = sorted(s.removeprefix(_VERIFIED) for s in steps if s.startswith(_VERIFIED) and s != _TEXTS)
    yield "the list of variants", names, verified
    for variant in manifest.variants:
        yield from _records_of(bundle, variant, steps.get(f"{_VERIFIED}{variant.name}", {}))
    for entry in manifest.engines:
        yield f"the precision of {entry.engine}", entry.precision, manifest.precision


def _sha256(bundle: BundleFiles, name: str) -> str | None:
    """A file's hash in the manifest. None if the manifest does not list the file."""
    entry = bundle.manifest.files.get(name)
    return None if entry is None else entry.sha256


def _records_of(
    bundle: BundleFiles, variant: Variant, verified: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    manifest = bundle.manifest

    yield variant.graph, _sha256(bundle, variant.graph), verified.get("graph")
    shared = manifest.session_graph
    yield shared, _sha256(bundle, shared), verified.get("session_graph")
    any_ratio = manifest.any_ratio_graph
    yield any_ratio, _sha256(bundle, any_ratio), verified.get("any_ratio")
    if variant.assembly_spec is not None:
        bound = manifest.steps.get(f"bind/{variant.name}", {})
        yield f"the assembly of {variant.name}", variant.assembly_spec, bound.get("assembly")
    for name, expected in (verified.get("modules") or {}).items():
        yield name, _sha256(bundle, name), expected
    for modules in variant.modules:
        entry = manifest.modules[modules]
        bundle.file(f"{entry.folder}/{MODULE_CONFIG_NAME}")
        described = load_module_config(bundle.path / entry.folder)
        groups = tuple((group.first, group.last, group.like) for group in described.modules)
        yield f"the groups of {modules}", entry.groups, groups
        stored = _sha256(bundle, f"{entry.folder}/{MODULE_TENSORS_NAME}")
        yield f"the hash of {modules}", entry.sha256, stored
    yield BACKBONE_WEIGHTS, _sha256(bundle, BACKBONE_WEIGHTS), verified.get("weights")
    if manifest.backbone.generates:
        decoder, generated = variant.decoder_graph, manifest.steps.get(f"generate/{variant.name}", {})
        yield decoder, _sha256(bundle, decoder), generated.get("decoder")
    plugin = variant.plugin
    if plugin is None:
        yield f"the ratio of {variant.name}", variant.ratio, 1
        return
    tensors, config = f"{plugin.folder}/{TENSORS_NAME}", f"{plugin.folder}/{CONFIG_NAME}"
    yield tensors, _sha256(bundle, tensors), verified.get("plugin")
    yield config, _sha256(bundle, config), verified.get("plugin_config")
    yield f"the hash of the plugin of {variant.name}", plugin.sha256, verified.get("plugin")
    content = load_plugin_config(bundle.variant_files(variant).plugin_folder)
    yield f"the ratio of {variant.name}", variant.ratio, content.ratio
    yield f"the masking of {variant.name}", plugin.masking, content.masking
    yield f"the bottleneck of {variant.name}", plugin.bottleneck_size, content.bottleneck_size


def check_backbone(bundle: BundleFiles, backbone: "Backbone") -> None:
    """Compare what a bundle took from its backbone: every weight bit for bit, every file byte for byte.

    Args:
        bundle: The bundle.
        backbone: The backbone, in the bundle's precision.

    Raises:
        NumbersDisagreeError: Something differs. The message names it.
    """
    entry, info = bundle.manifest.backbone, backbone.info
    facts = {
        "architecture": (entry.architecture, info.spec.name),
        "task": (entry.task, info.spec.head.task),
        "model_type": (entry.model_type, info.spec.family.name),
        "hidden_size": (entry.hidden_size, info.size.hidden_size),
        "num_layers": (entry.num_layers, info.size.num_layers),
        "max_length": (entry.max_length, info.max_length),
        "outputs": (entry.outputs, info.outputs),
        "token_outputs": (tuple(entry.token_outputs), tuple(info.token_outputs)),
    }
    for name, (found, expected) in facts.items():
        if found != expected:
            raise _differs(bundle, f"{name} is {found!r}", f"{expected!r}")
    source: Path = info.source.folder
    for name in bundle.manifest.steps.get("backbone", {}).get("files") or {}:
        if not (source / name).is_file() or sha256_file(source / name) != sha256_file(bundle.file(name)):
            raise _differs(bundle, name, str(source / name))
    _check_weights(bundle, backbone)


def _check_weights(bundle: BundleFiles, backbone: "Backbone") -> None:
    import torch
    from safetensors import safe_open

    state = backbone.state
    with safe_open(bundle.file(BACKBONE_WEIGHTS), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            stored = file.get_tensor(name)
            expected = state.get(name)
            # Bits, not values: NaN and the sign of zero count too.
            if (
                expected is None
                or stored.dtype != expected.dtype
                or stored.shape != expected.shape
                or not torch.equal(_bits(stored), _bits(expected))
            ):
                where = f"{name} of {backbone.info.source.name}"
                raise _differs(bundle, f"{name} in {BACKBONE_WEIGHTS}", where)


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8)


def _differs(bundle: BundleFiles, found: str, expected: str) -> NumbersDisagreeError:
    return NumbersDisagreeError(
        f"{bundle.path}: {found} is not the backbone's: {expected}.", rebuild_hint(bundle.path)
    )
