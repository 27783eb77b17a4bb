"""The table of sites: which backbones there are and where their feed-forward networks sit."""

from importlib.metadata import entry_points

from variator_export.core.errors import UserError
from variator_export.core.nearest import nearest
from variator_export.model.families.base import Architecture, Family
from variator_export.model.families.bert import BERT
from variator_export.model.families.deberta import DEBERTA, DEBERTA_V2
from variator_export.model.families.distilbert import DISTILBERT
from variator_export.model.families.electra import ELECTRA
from variator_export.model.families.modernbert import MODERNBERT
from variator_export.model.families.mpnet import MPNET
from variator_export.model.families.roberta import ROBERTA, XLM_ROBERTA
from variator_export.model.families.t5 import T5

FAMILIES: tuple[Family, ...] = (
    BERT, DEBERTA, DEBERTA_V2, DISTILBERT, ELECTRA, MODERNBERT, MPNET, ROBERTA, T5, XLM_ROBERTA,
)  # fmt: skip
# Families of installed distributions.
ENTRY_POINT_GROUP = "variator_export.families"


def architectures() -> dict[str, Architecture]:
    """Every supported transformers class by its name: those of `FAMILIES`, then those of distributions.

    Raises:
        UserError: A distribution's entry is broken, or is for a class that is there already.
    """
    found = _by_class(FAMILIES)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        where = f"The entry point {entry.name} = {entry.value} of {ENTRY_POINT_GROUP}"
        remedy = f"Mend or uninstall the distribution {entry.dist.name if entry.dist else 'that has it'}."
        try:
            family = entry.load()
        except Exception as error:  # it runs the distribution's code
            raise UserError(f"{where} cannot be loaded: {error!r}.", remedy) from error
        if not isinstance(family, Family):
            raise UserError(f"{where} is a {type(family).__name__}, no Family.", remedy)
        added = _by_class((family,))
        if double := sorted(found.keys() & added.keys()):
            raise UserError(f"{where} is for {', '.join(double)}, which is in the table already.", remedy)
        found |= added
    return found


def _by_class(families: tuple[Family, ...]) -> dict[str, Architecture]:
    return {
        name: Architecture(name, family, head) for family in families for name, head in family.heads.items()
    }


def find_architecture(name: str) -> Architecture:
    """Look a transformers class up in the table.

    Raises:
        UserError: It is not in the table; lists what is and says how one is added.
    """
    known = architectures()
    if name in known:
        return known[name]
    nearest = _nearest_family(name, known)
    same_family = [other for other, found in known.items() if found.family.name == nearest]
    hint = "A family is added with one file, also from outside of this package (see docs/families.md)."
    if same_family:
        hint = f"Take {' or '.join(same_family)} of it, with --task or backbone.architecture. {hint}"
    raise UserError(
        f"The architecture {name} is not supported; supported are the model types "
        f"{', '.join(sorted({found.family.name for found in known.values()}))}.",
        hint,
    )


def find_task(name: str, task: str) -> Architecture:
    """The class that does a task, in the family of another class.

    Raises:
        UserError: The family is not in the table, or has no class for the task; lists what it has.
    """
    known = architectures()
    family = known[name].family.name if name in known else _nearest_family(name, known)
    there = {found.head.task: found for found in known.values() if found.family.name == family}
    if not there:
        return find_architecture(name)  # its error
    if task not in there:
        raise UserError(
            f"The family {family} does not do the task {task!r}; it does {', '.join(sorted(there))}.",
            f"--task {nearest(task, sorted(there)) or 'feature-extraction'}",
        )
    return there[task]


def _nearest_family(name: str, known: dict[str, Architecture]) -> str | None:
    """The family whose name a class begins with; the longest, since `DebertaV2` begins with `Deberta` too."""
    families = {found.family.name for found in known.values()}
    fitting = [family for family in families if name.lower().startswith(family.replace("-", ""))]
    return max(fitting, key=len, default=None)
