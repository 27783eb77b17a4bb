"""Engines of TensorRT for `gpu.py`: a bundle of the same model, compiled for this GPU."""

from pathlib import Path
from typing import Any

from common import copy_tokenizer
from gpu_models import Model
from variator_export.building.compile_engines import compile_engines
from variator_export.building.recipe_build import build
from variator_export.building.steps.engines import EngineOrder
from variator_export.model.plugin_file import save_plugin
from variator_export.recipe.recipe import EngineRecipe, Recipe, ShapeSet
from variator_export.sessions import Bundle

_SHAPES = {
    "short": ShapeSet(batch_size=(1, 1, 8), sequence_length=(1, 128, 512)),
    "batch": ShapeSet(batch_size=(1, 32, 64), sequence_length=(1, 128, 512)),
}


def open_engine(model: Model, ratio: int, folder: Path) -> Any:
    """A session on the engine of a ratio, with CUDA graphs; the bundle is built once."""
    if not (folder / "manifest.json").exists():
        build(_recipe(model, folder.parent), folder)
    order = EngineOrder(EngineRecipe(profiles=_SHAPES), ("tensorrt",), (f"ratio-{ratio}",))
    compile_engines(folder, order)
    return Bundle.load(folder).session("tensorrt", ratio, allow_unverified=True, cuda_graphs=True)


def _recipe(model: Model, folder: Path) -> Recipe:
    source = model.backbone.info.source.folder
    if not (source / "tokenizer.json").exists():  # a bundle has one, and is verified on text
        copy_tokenizer(source)
    plugins = []
    for k, plugin in model.plugins.items():
        if plugin is not None:
            save_plugin(plugin, folder / "given" / f"ratio-{k}")
            plugins.append({"ratio": k, "source": str(folder / "given" / f"ratio-{k}")})
    return Recipe.model_validate(
        {
            "name": model.name,
            "backbone": {"source": str(source)},
            "plugins": plugins,
            "precision": model.precision,
            "speed": None,
        }
    )
