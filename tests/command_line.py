"""The command line as a user or a CI job calls it."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

from variator_export.cli.main import main
from variator_export.core import interrupts

_OF_A_TERMINAL = {"COLUMNS": "200", "CI": "true"}


def call(
    *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in this process: one of its own spends seconds on imports.

    What it prints to Python's streams is captured, and its exit code is that of the process. huggingface_hub
    reads its settings from the environment when it is imported; here it is given them.
    """
    out, err = io.StringIO(), io.StringIO()
    command = ["variator-export", *arguments]
    with (
        contextlib.chdir(cwd or Path.cwd()),
        mock.patch.object(sys, "argv", command),
        mock.patch.dict(os.environ, {**_OF_A_TERMINAL, **(environment or {})}),
        _hub_settings(environment or {}),
        mock.patch.object(interrupts, "install"),  # pytest has Ctrl-C
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code: object = 0
        except SystemExit as end:
            code = end.code
    code = 0 if code is None else code
    assert isinstance(code, int), code
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def _hub_settings(environment: Mapping[str, str]) -> Iterator[None]:
    """huggingface_hub as if it had been imported in an environment."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    settings: dict[str, object] = {}
    if "HF_ENDPOINT" in environment:
        home = Path(environment["HF_HOME"])
        settings = {
            "ENDPOINT": environment["HF_ENDPOINT"],
            "HUGGINGFACE_CO_URL_TEMPLATE": environment["HF_ENDPOINT"]
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": environment.get("HF_HUB_OFFLINE") == "1",
        }
        if "HF_HUB_DOWNLOAD_TIMEOUT" in environment:
            settings["HF_HUB_DOWNLOAD_TIMEOUT"] = int(environment["HF_HUB_DOWNLOAD_TIMEOUT"])
    with mock.patch.multiple(constants, **settings) if settings else contextlib.nullcontext():
        yield
    if settings:
        close_session()  # its connections are to a server that ends with the test


def call_process(
    *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with little in its environment."""
    return subprocess.run(
        [sys.executable, "-m", "variator_export", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**process_environment(), **_OF_A_TERMINAL, **(environment or {})},
    )


def process_environment() -> dict[str, str]:
    """The little that a process needs in its environment: one thread, and the store of traces."""
    return {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ["PYTHONPATH"]}
