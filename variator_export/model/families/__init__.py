"""The table of sites: the supported backbones and the locations of their feed-forward networks."""

from collections.abc import Iterable

from variator_export.core.errors import UserError
from variator_export.core.nearest import nearest
from variator_export.core.registry import Registry, remedy
from variator_export.model.families.base import Architecture, Family

# Ends of the class names of models that a family file cannot describe.
_NOT_ENCODERS = ("ForCausalLM", "LMHeadModel", "ForImageClassification")

FAMILIES = Registry(
    kind="family",
    group="variator_export.families",
    contract=Family,
    own={
        family: f"variator_export.model.families.{reference}"
        for family, reference in {
            "bart": "bart:BART",
            "bert": "bert:BERT",
            "deberta": "deberta:DEBERTA",
            "deberta-v2": "deberta:DEBERTA_V2",
            "distilbert": "distilbert:DISTILBERT",
            "electra": "electra:ELECTRA",
            "mbart": "bart:MBART",
            "modernbert": "modernbert:MODERNBERT",
            "mpnet": "mpnet:MPNET",
            "mt5": "t5:MT5",
            "pegasus": "bart:PEGASUS",
            "roberta": "roberta:ROBERTA",
            "t5": "t5:T5",
            "xlm-roberta": "roberta:XLM_ROBERTA",
        }.items()
    },
)


def architectures() -> dict[str, Architecture]:
    """List every supported transformers class by name: this package's, then those of other distributions.

    Raises:
        UserError: A distribution's entry point is broken, or adds a class that is already in the table.
    """
    found = _by_class(FAMILIES.find(name) for name in FAMILIES.own)
    for entry in FAMILIES.entries():
        added = _by_class((FAMILIES.load(entry),))
        if double := sorted(found.keys() & added.keys()):
            raise UserError(
                f"{FAMILIES.where(entry)} adds {', '.join(double)}, which is already in the table.",
                remedy(entry),
            )
        found |= added
    return found


def _by_class(families: Iterable[Family]) -> dict[str, Architecture]:
    return {
        name: Architecture(name, family, head) for family in families for name, head in family.heads.items()
    }


def find_architecture(name: str) -> Architecture:
    """Look up a transformers class in the table.

    Raises:
        UserError: The class is not in the table. The error lists the supported model types and explains how
            to add a family.
    """
    known = architectures()
    if name in known:
        return known[name]
    nearest = _nearest_family(name, known)
    same_family = [other for other, found in known.items() if found.family.name == nearest]
    hint = "A family of encoders is one file; others can add it from outside (see docs/families.md)."
    if name.endswith(_NOT_ENCODERS):
        hint = "Only encoders of text can be compressed, alone or with a decoder that reads them."
    if same_family:
        hint = f"Use {' or '.join(same_family)} from its family (--task or backbone.architecture). {hint}"
    raise UserError(
        f"The architecture {name} is not supported; supported are the model types "
        f"{', '.join(sorted({found.family.name for found in known.values()}))}.",
        hint,
    )


def find_task(name: str, task: str) -> Architecture:
    """Find the class for a task in the family of another class.

    Raises:
        UserError: The family is not in the table, or has no class for the task. The error lists the tasks of
            the family.
    """
    known = architectures()
    family = known[name].family.name if name in known else _nearest_family(name, known)
    there = {found.head.task: found for found in known.values() if found.family.name == family}
    if not there:
        return find_architecture(name)  # raises the error for an unknown class
    if task not in there:
        raise UserError(
            f"The family {family} does not support the task {task!r}, only {', '.join(sorted(there))}.",
            f"--task {nearest(task, sorted(there)) or sorted(there)[0]}",
        )
    return there[task]


def _nearest_family(name: str, known: dict[str, Architecture]) -> str | None:
    """Find the family whose name is a prefix of a class name.

    The longest prefix wins, because `DebertaV2` begins with `Deberta` too.
    """
    families = {found.family.name for found in known.values()}
    fitting = [family for family in families if name.lower().startswith(family.replace("-", ""))]
    return max(fitting, key=len, default=None)
