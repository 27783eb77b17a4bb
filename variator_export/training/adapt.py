"""Adaptation, stage two of the paper: training plugins for a backbone that was fine-tuned for a task."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.data.examples import Examples
from variator_export.model.backbone import Backbone
from variator_export.text.tokenizer import TextEncoder
from variator_export.training.batches import collate_items
from variator_export.training.distillation import needs_right_text
from variator_export.training.given_plugins import load_given
from variator_export.training.plugin_run import train_plugins
from variator_export.training.results import TrainedFolders
from variator_export.training.run import Run
from variator_export.training.settings import Losses, Optimisation
from variator_export.training.task_data import (
    class_targets,
    describe_examples,
    task_data,
    text_targets,
)


def adapt(
    backbone: Backbone,
    plugins: Mapping[str, Path],
    train: Examples,
    held_out: Examples,
    run: Run,
    *,
    losses: Losses,
    optimisation: Optimisation,
    max_tokens: int = 128,
    max_target_tokens: int = 128,
) -> TrainedFolders:
    """Train existing plugins further on a task. The results are published as OUTPUT/NAME.

    Args:
        backbone: The backbone, fine-tuned for the task. It is the teacher, and the plugins are inserted
            into it.
        plugins: Folders of the trained plugins, by name. All are trained in one run.
        train: Texts of the task. Labels are needed only for the loss term `label`; the target texts, only for
            the terms `decoder`, `logits` and `label` of a backbone that generates text.
        held_out: Texts on which the loss is evaluated.
        run: The training run, which says where the plugins are published.
        losses: Weights of the terms of the loss.
        optimisation: Settings of the optimizer.
        max_tokens: Longer texts are truncated to this number of tokens.
        max_target_tokens: Longer target texts are truncated to this number of tokens.

    Raises:
        UserError: A plugin does not fit the backbone, or a label is missing or unknown; see also
            `train_plugins`.
    """
    given = load_given(plugins, backbone)
    data, settings = adaptation_data(
        backbone, train, held_out, losses, optimisation, max_tokens, max_target_tokens
    )
    return train_plugins(
        backbone,
        given.modules,
        *data,
        collate_items(backbone),
        losses=losses,
        optimisation=optimisation,
        record={
            "stage": "adaptation",
            "settings": settings,
            "data": describe_examples(("training", train), ("held out", held_out)),
            "parents": given.parents,
        },
        run=run,
        inputs=list(plugins.values()),
    )


def adaptation_data(
    backbone: Backbone,
    train: Examples,
    held_out: Examples,
    losses: Losses,
    optimisation: Optimisation,
    max_tokens: int,
    max_target_tokens: int,
) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """The items to train on and the held-out items, and the settings that are stored with the result.

    Arguments are those of `adapt`.

    Raises:
        UserError: A label is missing or unknown.
    """
    encoder = TextEncoder(backbone.info.source.folder)
    limit = min(max_tokens, backbone.max_length or max_tokens)
    settings: dict[str, Any] = {"max_tokens": limit}
    if (words := backbone.spec.head.label_words) is not None:
        settings |= {"label_words": list(words.words.items()), "decoder_prompt": words.prompt}
    targets = None
    if needs_right_text(backbone, losses):
        decoder = backbone.spec.family.decoder
        if decoder is None or not decoder.texts_like_sources:
            raise UserError(
                f"The target texts of {backbone.spec.name} need the code of their language, which no option "
                "gives.",
                "Train the encoder alone, on its own states: --loss hidden=1",
            )
        _refuse_missing(train, held_out, "The decoder's terms of the loss need the target texts")
        longest = min(max_target_tokens, backbone.info.max_output_length or max_target_tokens)
        targets, settings = text_targets(encoder, longest), settings | {"max_target_tokens": longest}
    elif losses.label:
        _refuse_missing(train, held_out, "The loss term label needs labels")
        targets = class_targets(getattr(backbone.info.config, "label2id", {}))
    data = task_data(train, held_out, encoder, max_tokens=limit, targets=targets, optimisation=optimisation)
    return data, settings


def _refuse_missing(train: Examples, held_out: Examples, needs: str) -> None:
    if train.targets is None or held_out.targets is None:
        raise UserError(f"{needs}; the data was read without any.", "Give --label-column NAME.")
