"""The model card (README.md) of a plugin: its purpose, training, data and measured quality."""

from pathlib import Path

from variator_export.model.card import CARD_NAME, PLOT_NAME, card
from variator_export.model.plugin_layout import CONFIG_NAME, TENSORS_NAME, PluginConfig


def plugin_card(config: PluginConfig) -> str:
    """The card of a trained plugin: Markdown with the hub's metadata block."""
    assert config.training is not None
    backbone = config.backbone.name if config.backbone is not None and config.backbone.name else "unknown"
    about = [
        f"A Variator compression plugin (arXiv 2310.15724) for the backbone `{backbone}`. It compresses "
        f"{config.ratio} neighbouring hidden vectors into one before each of the {config.num_layers} "
        f"feed-forward networks, and decompresses them afterwards. Bottleneck {config.bottleneck_size}, "
        f"masking `{config.masking}`.",
        "",
        "```",
        f"variator-export build --backbone {backbone} --plugin THIS-FOLDER --output my-bundle",
        "```",
    ]
    tags = ("variator", "compression-plugin")
    return card("plugin", tags, f"Compression plugin, ratio {config.ratio}", about, config.training)


def is_plugin_folder(folder: Path) -> bool:
    """Whether a folder holds a plugin and no files other than those that `train` and `import` write."""
    if not (folder / CONFIG_NAME).is_file():
        return False
    return {path.name for path in folder.iterdir()} <= {CONFIG_NAME, TENSORS_NAME, CARD_NAME, PLOT_NAME}
