"""Training modules on unlabelled text: the original is the teacher."""

from collections.abc import Sequence

from variator_export.core.assembly import Stack
from variator_export.core.errors import UserError
from variator_export.data.texts import TextSource
from variator_export.model.backbone import Backbone
from variator_export.model.modular.assembled import copied_layer, trainable
from variator_export.model.modular.layout import ModuleConfig, even_groups
from variator_export.text.tokenizer import TextEncoder
from variator_export.training.batches import collate_items
from variator_export.training.modular.replacing import check_module_losses
from variator_export.training.modular.run import NewModules, train_modules
from variator_export.training.modular.settings import ModuleLosses, ModuleShape, Replacing
from variator_export.training.passages import describe_texts
from variator_export.training.pretrain import check_targets_of_text, passages_of
from variator_export.training.results import TrainedFolders
from variator_export.training.run import Run
from variator_export.training.settings import Optimisation, PassageSettings


def pretrain_modules(
    backbone: Backbone,
    texts: Sequence[TextSource],
    run: Run,
    *,
    shape: ModuleShape,
    losses: ModuleLosses,
    replacing: Replacing,
    passages: PassageSettings,
    optimisation: Optimisation,
) -> TrainedFolders:
    """Train modules of several granularities on plain text, in one run.

    They are published as OUTPUT/gN, those of the decoder as OUTPUT/decoder-gN.

    Args:
        backbone: The original, which is also the teacher. Its weights are not changed.
        texts: Plain text.
        run: The training run, which says where the modules are published.
        shape: The modules.
        losses: Weights of the terms of the loss.
        replacing: The schedule of the replacing.
        passages: Settings for cutting text into passages.
        optimisation: Settings of the optimizer.

    Raises:
        UserError: A granularity does not fit the stack, the text is too short, passages are longer than the
            backbone allows, or the output or the losses are not suitable.
    """
    run.check_output()  # before the text is tokenized
    check_targets_of_text(backbone, losses, passages)
    sets = new_modules(backbone, shape)
    if shape.decoder_granularities and not TextEncoder(backbone.info.source.folder).sentinel_ids():
        raise UserError(
            "Modules of a decoder are trained along target texts, which plain text gives only to T5 and mT5: "
            f"the tokenizer of {backbone.info.source.name} has no tokens for spans that are left out.",
            "Train them on a table: --data FILE --text-column NAME --label-column NAME.",
        )
    check_module_losses(backbone, losses, [modules.config.stack for modules in sets.values()])
    train, held_out = passages_of(backbone, texts, passages, optimisation)
    return train_modules(
        backbone,
        sets,
        (train, held_out),
        collate_items(backbone),
        losses=losses,
        replacing=replacing,
        optimisation=optimisation,
        record={
            "stage": "pre-training",
            "settings": {"modules": shape.model_dump(), "passages": passages.model_dump()},
            "data": describe_texts(texts),
        },
        run=run,
    )


def default_losses(backbone: Backbone, *, with_decoder: bool = False, of_task: bool = False) -> ModuleLosses:
    """The terms that a run has if none are chosen.

    Args:
        backbone: The backbone.
        with_decoder: Whether the run has target texts, along which the decoder runs.
        of_task: Whether it is on the table of a task, not on plain text.
    """
    embedding = 1.0 if backbone.pooling is not None and not of_task else 0.0
    text = 1.0 if with_decoder else 0.0
    return ModuleLosses(hidden=1.0, layers=1.0, attention=1.0, embedding=embedding, decoder=text, logits=text)


def new_modules(backbone: Backbone, shape: ModuleShape) -> dict[str, NewModules]:
    """Modules in the state in which training starts, copies of layers, by the names of their folders.

    Raises:
        UserError: The backbone has no such stack, or a stack has fewer layers than a granularity.
    """
    return {
        name: _new(backbone, stack, granularity, shape.start)
        for name, (stack, granularity) in shape.sets.items()
    }


def _new(backbone: Backbone, stack: Stack, granularity: int, start: str) -> NewModules:
    if (num_layers := backbone.info.stack_layers.get(stack)) is None:
        raise UserError(
            f"{backbone.info.source.name} has no {stack} to train modules for.",
            "Leave out --decoder-granularity, or choose a backbone that generates text.",
        )
    groups = even_groups(num_layers, granularity, start)
    if not groups:
        raise UserError(
            f"A module of granularity {granularity} replaces {granularity} layers; the {stack} of "
            f"{backbone.info.source.name} has {num_layers}.",
            f"Choose a granularity from 2 to {num_layers}.",
        )
    config = ModuleConfig(
        stack=stack,
        granularity=granularity,
        num_layers=num_layers,
        hidden_size=backbone.info.size.hidden_size,
        modules=groups,
        backbone=backbone.info.identity,
    )
    family = backbone.spec.family
    layers = tuple(trainable(family, copied_layer(backbone, stack, group)) for group in groups)
    return NewModules(config, layers)
