"""Building of a strongly typed engine in this process.

`builder_process.py` calls this module in a process of its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.engines.graph_file import load_without_defaults
from variator_export.engines.request import Attention, BuiltEngine, EngineRequest, Profile
from variator_export.engines.target import OnProgress
from variator_export.engines.tensorrt.api import load_tensorrt
from variator_export.engines.tensorrt.building.attention import FORMS, Form, apply_form, attentions
from variator_export.engines.tensorrt.building.timing_cache import TimingCache
from variator_export.engines.tensorrt.log import last_messages, make_log
from variator_export.engines.tensorrt.plugin_inputs import engine_shapes, unstack
from variator_export.model.plugin_layout import GRAPH_INPUT_PREFIX

_KINDS: dict[Form, Attention] = {
    "float32 sums": "fused-float32",
    "as exported": "fused",
    "decomposed": "decomposed",
}
# In what the builder says where it has no fused kernel for attention.
_ATTENTION = "attention"


def build_engine_here(request: EngineRequest, on_progress: OnProgress | None = None) -> BuiltEngine:
    """Build an engine in this process, with the result and errors of `builder_process.build_engine`."""
    trt = load_tensorrt(request.target)
    log = make_log(trt)
    try:
        builder = trt.Builder(log)
    except (RuntimeError, TypeError) as error:
        raise _failed(request, "cannot start its builder", log, str(error)) from error
    config = builder.create_builder_config()
    _configure(trt, config, request)
    if on_progress is not None:
        config.progress_monitor = _make_monitor(trt, on_progress)
    kind: Attention | None = None
    with _timing_cache(config, request) as cache:
        for form in FORMS:
            earlier = len(log.messages)
            with _network(trt, builder, log, request) as network:
                if not apply_form(trt, network, form):
                    continue
                if not config.num_optimization_profiles:
                    for profile in request.profiles:
                        config.add_optimization_profile(_make_profile(builder, network, request, profile))
                serialized = builder.build_serialized_network(network, config)
                if any(attentions(trt, network)):
                    kind = _KINDS[form]
            if serialized is not None:
                break
            # A builder that may decompose attention does so silently, also where a fused kernel was expected.
            # So it is asked to only if attention is what it refused.
            if form == "as exported" and _ATTENTION not in "".join(log.messages[earlier:]).lower():
                break
        if serialized is None:
            raise _failed(request, "built no engine", log)
        if cache is not None:
            cache.store(config)
    return BuiltEngine(bytes(serialized), kind)


@contextmanager
def _network(trt: Any, builder: Any, log: Any, request: EngineRequest) -> Iterator[Any]:
    """The network of a request's graph."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)  # holds the weights
    if not _parse(parser, request):
        raise _failed(request, "cannot parse the graph", log, "\n  ".join(_parser_errors(parser)))
    yield network


def _parse(parser: Any, request: EngineRequest) -> bool:
    """Parse the graph. If it takes plugins, it has no default values then, and inputs for each layer."""
    given = {name for profile in request.profiles for name in profile.shapes}
    if not any(name.startswith(GRAPH_INPUT_PREFIX) for name in given):
        return bool(parser.parse_from_file(request.graph))
    purpose = "Building an engine that runs every ratio"
    model = load_without_defaults(Path(request.graph), request.target, purpose)
    unstack(model)
    return bool(parser.parse(model.SerializeToString(), request.graph))


def _parser_errors(parser: Any) -> Iterator[str]:
    """The parser's errors, each with its node, whose name starts with the PyTorch module it came from."""
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        yield f"at the node {error.node_name()} ({error.node_operator()}): {error.desc()}"


def _configure(trt: Any, config: Any, request: EngineRequest) -> None:
    options = request.options
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)  # set by default
    # Detailed verbosity lets the inspector report in which types an engine computes (`layers`).
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # So that a call needs memory for its own shapes, not for the largest of the profile.
    config.set_preview_feature(trt.PreviewFeature.RUNTIME_ACTIVATION_RESIZE_10_10, True)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if request.compute_capabilities:
        config.num_compute_capabilities = len(request.compute_capabilities)
        for index, name in enumerate(request.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    if options.hardware_compatibility == "ampere-plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware_compatibility == "same-compute-capability":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # A plan that contains the lean runtime is a program, and needs `engine_host_code_allowed` to run.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        # By its release notes, TensorRT 11.3 can compute wrong numbers with plain REFIT. The weights are the
        # same anyway.
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if request.timing_cache_mode == "require":
        config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)


@contextmanager
def _timing_cache(config: Any, request: EngineRequest) -> Iterator[TimingCache | None]:
    if request.timing_cache is None or request.timing_cache_mode == "ignore":
        yield None
        return
    cache = TimingCache(Path(request.timing_cache))
    cache.load(config, must_exist=request.timing_cache_mode == "require")
    yield cache


def _make_profile(builder: Any, network: Any, request: EngineRequest, profile: Profile) -> Any:
    """Create a profile, after a check of its names and shapes.

    The builder itself accepts wrong names and reversed shapes silently.
    """
    inputs = {network.get_input(i).name: network.get_input(i) for i in range(network.num_inputs)}
    varying = {name for name, tensor in inputs.items() if -1 in tuple(tensor.shape)}
    ends = [
        engine_shapes({name: ends[end] for name, ends in profile.shapes.items()}, varying) for end in range(3)
    ]
    unknown = {name for name in profile.shapes if not name.startswith(GRAPH_INPUT_PREFIX)} - varying
    if set(ends[0]) != varying or unknown:
        raise UserError(
            f"The profile {profile.name} has shapes for {', '.join(sorted(profile.shapes))}; the inputs of "
            f"{request.graph} whose shape varies are {', '.join(sorted(varying))}.",
            "Give a shape for each of those.",
        )
    made = builder.create_optimization_profile()
    for name in ends[0]:
        low, opt, high = (end[name] for end in ends)
        if not all(a <= b <= c for a, b, c in zip(low, opt, high, strict=True)):
            raise UserError(
                f"The profile {profile.name} must be min <= opt <= max; {name} has {low}, {opt}, {high}.",
                f"Correct engine.profiles.{profile.name} in the recipe.",
            )
        try:
            made.set_shape(name, low, opt, high)
        except RuntimeError as error:
            raise UserError(
                f"The builder refuses the shapes {low}, {opt}, {high} of {name} in the profile "
                f"{profile.name}: {error}",
                f"Correct engine.profiles.{profile.name} in the recipe.",
            ) from error
    return made


def _make_monitor(trt: Any, on_progress: OnProgress) -> Any:
    """Create a monitor that reports the outermost phase of a build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phases: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.phases[phase] = steps
                on_progress(phase, 0, steps)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self.phases:
                on_progress(phase, step + 1, self.phases[phase])
            return True  # False would cancel the build

        def phase_finish(self, phase: str) -> None:
            if phase in self.phases:
                steps = self.phases.pop(phase)
                on_progress(phase, steps, steps)

    return Monitor()


def _failed(request: EngineRequest, what: str, log: Any, detail: str = "") -> UserError:
    profiles = "; ".join(f"{index}: {profile}" for index, profile in enumerate(request.profiles))
    return UserError(
        f"{request.target} {what} for {request.what}. Its profiles: {profiles}. In its own words:\n  "
        f"{last_messages(log, detail)}",
        "Other targets and engines are not affected.",
    )
