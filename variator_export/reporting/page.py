"""The parts of a report's page, and the page made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Column:
    """A column of a table; text is on the left, numbers are on the right."""

    name: str
    text: bool = False


@dataclass(frozen=True)
class TableOf:
    """A table of the page, cells as they are shown."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture of the page.

    Attributes:
        name: Of its file.
        figure: The picture.
        caption: What it shows.
    """

    name: str
    figure: "Figure"
    caption: str

    @property
    def svg(self) -> str:
        """As an element of the page."""
        from variator_export.reporting.plots import as_svg

        return as_svg(self.figure)


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    text: str = ""
    plots: Sequence[Plot] = field(default_factory=tuple)
    tables: Sequence[TableOf] = field(default_factory=tuple)


def render(content: Mapping[str, Any]) -> str:
    """The page as HTML that holds everything itself; what it shows is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("variator_export", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(content)


def number(value: float | None, form: str, unit: str = "") -> str:
    """A number as it is shown; None is a dash."""
    return "-" if value is None else f"{value:{form}}{unit}"
