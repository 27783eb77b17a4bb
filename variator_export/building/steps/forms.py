"""Forms of a bundle's graphs for programs that know nothing of bundles: `model.onnx` and adapters."""

import shutil

import numpy as np

from variator_export.building.context import BuildContext
from variator_export.building.variant_plan import VariantPlan
from variator_export.core.environment import require_onnxruntime, versions
from variator_export.core.errors import NumbersDisagreeError
from variator_export.engines.onnxruntime.adapters import write_adapter
from variator_export.verification.verified_graph import open_for_verification

_MADE_BY = ("building/steps/forms.py", "engines/onnxruntime", "model/plugin_layout.py")


def name_default(context: BuildContext, plan: VariantPlan) -> None:
    """Copy the graph of the default variant to the name that other programs open.

    A copy, because ONNX Runtime refuses links to graphs with external data. The weights are not copied.
    """
    staged, source, name = context.staged, context.graph(plan), f"{context.part}.onnx"

    def make() -> None:
        shutil.copyfile(staged.folder / source, staged.folder / name)

    staged.step("default", {"variant": plan.name, "graph": staged.sha256(source)}, [name], make)


def adapter_name(variant: str) -> str:
    """Return the file name of a variant's adapter."""
    return f"{variant}.onnx_adapter"


def make_adapter(context: BuildContext, plan: VariantPlan) -> None:
    """Write a plugin in ONNX Runtime's adapter format, and run the any-ratio graph with it.

    Raises:
        NumbersDisagreeError: With the adapter, the graph does not compute the same as with the plugin as
            inputs.
    """
    staged, name = context.staged, adapter_name(plan.name)
    depends_on = {
        **context.graph_input_hashes(plan),
        "onnxruntime": versions(require_onnxruntime()),
        "made_by": context.code_fingerprint(*_MADE_BY),
    }

    def make() -> None:
        folder = staged.folder
        plugin = context.graph_inputs(plan, context.any_ratio)
        write_adapter(plugin, folder / name)
        runner = open_for_verification(folder / context.any_ratio, plugin, context.recipe.precision)
        inputs = {n: np.ones((2, plan.ratio + 1), np.int64) for n in context.info.spec.family.inputs}
        if "attention_mask" in inputs:
            inputs["attention_mask"][1, -1] = 0  # so that the masking mode matters
        expected, found = runner.run(inputs), runner.run_with_adapter(inputs, folder / name)
        for output, array in expected.items():
            if not np.array_equal(array, found[output], equal_nan=True):
                raise NumbersDisagreeError(
                    f"{name}: {output} differs from that of the same plugin given as inputs.",
                    "This is a bug in the export or in ONNX Runtime: please report it with the recipe, or "
                    "build without adapters (--no-adapters).",
                )

    staged.step(f"adapter/{plan.name}", depends_on, [name], make)
