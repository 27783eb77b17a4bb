"""Values that a shell completes: targets, and recipes by name or file. `--install-completion` sets it up."""

from collections.abc import Callable, Iterable
from pathlib import Path

from variator_export.engines.targets import TARGETS, build_targets, engine_targets
from variator_export.recipe.recipe_file import shipped_recipes

Complete = Callable[[str], list[str]]


def of(names: Callable[[], Iterable[str]]) -> Complete:
    """Return a function that completes one of the names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def recipes(incomplete: str) -> list[str]:
    """Complete the name of a recipe that comes with the package, or the path of a YAML file."""
    folder, _, start = incomplete.rpartition("/")
    names = [] if folder else shipped_recipes()
    prefix = f"{folder}/" if folder else "/" if incomplete.startswith("/") else ""
    try:
        there = sorted(Path(prefix or ".").iterdir())
    except OSError:
        there = []
    names += [prefix + p.name for p in there if p.suffix in (".yaml", ".yml") and p.name.startswith(start)]
    # A folder is completed further.
    names += [f"{prefix}{p.name}/" for p in there if p.is_dir() and p.name.startswith(start) and start]
    return [name for name in names if name.startswith(incomplete)]


run_targets = of(TARGETS.names)
targets_to_build = of(build_targets)
targets_with_engines = of(engine_targets)
