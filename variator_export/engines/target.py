"""What a target has to say about itself: whatever runs graphs, or builds engines of them and runs those.

One folder for each runtime, entered in `targets.py`, or in another distribution by an entry point.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import EngineEntry
from variator_export.core.environment import versions
from variator_export.engines.base import Arrays
from variator_export.engines.request import EngineRequest, TimingCacheMode
from variator_export.recipe.recipe import EngineRecipe

if TYPE_CHECKING:
    import onnx_ir as ir

# Phase, steps done, steps in all.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SessionOptions:
    """How a session is opened. A target takes what it has a use for.

    Attributes:
        threads: Of one operator on a CPU; None: `OMP_NUM_THREADS`, or all cores.
        allow_unverified: Run an engine that was built and never verified on a device.
        trust_host_code: Let an engine bring a program of its own (TensorRT's lean runtime).
        cuda_graphs: Record an engine's work once for each shape and variant, and replay it.
    """

    threads: int | None = None
    allow_unverified: bool = False
    trust_host_code: bool = False
    cuda_graphs: bool = False


class Session(Protocol):
    """A bundle that is open on a target: one variant of it, or all in one."""

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that it runs, ascending."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what it runs: the bundle's variants, then the plugins that were added."""
        ...

    def run(self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None) -> Arrays:
        """Run once.

        Args:
            inputs: Arrays by the model's input names.
            ratio: A ratio, or the name of a variant or of a plugin that was added; None: the variant of the
                session, or the baseline where it runs all.

        Raises:
            UserError: There is no such one, or the inputs do not fit.
        """
        ...

    def add_plugin(self, name: str, source: str | Path) -> None:
        """Take another plugin of the backbone, or a better one under a name that is there.

        Raises:
            UserError: The session cannot, or the plugin does not fit; the session is as before.
        """
        ...


class EngineSession(Session, Protocol):
    """A session on an engine, which is for the shapes of its profiles."""

    def takes(self, batch_size: int, sequence_length: int) -> bool:
        """Whether a profile is for a shape of the inputs."""
        ...

    def profile_shapes(self) -> list[tuple[int, int]]:
        """(batch_size, sequence_length) of each profile at its min, opt and max."""
        ...

    def layers(self) -> list[Any]:
        """What the runtime says of the engine's layers."""
        ...


class DebugEngines(Protocol):
    """Builds and runs engines of changed copies of a graph, as one of a bundle was built."""

    def open(
        self, model: "ir.Model", inputs: Mapping[str, np.ndarray], on_progress: OnProgress | None = None
    ) -> Callable[[], Arrays]:
        """Build an engine of a graph; gives what runs it on these inputs."""
        ...


class Target(ABC):
    """What runs the graphs of bundles.

    Attributes:
        name: How recipes and the command line call it.
        module: The Python module without which it does not run.
        distributions: The distributions whose versions say what ran.
        gpu: Whether it runs on a GPU.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    gpu: bool

    @abstractmethod
    def require(self, bundle: BundleFiles) -> None:
        """See that it can run a bundle.

        Raises:
            UserError: It cannot, whatever is installed: says why, and what can.
        """

    @abstractmethod
    def open(self, bundle: BundleFiles, variant: str | None, options: SessionOptions) -> Session:
        """Open a session of one variant; None: of all.

        Raises:
            UserError: It cannot run here, or the bundle lacks what it needs.
        """

    def runs_graphs(self, bundle: BundleFiles, installed: str) -> bool:
        """Whether it could run the graphs of a bundle, by what its module says of itself (`doctor`)."""
        del bundle, installed
        return False

    def versions(self) -> dict[str, str | None]:
        """The versions of its distributions; None for what is not installed."""
        return versions(*self.distributions)


class EngineTarget(Target):
    """What builds engines of graphs, and runs those.

    Attributes:
        probe: A program that says the version, for `doctor`.
        code: The code of this package that decides an engine's bytes, for `core.hashing.code_digest`.
    """

    probe: str
    code: tuple[str, ...]

    @abstractmethod
    def version(self) -> str:
        """The version that is installed, without importing it.

        Raises:
            UserError: None is.
        """

    @abstractmethod
    def check_options(self, options: EngineRecipe, timing_cache: TimingCacheMode) -> None:
        """Refuse what it cannot do, instead of leaving it out.

        Raises:
            UserError: An option is set that it does not have, or a GPU that it cannot build for.
        """

    @abstractmethod
    def platforms(self, options: EngineRecipe) -> list[str]:
        """The GPUs to build for, an engine for each: `sm89`, `portable`, …

        Raises:
            UserError: It needs a GPU that is not there.
        """

    @abstractmethod
    def timing_cache(self, mode: TimingCacheMode) -> str | None:
        """The file of kernels' times; None: none.

        Raises:
            UserError: One is asked for where there is no GPU.
        """

    @abstractmethod
    def build(self, request: EngineRequest, folder: Path, on_progress: OnProgress | None) -> bytes:
        """Build an engine.

        Args:
            request: What to build.
            folder: Where its graph and the external data are.
            on_progress: Is told the phase, the steps that are done, and how many there are.

        Raises:
            UserError: The builder refuses, or crashes; the message has its own words.
        """

    @abstractmethod
    def facts(self, engine: bytes) -> dict[str, str | None]:
        """What an engine says of itself, for its sidecar: `cuda`, `plan_version`."""

    @abstractmethod
    def contradiction(self, engine: Path, version: str) -> str | None:
        """What in an engine's file cannot be, if it is of this target and version; None: nothing."""

    @abstractmethod
    def gpus(self, platform: str) -> str:
        """The GPUs that engines of a platform run on, for people."""

    @abstractmethod
    def runs_on(self, platform: str, capability: str) -> bool:
        """Whether engines of a platform run on a GPU."""

    @abstractmethod
    def how_to_build_for(self, capability: str) -> str:
        """What to do where no engine is for a GPU."""

    @abstractmethod
    def open_engine(self, bundle: BundleFiles, variant: str | None, options: SessionOptions) -> EngineSession:
        """As `open`."""

    @abstractmethod
    def debug_engines(
        self,
        bundle: BundleFiles,
        entry: EngineEntry,
        sidecar: Mapping[str, Any],
        constant: Mapping[str, np.ndarray],
    ) -> DebugEngines:
        """What builds engines of changed graphs as an engine of a bundle was built.

        Raises:
            UserError: There is no GPU.
        """

    @abstractmethod
    def reproduction(self, sidecar: Mapping[str, Any]) -> str:
        """A program that builds and runs an engine of `graph.onnx`, as one with this sidecar was built.

        It reads `inputs.safetensors` and `expected.safetensors`, and leaves `runtime` (in words), `found` and
        `expected` (numpy arrays) for what compares them.
        """

    def open(self, bundle: BundleFiles, variant: str | None, options: SessionOptions) -> Session:
        """Open a session on an engine."""
        return self.open_engine(bundle, variant, options)


def names_of(targets: Sequence[Target]) -> str:
    """Targets for people."""
    return ", ".join(target.name for target in targets)
