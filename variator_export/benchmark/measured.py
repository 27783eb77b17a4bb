"""What every benchmark of a bundle says about itself."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from variator_export.benchmark.runtimes import OWN_RUNTIMES
from variator_export.benchmark.schedule import TimingSettings


@dataclass(frozen=True)
class Measured(ABC):
    """A benchmark of a bundle.

    Attributes:
        bundle: The bundle's folder.
        graphs: The sha256 of each variant's graph.
        settings: Settings of the timing.
        torch_threads: Number of threads that PyTorch reports. None if PyTorch is not installed. Other
            runtimes do not report how many threads they choose when the settings leave the choice to them.
        measured_at: Time of the benchmark, ISO 8601, UTC.
        machine: Description of this machine.
        conditions: Clocks and load before and after.
        versions: Versions of the packages involved.
    """

    bundle: Path
    graphs: Mapping[str, str]
    settings: TimingSettings
    torch_threads: int | None
    measured_at: str
    machine: Mapping[str, Any]
    conditions: Mapping[str, Any]
    versions: Mapping[str, str | None]

    @abstractmethod
    def results(self) -> Iterator[tuple[str, bool, Sequence[Mapping[str, Any]]]]:
        """Yield each shape's name, whether it settled, and its rows."""

    @property
    def settled(self) -> bool:
        """Whether the medians became stable at all shapes."""
        return all(settled for _, settled, _ in self.results())

    def too_slow(self, least: float) -> list[str]:
        """Return a message for each compressed variant whose speed-up is below a minimum.

        The lower bound of the speed-up counts. PyTorch's own runtimes are not checked.
        """
        return [
            f"{row['variant']} on {row['runtime']} at {shape}: speed-up {row['speedup']:.2f}, lower bound "
            f"{row['speedup_low']:.2f}"
            for shape, _, rows in self.results()
            for row in rows
            if not row["is_baseline"] and row["runtime"] in OWN_RUNTIMES and row["speedup_low"] < least
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON data."""
        return {**asdict(self), "bundle": str(self.bundle), "settled": self.settled}
