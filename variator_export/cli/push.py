"""`variator-export push`, and `--push-to-hub` of the commands that write bundles or plugins."""

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
        help="Push the complete result to this repository on the hub.",
    ),
]


def push_command(
    folder: Annotated[Path, typer.Argument(help="A bundle, or a folder of plugins or modules.")],
    repository: Annotated[
        str, typer.Argument(metavar="ORGANISATION/NAME[@BRANCH]", help="The repository to push to.")
    ],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Visibility of a new repository. Default: the organisation's setting."
        ),
    ] = None,
    format: Annotated[Format, typer.Option(help="How to print the result.")] = Format.TEXT,
) -> None:
    """Push a bundle, plugins or modules to the Hugging Face Hub, in one commit.

    The token comes from `HF_TOKEN` or `hf auth login`. A repository with other content is refused.

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
    """Check the argument of `--push-to-hub` and the token before the work, which may take hours.

    Raises:
        UserError: The argument does not name a repository, or there is no token.
    """
    if repository is not None:
        check_repository(repository)
        require_token()


def push_result(printer: Output, folder: Path, repository: str | None) -> dict[str, Any] | None:
    """Push a finished result for `--push-to-hub`, after it was written to disk.

    Raises:
        UserError: The push failed. The hint shows how to push again without repeating the work.
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
    removed = f", {pushed['removed']} earlier files removed" if pushed["removed"] else ""
    printer.text(f"pushed to {pushed['repo']}: {pushed['files']} files{removed}: {pushed['commit_url']}")
