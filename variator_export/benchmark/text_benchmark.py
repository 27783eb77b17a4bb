"""Benchmark of a bundle that generates text: whole requests, the first token, and each further one."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from variator_export.benchmark.bundle_benchmark import chosen_variants, torch_threads
from variator_export.benchmark.measured import Measured
from variator_export.benchmark.runtimes import OPTIONAL_RUNTIMES, RUNTIMES
from variator_export.benchmark.schedule import Timed, TimingSettings, open_again, time_in_openings
from variator_export.benchmark.speed_table import speed_inputs, speedup_fields
from variator_export.benchmark.timing import Timings, speedup
from variator_export.bundle.manifest import BackboneEntry, Variant
from variator_export.core.environment import conditions, is_importable, machine, versions
from variator_export.core.errors import UserError, first_line
from variator_export.core.precision import find_precision
from variator_export.core.progress import Progress
from variator_export.engines.base import Arrays
from variator_export.engines.target import GeneratingSession
from variator_export.generation.settings import read_settings
from variator_export.model.macs import decoder_macs
from variator_export.sessions import Bundle
from variator_export.verification.eager_bundle import load_bundle_backbone

if TYPE_CHECKING:
    from variator_export.model.backbone import Backbone

# The runtimes that generate text.
TEXT_RUNTIMES = ("eager", "onnxruntime", "ctranslate2", "ctranslate2-int8")
# Function of inputs, new tokens and beams.
Generate = Callable[[Arrays, int, int], object]


@dataclass(frozen=True)
class RequestShape:
    """The shape of requests, whose rows are full and which generate exactly so many tokens.

    Attributes:
        batch_size: Number of rows.
        sequence_length: Tokens per row.
        new_tokens: Generated tokens per row.
        num_beams: Number of beams.
    """

    batch_size: int
    sequence_length: int
    new_tokens: int
    num_beams: int

    def __str__(self) -> str:
        beams = f", {self.num_beams} beams" if self.num_beams > 1 else ""
        return f"{self.batch_size}x{self.sequence_length} tokens in, {self.new_tokens} out{beams}"


@dataclass(frozen=True)
class RequestResult:
    """Result at one shape.

    Attributes:
        shape: The shape.
        settled: Whether the medians became stable, in every opening.
        rows: A JSON row for each runtime and variant: `request_ms`, the time of a request; `first_token_ms`,
            that of the encoder and the decoder's first step; `token_ms`, that of each further token; the
            speed-up of the request over the same runtime at ratio 1, with its 95 % interval; and the
            speed-up that is allowed for the whole request by the saving up to the first token, and, for
            further tokens, by the multiply-accumulates that an assembly's decoder saves.
    """

    shape: RequestShape
    settled: bool
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class TextBenchmark(Measured):
    """Result of `bench` for a bundle that generates text.

    Attributes:
        shapes: Results by shape, in the order in which the shapes were requested.
    """

    shapes: Sequence[RequestResult]

    def results(self) -> Iterator[tuple[str, bool, Sequence[Mapping[str, Any]]]]:
        """Yield each shape's name, whether it settled, and its rows."""
        for result in self.shapes:
            yield str(result.shape), result.settled, result.rows


@dataclass(frozen=True)
class _Subject:
    runtime: str
    variant: Variant
    generate: Generate

    @property
    def key(self) -> str:
        return f"{self.runtime}/{self.variant.name}"


def bench_text(
    bundle: str | Path,
    shapes: Sequence[RequestShape],
    variants: Sequence[int | str] | None = None,
    *,
    runtimes: Sequence[str] | None = None,
    backbone: str | None = None,
    settings: TimingSettings | None = None,
    progress: Progress | None = None,
) -> TextBenchmark:
    """Time whole requests of a bundle that generates text.

    Args:
        bundle: The bundle's folder.
        shapes: The shapes of the requests.
        variants: Ratios or names. None means all. Ratio 1 is always included.
        runtimes: Names in `TEXT_RUNTIMES`. None means all that are installed; alternatives among these are
            left out if they fail.
        backbone: The backbone's location, for PyTorch. None means its location when the bundle was built.
        settings: Settings of the timing.
        progress: Receives progress reports and notes.

    Raises:
        UserError: The bundle is damaged, a shape exceeds the model's limits, or a runtime cannot run here.
    """
    progress, settings = progress or Progress(), settings or TimingSettings()
    opened = Bundle.load(bundle)
    for shape in shapes:
        _check_shape(opened, shape)
    precision = find_precision(opened.manifest.precision)
    if not precision.on_a_cpu:
        raise UserError(
            f"ONNX Runtime does not compute in {precision.name} on a CPU.", "Time a float32 bundle instead."
        )
    chosen = chosen_variants(opened, variants)
    names = list(runtimes or (name for name in TEXT_RUNTIMES if is_importable(RUNTIMES[name].needs)))
    before = conditions()
    with TemporaryDirectory() as scratch, torch_threads(settings.threads, 0) as threads:
        opener = _Opener(opened, backbone, Path(scratch), settings.threads)
        subjects = _open_all(opener, names, chosen, shapes, progress, named=runtimes is not None)
        timed = _time_everything(opener, subjects, shapes, settings, progress)
    return TextBenchmark(
        bundle=opened.path,
        shapes=[
            RequestResult(
                shape,
                all(timed[shape].settled),
                _rows(subjects, shape, timed[shape].timings, opened.manifest.backbone),
            )
            for shape in shapes
        ],
        graphs=opened.graph_hashes(),
        settings=settings,
        torch_threads=threads,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(),
        conditions={"before": before, "after": conditions()},
        versions=versions("variator-export", "onnxruntime", "torch", "transformers", "ctranslate2"),
    )


def _check_shape(bundle: Bundle, shape: RequestShape) -> None:
    entry = bundle.manifest.backbone
    for what, asked, limit in (
        ("tokens in", shape.sequence_length, entry.max_length),
        ("tokens out", shape.new_tokens, entry.max_output_length),
    ):
        if limit is not None and asked > limit:
            raise UserError(f"{asked} {what} are over the model's limit of {limit}.", "Ask for fewer.")


class _Opener:
    """Opens a variant on a runtime, as users would."""

    def __init__(self, bundle: Bundle, backbone: str | None, scratch: Path, threads: int | None) -> None:
        self._bundle = bundle
        self._source = backbone
        self._scratch = scratch
        self._threads = threads
        self._config = bundle.config()

    def open(self, runtime: str, variant: Variant) -> _Subject:
        """Open a subject."""
        return _Subject(runtime, variant, self._generate(runtime, variant))

    def inputs(self, shape: RequestShape) -> Arrays:
        """Full rows of random tokens."""
        names, vocabulary = self._bundle.manifest.backbone.inputs, int(self._config["vocab_size"])
        return speed_inputs(names, vocabulary, shape.batch_size, shape.sequence_length)

    def _generate(self, runtime: str, variant: Variant) -> Generate:
        if runtime == "onnxruntime":
            session = self._bundle.session("onnxruntime", variant.name, threads=self._threads)
            assert isinstance(session, GeneratingSession)
            return lambda inputs, tokens, beams: session.generate(
                inputs, variant.name, **_exactly(tokens, beams)
            )
        if runtime == "eager":
            from variator_export.engines.eager import EagerModel

            model = EagerModel.of_variant(self._backbone, self._bundle, variant, attention="sdpa")
            return lambda inputs, tokens, beams: model.generate(inputs, **_exactly(tokens, beams))
        from variator_export.benchmark.alternatives.ctranslate2_runtime import translator
        from variator_export.benchmark.alternatives.setup import Setup

        setup = Setup(self._backbone, self._scratch, self._threads, ())
        compute_type = "int8" if runtime.endswith("int8") else "float32"
        return translator(setup, compute_type, self._bundle.text_encoder(), read_settings(self._bundle.path))

    @functools.cached_property
    def _backbone(self) -> "Backbone":
        without = "choose only runtimes without PyTorch, for example --runtime onnxruntime"
        return load_bundle_backbone(self._bundle, self._source, without)


def _exactly(tokens: int, beams: int) -> dict[str, Any]:
    """Settings with which every row has exactly so many new tokens."""
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    return {**lengths, "num_beams": beams, "do_sample": False, "num_return_sequences": 1}


def _open_all(
    opener: _Opener,
    runtimes: Sequence[str],
    variants: Sequence[Variant],
    shapes: Sequence[RequestShape],
    progress: Progress,
    *,
    named: bool,
) -> list[_Subject]:
    """Open every runtime, and run each shape once. Alternatives that fail are left out, unless named."""
    subjects: list[_Subject] = []
    for name in runtimes:
        fitting = [v for v in variants if v.baseline or not RUNTIMES[name].only_baseline]
        try:
            own = [opener.open(name, variant) for variant in fitting]
            for shape in shapes:
                for subject in own:
                    subject.generate(opener.inputs(shape), 1, shape.num_beams)
        except Exception as error:  # libraries raise exceptions of any type
            words = error.message if isinstance(error, UserError) else first_line(error)
            if not named and name in OPTIONAL_RUNTIMES:
                progress.note(f"{name} is left out: {words}")
                continue
            if isinstance(error, UserError):
                raise
            raise UserError(f"{name} fails: {words}", "Choose the others with --runtime.") from error
        subjects += own
    return subjects


def _time_everything(
    opener: _Opener,
    subjects: list[_Subject],
    shapes: Sequence[RequestShape],
    settings: TimingSettings,
    progress: Progress,
) -> dict[RequestShape, Timed]:
    """Time first tokens and whole requests of all subjects in turns, in several openings."""

    def calls(shape: RequestShape, order: np.ndarray) -> dict[str, Callable[[], object]]:
        return _calls((subjects[i] for i in order), opener.inputs(shape), shape)

    names = {shape: str(shape) for shape in shapes}
    reopen = functools.partial(open_again, opener.open, subjects)
    return time_in_openings(names, len(subjects), calls, reopen, settings, progress)


def _calls(
    subjects: Iterable[_Subject], inputs: Arrays, shape: RequestShape
) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for subject in subjects:
        for tokens in {1, shape.new_tokens}:
            name = f"{subject.key}/{tokens}"
            calls[name] = functools.partial(subject.generate, inputs, tokens, shape.num_beams)
    return calls


def _rows(
    subjects: Sequence[_Subject],
    shape: RequestShape,
    timings: Mapping[str, Timings],
    backbone: BackboneEntry,
) -> list[dict[str, Any]]:
    def decoder(variant: Variant) -> int:
        size = backbone.decoder_of(variant.assembly)
        return decoder_macs(size, backbone.hidden_size, shape.sequence_length, shape.new_tokens)

    plain = {subject.runtime: subject for subject in subjects if subject.variant.baseline}
    rows = []
    for subject in subjects:
        first, whole = (timings[f"{subject.key}/{n}"] for n in (1, shape.new_tokens))
        base = plain[subject.runtime].key
        base_first, base_whole = (timings[f"{base}/{n}"] for n in (1, shape.new_tokens))
        gained = speedup(base_whole, whole)
        # Paired within each opening, as in `speedup`: a request of one token then reaches all of it.
        whole_of, base_of, first_of = (
            np.array(timing.opening_medians_ms) for timing in (base_whole, base_first, first)
        )
        kept = decoder(subject.variant) / decoder(plain[subject.runtime].variant)
        further_of = (whole_of - base_of) * kept
        allowed = float(np.median(whole_of / (first_of + further_of)))
        further = shape.new_tokens - 1
        rows.append(
            {
                "runtime": subject.runtime,
                "variant": subject.variant.name,
                "ratio": subject.variant.ratio,
                "is_baseline": subject.variant.baseline,
                "request_ms": round(whole.median_ms, 3),
                "request_p90_ms": round(whole.percentile_ms(90), 3),
                "first_token_ms": round(first.median_ms, 3),
                "token_ms": round((whole.median_ms - first.median_ms) / further, 3) if further else None,
                "runs": whole.num_runs,
                "new_tokens_per_second": round(
                    shape.batch_size * shape.new_tokens / whole.median_ms * 1e3, 1
                ),
                **speedup_fields(gained, allowed),
            }
        )
    return rows
