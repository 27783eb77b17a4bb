"""Assemblies: the layers of a model's stacks, each original or a module that does the work of several.

A specification such as `enc=2,2,1x8;dec=6,6` lists, for each stack, how many original layers each layer of
the assembly stands for. `1x8` is short for eight times 1. A stack that is not named keeps its layers.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from variator_export.core.errors import UserError

Stack = Literal["encoder", "decoder"]
ENCODER_STACK: Stack = "encoder"
DECODER_STACK: Stack = "decoder"
_SHORT: dict[str, Stack] = {"enc": ENCODER_STACK, "dec": DECODER_STACK}
_RATIO = "k"
_ITEM = re.compile(r"(\d{1,4})(?:x(\d{1,4}))?")
_EXAMPLE = "For example enc=2,2,1x8: two modules for two layers each, then eight original layers."
_MOST_LAYERS = 10_000


@dataclass(frozen=True, order=True)
class Span:
    """Neighbouring layers of a stack that one layer of an assembly stands for, counted from 0, inclusive."""

    first: int
    last: int

    @property
    def granularity(self) -> int:
        """The number of original layers."""
        return self.last - self.first + 1

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class Assembly:
    """The granularities of the layers of each stack, in order; an empty stack keeps its layers."""

    encoder: tuple[int, ...] = ()
    decoder: tuple[int, ...] = ()

    def granularities(self, stack: Stack) -> tuple[int, ...]:
        """The granularities of a stack."""
        return self.encoder if stack == ENCODER_STACK else self.decoder

    def spans(self, stack: Stack, num_layers: int) -> tuple[Span, ...]:
        """The original layers that each layer of a stack stands for.

        Args:
            stack: `encoder` or `decoder`.
            num_layers: Layers of the model's own stack.

        Raises:
            UserError: The granularities do not add up to the number of layers.
        """
        listed = self.granularities(stack) or (1,) * num_layers
        ends = tuple(itertools.accumulate(listed))
        if ends[-1] != num_layers:
            short = next(name for name, long in _SHORT.items() if long == stack)
            raise UserError(
                f"The assembly {short}={_run_lengths(listed)} adds up to {ends[-1]} layers; the {stack} has "
                f"{num_layers}.",
                f"Change the granularities so that they add up to {num_layers}. {_EXAMPLE}",
            )
        return tuple(Span(end - size, end - 1) for end, size in zip(ends, listed, strict=True))

    @property
    def is_original(self) -> bool:
        """Whether every layer is an original one."""
        return not any(map(self.has_modules, _SHORT.values()))

    def has_modules(self, stack: Stack) -> bool:
        """Whether a stack has a layer that stands for several."""
        return any(size > 1 for size in self.granularities(stack))

    def of_stack(self, stack: Stack) -> "Assembly":
        """The same layers in one stack, and the original layers in the other."""
        return Assembly(**{stack: self.granularities(stack)})

    @property
    def name(self) -> str:
        """A name for files: `enc-2x2-1x8_dec-6x2`."""
        return str(self).replace("=", "-").replace(",", "-").replace(";", "_")

    def __str__(self) -> str:
        stacks = [(short, self.granularities(stack)) for short, stack in _SHORT.items()]
        return ";".join(f"{short}={_run_lengths(listed)}" for short, listed in stacks if listed)


def parse_assembly(text: str) -> tuple[Assembly, int | None]:
    """Read a specification.

    Args:
        text: `enc=2,2,1x8;dec=6,6`, in any order; or the list alone for the encoder. `k=4` adds the
            compression plugin of ratio 4.

    Returns:
        The assembly, and the ratio; None if the specification has no `k`.

    Raises:
        UserError: The text is not a specification.
    """
    stacks: dict[str, tuple[int, ...]] = {}
    ratio: int | None = None
    for part in text.split(";"):
        key, equals, value = (item.strip() for item in part.rpartition("="))
        key = key if equals else "enc"
        if key == _RATIO and value.isdecimal() and int(value) >= 1 and ratio is None:
            ratio = int(value)
        elif key in _SHORT and key not in stacks:
            stacks[key] = _granularities(value, text)
        else:
            raise UserError(
                f"{part.strip()!r} in the assembly {text!r} is not one of enc=…, dec=… and k=…, each given "
                "once.",
                _EXAMPLE,
            )
    return Assembly(stacks.get("enc", ()), stacks.get("dec", ())), ratio


def possible_spans(num_layers: int, modules: Collection[Span]) -> Iterator[tuple[Span, ...]]:
    """Yield every way to cover a stack with original layers and modules, the original stack first.

    Args:
        num_layers: Layers of the stack.
        modules: The layers that each available module stands for.
    """
    by_first: dict[int, list[Span]] = {first: [Span(first, first)] for first in range(num_layers)}
    for span in sorted({*modules}):
        if span.granularity > 1 and span.last < num_layers:
            by_first[span.first].append(span)

    def rest(first: int) -> Iterator[tuple[Span, ...]]:
        if first == num_layers:
            yield ()
            return
        for span in by_first[first]:
            for others in rest(span.last + 1):
                yield (span, *others)

    return rest(0)


def _granularities(text: str, whole: str) -> tuple[int, ...]:
    found: list[int] = []
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        size, times = (int(match[1]), int(match[2] or 1)) if match else (0, 0)
        if size < 1 or times < 1 or len(found) + times > _MOST_LAYERS:
            raise UserError(
                f"{item.strip()!r} in the assembly {whole!r} is not a number of layers, or one with a count "
                "(2x3).",
                _EXAMPLE,
            )
        found += [size] * times
    return tuple(found)


def _run_lengths(listed: Sequence[int]) -> str:
    runs = [(size, len(list(run))) for size, run in itertools.groupby(listed)]
    return ",".join(str(size) if count == 1 else f"{size}x{count}" for size, count in runs)
