"""Reading the configuration of folders of modules. Their tensors are read by `weights`, with torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from variator_export.bundle.variant_files import MODULE_CONFIG_NAME, MODULE_TENSORS_NAME
from variator_export.core.assembly import Stack
from variator_export.core.errors import UserError
from variator_export.core.hashing import sha256_files
from variator_export.model.config_file import read_config
from variator_export.model.modular.layout import ModuleConfig
from variator_export.model.plugin_file import PluginHost


@dataclass(frozen=True)
class ResolvedModules:
    """A folder of modules whose configuration was read and whose files were hashed."""

    folder: Path
    config: ModuleConfig
    sha256: str


def resolve_modules(folder: Path) -> ResolvedModules:
    """Read the configuration of a folder of modules and hash its files.

    Raises:
        UserError: Same as `load_module_config`.
    """
    config = load_module_config(folder)
    return ResolvedModules(folder, config, sha256_files({path.name: path for path in module_files(folder)}))


def module_files(folder: Path) -> tuple[Path, Path]:
    """Find the two files of a folder of modules: configuration and tensors.

    Raises:
        UserError: The folder or one of the files is missing.
    """
    for name in (MODULE_CONFIG_NAME, MODULE_TENSORS_NAME):
        if not (folder / name).is_file():
            what = f"has no {name}" if folder.is_dir() else "does not exist"
            raise UserError(
                f"The folder of modules {folder} {what}.",
                f"Give a folder with {MODULE_CONFIG_NAME} and {MODULE_TENSORS_NAME}, as `variator-export "
                "train modules` writes it.",
            )
    return folder / MODULE_CONFIG_NAME, folder / MODULE_TENSORS_NAME


def load_module_config(folder: Path) -> ModuleConfig:
    """Read and check `module_config.json` of a folder of modules.

    Raises:
        UserError: The file is missing or not JSON, or a field is unknown, missing or wrong.
    """
    path, _ = module_files(folder)
    return read_config(path, ModuleConfig, "a configuration of modules", "docs/modular.md")


def check_modules_fit(
    config: ModuleConfig, source: str, host: PluginHost, stack_layers: Mapping[Stack, int]
) -> None:
    """Refuse modules that were made for another backbone, or for a stack that this one does not have.

    Args:
        config: The modules' configuration.
        source: Source of the modules, for the error message.
        host: The backbone.
        stack_layers: Layers of the backbone's stacks, by stack.

    Raises:
        UserError: The modules do not fit.
    """
    advice = "Use modules that were made for this backbone, or train some: variator-export train modules"
    if config.stack not in stack_layers:
        raise UserError(
            f"The modules {source} are for the {config.stack}; the backbone {host.name} has none.", advice
        )
    for what, found, expected in (
        ("hidden size", config.hidden_size, host.hidden_size),
        (f"number of {config.stack} layers", config.num_layers, stack_layers[config.stack]),
    ):
        if found != expected:
            raise UserError(
                f"The modules {source} are for the {what} {found}; the backbone {host.name} has {expected}.",
                advice,
            )
    made_for = config.backbone
    if made_for is None:
        return
    if made_for.model_type != host.model_type:
        raise UserError(
            f"The modules {source} were made for a {made_for.model_type} backbone; {host.name} is a "
            f"{host.model_type}.",
            advice,
        )
    if made_for.weights_sha256 not in (None, host.weights_sha256):
        raise UserError(
            f"The modules {source} were made for the backbone {made_for.name} with weights of sha256 "
            f"{made_for.weights_sha256}; those of {host.name} have {host.weights_sha256}.",
            advice,
        )
