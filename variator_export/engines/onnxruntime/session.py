"""Sessions on ONNX Runtime: every variant of a bundle in one session, or one variant alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.bundle.branches import BRANCHES_INPUT
from variator_export.bundle.files import BundleFiles
from variator_export.core.errors import UserError
from variator_export.engines.added_plugin import (
    load_added_plugin,
    refuse_added_plugin,
    refuse_name_of_assembly,
)
from variator_export.engines.base import Arrays, check_inputs, choose_outputs, named_outputs
from variator_export.engines.onnxruntime.compiled_bundle import profiles_of
from variator_export.engines.onnxruntime.graph import IoBindingRunner
from variator_export.engines.onnxruntime.providers import CPU, Provider
from variator_export.model.methods import method_of
from variator_export.model.plugin_layout import stack_for_graph


@dataclass(frozen=True)
class _Loaded:
    """A variant of a session, or a plugin that was added.

    Attributes:
        ratio: The ratio.
        inputs: What it gives the graph, in the place from which the graph reads it: the plugin's tensors, and
            which layers run.
        assembly: Whether its layers are those of an assembly. A ratio alone never means such a variant.
        outputs: Where the graph has its outputs (`Manifest.shared_outputs`).
    """

    ratio: int
    inputs: Mapping[str, Any]
    assembly: bool = False
    outputs: Mapping[str, str] | None = None


class OnnxRuntimeSession:
    """One session that runs every variant of a bundle.

    The weights are in memory once, those of modules too. The variant can change from call to call, because
    the plugin's tensors are inputs of the graph, and so is what layers and modules run. The session needs
    neither torch nor transformers.
    """

    def __init__(self, bundle: BundleFiles, *, threads: int | None = None, provider: Provider = CPU) -> None:
        self._bundle, self._backbone = bundle, bundle.manifest.backbone
        shared = bundle.manifest.session_graph
        self._graph = _open(bundle, shared, None, provider, threads)
        # Load all plugins now, so that publishing the bundle again later changes nothing here. The table is
        # only ever replaced as a whole: calls in other threads see either the old or the new table.
        self._plugins = {
            v.name: _Loaded(
                v.ratio,
                self._graph.upload(method_of(v).inputs_of(bundle, v, shared)),
                v.assembly_spec is not None,
                bundle.manifest.shared_outputs(v, shared),
            )
            for v in bundle.manifest.variants
        }
        bundle.check_unchanged()

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that the session runs, ascending."""
        return tuple(sorted({plugin.ratio for plugin in self._plugins.values()}))

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the session runs: the bundle's variants, then the added plugins."""
        return tuple(self._plugins)

    def add_plugin(self, name: str, source: str | Path) -> None:
        """Add another plugin of the backbone, or replace the plugin that has this name.

        The plugin is used from the next call on; nothing else is loaded. The graph was verified with the
        bundle's own plugins, not with this one: build the plugin into a bundle to verify it as well.

        Args:
            name: Name of the plugin in `run`, used like the name of a variant. A ratio alone selects the
                plugin only if the bundle has no variant of that ratio.
            source: The plugin's folder, `recipes:PATH`, or `hub:ORGANISATION/NAME[/FOLDER][@REVISION]`.

        Raises:
            UserError: The plugin cannot be read or was made for another backbone, or the name is not valid
                or belongs to a plugin of another ratio. The session stays as it was.
        """
        refuse_name_of_assembly(self._bundle.manifest.variants, name)
        there = self._plugins.get(name)
        plugin = load_added_plugin(self._backbone, name, source, there.ratio if there else None)
        inputs = stack_for_graph(plugin)
        manifest = self._bundle.manifest
        if (original := manifest.switches(manifest.baseline)) is not None:
            inputs[BRANCHES_INPUT] = original
        outputs = manifest.shared_outputs(manifest.baseline, manifest.session_graph)
        loaded = _Loaded(plugin.config.ratio, self._graph.upload(inputs), outputs=outputs)
        self._plugins = {**self._plugins, name: loaded}

    def find(self, choice: int | str | None) -> str:
        """The name of the variant or the added plugin that a choice of `run` means.

        By ratio, the bundle's own plugins come before the added ones.

        Raises:
            UserError: There is none, or several.
        """
        table = self._plugins
        if choice is None:
            return self._bundle.manifest.default_variant
        if isinstance(choice, str) and choice in table:
            return choice
        own = {variant.name for variant in self._bundle.manifest.variants}
        found = [n for n, loaded in table.items() if loaded.ratio == choice and not loaded.assembly]
        found = [name for name in found if name in own] or found
        if len(found) != 1:
            there = ", ".join(f"{name} (ratio {plugin.ratio})" for name, plugin in table.items())
            raise UserError(
                f"The session has {'several plugins' if found else 'no plugin'} of {choice!r}: {there}.",
                "Name one of them, session.run(inputs, ratio=NAME), or session.add_plugin(NAME, DIR).",
            )
        return found[0]

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        ratio: int | str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Arrays:
        """Run the model once.

        Args:
            inputs: int64 arrays (B, S), keyed by the backbone's input names.
            ratio: A ratio, or the name of a variant or of an added plugin. None for the default variant.
            outputs: Names of the outputs to return; None for all.

        Raises:
            UserError: The session has no such variant or plugin, the inputs do not fit, or the model has no
                such output.
        """
        arrays, own = self._arguments(inputs, ratio)
        sources = named_outputs({name: name for name in self._graph.outputs}, own.outputs)
        chosen = choose_outputs(outputs, tuple(sources))
        found = self._graph.run(arrays, own.inputs, list(dict.fromkeys(sources[name] for name in chosen)))
        return {name: found[sources[name]] for name in chosen}

    def run_on_device(
        self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None
    ) -> dict[str, Any]:
        """Run the model once, as `run` does, and leave the outputs on the device."""
        arrays, own = self._arguments(inputs, ratio)
        return named_outputs(self._graph.run_values(arrays, own.inputs), own.outputs)

    def _arguments(self, inputs: Mapping[str, np.ndarray], ratio: int | str | None) -> tuple[Arrays, _Loaded]:
        own = self._plugins[self.find(ratio)]
        return check_inputs(inputs, self._backbone.part, self._backbone.max_length), own


class OnnxRuntimeVariantSession:
    """The graph of one variant of a bundle: a few per cent faster than the any-ratio graph."""

    def __init__(
        self,
        bundle: BundleFiles,
        variant: int | str,
        *,
        threads: int | None = None,
        provider: Provider = CPU,
    ) -> None:
        self._bundle, self._backbone = bundle, bundle.manifest.backbone
        self._variant = bundle.variant(variant)
        self._graph = _open(bundle, self._variant.graph, self._variant.name, provider, threads)
        bundle.check_unchanged()

    @property
    def ratios(self) -> tuple[int, ...]:
        """The one ratio that the session runs."""
        return (self._variant.ratio,)

    @property
    def names(self) -> tuple[str, ...]:
        """The one variant that the session runs."""
        return (self._variant.name,)

    def add_plugin(self, name: str, source: str | Path) -> None:
        """Refuse the plugin: a graph of one variant has no inputs for a plugin.

        Raises:
            UserError: Always.
        """
        del name, source
        refuse_added_plugin(self._variant.name)

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        ratio: int | str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Arrays:
        """Run the variant once, on int64 arrays (B, S) keyed by the backbone's input names.

        Raises:
            UserError: The call asks for another ratio or output, or the inputs do not fit.
        """
        arrays = self._arguments(inputs, ratio)
        return self._graph.run(arrays, {}, choose_outputs(outputs, self._graph.outputs))

    def run_on_device(
        self, inputs: Mapping[str, np.ndarray], ratio: int | str | None = None
    ) -> dict[str, Any]:
        """Run the variant once, as `run` does, and leave the outputs on the device."""
        return self._graph.run_values(self._arguments(inputs, ratio), {})

    def find(self, choice: int | str | None) -> str:
        """The session's variant.

        Raises:
            UserError: The choice means another one.
        """
        if choice is not None and not self._variant.answers_to(choice):
            raise UserError(
                f"This session runs {self._variant.name} (ratio {self._variant.ratio}), not {choice!r}.",
                "Open a session for every ratio: leave out `variant` in bundle.session(...).",
            )
        return self._variant.name

    def _arguments(self, inputs: Mapping[str, np.ndarray], ratio: int | str | None) -> Arrays:
        self.find(ratio)
        return check_inputs(inputs, self._backbone.part, self._backbone.max_length)


def _open(
    bundle: BundleFiles, graph: str, variant: str | None, provider: Provider, threads: int | None
) -> IoBindingRunner:
    # A decoder reads the outputs from the device, on a CPU too.
    bind = True if bundle.manifest.backbone.generates else None
    profiles = profiles_of(bundle, provider.compiler, variant)
    return IoBindingRunner(bundle.graph(graph), provider, threads=threads, profiles=profiles, bind=bind)
