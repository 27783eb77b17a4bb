"""The contract of a target: a runtime that runs graphs, or that builds engines from graphs and runs them.

Each runtime has a folder and is registered in `targets.py`; another distribution registers its own by an
entry point.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import EngineEntry
from variator_export.core.environment import versions
from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.engines.kernels import Schedule
from variator_export.engines.request import BuiltEngine, EngineRequest, TimingCacheMode
from variator_export.generation.search import Sequences
from variator_export.generation.settings import GenerationSettings
from variator_export.recipe.recipe import EngineRecipe

if TYPE_CHECKING:
    import onnx_ir as ir

    from variator_export.engines.text_session import TextSession

Specialization = Literal["lazy", "eager", "none"]
# Called with the phase, the completed steps and the total steps.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SessionOptions:
    """Options for opening a session. A target uses the options that apply to it.

    Attributes:
        threads: Threads of one operator on a CPU; None for `OMP_NUM_THREADS`, or all cores if that is not
            set.
        allow_unverified: Run an engine that was built and never verified on a device.
        lean_runtime: Library of the lean runtime of the TensorRT that built an engine, for a TensorRT that is
            later. The library is loaded, so its programs run.
        cuda_graphs: Record an engine's work once for each shape and variant, and replay it.
        specialization: When TensorRT for RTX compiles kernels for the shapes of a call: `lazy`, in the
            background, while kernels for all shapes run; `eager`, before the first call of these shapes; or
            `none`.
        fixed_profiles: Whether an engine's profiles for one shape alone are used. Without them, a benchmark
            shows what they are worth.
    """

    threads: int | None = None
    allow_unverified: bool = False
    lean_runtime: Path | None = None
    cuda_graphs: bool = False
    specialization: Specialization = "lazy"
    fixed_profiles: bool = True


class Session(Protocol):
    """A bundle opened on a target: one of its variants, or all variants in one session."""

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that the session runs, ascending."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the session runs: the bundle's variants, then the added plugins."""
        ...

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        ratio: int | str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Arrays:
        """Run the model once.

        Args:
            inputs: Arrays, keyed by the model's input names.
            ratio: A ratio, or the name of a variant or of an added plugin. None for the session's variant,
                or for the default variant if the session runs all variants.
            outputs: Names of the outputs to return; None for all. On a GPU the others are not copied to the
                host.

        Raises:
            UserError: The session has no such variant or plugin, the inputs do not fit, or the model has no
                such output.
        """
        ...

    def add_plugin(self, name: str, source: str | Path) -> None:
        """Add another plugin of the backbone, or replace the plugin that has this name.

        Raises:
            UserError: The session accepts no plugins, or the plugin does not fit. The session stays as it
                was.
        """
        ...


@runtime_checkable
class GeneratingSession(Session, Protocol):
    """A session that generates text."""

    @property
    def settings(self) -> GenerationSettings:
        """The model's own settings."""
        ...

    def generate(
        self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None, **settings: Any
    ) -> Sequences:
        """Generate tokens.

        Args:
            inputs: int64 arrays (B, S): `input_ids`, and `attention_mask` with 0 for padding.
            ratio: As for `run`.
            **settings: Changes of the model's own settings (`generation.settings.GenerationSettings`).

        Raises:
            UserError: Same conditions as `run`; or a setting does not exist, or contradicts another one.
        """
        ...

    def stream(
        self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None, **settings: Any
    ) -> Iterator[np.ndarray]:
        """Generate tokens one after the other; arguments and errors are those of `generate`.

        Yields:
            The next token of each row, int64 (rows,), and the pad token for rows that ended.
        """
        ...


class EngineSession(Session, Protocol):
    """A session on an engine. An engine runs the shapes of its profiles only."""

    def supports_shape(self, batch_size: int, sequence_length: int) -> bool:
        """Whether a profile covers inputs of this shape."""
        ...

    def profile_shapes(self) -> list[tuple[int, int]]:
        """(batch_size, sequence_length) of each profile at its min, opt and max."""
        ...

    def layers(self) -> list[Any]:
        """The engine's layers, as the runtime lists them."""
        ...


class DebugEngines(Protocol):
    """Builder of engines from changed copies of a graph, with the options of an engine of a bundle."""

    def open(
        self, model: "ir.Model", inputs: Mapping[str, np.ndarray], on_progress: OnProgress | None = None
    ) -> Callable[[], Arrays]:
        """Build an engine of a graph; returns a function that runs the engine on these inputs."""
        ...


class Target(ABC):
    """A runtime for the graphs of bundles.

    Attributes:
        name: Name of the target in recipes and on the command line.
        module: The Python module that the target needs.
        distributions: The distributions whose versions identify the software that ran.
        gpu: Whether the target runs on a GPU.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    gpu: bool

    @abstractmethod
    def require(self, bundle: BundleFiles) -> None:
        """Check that the target can run a bundle.

        Raises:
            UserError: The target cannot run the bundle, whatever is installed. The message names the reason
                and a target that can.
        """

    @abstractmethod
    def open(self, bundle: BundleFiles, variant: str | None, options: SessionOptions) -> Session:
        """Open a session of one variant, or of all variants if `variant` is None.

        Raises:
            UserError: The target cannot run here, or the bundle lacks a file that the target needs.
        """

    def runs_graphs(self, bundle: BundleFiles, installed: str) -> bool:
        """Whether the target could run the graphs of a bundle, by the output of the probe (`doctor`)."""
        del bundle, installed
        return False

    def versions(self) -> dict[str, str | None]:
        """The versions of the target's distributions; None for a distribution that is not installed."""
        return versions(*self.distributions)


class EngineTarget(Target):
    """A runtime that builds engines from graphs and runs the engines.

    Attributes:
        probe: A program that prints the version, for `doctor`.
        code: The code of this package that determines an engine's bytes, for `core.hashing.code_digest`.
        times_kernels: Whether builds time kernels on the GPU, so that two at once would measure each other.
    """

    probe: str
    code: tuple[str, ...]
    times_kernels: bool = False

    @abstractmethod
    def version(self) -> str:
        """The installed version, read without importing the module.

        Raises:
            UserError: The target is not installed.
        """

    @abstractmethod
    def check_options(self, options: EngineRecipe, timing_cache: TimingCacheMode) -> None:
        """Refuse options that the target does not have, instead of ignoring them.

        Raises:
            UserError: An option is set that the target does not have, or a GPU that it cannot build for.
        """

    def check_precision(self, precision: str) -> None:
        """Refuse a precision whose graphs the target cannot build. A target that can build all accepts any.

        Raises:
            UserError: The target cannot build them.
        """

    def check_gpus(self, precision: str, options: EngineRecipe) -> None:
        """Refuse GPUs that have no products in a precision.

        Raises:
            UserError: One of the platforms lacks the precision.
        """
        del precision, options

    @abstractmethod
    def platforms(self, options: EngineRecipe) -> list[str]:
        """The platforms to build for, one engine each: `sm89`, `portable`, …

        Raises:
            UserError: The build needs a GPU, and the machine has none.
        """

    @abstractmethod
    def timing_cache(self, mode: TimingCacheMode) -> str | None:
        """Path of the timing cache; None if the build uses none.

        Raises:
            UserError: A timing cache is requested on a machine without a GPU.
        """

    @abstractmethod
    def build(self, request: EngineRequest, folder: Path, on_progress: OnProgress | None) -> BuiltEngine:
        """Build an engine.

        Args:
            request: The engine to build.
            folder: The folder with the graph and its external data.
            on_progress: Called with the phase, the completed steps and the total steps.

        Raises:
            UserError: The builder refuses or crashes. The message quotes the builder.
        """

    def products(self, engine: bytes) -> list[Any]:
        """The kernels in an engine that compute products, as far as the file tells without a GPU.

        Returns:
            Layers for `engines.layers.precision_in_engine`; empty if the file tells nothing.
        """
        del engine
        return []

    def schedule(self, engine: bytes) -> Schedule | None:
        """The kernels of an engine, as far as the file tells without a GPU; None if it tells nothing."""
        del engine
        return None

    @abstractmethod
    def facts(self, engine: bytes) -> dict[str, str | None]:
        """Facts about an engine for its sidecar: `cuda`, `plan_version`."""

    @abstractmethod
    def contradiction(self, engine: Path, version: str) -> str | None:
        """The contradiction between an engine file and this target and version; None if there is none."""

    @abstractmethod
    def gpus(self, platform: str) -> str:
        """The GPUs that engines of a platform run on, for messages."""

    @abstractmethod
    def runs_on(self, platform: str, capability: str) -> bool:
        """Whether engines of a platform run on a GPU."""

    @abstractmethod
    def how_to_build_for(self, capability: str) -> str:
        """Advice for getting an engine for a GPU that no engine supports."""

    @abstractmethod
    def open_engine(self, bundle: BundleFiles, variant: str | None, options: SessionOptions) -> EngineSession:
        """Open a session on an engine; the same contract as `open`."""

    def open_decoder(
        self, bundle: BundleFiles, encoder: EngineSession, options: SessionOptions
    ) -> "TextSession":
        """Open the decoder's engine of a model that generates text.

        Args:
            bundle: The bundle.
            encoder: A session on the encoder's engine (`open_engine`).
            options: Options of the session.

        Raises:
            UserError: The target has no such sessions; or the same conditions as for `open`.
        """
        del encoder, options
        raise UserError(
            f"{bundle.path} generates text, which the target {self.name} does not support.",
            "Run it on onnxruntime.",
        )

    @abstractmethod
    def debug_engines(
        self,
        bundle: BundleFiles,
        entry: EngineEntry,
        sidecar: Mapping[str, Any],
        constant: Mapping[str, np.ndarray],
    ) -> DebugEngines:
        """A builder of engines from changed graphs, with the options of an engine of a bundle.

        Raises:
            UserError: The machine has no GPU.
        """

    @abstractmethod
    def reproduction(self, sidecar: Mapping[str, Any]) -> str:
        """A program that builds an engine of `graph.onnx`, with the options of this sidecar, and runs it.

        The program reads `inputs.safetensors` and `expected.safetensors`. It leaves `runtime` (in words),
        `found` and `expected` (numpy arrays) for the comparison that follows.
        """

    def open(self, bundle: BundleFiles, variant: str | None, options: SessionOptions) -> Session:
        """Open a session on an engine; on two if the model generates text, of the encoder and the decoder."""
        session = self.open_engine(bundle, variant, options)
        if not bundle.manifest.backbone.generates:
            return session
        return self.open_decoder(bundle, session, options)


def names_of(targets: Sequence[Target]) -> str:
    """Names of targets, for messages."""
    return ", ".join(target.name for target in targets)
