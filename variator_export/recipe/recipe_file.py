"""Recipes as YAML: shipped recipes and users' recipes, layered over each other, with flags on top."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from variator_export.core.errors import UserError
from variator_export.core.hub import HUB_PREFIX, looks_like_repository
from variator_export.core.validation import describe_validation_error
from variator_export.recipe.recipe import Recipe
from variator_export.recipe.recipes_folder import recipes_folder

_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Layer:
    """A part of a recipe that overrides the layers below.

    Attributes:
        origin: The layer's origin, as text for people: a file, a shipped recipe or a flag.
        content: Some keys of a recipe. Mappings are merged, everything else is replaced. A `backbone` with a
            `source` replaces the whole backbone, because a pin, a task and an architecture belong to the
            weights that they were declared with.
    """

    origin: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe with the origins of its values.

    Attributes:
        recipe: The validated recipe.
        origins: Origins by dotted key. A value without an origin is a default; a list has one origin.
    """

    recipe: Recipe
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """The origin of the value of a dotted key."""
        while key not in self.origins and "." in key:
            key = key.rpartition(".")[0]
        return self.origins.get(key, "default")

    def to_yaml(self) -> str:
        """The whole recipe as an equivalent file, with the origin of each value in a comment."""
        rows = list(self._rows(self.recipe.model_dump(mode="json"), ""))
        width = min(72, max(len(text) for text, _ in rows))
        return "".join(f"{text:{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in rows)

    def _rows(self, values: Mapping[str, Any], prefix: str) -> Any:
        for name, value in values.items():
            key, indent = prefix + name, "  " * prefix.count(".")
            if isinstance(value, dict) and (not value or key in _WHOLE):
                yield f"{indent}{name}: {_inline(value)}", self.origin(key)
            elif isinstance(value, dict):
                yield f"{indent}{name}:", ""
                yield from self._rows(value, f"{key}.")
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                yield f"{indent}{name}:", self.origin(key)
                for item in value:
                    yield f"{indent}  - {_inline({k: v for k, v in item.items() if v is not None})}", ""
            else:
                yield f"{indent}{name}: {_inline(value)}", self.origin(key)


class _UniqueKeys(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys; PyYAML silently keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, and refuse a key that appears twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} appears twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A YAML file, or the name of a recipe that ships with the package.

    Raises:
        UserError: The recipe, or a recipe that it extends, does not exist, is not YAML, or does not validate.
    """
    return resolve_recipe(recipe).recipe


def resolve_recipe(recipe: str | Path, over: Sequence[Layer] = ()) -> ResolvedRecipe:
    """Read a recipe over the recipes that it extends, and put the layers of `over` on top.

    Raises:
        UserError: Same conditions as `load_recipe`.
    """
    content: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for layer in (*_layers(recipe, None, ()), *over):
        _overlay(content, origins, layer, "")
    flags = ", ".join(layer.origin for layer in over)
    return ResolvedRecipe(parse_recipe(content, f"{recipe} with {flags}" if flags else str(recipe)), origins)


def parse_recipe(content: Any, name: str) -> Recipe:
    """Validate the content of a recipe.

    Raises:
        UserError: The content does not validate. The message names the key, the value found and the nearest
            known key.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"The recipe {name} does not validate: {describe_validation_error(error, Recipe)}",
            "docs/recipes.md describes every key.",
        ) from error


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, which editors use to complete and check recipes."""
    schema = Recipe.model_json_schema()
    extends = {
        "description": "The recipe to extend: one that ships with the package, or a YAML file. This recipe "
        "overrides its values.",
        "title": "Extends",
        "type": "string",
    }
    # The extended recipe may provide required keys.
    schema["$defs"]["BackboneRecipe"].pop("required")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": {"extends": extends, **schema["properties"]},
        "required": ["name"],
        "anyOf": [{"required": ["backbone"]}, {"required": ["extends"]}],
    }


def shipped_recipes() -> list[str]:
    """The names of the recipes that ship with the package."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def _layers(recipe: str | Path, folder: Path | None, above: tuple[Path, ...]) -> list[Layer]:
    """A recipe and the recipes that it extends, lowest layer first.

    Args:
        recipe: A file, or the name of a recipe that ships with the package.
        folder: The folder that a file path is relative to. None for the current folder.
        above: The recipes that extend this one.
    """
    path, origin = _find(recipe, folder)
    if path.resolve() in above:
        chain = " extends ".join(p.name for p in (*above, path.resolve()))
        raise UserError(f"Recipes extend each other in a circle: {chain}.", "Remove one `extends`.")
    content = _read(path, origin)
    extends = content.pop("extends", None)
    if extends is not None and not isinstance(extends, str):
        raise UserError(
            f"{origin}: 'extends' is {extends!r}.",
            "Name one recipe: a recipe of the package, or the path of a YAML file.",
        )
    relative = Layer(origin, _relative(content, None if origin == path.stem else path.parent))
    if extends is None:
        return [relative]
    if "name" not in content:
        raise UserError(
            f"{origin} extends {extends} and has no name of its own.",
            "Give it a name (name: …); the folder of its bundle is named after it.",
        )
    return [*_layers(extends, path.parent, (*above, path.resolve())), relative]


def _find(recipe: str | Path, folder: Path | None) -> tuple[Path, str]:
    """The file of a recipe, and the recipe's name in messages."""
    path = Path(recipe).expanduser()
    if path.suffix in _SUFFIXES or (folder is None and path.is_file()):
        path = path if folder is None else folder / path
        return path, str(path)
    if str(recipe) not in shipped_recipes():
        raise UserError(
            f"There is no recipe {recipe}.", f"Give a YAML file, or one of: {', '.join(shipped_recipes())}."
        )
    return recipes_folder() / f"{recipe}.yaml", str(recipe)


def _read(path: Path, origin: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"The recipe {origin} cannot be read: {error}.",
            f"Give a YAML file, or one of: {', '.join(shipped_recipes())}.",
        ) from error
    try:
        content = yaml.load(text, Loader=_UniqueKeys)
    except (yaml.YAMLError, TypeError, RecursionError) as error:
        # TypeError: a mapping as a key ({{ name }}). RecursionError: lists nested too deeply.
        raise UserError(
            f"The recipe {origin} is not valid YAML: {error}", "Correct the file at that place."
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"The recipe {origin} is not a mapping.",
            "Start from an existing recipe: variator-export build RECIPE --show-recipe",
        )
    return content


# Mappings whose keys are the user's own: a layer replaces them as a whole.
_WHOLE = ("backbone.label_words", "quality.generation")


def _overlay(content: dict[str, Any], origins: dict[str, str], layer: Layer, prefix: str) -> None:
    for name, value in layer.content.items():
        key, below = f"{prefix}{name}", content.get(name)
        replaces = key in _WHOLE or (key == "backbone" and isinstance(value, Mapping) and "source" in value)
        if isinstance(value, Mapping) and isinstance(below, dict) and not replaces:
            _overlay(below, origins, Layer(layer.origin, value), f"{key}.")
            continue
        for other in [k for k in origins if k == key or k.startswith(f"{key}.")]:
            del origins[other]
        if isinstance(value, Mapping) and value and key not in _WHOLE:
            content[name] = {}
            _overlay(content[name], origins, Layer(layer.origin, value), f"{key}.")
        else:
            content[name] = copy.deepcopy(value)
            origins[key] = layer.origin


def _relative(content: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Resolve the sources in a recipe file relative to the file; validation handles non-strings."""
    if folder is None:
        return content
    found = copy.deepcopy(content)
    parts = [found.get("backbone")]
    for name in ("plugins", "modules"):
        parts += listed if isinstance(listed := found.get(name), list) else []
    for part in (part for part in parts if isinstance(part, dict)):
        if isinstance(part.get("source"), str):
            part["source"] = _below(folder, part["source"])
    quantization = found.get("quantization")
    calibration = quantization.get("calibration") if isinstance(quantization, dict) else None
    for section in (found.get("quality"), calibration):
        if isinstance(section, dict) and isinstance(data := section.get("data"), str):
            is_name = re.match(r"[a-z]+:", data)
            section["data"] = data if is_name else os.path.normpath(folder / Path(data).expanduser())
    return found


def _below(folder: Path, source: str) -> str:
    if re.match(r"[a-z]+:", source):
        return source
    path = os.path.normpath(folder / Path(source).expanduser())
    if looks_like_repository(source) and not Path(path).exists():
        return HUB_PREFIX + source
    # A path stays a path: without ./, sub/model would be read as a hub repository if the folder is missing.
    return f".{os.sep}{path}" if looks_like_repository(path) else path


def _inline(value: Any) -> str:
    text: str = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()
