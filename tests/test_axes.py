"""The axes are open: methods, precisions, targets and evaluation tasks of another distribution take part.

Families have a page of their own, and a test of it (test_families.py).
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import call

from variator_export import Bundle, Columns, UserError, build, evaluate, read_examples
from variator_export.core.precision import PRECISIONS
from variator_export.engines.targets import TARGETS
from variator_export.model.methods import METHODS
from variator_export.quality.tasks import TASKS
from variator_export.recipe.recipe import Recipe
from variator_export.verification.bundle_verification import verify

Install = Callable[[str, str, str], None]

# Variator under another name; float16 under another name; and a target that "builds" engines by keeping the
# graph, and runs them on ONNX Runtime.
METHOD = """
import dataclasses
from variator_export.model.methods.variator import VARIATOR
X = dataclasses.replace(VARIATOR, name="mirror")
"""
PRECISION = """
import dataclasses
from variator_export.core.precision import FLOAT16
X = dataclasses.replace(FLOAT16, name="half", suffix="-half")
"""
TARGET = '''
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.engines.request import BuiltEngine
from variator_export.engines.target import EngineTarget

class Kept:
    """A session on a graph that was kept."""

    def __init__(self, bundle, entry):
        self.graph = OnnxRuntimeRunner(bundle.file(entry.engine).read_bytes(), weights=bundle.path)
        self.names, self.ratios = (entry.variant,), (bundle.variant(entry.variant).ratio,)

    def run(self, inputs, ratio=None, outputs=None):
        return self.graph.run(inputs)

class Keeper(EngineTarget):
    name, module, distributions, gpu = "keeper", "onnxruntime", ("onnxruntime",), False
    probe, code = "print(1)", ()

    def require(self, bundle): pass
    def version(self): return "1.0"
    def check_options(self, options, timing_cache): pass
    def platforms(self, options): return ["anywhere"]
    def timing_cache(self, mode): return None
    def build(self, request, folder, on_progress): return BuiltEngine((folder / request.graph).read_bytes())
    def facts(self, engine): return {"cuda": None, "plan_version": None}
    def contradiction(self, engine, version): return None
    def gpus(self, platform): return "none"
    def runs_on(self, platform, capability): return True
    def how_to_build_for(self, capability): return "nothing"
    def debug_engines(self, *_): raise NotImplementedError
    def reproduction(self, sidecar): return ""
    def open_engine(self, bundle, variant, options):
        (entry,) = bundle.engines("keeper", variant)
        return Kept(bundle, entry)

X = Keeper()
'''
TASK = """
import numpy as np
from variator_export.quality.samples import mean
from variator_export.quality.tasks.embeddings import HiddenStates, _HiddenStates

class Drift(_HiddenStates):
    metric = "stays"

    def measure(self, kept, uncompressed):
        near = [np.abs(a - b).max() < 1 for a, b in zip(kept, uncompressed)]
        return {"stays": mean(np.array(near))}

class Task(HiddenStates):
    name = "drift"

    def measurement(self, model, examples, encode):
        return Drift(super().measurement(model, examples, encode).rows)

X = Task()
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Something installed, as a package index would leave it: a module, and an entry point."""

    def installed(group: str, name: str, module: str) -> None:
        folder = tmp_path / "site"
        info = folder / "mine-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / "mine.py").write_text(module)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = mine:X\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, "mine", raising=False)

    return installed


def test_a_method_from_outside(small_recipe: Recipe, tmp_path: Path, install: Install) -> None:
    install(METHODS.group, "mirror", METHOD)
    plugins = (small_recipe.plugins[0].model_copy(update={"method": "mirror"}),)
    bundle = build(small_recipe.model_copy(update={"plugins": plugins}), tmp_path / "b").bundle
    variant = Bundle.load(bundle).variant(2)
    assert (variant.method, variant.baseline) == ("mirror", False)
    assert verify(bundle, [2], profile_shapes="none").passed


def test_a_method_that_is_not_installed_is_named(small_recipe: Recipe, tmp_path: Path) -> None:
    plugins = (small_recipe.plugins[0].model_copy(update={"method": "variatorr"}),)
    with pytest.raises(UserError, match="There is no method 'variatorr'; there are none, variator") as raised:
        build(small_recipe.model_copy(update={"plugins": plugins}), tmp_path / "b")
    assert raised.value.hint == "Did you mean 'variator'?"
    assert not (tmp_path / "b").exists()


def test_a_precision_from_outside(small_recipe: Recipe, tmp_path: Path, install: Install) -> None:
    install(PRECISIONS.group, "half", PRECISION)
    recipe = Recipe.model_validate({**small_recipe.model_dump(), "precision": "half", "ratios": (2,)})
    bundle = Bundle.load(build(recipe, tmp_path / "b").bundle)
    assert bundle.manifest.precision == "half"
    assert {variant.precision_proof.macs for variant in bundle.manifest.variants} == {1.0}
    assert verify(bundle.path, [2], profile_shapes="none").passed


def test_a_target_from_outside(bundle_copy: Path, install: Install) -> None:
    install(TARGETS.group, "keeper", TARGET)
    result = call(
        "compile", str(bundle_copy), "--target", "keeper", "--variant", "ratio-2", "--format", "json"
    )
    assert result.returncode == 0, result.stderr
    (entry,) = json.loads(result.stdout)["engines"]
    assert (entry["target"], entry["platform"], entry["version"]) == ("keeper", "anywhere", "1.0")
    bundle = Bundle.load(bundle_copy)
    inputs = bundle.text_encoder().encode(["Yes."], bundle.manifest.backbone.inputs, 64)
    found, expected = (bundle.session(target, 2).run(inputs) for target in ("keeper", "onnxruntime"))
    np.testing.assert_array_equal(found["last_hidden_state"], expected["last_hidden_state"])
    assert call("doctor", str(bundle_copy)).returncode == 0


@pytest.mark.parametrize(
    ("registry", "module", "words"),
    [
        (METHODS, "X = 1", "is of type int, not Method"),
        (PRECISIONS, "raise ZeroDivisionError", "cannot be loaded: ZeroDivisionError"),
    ],
)
def test_a_broken_entry_names_its_distribution(
    install: Install, registry: object, module: str, words: str
) -> None:
    install(registry.group, "broken", module)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=words) as raised:
        registry.find("broken")  # type: ignore[attr-defined]
    assert "mine" in str(raised.value.hint)


def test_an_evaluation_task_from_outside(small_bundle: Path, tmp_path: Path, install: Install) -> None:
    install(TASKS.group, "drift", TASK)
    (tmp_path / "texts.jsonl").write_text('{"text": "One."}\n{"text": "Two."}\n')
    examples = read_examples(str(tmp_path / "texts.jsonl"), Columns("text", None, None))
    quality = evaluate(small_bundle, examples, task="drift", runtimes=("onnxruntime",))
    assert (quality.task, quality.metric, quality.rows[0].metrics) == ("drift", "stays", {"stays": 1.0})
