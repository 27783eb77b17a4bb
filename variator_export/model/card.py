"""What the cards (README.md) of plugins and of modules share: training, data and measured quality."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError

CARD_NAME = "README.md"
PLOT_NAME = "loss.svg"
_QUALITY_BEGIN, _QUALITY_END = "<!-- quality: begin -->", "<!-- quality: end -->"
_QUALITY = re.compile(re.escape(_QUALITY_BEGIN) + ".*?" + re.escape(_QUALITY_END), re.DOTALL)
_NOT_MEASURED = "Not measured yet. `variator-export evaluate --card` measures it and writes the result here."


def card(
    kind: str, tags: Sequence[str], title: str, about: Sequence[str], training: Mapping[str, Any]
) -> str:
    """The card of a training's result: Markdown with the hub's metadata block.

    Args:
        kind: The word for the result in sentences: `plugin`.
        tags: Tags for the hub.
        title: The heading.
        about: Paragraphs and blocks about the result, below the heading.
        training: The record of the training.
    """
    lines = [
        "---",
        "library_name: variator-export",
        f"tags: [{', '.join(tags)}]",
        "---",
        "",
        f"# {title}",
        "",
        *about,
        "",
        "## Quality",
        "",
        _QUALITY_BEGIN,
        _NOT_MEASURED,
        _QUALITY_END,
        "",
        "## Training",
        "",
        *_run_lines(training),
        f"![losses]({PLOT_NAME})",
        "",
        "## Data",
        "",
        *_data_lines(training),
        *_parent_lines(training, kind),
    ]
    return "\n".join(lines)


def _run_lines(training: Mapping[str, Any]) -> list[str]:
    """Lines about one training run: settings, losses, command and versions."""
    settings = training["settings"]
    optimisation = settings["optimisation"]
    losses = ", ".join(f"{name} x {weight:g}" for name, weight in settings["losses"].items() if weight)
    return [
        f"Stage: {training['stage']}. Loss: {losses}. {training['steps']} steps of "
        f"{optimisation['batch_size']} texts, learning rate {optimisation['learning_rate']:g} "
        f"({optimisation['schedule']}), seed {optimisation['seed']}, matrix products in "
        f"{optimisation['precision']}. Held-out loss {training['loss']:.5g} at step {training['best_step']}, "
        "the step whose parameters were kept.",
        "",
        "Command to repeat the run:",
        "",
        "```",
        training["command"] or "(called from Python)",
        "```",
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in training["versions"].items()) + ".",
        "",
    ]


def _data_lines(training: Mapping[str, Any]) -> list[str]:
    """Lines about the data of one training run."""
    return [f"Terms: {training['terms'] or 'not stated'}.", "", *_data_table(training["data"]), ""]


def _parent_lines(training: Mapping[str, Any], kind: str) -> list[str]:
    """Lines about what this run started from, and about its own predecessors, newest first."""
    lines: list[str] = []
    while (parent := training.get("parent")) is not None:
        lines += ["## Previous run", "", f"The run above started from {kind} `{parent['sha256'][:16]}…`.", ""]
        earlier = parent["training"]
        if earlier is None or "settings" not in earlier:  # trained elsewhere, or imported
            source = (
                f"imported from {earlier['file']}" if earlier and "file" in earlier else "not trained here"
            )
            return [*lines, f"That {kind} was {source}; its training is unknown.", ""]
        lines += _run_lines(earlier)
        if all(earlier[key] == training[key] for key in ("data", "terms")):
            lines += ["The data was the same.", ""]
        else:
            lines += _data_lines(earlier)
        training = earlier
    return lines


def _data_table(data: Sequence[dict[str, Any]]) -> list[str]:
    rows = ["| name | size | sha256 |", "|---|---|---|"]
    for source in data:
        size = (
            f"{source['characters']:,} characters"
            if "characters" in source
            else f"{source['examples']:,} examples"
        )
        rows.append(f"| {source['name']} | {size} | `{source['sha256'][:16]}…` |")
    return rows


def write_quality(folder: Path, markdown: str) -> None:
    """Write measured quality into a card, replacing the previous entry.

    Raises:
        UserError: Same as `check_card`.
    """
    path = check_card(folder)
    block = f"{_QUALITY_BEGIN}\n{markdown.strip()}\n{_QUALITY_END}"
    text = _QUALITY.sub(lambda _: block, path.read_text(encoding="utf-8"), count=1)
    path.write_text(text, encoding="utf-8")


def check_card(folder: Path) -> Path:
    """Find the card of a folder.

    Raises:
        UserError: The folder has no card, or its card has no place for measured quality.
    """
    path = folder / CARD_NAME
    if not path.is_file():
        raise UserError(
            f"{folder} has no {CARD_NAME} to write the quality into.",
            "Leave --card out, or use a folder that `variator-export train` wrote.",
        )
    if not _QUALITY.search(path.read_text(encoding="utf-8")):
        raise UserError(
            f"{path} has no place for the quality.", f"Add the lines {_QUALITY_BEGIN} and {_QUALITY_END}."
        )
    return path
