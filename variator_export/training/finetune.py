"""Fine-tuning the backbone itself: training a classifier from a pretrained encoder and labelled texts."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from variator_export.core.json_file import write_json
from variator_export.data.examples import Examples
from variator_export.model.backbone import Backbone, load_classifier, quiet_transformers
from variator_export.model.source import BackboneSource
from variator_export.text.tokenizer import TOKENIZER_FILES, TextEncoder
from variator_export.training.batches import collate_items
from variator_export.training.checkpoints import History
from variator_export.training.losses import label_loss
from variator_export.training.processes import device, is_main_process, num_processes
from variator_export.training.run import RECORD_NAME, Run
from variator_export.training.settings import Optimisation
from variator_export.training.task_data import (
    class_targets,
    describe_examples,
    task_data,
)
from variator_export.training.trained_module import TrainedModule
from variator_export.training.trainer import fit


@dataclass(frozen=True)
class FinetunedModel:
    """Result of fine-tuning.

    Attributes:
        folder: Folder of the classifier as transformers saves it, with its tokenizer.
        labels: The classes, in the order of their indices.
        accuracy: Accuracy on the held-out examples.
        history: History of the run.
    """

    folder: Path
    labels: tuple[str, ...]
    accuracy: float
    history: History


class _Classifier(TrainedModule):
    metric_names = ("cross_entropy", "accuracy")
    num_loss_metrics = 1

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.model = backbone.model.requires_grad_(True)
        self.clipped = (self.model,)

    def forward(self, labels: Tensor, **inputs: Tensor) -> dict[str, Tensor]:
        """Compute the cross-entropy with class indices (B,), and whether the arg-max is right."""
        logits = self.model(**inputs)["logits"].float()
        each = label_loss(logits, labels)
        right = (logits.argmax(-1) == labels).float()
        return {"loss": each.mean(), "metrics": torch.stack([each.detach(), right], dim=-1)}


def finetune(
    source: BackboneSource,
    train: Examples,
    held_out: Examples,
    run: Run,
    *,
    optimisation: Optimisation,
    max_tokens: int = 128,
) -> FinetunedModel:
    """Train a classifier head and all weights of the encoder, and save the model as transformers does.

    Args:
        source: A pretrained encoder of a family that has a classifier.
        train: Texts or pairs with labels.
        held_out: Examples on which the loss is evaluated. The parameters with the lowest loss are kept.
        run: The training run, which says where the model is published.
        optimisation: Settings of the optimizer.
        max_tokens: Longer texts are truncated to this number of tokens.

    Raises:
        UserError: The family has no classifier, the data has only one class, or a held-out label is unknown.
    """
    labels = train.classes()
    encoder = TextEncoder(source.folder)
    torch.manual_seed(optimisation.seed)  # seeds the weights of the new head
    backbone = load_classifier(source, labels, encoder.pad_token_id)
    limit = min(max_tokens, backbone.max_length or max_tokens)
    record = {
        "stage": "fine-tuning",
        "backbone": {"name": source.label, "weights_sha256": source.weights_sha256},
        "settings": {"max_tokens": limit, "optimisation": optimisation.model_dump()},
        "labels": labels,
        "data": describe_examples(("training", train), ("held out", held_out)),
    }
    with run.publishing([source.folder]) as (staging, checkpoints):
        module = _Classifier(backbone).to(device())
        history = fit(
            module,
            *task_data(
                train,
                held_out,
                encoder,
                max_tokens=limit,
                targets=class_targets({label: index for index, label in enumerate(labels)}),
                optimisation=optimisation,
            ),
            collate_items(backbone),
            optimisation,
            checkpoints,
            {**record, "processes": num_processes()},
            run.listener(),
        )
        best = history.best().metrics
        if is_main_process():
            with quiet_transformers():
                cast(Any, backbone.model).save_pretrained(staging)
            for name in TOKENIZER_FILES:
                if (source.folder / name).is_file():
                    shutil.copyfile(source.folder / name, staging / name)
            result = {"held_out": best, "steps": history.steps, "best_step": history.best_step}
            write_json(staging / RECORD_NAME, {**record, **result, **run.record()})
    return FinetunedModel(run.output, tuple(labels), best["accuracy"], history)


def steps_for_epochs(examples: Examples, batch_size: int, epochs: float) -> int:
    """Return the number of steps that cover the examples `epochs` times."""
    return max(1, round(len(examples) * epochs / batch_size))
