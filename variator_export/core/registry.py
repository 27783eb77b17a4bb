"""Registries of extensible members: built-in members, and members added by installed distributions.

Families, methods, precisions and targets each have a registry. Distributions add members through entry
points. A built-in member is given as `module:attribute` and imported on first use, so listing the names costs
nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from variator_export.core.errors import UserError
from variator_export.core.nearest import nearest

Member = TypeVar("Member")


@dataclass(frozen=True)
class Registry(Generic[Member]):
    """The members of one kind, by name.

    Attributes:
        kind: The word for a member in messages, for example `target`.
        group: The entry point group in which distributions add members. An entry has its member's name.
        contract: The class that every member is an instance of.
        own: Built-in members, as `module:attribute`.
    """

    kind: str
    group: str
    contract: type[Member]
    own: Mapping[str, str]

    def names(self) -> tuple[str, ...]:
        """The names of all members, built-in members first. Nothing is imported."""
        return tuple(dict.fromkeys([*self.own, *(entry.name for entry in self.entries())]))

    def find(self, name: str) -> Member:
        """A member by its name.

        Raises:
            UserError: No member has that name, or a distribution's entry is broken.
        """
        if name in self.own:
            member: Member = resolve(self.own[name])
            return member
        for entry in self.entries():
            if entry.name == name:
                return self.load(entry)
        raise unknown_member(self.kind, name, self.names())

    def all(self) -> dict[str, Member]:
        """Every member by its name.

        Raises:
            UserError: A distribution's entry is broken.
        """
        return {name: self.find(name) for name in self.names()}

    def load(self, entry: EntryPoint) -> Member:
        """The member of a distribution's entry point.

        Raises:
            UserError: The entry cannot be imported, or is not a member. The hint names the distribution.
        """
        try:
            member = entry.load()
        except Exception as error:  # the entry runs the distribution's code
            raise UserError(f"{self.where(entry)} cannot be loaded: {error!r}.", remedy(entry)) from error
        if not isinstance(member, self.contract):
            found, expected = type(member).__name__, self.contract.__name__
            raise UserError(f"{self.where(entry)} is of type {found}, not {expected}.", remedy(entry))
        return member

    def where(self, entry: EntryPoint) -> str:
        """The description of an entry point in messages."""
        return f"The entry point {entry.name} = {entry.value} of {self.group}"

    def entries(self) -> Iterator[EntryPoint]:
        """Yield the entry points of installed distributions."""
        yield from entry_points(group=self.group)


def unknown_member(kind: str, name: str, known: Sequence[str]) -> UserError:
    """The error for a name that no member has, with the nearest name as its hint."""
    guess = nearest(name, list(known))
    return UserError(
        f"There is no {kind} {name!r}; there are {', '.join(known)}.",
        f"Did you mean {guess!r}?" if guess else f"Choose one of: {', '.join(known)}.",
    )


def resolve(reference: str) -> Any:
    """Import and return the object that `module:attribute` names."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


def remedy(entry: EntryPoint) -> str:
    """The hint for a broken entry point."""
    return f"Fix or uninstall the distribution {entry.dist.name if entry.dist else 'that has it'}."
