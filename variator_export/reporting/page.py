"""The building blocks of a report's page, and rendering them to HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True)
class Column:
    """A column of a table. Text is aligned left, numbers are aligned right."""

    name: str
    text: bool = False


@dataclass(frozen=True)
class TableOf:
    """A table of the page. Cells hold the text that is shown."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """A plot of the page.

    Attributes:
        name: Name of the plot's file, without suffix.
        figure: The figure.
        caption: Text that explains the plot.
    """

    name: str
    figure: "Figure"
    caption: str

    @property
    def svg(self) -> str:
        """The plot as an SVG element of the page."""
        from variator_export.reporting.plots import as_svg

        return as_svg(self.figure)


@dataclass(frozen=True)
class Section:
    """A section of the page: a heading, text, plots and tables."""

    title: str
    text: str = ""
    plots: Sequence[Plot] = field(default_factory=tuple)
    tables: Sequence[TableOf] = field(default_factory=tuple)


def render(content: Mapping[str, Any]) -> str:
    """Render the page as self-contained HTML. All content is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("variator_export", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(content)


def number(value: float | None, form: str, unit: str = "") -> str:
    """Format a number for display; None becomes a dash."""
    return "-" if value is None else f"{value:{form}}{unit}"
