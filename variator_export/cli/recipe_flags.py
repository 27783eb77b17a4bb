"""Recipes of a `build`, overridden by its flags."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from variator_export.building.plan import parse_ratio
from variator_export.cli import options
from variator_export.core.errors import UsageError, UserError
from variator_export.core.nearest import nearest
from variator_export.engines.targets import build_targets
from variator_export.recipe.recipe import DEFAULT_RECIPE, VARIANT_NAME
from variator_export.recipe.recipe_file import Layer, ResolvedRecipe, resolve_recipe

# The keys of a specification of an assembly.
_KEYS = ("enc", "dec", "k")
# Characters that a recipe's name cannot have.
_NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def with_flags(
    recipe: str,
    *,
    ratios: Sequence[str] | None = None,
    backbone: str | None = None,
    task: str | None = None,
    architecture: str | None = None,
    label_words: Sequence[str] | None = None,
    decoder_prompt: str | None = None,
    plugins: Sequence[str] | None = None,
    modules: Sequence[str] | None = None,
    assemblies: Sequence[str] | None = None,
    strategy: str | None = None,
    speedup: float | None = None,
    max_weights: str | None = None,
    untrained: bool = False,
    targets: Sequence[str] | None = None,
    precision: str | None = None,
    calibration: str | None = None,
    calibration_column: str | None = None,
    opset: int | None = None,
    default_variant: str | None = None,
    adapters: bool | None = None,
    output: Path | None = None,
    speed: bool = True,
) -> ResolvedRecipe:
    """Return a recipe overridden by flags, with the origin of each value.

    Raises:
        UserError: The recipe is invalid, as written or after a flag changed it.
        UsageError: A flag needs another flag, or excludes it.
    """
    layers: list[Layer] = []
    if backbone is not None:
        if output is None and recipe == DEFAULT_RECIPE:
            raise UsageError(
                "--backbone needs --output: the default recipe's folder is for the default backbone.",
                f"variator-export build --backbone {backbone} --output artifacts/NAME",
            )
        change: dict[str, Any] = {"backbone": {"source": backbone}}
        if recipe == DEFAULT_RECIPE and modules and not plugins and not untrained:
            change["plugins"] = []  # the default recipe's are for the default backbone
        if output is not None:  # the bundle is no longer the recipe's
            change["name"] = _NO_NAME.sub("-", output.resolve().name).strip("-._") or "bundle"
        layers.append(Layer("--backbone", change))
    if task is not None:
        layers.append(Layer("--task", {"backbone": {"task": task, "architecture": None}}))
    options.check_architecture(task, architecture)
    if architecture is not None:
        layers.append(Layer("--architecture", {"backbone": {"task": None, "architecture": architecture}}))
    if (words := options.parse_label_words(label_words)) is not None:
        layers.append(Layer("--label-word", {"backbone": {"label_words": words}}))
    if decoder_prompt is not None:
        layers.append(Layer("--decoder-prompt", {"backbone": {"decoder_prompt": decoder_prompt}}))
    if plugins:
        layers.append(
            Layer("--plugin", {"plugins": [_named_source(text) for text in plugins], "ratios": None})
        )
    if modules:
        layers.append(Layer("--module", {"modules": [_named_source(text) for text in modules]}))
    if assemblies:
        layers.append(Layer("--assembly", {"assemblies": [_assembly(text) for text in assemblies]}))
    budget = {"strategy": strategy, "speedup": speedup, "max_weights": max_weights}
    if speedup is not None or max_weights is not None:
        layers.append(
            Layer("--speedup" if speedup is not None else "--max-weights", {"strategies": [budget]})
        )
    elif strategy is not None:
        raise UsageError(
            f"--strategy {strategy} needs a budget.", "Give --speedup 2.0 or --max-weights 150MB."
        )
    asked = sorted({parse_ratio(text) for text in ratios or ()})
    if untrained:
        layers.append(Layer("--untrained", {"plugins": _initialised(asked, plugins)}))
    if asked:
        layers.append(Layer("--ratio", {"ratios": asked}))
    if targets:
        layers.append(Layer("--target", {"targets": list(dict.fromkeys(map(_target, targets)))}))
    if precision is not None:
        layers.append(Layer("--precision", {"precision": precision}))
    if calibration is not None:
        column = {} if calibration_column is None else {"text_column": calibration_column}
        # The columns of the recipe belong to its own data.
        change = {"calibration": {"data": calibration, "pair_column": None, **column}}
        layers.append(Layer("--calibration", {"quantization": change}))
    elif calibration_column is not None:
        raise UsageError("--calibration-column needs --calibration.", "--calibration FILE")
    graphs = {"opset": opset, "default_variant": _number_or_name(default_variant), "adapters": adapters}
    layers += [
        Layer(f"--{name.replace('_', '-')}", {"graphs": {name: value}})
        for name, value in graphs.items()
        if value is not None
    ]
    if not speed:
        layers.append(Layer("--no-speed", {"speed": None}))
    return resolve_recipe(recipe, layers)


def _initialised(ratios: Sequence[int], plugins: Sequence[str] | None) -> list[dict[str, Any]]:
    if plugins:
        raise UsageError("--untrained and --plugin were both given.", "Give one of them.")
    found = [{"ratio": ratio, "initialise": {"seed": ratio}} for ratio in ratios if ratio != 1]
    if not found:
        raise UsageError("--untrained needs the ratios to initialise plugins for.", "--untrained --ratio 4")
    return found


def _named_source(text: str) -> dict[str, Any]:
    name, source = options.named_plugin(text)
    return {"name": name, "source": source}


def _assembly(text: str) -> dict[str, Any]:
    """`[NAME=]SPEC`, where a specification itself begins with `enc=`, `dec=` or a number."""
    name, equals, spec = text.partition("=")
    if equals and re.fullmatch(VARIANT_NAME, name) and name not in _KEYS:
        return {"name": name, "spec": spec}
    return {"spec": text}


def _number_or_name(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def _target(text: str) -> str:
    known = build_targets()
    if text not in known:
        guess = nearest(text, list(known))
        raise UserError(
            f"There is no target {text!r}; the targets are {', '.join(known)}.",
            f"--target {guess}" if guess else f"Choose one of: {', '.join(known)}.",
        )
    return text
