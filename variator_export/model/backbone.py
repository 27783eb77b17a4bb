"""Loading of pretrained transformers."""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from variator_export.core.errors import UserError
from variator_export.core.precision import Precision
from variator_export.model.backbone_info import BackboneInfo, read_backbone_info
from variator_export.model.families.base import Architecture
from variator_export.model.pooling import PoolingSpec
from variator_export.model.quantization.calibration import Calibration
from variator_export.model.quantization.layers import is_part_of, linear_layers
from variator_export.model.source import BackboneSource

# Constants that older versions of transformers stored with the weights.
_POSITION_BUFFERS = ("position_ids", "token_type_ids")
_INDEX = re.compile(r"\b\d+\b")


@dataclass(frozen=True)
class Backbone:
    """A loaded backbone: frozen, with eager attention, in float32 unless `to_dtype` made it.

    Attributes:
        info: What was read without the weights.
        model: The model.
        pad_token_id: The tokenizer's padding token.
        left_out: Modules whose tensors the weights hold and the architecture does not have: other heads, a
            pooler, a decoder.
        module_buffers: The names in graphs of the buffers of an assembly's modules, by the buffers' `id`.
    """

    info: BackboneInfo
    model: nn.Module
    pad_token_id: int
    left_out: tuple[str, ...] = ()
    module_buffers: Mapping[int, str] = field(default_factory=dict)

    @property
    def spec(self) -> Architecture:
        """The backbone's architecture in the table of sites."""
        return self.info.spec

    @property
    def pooling(self) -> PoolingSpec | None:
        """The pooling that the folder declares for sentence embeddings; None if it declares none."""
        return self.info.pooling

    @property
    def max_length(self) -> int | None:
        """The longest input in tokens; None if there is no limit."""
        return self.info.max_length

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """The model's state dict."""
        return self.model.state_dict()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, except those in the family's float32 modules."""
        return next(self.model.parameters()).dtype

    def with_model(self, model: nn.Module) -> "Backbone":
        """A copy with another model of the same architecture."""
        return dataclasses.replace(self, model=model)

    def to_dtype(self, dtype: torch.dtype, *, keeps_float32_modules: bool = False) -> "Backbone":
        """A copy whose weights have another type.

        Args:
            dtype: The new type.
            keeps_float32_modules: Whether the family's float32 modules stay in float32.
        """
        model = copy.deepcopy(self.model).to(dtype)
        if keeps_float32_modules:
            kept = self.spec.family.float32_modules
            originals = dict(self.model.named_modules())
            for name, module in model.named_modules():
                if name.rpartition(".")[2] in kept:
                    # Copy the original values, because `to` has rounded the copy's.
                    module.float().load_state_dict(originals[name].state_dict())
        return dataclasses.replace(self, model=model.requires_grad_(False))

    @property
    def linear_layers(self) -> dict[str, nn.Linear]:
        """The linear layers of the encoder by name; those that a precision can quantise."""
        return linear_layers(self.model, self.spec.family.stack)

    def in_precision(
        self, precision: Precision, kept: Sequence[str] = (), calibration: Calibration | None = None
    ) -> "Backbone":
        """A copy in one of the precisions of recipes.

        Args:
            precision: The precision.
            kept: Parts of the names of modules that a precision that quantises leaves as they are, besides
                the family's own.
            calibration: The calibration, for precisions that need one.

        Raises:
            UserError: Nothing can be quantised, or there is no module of one of the names.
        """
        dtype: torch.dtype = getattr(torch, precision.dtype)
        converted = self.to_dtype(dtype, keeps_float32_modules=precision.keeps_float32_modules)
        if not precision.quantizes:
            return converted
        names = self.linear_layers
        for part in kept:
            if not any(is_part_of(name, part) for name in names):
                raise UserError(
                    f"The encoder of {self.info.source.name} has no linear layer in a module {part!r}.",
                    f"Choose from {', '.join(self.quantizable_modules)}.",
                )
        model = converted.model
        original = self.model if precision.is_half else None
        if not self.info.quantize(model, precision, kept, calibration, original):
            raise UserError(
                f"The encoder of {self.info.source.name} has no linear layer left to quantise.",
                "Leave fewer modules in float32, or choose another precision.",
            )
        return dataclasses.replace(converted, model=model.requires_grad_(False))

    @property
    def quantizable_modules(self) -> tuple[str, ...]:
        """Names of the modules to leave in float32: each kind of linear layer, and each encoder layer."""
        stack = self.spec.family.stack
        inner = [name.removeprefix(f"{stack}.").partition(".") for name in self.linear_layers]
        kinds = dict.fromkeys(kind for _, _, kind in inner)
        layers = dict.fromkeys(f"{stack}.{index}" for index, _, _ in inner)
        return (*kinds, *layers)


def copy_sharing_weights(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares its parameters and buffers with the original."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo=dict(shared))


def load_backbone(info: BackboneInfo, pad_token_id: int) -> Backbone:
    """Load the weights, from safetensors only and without running remote code.

    Raises:
        UserError: The weights cannot be read, or lack tensors that the model needs.
    """
    model, loading = _load(info, {})
    _refuse_missing(info, loading["missing_keys"])
    return _checked(info, model, loading, pad_token_id)


def load_classifier(source: BackboneSource, labels: Sequence[str], pad_token_id: int) -> Backbone:
    """Load an encoder with a new classifier head, initialised from torch's global random generator.

    If the source already has head weights for the same number of classes, they are used instead.

    Raises:
        UserError: The family has no classifier, or tensors of the encoder itself are missing.
    """
    # Every family has the task, whatever class the checkpoint was saved from.
    family = read_backbone_info(source, task="feature-extraction").spec.family
    names = [name for name in family.heads if name.endswith("ForSequenceClassification")]
    if not names:
        raise UserError(
            f"The family {family.name} has no classifier in the table of sites.",
            "Fine-tune it elsewhere and give the folder to `train adapt`, or choose another backbone.",
        )
    info = read_backbone_info(source, names[0])
    classes = {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "ignore_mismatched_sizes": True,
    }
    model, loading = _load(info, classes)
    prefix = f"{model.base_model_prefix}."
    _refuse_missing(info, [name for name in loading["missing_keys"] if name.startswith(prefix)])
    return _checked(dataclasses.replace(info, config=model.config), model, loading, pad_token_id)


def _load(info: BackboneInfo, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    model_class = getattr(transformers, info.spec.name)
    try:
        with quiet_transformers():
            return model_class.from_pretrained(
                info.source.folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                attn_implementation="eager",
                output_loading_info=True,
                **info.spec.head.init_options,
                **options,
            )
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"The weights of {info.source.name} cannot be read: {error}.", "Copy or download them again."
        ) from error
    except Exception as error:  # a broken configuration can fail anywhere in transformers
        raise UserError(
            f"transformers cannot create {info.spec.name} from {info.source.name}: {error}",
            "Check that config.json belongs to these weights; copy both again from their source.",
        ) from error


def _refuse_missing(info: BackboneInfo, missing: Iterable[str]) -> None:
    lacking = sorted(missing)
    if lacking:
        raise UserError(
            f"The weights of {info.source.name} lack {len(lacking)} tensors that {info.spec.name} needs, "
            f"{_some(lacking)}; transformers would fill them with random numbers.",
            "Use the weights of the whole model, or another architecture (backbone.architecture).",
        )


def _checked(info: BackboneInfo, model: Any, loading: Mapping[str, Any], pad_token_id: int) -> Backbone:
    """Build the backbone, after refusing weights of layers that the configuration does not have."""
    templates = {_INDEX.sub("#", name) for name in model.state_dict()}
    surplus = sorted(name for name in loading["unexpected_keys"] if _INDEX.sub("#", name) in templates)
    if surplus:
        raise UserError(
            f"The weights of {info.source.name} hold {len(surplus)} tensors of layers that config.json does "
            f"not have, for example {surplus[0]}.",
            "Correct the number of layers in config.json, or use the weights that belong to it.",
        )
    unused, left_out = _unused(model, loading["unexpected_keys"])
    if unused:
        raise UserError(
            f"The weights of {info.source.name} hold {len(unused)} tensors that {info.spec.name} of "
            f"transformers {transformers.__version__} does not use: {_some(unused)}. Without them it would "
            "compute something else.",
            "config.json asks for something that this version of transformers does not have, or the weights "
            "belong to another architecture (--architecture).",
        )
    return Backbone(info, model.eval().requires_grad_(False), pad_token_id, left_out)


def _unused(model: Any, unexpected: Iterable[str]) -> tuple[list[str], tuple[str, ...]]:
    """Split the tensors that a model does not use.

    A tensor inside a module that the model has, such as its encoder, changes what the module computes. A
    tensor elsewhere belongs to another head, a pooler or a decoder.

    Returns:
        The names of tensors inside the model's modules, and the modules that were left out.
    """
    prefix = f"{model.base_model_prefix}."
    base = getattr(model, model.base_model_prefix, model)
    own = {name for part in (model, base) for name, _ in part.named_children()}
    inside, outside = [], set()
    for name in sorted(unexpected):
        if name.rpartition(".")[2] in _POSITION_BUFFERS:
            continue
        module = name.removeprefix(prefix).partition(".")[0]
        if module in own:
            inside.append(name)
        else:
            outside.add(module)
    return inside, tuple(sorted(outside))


def _some(names: Sequence[str]) -> str:
    """The first names of a list, and how many there are besides."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' progress bar and its report of unused tensors.

    Missing tensors need no report either, because this package raises its own error for them.
    """
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
