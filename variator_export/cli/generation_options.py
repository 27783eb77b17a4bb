"""Options of commands that generate text."""

import json
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from variator_export.core.errors import UsageError

MaxNewTokensOption = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        min=1,
        metavar="N",
        help="The longest generated text in tokens. Default: the model's own setting.",
    ),
]
NumBeamsOption = Annotated[
    int | None,
    typer.Option(
        "--num-beams", min=1, metavar="N", help="The number of beams. Default: the model's own setting."
    ),
]
GenerationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--generation",
        metavar="NAME=VALUE",
        help="Another setting of the generation, with transformers' name, for example "
        "no_repeat_ngram_size=3; may be repeated.",
    ),
]


def parse_settings(
    given: Sequence[str] | None, max_new_tokens: int | None, num_beams: int | None
) -> dict[str, Any]:
    """The settings of a generation as typed.

    Args:
        given: NAME=VALUE, where the value is JSON, or a word.
        max_new_tokens: The setting of this name, or None.
        num_beams: The setting of this name, or None.

    Raises:
        UsageError: An entry is not NAME=VALUE, or a setting was given twice.
    """
    settings: dict[str, Any] = {}
    for entry in given or ():
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise UsageError(
                f"--generation {entry!r} is not NAME=VALUE.", "For example: --generation length_penalty=0.8"
            )
        if name in settings:
            raise UsageError(f"--generation {name} was given twice.", "Give it once.")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    for name, number in (("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
        if number is not None:
            if name in settings:
                raise UsageError(f"{name} was given twice.", "Give it once.")
            settings[name] = number
    return settings
