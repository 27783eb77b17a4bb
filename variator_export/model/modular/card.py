"""The model card (README.md) of a folder of modules."""

from pathlib import Path

from variator_export.bundle.variant_files import MODULE_CONFIG_NAME, MODULE_TENSORS_NAME
from variator_export.model.card import CARD_NAME, PLOT_NAME, card
from variator_export.model.modular.layout import ModuleConfig, whole_assembly


def module_card(config: ModuleConfig) -> str:
    """The card of trained modules: Markdown with the hub's metadata block."""
    assert config.training is not None
    backbone = config.backbone.name if config.backbone is not None and config.backbone.name else "unknown"
    about = [
        f"Modules of Modular Transformers (arXiv 2306.02379) for the {config.stack} of the backbone "
        f"`{backbone}`. Each is one layer that does the work of {config.granularity} of its "
        f"{config.num_layers} layers, counted from 0: "
        f"{', '.join(str(group.span) for group in config.modules)}.",
        "",
        "```",
        f"variator-export build --backbone {backbone} --module THIS-FOLDER \\",
        f"  --assembly {whole_assembly(config)} --output my-bundle",
        "```",
    ]
    title = f"Modules, granularity {config.granularity}"
    return card("modules", ("modular-transformers",), title, about, config.training)


def is_module_folder(folder: Path) -> bool:
    """Whether a folder holds modules and no files other than those that `train` writes."""
    if not (folder / MODULE_CONFIG_NAME).is_file():
        return False
    names = {MODULE_CONFIG_NAME, MODULE_TENSORS_NAME, CARD_NAME, PLOT_NAME}
    return {path.name for path in folder.iterdir()} <= names
