"""Loading of a backbone in one of the precisions of recipes."""

from collections.abc import Sequence

import torch

from variator_export.core.errors import UserError
from variator_export.core.precision import find_precision
from variator_export.model.backbone import Backbone, load_backbone
from variator_export.model.backbone_info import BackboneInfo
from variator_export.model.quantization.calibration import Calibration


def load_in_precision(
    info: BackboneInfo,
    pad_token_id: int,
    precision: str,
    kept: Sequence[str] = (),
    calibration: Calibration | None = None,
) -> Backbone:
    """Load the weights and round or quantise them to one of the precisions of recipes.

    Raises:
        UserError: Same as `load_backbone` and `Backbone.in_precision`, or a weight is too large for the
            precision.
    """
    loaded, wanted = load_backbone(info, pad_token_id), find_precision(precision)
    if not wanted.is_half and not wanted.quantizes:
        return loaded
    converted = loaded.in_precision(wanted, kept, calibration)
    for name, tensor in converted.state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise UserError(
                f"The weights of {info.source.name} do not fit {precision}: {name} has values beyond "
                f"{torch.finfo(tensor.dtype).max:g}.",
                "Choose bfloat16, which has the range of float32.",
            )
    return converted
