"""The build: what it reuses and why, what it refuses, and that a wrong graph is never published."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import plugin_for, sentence_transformers_modules
from small_disk import run_on_small_disk

from variator_export import Bundle, NumbersDisagreeError, UserError, build
from variator_export.building.recipe_build import BuildResult
from variator_export.building.steps import graphs as steps
from variator_export.model.backbone import Backbone
from variator_export.model.plugin_file import save_plugin
from variator_export.model.plugin_layout import Plugin
from variator_export.recipe.recipe import BackboneRecipe, PluginRecipe, Recipe
from variator_export.verification.reference import load_reference
from variator_export.verification.reference_check import verify_graph


def _bytes(bundle: Path) -> dict[str, bytes]:
    return {
        path.relative_to(bundle).as_posix(): path.read_bytes()
        for path in sorted(bundle.rglob("*"))
        if path.is_file()
    }


def _made(result: BuildResult) -> dict[str, str]:
    return {step.name: step.why for step in result.steps if step.action == "made"}


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update=changes)


def test_adding_a_ratio_does_not_trace_again_and_gives_the_same_bytes(
    small_recipe: Recipe, small_bundle: Path, tmp_path: Path
) -> None:
    first = build(_with(small_recipe, ratios=(2, 4)), tmp_path / "b")
    assert set(_made(first).values()) == {"the bundle is new"}
    second = build(_with(small_recipe, ratios=(3,)), tmp_path / "b")
    assert set(_made(second)) == {"plugin/ratio-3", "bind/ratio-3", "verify/ratio-3"}
    assert set(_made(second).values()) == {"the bundle does not have it yet"}
    assert [step.name for step in second.steps if step.action == "reused"][:2] == [
        "backbone",
        "plugin/ratio-2",
    ]
    assert _bytes(tmp_path / "b") == _bytes(small_bundle), "in two builds or in one: equal bytes"


def test_a_bundle_that_is_up_to_date_is_left_alone(small_recipe: Recipe, bundle_copy: Path) -> None:
    before = (bundle_copy / "manifest.json").stat()
    result = build(small_recipe, bundle_copy)
    assert not result.published
    assert not _made(result)
    assert (bundle_copy / "manifest.json").stat().st_ino == before.st_ino
    assert result.verification["ratio-4"]["relative_frobenius"] < 1e-5


def test_another_plugin_is_bound_and_verified_again(
    small_recipe: Recipe, bundle_copy: Path, load_model: Callable[[str], Backbone], tmp_path: Path
) -> None:
    save_plugin(plugin_for(load_model("bert"), 4), tmp_path / "p")
    recipe = _with(small_recipe, plugins=(PluginRecipe(source=str(tmp_path / "p")),), ratios=None)
    result = build(recipe, bundle_copy)
    assert set(_made(result)) == {"plugin/ratio-4", "bind/ratio-4", "verify/ratio-4"}
    assert "changed: plugin" in _made(result)["bind/ratio-4"]
    entry = Bundle.load(bundle_copy).variant(4).plugin
    assert entry is not None
    assert entry.source == str(tmp_path / "p")
    shutil.rmtree(tmp_path / "p")  # from now on the bundle's copy is the plugin
    assert not _made(build(_with(small_recipe, ratios=(2,)), bundle_copy))


def test_another_tolerance_or_version_is_a_reason(
    small_recipe: Recipe, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _with(small_recipe, verify=small_recipe.verify.model_copy(update={"seed": 1}))
    result = build(recipe, bundle_copy)
    assert set(_made(result)) == {f"verify/ratio-{k}" for k in (1, 2, 3, 4)}
    assert set(_made(result).values()) == {"changed: cases.seed"}
    monkeypatch.setattr(steps, "versions", lambda *names: dict.fromkeys(names, "1.99"))
    result = build(recipe, bundle_copy)
    assert set(_made(result)) == {"verify/texts", *(f"verify/ratio-{k}" for k in (1, 2, 3, 4))}
    assert _made(result)["verify/ratio-1"].startswith("changed: onnxruntime.onnxruntime (1.3")


def test_what_a_user_put_into_the_folder_stays(small_recipe: Recipe, bundle_copy: Path) -> None:
    (bundle_copy / "notes").mkdir()
    (bundle_copy / "notes" / "mine.txt").write_text("keep")
    (bundle_copy / "reports" / "mine.json").write_text("{}")
    (bundle_copy / "reports" / "speed.json.part").write_text("half")
    (bundle_copy / "empty").mkdir()
    (bundle_copy / "elsewhere").symlink_to("/nowhere")
    other = _with(small_recipe, verify=small_recipe.verify.model_copy(update={"seed": 3}))
    assert build(other, bundle_copy).published
    assert (bundle_copy / "notes" / "mine.txt").read_text() == "keep"
    assert (bundle_copy / "reports" / "mine.json").exists()
    assert not (bundle_copy / "reports" / "speed.json.part").exists()
    assert (bundle_copy / "empty").is_dir()
    assert (bundle_copy / "elsewhere").readlink() == Path("/nowhere")


def test_a_folder_that_is_no_bundle_is_not_touched(small_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for start_afresh in (False, True):
        with pytest.raises(UserError, match="holds files but is not a bundle"):
            build(small_recipe, tmp_path, replace=start_afresh)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_damaged_bundle_is_not_built_upon(small_recipe: Recipe, bundle_copy: Path) -> None:
    (bundle_copy / "weights.safetensors").write_bytes(
        (bundle_copy / "weights.safetensors").read_bytes()[:-1] + b"\xff"
    )
    before = _bytes(bundle_copy)
    changed = _with(small_recipe, verify=small_recipe.verify.model_copy(update={"seed": 9}))
    with pytest.raises(UserError, match=r"weights\.safetensors has the sha256") as raised:
        build(changed, bundle_copy)
    assert "--replace" in str(raised.value.hint)
    assert _bytes(bundle_copy) == before


def test_a_bundle_of_another_backbone(
    small_recipe: Recipe, bundle_copy: Path, small_model: Callable[[str], Path]
) -> None:
    before = _bytes(bundle_copy)
    recipe = _with(
        small_recipe, backbone=BackboneRecipe(source=str(small_model("bert-classifier"))), ratios=(2,)
    )
    with pytest.raises(UserError, match=r"The bundle is of another backbone: .*bert.*, whose weights"):
        build(recipe, bundle_copy)
    assert _bytes(bundle_copy) == before
    result = build(recipe, bundle_copy, replace=True)
    assert Bundle.load(result.bundle).manifest.backbone.outputs == ("logits",)
    assert [v.ratio for v in Bundle.load(result.bundle).manifest.variants] == [1, 2]


def _other(plugin: Plugin, **config: Any) -> Plugin:
    return Plugin(dataclasses.replace(plugin.config, **config), plugin.tensors)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("hidden size", r"has the hidden size 16; the backbone .* has 32"),
        ("layers", r"has the number of layers 1; the backbone .* has 2"),
        ("hash", r"made for the backbone other with weights of sha256 000"),
        ("family", r"made for a t5 backbone; .* is a bert"),
        ("ratio 1", r"has ratio 1, which compresses nothing"),
        ("truncated", r"not a whole safetensors file"),
    ],
)
def test_a_plugin_that_does_not_fit(
    small_recipe: Recipe,
    bundle_copy: Path,
    load_model: Callable[[str], Backbone],
    tmp_path: Path,
    what: str,
    words: str,
) -> None:
    from variator_export.model.plugin import initialise_plugin

    fitting = plugin_for(load_model("bert"), 4)
    identity = fitting.config.backbone
    assert identity is not None
    plugin = {
        "hidden size": initialise_plugin(4, 16, 2),
        "layers": initialise_plugin(4, 32, 1),
        "hash": _other(
            fitting, backbone=dataclasses.replace(identity, name="other", weights_sha256="0" * 64)
        ),
        "family": _other(fitting, backbone=dataclasses.replace(identity, model_type="t5")),
        "ratio 1": initialise_plugin(1, 32, 2),
        "truncated": fitting,
    }[what]
    save_plugin(plugin, tmp_path / "p")
    if what == "truncated":
        path = tmp_path / "p" / "plugin.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
    before = _bytes(bundle_copy)
    recipe = _with(small_recipe, plugins=(PluginRecipe(source=str(tmp_path / "p")),), ratios=None)
    with pytest.raises(UserError, match=words) as raised:
        build(recipe, bundle_copy)
    assert str(tmp_path / "p") in raised.value.message
    assert _bytes(bundle_copy) == before


def _corrupt(path: Path) -> None:
    """Let one graph look at the wrong half of the decompression matrix in its last layer."""
    model = onnx.load(path, load_external_data=False)
    names = [node.name for node in model.graph.node if node.op_type == "Slice" and "down" in node.input[0]]
    first, second = (next(n for n in model.graph.node if n.name == name) for name in names[-2:])
    first.input[1], first.input[2], second.input[1], second.input[2] = (
        second.input[1], second.input[2], first.input[1], first.input[2]
    )  # fmt: skip
    onnx.save(model, path)


def test_a_graph_that_computes_something_else_is_not_published(
    small_recipe: Recipe, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = steps.bind_variant

    def wrong(context: Any, plan: Any) -> None:
        real(context, plan)
        if plan.ratio == 3:
            _corrupt(context.staged.folder / "ratio-3.onnx")

    monkeypatch.setattr(steps, "bind_variant", wrong)
    before = _bytes(bundle_copy)
    with pytest.raises(NumbersDisagreeError) as raised:
        build(small_recipe, bundle_copy, replace=True)
    for word in ("ratio-3 (ratio 3): ratio-3.onnx,", "case", "input shape (", "output last_hidden_state"):
        assert word in raised.value.message
    assert raised.value.exit_code == 3
    assert _bytes(bundle_copy) == before


def test_nan_never_passes(small_model: Callable[[str], Path], small_recipe: Recipe, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(small_model("bert"), tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["encoder.layer.1.output.LayerNorm.weight"][3] = np.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    recipe = _with(small_recipe, backbone=BackboneRecipe(source=str(tmp_path / "broken")), ratios=(2,))
    with pytest.raises(UserError, match="Eager PyTorch itself returns NaN or infinite values"):
        build(recipe, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_backbone_that_was_changed_in_place_does_not_keep_its_plugins(
    small_model: Callable[[str], Path], load_model: Callable[[str], Backbone], tmp_path: Path
) -> None:
    """The plugin folder is the same; what it was made for is not there any more."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(small_model("bert"), tmp_path / "tuned")
    save_plugin(plugin_for(load_model("bert"), 2), tmp_path / "p")
    recipe = Recipe.model_validate(
        {
            "name": "tuned",
            "backbone": {"source": str(tmp_path / "tuned")},
            "plugins": [{"source": str(tmp_path / "p")}],
            "speed": None,
        }
    )
    build(recipe, tmp_path / "b")
    weights = tmp_path / "tuned" / "model.safetensors"
    tensors = load_file(weights)
    tensors["encoder.layer.0.output.dense.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="The bundle is of another backbone"):
        build(recipe, tmp_path / "b")
    with pytest.raises(UserError, match="was made for the backbone test with weights of sha256"):
        build(recipe, tmp_path / "b", replace=True)


def test_an_initialised_plugin_does_not_replace_a_trained_one(
    small_recipe: Recipe, bundle_copy: Path, load_model: Callable[[str], Backbone], tmp_path: Path
) -> None:
    plugin = _other(plugin_for(load_model("bert"), 4), training={"steps": 1})
    save_plugin(plugin, tmp_path / "p")
    trained = _with(small_recipe, plugins=(PluginRecipe(source=str(tmp_path / "p")),), ratios=None)
    assert "ratio-4" not in build(trained, bundle_copy).untrained
    with pytest.raises(UserError, match="has a trained plugin ratio-4"):
        build(small_recipe, bundle_copy)
    save_plugin(plugin_for(load_model("bert"), 4), tmp_path / "p")  # the folder's training is null now
    with pytest.raises(UserError, match="has a trained plugin ratio-4"):
        build(trained, bundle_copy)


def test_an_up_to_date_bundle_is_looked_at_before_that_is_said(
    small_recipe: Recipe, bundle_copy: Path
) -> None:
    content = bytearray((bundle_copy / "ratio-3.onnx").read_bytes())
    content[100] ^= 1
    (bundle_copy / "ratio-3.onnx").write_bytes(content)
    with pytest.raises(UserError, match=r"ratio-3\.onnx has the sha256"):
        build(small_recipe, bundle_copy)


def test_pooling_in_any_subfolder_decides_the_trace(
    small_model: Callable[[str], Path], small_recipe: Recipe, tmp_path: Path
) -> None:
    folder = tmp_path / "pooled"
    shutil.copytree(small_model("bert"), folder)
    kinds = {"Transformer": "", "Pooling": "some_pooling"}
    (folder / "modules.json").write_text(json.dumps(sentence_transformers_modules(kinds)))
    recipe = _with(small_recipe, backbone=BackboneRecipe(source=str(folder)), ratios=(1,))
    with pytest.raises(UserError, match=r"some_pooling/config\.json cannot be read"):
        build(recipe, tmp_path / "b")
    (folder / "some_pooling").mkdir()
    (folder / "some_pooling" / "config.json").write_text(
        json.dumps({"pooling_mode": "mean", "embedding_dimension": 32})
    )
    bundle = Bundle.load(build(recipe, tmp_path / "b").bundle)
    assert bundle.manifest.backbone.outputs == ("last_hidden_state", "sentence_embedding")
    assert "some_pooling/config.json" in bundle.manifest.steps["trace"]["backbone"]["files"]


def test_a_manifest_of_another_program_is_not_replaced(small_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "a web app"}))
    with pytest.raises(UserError, match="is not a bundle"):
        build(small_recipe, tmp_path, replace=True)
    assert json.loads((tmp_path / "manifest.json").read_text())["name"] == "a web app"


def test_two_plugins_of_one_ratio_in_one_bundle(
    small_recipe: Recipe, bundle_copy: Path, load_model: Callable[[str], Backbone], tmp_path: Path
) -> None:
    save_plugin(plugin_for(load_model("bert"), 2, masking="exclude-padding"), tmp_path / "p")
    plugins = (PluginRecipe(name="news", source=str(tmp_path / "p")),)
    result = build(_with(small_recipe, plugins=plugins), bundle_copy)
    bundle = Bundle.load(result.bundle)
    names = [variant.name for variant in bundle.manifest.variants]
    assert names == ["ratio-1", "news", "ratio-2", "ratio-3", "ratio-4"]
    with pytest.raises(UserError, match="several variants of ratio 2: news, ratio-2"):
        bundle.variant(2)
    inputs = bundle.text_encoder().encode(["Yes."], bundle.manifest.backbone.inputs, 64)
    session = bundle.session()
    one, two = session.run(inputs, "news"), session.run(inputs, "ratio-2")
    assert np.abs(one["last_hidden_state"] - two["last_hidden_state"]).max() > 1e-3


def test_the_reference_lets_a_machine_without_torch_verify(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    for variant in bundle.manifest.variants:
        reference = load_reference(bundle.file(variant.reference))
        cases = {expected.case.name for expected in reference}
        assert {"real text", "unusual text", f"3x{variant.ratio + 1}", "3x37"} <= cases
        findings = verify_graph(variant.name, bundle.session(variant=variant.name), reference)
        assert len(findings) == len(reference) + 2  # and the averages
        assert all(finding.passed for finding in findings)


def test_the_report_holds_every_case_of_both_graphs(small_bundle: Path) -> None:
    report = json.loads((small_bundle / "reports/verification/ratio-4.json").read_text())
    graphs = {finding["graph"] for finding in report["findings"]}
    cases = {finding["case"] for finding in report["findings"]}
    assert graphs == {"ratio-4.onnx", "any-ratio.onnx"}
    assert cases == {
        "real text", "unusual text", "the longest text", "1x1", "4x3", "1x4", "3x5", "3x37", "2x63",
        "a row of padding", "a mask with holes", "padding on the left", "all cases",
    }  # fmt: skip
    assert all(0 <= finding["used"] <= finding["allowed"] for finding in report["findings"])
    assert report["reference"] == "eager PyTorch, float64, CPU"


def test_a_bundle_is_hardly_larger_than_its_weights(minilm_bundle: Path) -> None:
    """Four ratios, engines aside, against the backbone's weights and the plugins."""
    bundle = Bundle.load(minilm_bundle)
    sizes = {name: entry.size_bytes for name, entry in bundle.manifest.files.items()}
    total = sum(size for name, size in sizes.items() if not name.startswith("engines/"))
    needed = sizes["weights.safetensors"] + sum(s for n, s in sizes.items() if n.startswith("plugins/"))
    assert total <= 1.08 * needed


def test_sentence_embeddings_of_minilm_are_those_of_sentence_transformers(
    minilm_bundle: Path, minilm_folder: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["The ferry leaves at seven.", "A boat departs in the morning.", "Prices rose in May."]
    bundle = Bundle.load(minilm_bundle)
    backbone = bundle.manifest.backbone
    inputs = bundle.text_encoder().encode(texts, backbone.inputs, backbone.max_length)
    found = bundle.session().run(inputs, ratio=1)["sentence_embedding"]
    theirs = SentenceTransformer(str(minilm_folder), device="cpu").encode(texts)
    np.testing.assert_allclose(found, theirs, atol=1e-6)


def test_a_full_disk(small_recipe: Recipe, small_bundle: Path, tmp_path: Path) -> None:
    """Really full: an earlier bundle fits, another one beside it does not."""
    path = tmp_path / "recipe.json.yaml"
    path.write_text(json.dumps(_with(small_recipe, ratios=(2,)).model_dump(mode="json")))
    script = f"""
        cp -r {small_bundle} $DISK/b
        before=$(cat $DISK/b/manifest.json $DISK/b/*.onnx | sha256sum)
        variator-export build {path} --output $DISK/b --no-speed --replace; code=$?
        after=$(cat $DISK/b/manifest.json $DISK/b/*.onnx | sha256sum)
        ls -A $DISK
        test "$before" = "$after" && variator-export inspect $DISK/b >/dev/null && exit $code
    """
    result = run_on_small_disk(script, tmp_path / "disk", size="9m")
    assert result.returncode == 1, result.stderr
    assert "no space left on device" in result.stderr
    assert "Free some space" in result.stderr
    assert result.stdout.split() == [".b.lock", "b"]
    assert "Traceback" not in result.stderr


def test_a_read_only_folder(small_recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(small_recipe.model_dump(mode="json")))
    script = f"mount -o remount,ro $DISK && variator-export build {path} --output $DISK/b --no-speed"
    result = run_on_small_disk(script, tmp_path / "disk", size="9m")
    assert result.returncode == 1, result.stderr
    assert "read-only file system" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_target_that_there_is_not_is_refused_before_anything_is_built(
    small_recipe: Recipe, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="There is no target for engines 'tensorrt-rtxx'") as raised:
        build(_with(small_recipe, targets=("tensorrt-rtxx",)), tmp_path / "b")
    assert raised.value.hint == "Did you mean 'tensorrt-rtx'?"
    assert not (tmp_path / "b").exists()


def test_a_plugin_without_its_source(small_recipe: Recipe, tmp_path: Path) -> None:
    recipe = _with(small_recipe, plugins=(PluginRecipe(source=str(tmp_path / "none")),), ratios=None)
    with pytest.raises(UserError, match="does not exist"):
        build(recipe, tmp_path / "b")


def test_texts_longer_than_the_model_are_refused_before_the_trace(
    small_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = _with(small_recipe, verify=small_recipe.verify.model_copy(update={"texts": ("word " * 80,)}))
    with pytest.raises(UserError, match="has 82 tokens; the limit is 64"):
        build(recipe, tmp_path / "b")
