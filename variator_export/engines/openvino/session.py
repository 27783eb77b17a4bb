"""Sessions on OpenVINO: the graph of each ratio, compiled when the session opens."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from variator_export.bundle.files import BundleFiles
from variator_export.core.errors import UserError
from variator_export.engines.added_plugin import refuse_added_plugin
from variator_export.engines.base import Arrays, check_inputs, choose_outputs
from variator_export.engines.openvino.runner import OpenVinoRunner


class OpenVinoSession:
    """The graphs of one variant, or of every variant of a bundle.

    OpenVINO compiles a graph for its CPU, with a copy of the weights in the layout that its kernels read: the
    memory of a session grows with the number of its variants.
    """

    def __init__(self, bundle: BundleFiles, variant: str | None, *, threads: int | None = None) -> None:
        self._bundle, self._backbone = bundle, bundle.manifest.backbone
        chosen = bundle.manifest.variants if variant is None else (bundle.variant(variant),)
        self._default = bundle.manifest.default_variant if variant is None else variant
        precision = bundle.manifest.precision
        self._ratios = {v.name: v.ratio for v in chosen}
        self._runners = {
            v.name: OpenVinoRunner(bundle.graph(v.graph), precision, threads=threads) for v in chosen
        }
        bundle.check_unchanged()

    @property
    def ratios(self) -> tuple[int, ...]:
        """The ratios that the session runs, ascending."""
        return tuple(sorted(set(self._ratios.values())))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the variants that the session runs."""
        return tuple(self._runners)

    def add_plugin(self, name: str, source: str | Path) -> None:
        """Refuse the plugin: each graph has its own plugin bound.

        Raises:
            UserError: Always.
        """
        del name, source
        if len(self._runners) == 1:
            refuse_added_plugin(*self._runners)
        raise UserError(
            "A session on OpenVINO accepts no other plugin: each of its graphs has its plugin bound.",
            "Add it to a session on onnxruntime, or build it into the bundle.",
        )

    def run(
        self,
        inputs: Mapping[str, np.ndarray],
        ratio: int | str | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Arrays:
        """Run the model once.

        Args:
            inputs: int64 arrays (B, S), keyed by the backbone's input names.
            ratio: A ratio or the name of a variant. None for the session's variant, or for the default
                variant if the session runs all variants.
            outputs: Names of the outputs to return; None for all.

        Raises:
            UserError: The session has no such variant, the inputs do not fit, or the model has no such
                output.
        """
        name = self._bundle.variant(self._default if ratio is None else ratio).name
        if name not in self._runners:
            raise UserError(
                f"This session runs {self._default}, not {ratio!r}.",
                "Open a session for every ratio: leave out `variant` in bundle.session(...).",
            )
        found = self._runners[name].run(check_inputs(inputs, self._backbone.part, self._backbone.max_length))
        return {name: found[name] for name in choose_outputs(outputs, tuple(found))}
