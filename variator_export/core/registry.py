"""The members of an axis: this package's own, and those of installed distributions by their entry points.

Families, methods, precisions and targets are each such an axis. A member of our own is written as
`module:attribute` and imported when it is asked for, so that a list of names costs nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from variator_export.core.errors import UserError
from variator_export.core.nearest import nearest

Member = TypeVar("Member")


@dataclass(frozen=True)
class Registry(Generic[Member]):
    """The members of one axis by name.

    Attributes:
        kind: What a member is called in messages, for example `target`.
        group: The entry point group by which distributions add members. The name of an entry is the member's.
        contract: The class that a member is an instance of.
        own: This package's members, as `module:attribute`.
    """

    kind: str
    group: str
    contract: type[Member]
    own: Mapping[str, str]

    def names(self) -> tuple[str, ...]:
        """The names of all members, our own first; nothing is imported."""
        return tuple(dict.fromkeys([*self.own, *(entry.name for entry in self._entries())]))

    def find(self, name: str) -> Member:
        """A member by its name.

        Raises:
            UserError: There is none of that name, or a distribution's entry is broken.
        """
        if name in self.own:
            member: Member = resolve(self.own[name])
            return member
        for entry in self._entries():
            if entry.name == name:
                return self.load(entry)
        known = self.names()
        guess = nearest(name, list(known))
        raise UserError(
            f"There is no {self.kind} {name!r}; there are {', '.join(known)}.",
            f"Did you mean {guess!r}?" if guess else f"Choose one of: {', '.join(known)}.",
        )

    def all(self) -> dict[str, Member]:
        """Every member by its name.

        Raises:
            UserError: A distribution's entry is broken.
        """
        return {name: self.find(name) for name in self.names()}

    def load(self, entry: EntryPoint) -> Member:
        """The member of a distribution's entry.

        Raises:
            UserError: It cannot be imported, or is no member; names the distribution.
        """
        try:
            member = entry.load()
        except Exception as error:  # it runs the distribution's code
            raise UserError(f"{self.where(entry)} cannot be loaded: {error!r}.", remedy(entry)) from error
        if not isinstance(member, self.contract):
            found, expected = type(member).__name__, self.contract.__name__
            raise UserError(f"{self.where(entry)} is a {found}, no {expected}.", remedy(entry))
        return member

    def where(self, entry: EntryPoint) -> str:
        """How messages call an entry."""
        return f"The entry point {entry.name} = {entry.value} of {self.group}"

    def _entries(self) -> Iterator[EntryPoint]:
        yield from entry_points(group=self.group)


def resolve(reference: str) -> Any:
    """What `module:attribute` names, imported now."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def remedy(entry: EntryPoint) -> str:
    """What to do about a broken entry."""
    return f"Mend or uninstall the distribution {entry.dist.name if entry.dist else 'that has it'}."
