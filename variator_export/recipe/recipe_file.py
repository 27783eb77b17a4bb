"""Recipes as YAML: those that come with the package and those of users, one over another, flags over all."""

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
    """A part of a recipe that goes over what is below it.

    Attributes:
        origin: Where it comes from, for people: a file, a shipped recipe, a flag.
        content: Some keys of a recipe. Mappings are merged, everything else is replaced. A `backbone` with a
            `source` is replaced whole: a pin, a task and an architecture belong to the weights that they
            stood beside.
    """

    origin: str
    content: Mapping[str, Any]


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe together with where its values come from.

    Attributes:
        recipe: What to build.
        origins: By dotted key; what is not there is a default. A list has one origin.
    """

    recipe: Recipe
    origins: Mapping[str, str] = field(default_factory=dict)

    def origin(self, key: str) -> str:
        """Where the value of a dotted key comes from."""
        while key not in self.origins and "." in key:
            key = key.rpartition(".")[0]
        return self.origins.get(key, "default")

    def to_yaml(self) -> str:
        """The whole recipe, as a file that says the same, each value with its origin behind it."""
        rows = list(self._rows(self.recipe.model_dump(mode="json"), ""))
        width = min(72, max(len(text) for text, _ in rows))
        return "".join(f"{text:{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in rows)

    def _rows(self, values: Mapping[str, Any], prefix: str) -> Any:
        for name, value in values.items():
            key, indent = prefix + name, "  " * prefix.count(".")
            if isinstance(value, dict):
                yield f"{indent}{name}:", ""
                yield from self._rows(value, f"{key}.")
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                yield f"{indent}{name}:", self.origin(key)
                for item in value:
                    yield f"{indent}  - {_inline({k: v for k, v in item.items() if v is not None})}", ""
            else:
                yield f"{indent}{name}: {_inline(value)}", self.origin(key)


class _UniqueKeys(yaml.SafeLoader):
    """YAML whose keys come once; PyYAML takes the last of several without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that comes twice."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                problem = f"the key {key_node.value!r} comes twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def load_recipe(recipe: str | Path) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A YAML file, or the name of a recipe that comes with the package.

    Raises:
        UserError: It, or one that it extends, does not exist, is no YAML, or does not validate.
    """
    return resolve_recipe(recipe).recipe


def resolve_recipe(recipe: str | Path, over: Sequence[Layer] = ()) -> ResolvedRecipe:
    """Read a recipe, with those that it extends below it and `over` above it.

    Raises:
        UserError: As `load_recipe`.
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
        UserError: It does not validate; names the key, what was found and the nearest known key.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise UserError(
            f"The recipe {name} does not validate: {describe_validation_error(error, Recipe)}",
            "docs/recipes.md describes every key.",
        ) from error


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file, by which editors complete and check one while it is written."""
    schema = Recipe.model_json_schema()
    extends = {
        "description": "A recipe that comes with the package, or a YAML file; this one goes over it.",
        "title": "Extends",
        "type": "string",
    }
    # What is required may stand in the recipe below.
    schema["$defs"]["BackboneRecipe"].pop("required")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "properties": {"extends": extends, **schema["properties"]},
        "required": ["name"],
        "anyOf": [{"required": ["backbone"]}, {"required": ["extends"]}],
    }


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def _layers(recipe: str | Path, folder: Path | None, above: tuple[Path, ...]) -> list[Layer]:
    """A recipe and those that it extends, the lowest first.

    Args:
        recipe: A file or the name of one that comes with the package.
        folder: What a file is relative to; None: the current folder.
        above: Those that extend it.
    """
    path, origin = _find(recipe, folder)
    if path.resolve() in above:
        chain = " extends ".join(p.name for p in (*above, path.resolve()))
        raise UserError(f"Recipes extend each other in a circle: {chain}.", "Take one `extends` out.")
    content = _read(path, origin)
    extends = content.pop("extends", None)
    if extends is not None and not isinstance(extends, str):
        raise UserError(
            f"{origin}: 'extends' is {extends!r}.", "Name one recipe, or give the path of a YAML file."
        )
    relative = Layer(origin, _relative(content, None if origin == path.stem else path.parent))
    if extends is None:
        return [relative]
    if "name" not in content:
        raise UserError(
            f"{origin} extends {extends} and has no name of its own.",
            "Give it one (name: …), which names the folder of its bundle.",
        )
    return [*_layers(extends, path.parent, (*above, path.resolve())), relative]


def _find(recipe: str | Path, folder: Path | None) -> tuple[Path, str]:
    """The file of a recipe and how to call it."""
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
        # A mapping as a key ({{ name }}), or lists without end, are YAML, but no recipe.
        raise UserError(f"The recipe {origin} is not valid YAML: {error}", "Correct it there.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"The recipe {origin} is no mapping.", "Start from one that is there: build RECIPE --show-recipe"
        )
    return content


def _overlay(content: dict[str, Any], origins: dict[str, str], layer: Layer, prefix: str) -> None:
    for name, value in layer.content.items():
        key, below = f"{prefix}{name}", content.get(name)
        replaces = name == "backbone" and not prefix and isinstance(value, Mapping) and "source" in value
        if isinstance(value, Mapping) and isinstance(below, dict) and not replaces:
            _overlay(below, origins, Layer(layer.origin, value), f"{key}.")
            continue
        for other in [k for k in origins if k == key or k.startswith(f"{key}.")]:
            del origins[other]
        if isinstance(value, Mapping) and value:
            content[name] = {}
            _overlay(content[name], origins, Layer(layer.origin, value), f"{key}.")
        else:
            content[name] = copy.deepcopy(value)
            origins[key] = layer.origin


def _relative(content: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Sources in a recipe file are relative to the file. What is no text is left to the validation."""
    if folder is None:
        return content
    found = copy.deepcopy(content)
    backbone, plugins = found.get("backbone"), found.get("plugins")
    parts = [backbone] if isinstance(backbone, dict) else []
    parts += [plugin for plugin in plugins if isinstance(plugin, dict)] if isinstance(plugins, list) else []
    for part in parts:
        if isinstance(part.get("source"), str):
            part["source"] = _below(folder, part["source"])
    return found


def _below(folder: Path, source: str) -> str:
    if re.match(r"[a-z]+:", source):
        return source
    path = os.path.normpath(folder / Path(source).expanduser())
    if looks_like_repository(source) and not Path(path).exists():
        return HUB_PREFIX + source
    # A path stays one: sub/model would read as a repository of the hub where there is no such folder.
    return f".{os.sep}{path}" if looks_like_repository(path) else path


def _inline(value: Any) -> str:
    text: str = yaml.safe_dump(
        value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()
