"""What bundles need to run on ONNX Runtime's TensorRT providers: profiles, and no TF32."""

import os
from collections.abc import Mapping, Sequence

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.parts import PartEntry
from variator_export.core.errors import UserError
from variator_export.core.precision import FLOAT32, find_precision
from variator_export.engines.onnxruntime.compiler import Compiler
from variator_export.engines.request import Profile, any_ratio_profiles, variant_profiles
from variator_export.model.methods import method_of
from variator_export.recipe.recipe import EngineRecipe

# Without it, TensorRT computes float32 products in TF32, with 10 bits of mantissa. ONNX Runtime's TensorRT
# provider has no option for that (1.31).
_TF32 = "NVIDIA_TF32_OVERRIDE"


def profiles_of(
    bundle: BundleFiles, compiler: Compiler | None, variant: str | None, part: PartEntry | None = None
) -> list[Profile]:
    """The profiles of a session: those of an engine by the bundle's recipe.

    Args:
        bundle: The bundle.
        compiler: The compiler; None for a provider that takes every shape, and needs no profiles.
        variant: The variant that the session runs; None if it runs all.
        part: A decoder's part, which is the same for all variants; None for the graph of the variant.
    """
    if compiler is None:
        return []
    backbone = bundle.manifest.backbone
    sets = EngineRecipe.model_validate(bundle.manifest.recipe.get("engine") or {}).profiles
    if variant is not None or part is not None:
        found = variant_profiles(sets, backbone, part or backbone.part)
    else:
        shapes = {
            method_of(own).shape_label(own): method_of(own).graph_input_shapes(backbone, own)
            for own in bundle.manifest.variants
        }
        found = any_ratio_profiles(sets, backbone, backbone.part, shapes)
    # Usually the last variant, which has the highest ratio, in the first set of shapes.
    return [_spanning(found, usual=found[-len(sets)])] if compiler.several is None else found


def _spanning(profiles: Sequence[Profile], usual: Profile) -> Profile:
    """One profile around all, whose usual shapes are those of one of them."""
    shapes = {}
    for name, (_, opt, _) in usual.shapes.items():
        low, _, high = zip(*(profile.shapes[name] for profile in profiles), strict=True)
        smallest, largest = (
            tuple(map(end, zip(*sizes, strict=True))) for end, sizes in ((min, low), (max, high))
        )
        shapes[name] = smallest, opt, largest
    tokens = [profile.new_tokens for profile in profiles if profile.new_tokens is not None]
    return Profile(name="every shape", shapes=shapes, new_tokens=max(tokens, default=None))


def require_no_tf32(bundle: BundleFiles, target: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a bundle with products in float32 unless TF32 is off for the process.

    Raises:
        UserError: TensorRT would compute float32 products in TF32.
    """
    has_float32 = find_precision(bundle.manifest.precision) is FLOAT32 or any(
        variant.precision_proof.float32_modules for variant in bundle.manifest.variants
    )
    if has_float32 and environment.get(_TF32) != "0":
        raise UserError(
            f"{target} would compute the float32 products of {bundle.path} in TF32: the provider has no "
            "option that prevents it.",
            f"Start the process with {_TF32}=0, choose the target onnxruntime-cuda or an engine, or build "
            "the bundle with --precision bfloat16.",
        )
