"""What bundles need to run on ONNX Runtime's TensorRT providers: profiles, and no TF32."""

import os
from collections.abc import Mapping

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.parts import PartEntry
from variator_export.core.errors import UserError
from variator_export.core.precision import FLOAT32, find_precision
from variator_export.engines.request import Profile, any_ratio_profiles, variant_profiles
from variator_export.model.methods import method_of
from variator_export.recipe.recipe import EngineRecipe

# Without it, TensorRT computes float32 products in TF32, with 10 bits of mantissa. ONNX Runtime's TensorRT
# provider has no option for that (1.31).
_TF32 = "NVIDIA_TF32_OVERRIDE"


def profiles_of(bundle: BundleFiles, variant: str | None, part: PartEntry | None = None) -> list[Profile]:
    """The profiles of a session: those of an engine whose recipe names no shapes.

    Args:
        bundle: The bundle.
        variant: The variant that the session runs; None if it runs all.
        part: A decoder's part, which is the same for all variants; None for the graph of the variant.
    """
    backbone, sets = bundle.manifest.backbone, EngineRecipe().profiles
    if variant is not None or part is not None:
        return variant_profiles(sets, backbone, part or backbone.part)
    shapes = {
        method_of(own).shape_label(own): method_of(own).graph_input_shapes(backbone, own)
        for own in bundle.manifest.variants
    }
    return any_ratio_profiles(sets, backbone, backbone.part, shapes)


def require_no_tf32(bundle: BundleFiles, target: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a bundle in float32 unless TF32 is off for the process.

    Raises:
        UserError: TensorRT would compute float32 products in TF32.
    """
    if find_precision(bundle.manifest.precision) is FLOAT32 and environment.get(_TF32) != "0":
        raise UserError(
            f"{target} would compute the float32 products of {bundle.path} in TF32: the provider has no "
            "option that prevents it.",
            f"Start the process with {_TF32}=0, choose the target onnxruntime-cuda or an engine, or build "
            "the bundle with --precision bfloat16.",
        )
