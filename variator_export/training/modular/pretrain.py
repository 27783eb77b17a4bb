"""Training modules on unlabelled text: the original is the teacher."""

from collections.abc import Sequence

from variator_export.core.assembly import ENCODER_STACK
from variator_export.core.errors import UserError
from variator_export.data.texts import TextSource
from variator_export.model.backbone import Backbone
from variator_export.model.modular.assembled import copied_layer, trainable
from variator_export.model.modular.layout import ModuleConfig, even_groups
from variator_export.training.batches import collate_items
from variator_export.training.modular.replacing import check_module_losses
from variator_export.training.modular.run import NewModules, train_modules
from variator_export.training.modular.settings import ModuleLosses, ModuleShape, Replacing
from variator_export.training.passages import describe_texts
from variator_export.training.pretrain import passages_of
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
    """Train modules of several granularities on plain text, in one run. They are published as OUTPUT/gN.

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
    if losses.label:
        raise UserError(
            "The loss term label needs labels, which plain text does not have.",
            "Leave the term out, or use `train adapt` with a table.",
        )
    check_module_losses(backbone, losses)
    sets = {
        f"g{granularity}": new_modules(backbone, granularity, shape.start)
        for granularity in shape.granularities
    }
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


def default_losses(backbone: Backbone) -> ModuleLosses:
    """The terms that a run has if none are chosen."""
    embedding = 1.0 if backbone.pooling is not None else 0.0
    return ModuleLosses(hidden=1.0, layers=1.0, attention=1.0, embedding=embedding)


def new_modules(backbone: Backbone, granularity: int, start: str) -> NewModules:
    """Modules in the state in which training starts: copies of layers.

    Raises:
        UserError: The stack has fewer layers than the granularity.
    """
    size = backbone.info.size
    groups = even_groups(size.num_layers, granularity, start)
    if not groups:
        raise UserError(
            f"A module of granularity {granularity} replaces {granularity} layers; the encoder of "
            f"{backbone.info.source.name} has {size.num_layers}.",
            f"Choose a granularity from 2 to {size.num_layers}.",
        )
    config = ModuleConfig(
        stack=ENCODER_STACK,
        granularity=granularity,
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        modules=groups,
        backbone=backbone.info.identity,
    )
    family = backbone.spec.family
    layers = tuple(trainable(family, copied_layer(backbone, ENCODER_STACK, group)) for group in groups)
    return NewModules(config, layers)
