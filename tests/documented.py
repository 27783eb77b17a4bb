"""What the documentation shows: its pages, their blocks of code, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
_FENCE = re.compile(r"^```([\w-]*|\{[\w-]+\})\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_PROGRAM = re.compile(r"(?:^|\s)(?:variator-export|-m variator_export)\s+(\S.*)")
_ELIDED = re.compile(r"…|\.\.\.")


def pages() -> list[Path]:
    """Every page of the documentation."""
    found = [REPOSITORY / "README.md", REPOSITORY / "benchmarks" / "README.md"]
    found += (REPOSITORY / "docs").rglob("*.md")
    found += (REPOSITORY / "recipes").rglob("README.md")
    return sorted(found)


def blocks(text: str) -> list[tuple[str, str]]:
    """The language and the content of each fenced block; shell has no language."""
    return [(match[1], match[2]) for match in _FENCE.finditer(text)]


def lines_of(block: str) -> list[str]:
    """The lines of a block of shell, those that go on after a backslash in one."""
    return block.replace("\\\n", " ").splitlines()


def arguments_of(line: str) -> list[str] | None:
    """What stands after the program's name in a line of shell, up to a redirection; None: no call."""
    match = _PROGRAM.search(line)
    if match is None or line.lstrip().startswith("#"):
        return None
    lexer = shlex.shlex(match[1], posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    arguments: list[str] = []
    for token in lexer:
        if set(token) <= set("<>|&;()"):
            break
        arguments.append(token)
    return arguments


@dataclass(frozen=True)
class Mention:
    """A command in a page.

    Attributes:
        words: After the program's name; only options where a page speaks of an option alone.
        whole: It can be typed as it stands.
    """

    words: tuple[str, ...]
    whole: bool


def mentions(text: str) -> Iterator[Mention]:
    """Every command and option that a page names, in blocks and between backticks."""
    for language, block in blocks(text):
        if language in ("python", "json", "toml"):
            continue
        for line in lines_of(block):
            arguments = arguments_of(line)
            if arguments:
                yield Mention(tuple(arguments), whole=not _ELIDED.search(line))
    for code in _INLINE.findall(_FENCE.sub("", text)):
        code = " ".join(code.split())
        words = arguments_of(code) or code.split()
        if words and ("variator" in code or " --" in code or code.startswith("--")):
            yield Mention(tuple(words), whole=False)


def problems(app: Any, mention: Mention) -> list[str]:
    """What the command line (a group of Typer) does not know of a mention."""
    command, words, name = app, list(mention.words), "variator-export"
    if words[0].startswith("--"):
        # Of an option alone a page does not say whose it is.
        return [f"no command has {word}" for word in words if _is_option(word) and word not in _options(app)]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        if words[0] not in command.commands:
            known = mention.whole or command is not app
            return [f"{name} has no command {words[0]}"] if known else []
        command, name = command.commands[words[0]], f"{name} {words.pop(0)}"
    unknown = [word for word in words if _is_option(word) and word not in _own_options(command)]
    if unknown:
        return [f"{name} has no {word}" for word in unknown]
    if mention.whole and not hasattr(command, "commands"):
        try:
            command.make_context(name, words)
        except Exception as error:  # Typer's own, or what a callback of ours makes of a value
            return [f"{name} {' '.join(words)}: {error}"]
    return []


def _is_option(word: str) -> bool:
    return word.startswith("--") and len(word) > 2


def _own_options(command: Any) -> set[str]:
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own | {"--help"}


def _options(command: Any) -> set[str]:
    below = getattr(command, "commands", {}).values()
    return _own_options(command).union(*map(_options, below))
