"""The table of sites: which backbones there are and where their feed-forward networks sit."""

from variator_export.core.errors import UserError
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


def architectures() -> dict[str, Architecture]:
    """Every supported transformers class by its name."""
    return {
        name: Architecture(name, family, head) for family in FAMILIES for name, head in family.heads.items()
    }


def find_architecture(name: str) -> Architecture:
    """Look a transformers class up in the table.

    Raises:
        UserError: It is not in the table; lists what is and says how one is added.
    """
    known = architectures()
    if name in known:
        return known[name]
    same_family = [
        other for other, found in known.items() if name.lower().startswith(found.family.name.lower())
    ]
    hint = "A family is added with one file in variator_export/model/families/ (see docs/families.md)."
    if same_family:
        hint = f"Set backbone.architecture in the recipe to take {' or '.join(same_family)} of it. {hint}"
    raise UserError(
        f"The architecture {name} is not supported; supported are {', '.join(sorted(known))}.", hint
    )
