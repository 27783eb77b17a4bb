"""`variator-export push`, and `--push-to-hub` of the commands that make what can be pushed."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from variator_export.building.hub_push import check_repository, push
from variator_export.cli.output import Format, Output
from variator_export.core.errors import UserError
from variator_export.core.hub import require_token

PushOption = Annotated[
    str | None,
    typer.Option(
        "--push-to-hub",
        metavar="ORGANISATION/NAME[@BRANCH]",
        help="Write the result to this repository of the hub when it is complete.",
    ),
]


def push_command(
    folder: Annotated[Path, typer.Argument(help="A bundle, a plugin, or a folder of plugins.")],
    repository: Annotated[str, typer.Argument(metavar="ORGANISATION/NAME[@BRANCH]", help="Where to.")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Of a repository that is made; default: as the organisation has it."
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Write a bundle or plugins to the Hugging Face Hub, in one commit.

    The token is that of `HF_TOKEN` or `hf auth login`. A repository that holds something else is refused.

    **Examples**

    `variator-export push artifacts/minilm my-organisation/minilm-variator`

    `variator-export push plugins my-organisation/my-plugins --private`
    """
    printer = Output(format)
    pushed = push(folder, repository, private=private)
    if printer.is_json:
        printer.document({"pushed": asdict(pushed)})
    else:
        _print(printer, asdict(pushed))


def check_push(repository: str | None) -> None:
    """Refuse what `--push-to-hub` asks for before the work, which may take hours, as far as it can be told.

    Raises:
        UserError: It is no repository, or there is no token.
    """
    if repository is not None:
        check_repository(repository)
        require_token()


def push_result(printer: Output, folder: Path, repository: str | None) -> dict[str, Any] | None:
    """What `--push-to-hub` asks for, after the work is done and its result is on disk.

    Raises:
        UserError: It could not be pushed; says how to do it again without the work.
    """
    if repository is None:
        return None
    try:
        pushed = asdict(push(folder, repository))
    except UserError as error:
        raise type(error)(
            f"{folder} is complete, but was not pushed: {error.message}",
            f"{error.hint or ''} Then: variator-export push {folder} {repository}".strip(),
        ) from error
    if not printer.is_json:
        _print(printer, pushed)
    return pushed


def _print(printer: Output, pushed: dict[str, Any]) -> None:
    removed = f", {pushed['removed']} of before removed" if pushed["removed"] else ""
    printer.text(f"pushed to {pushed['repo']}: {pushed['files']} files{removed}: {pushed['commit_url']}")
