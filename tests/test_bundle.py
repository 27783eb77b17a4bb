"""Opening a bundle: whatever was changed in it is refused and named."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from variator_export import Bundle
from variator_export.core.errors import UserError


def _edit_manifest(bundle: Path, edit: Callable[[dict], object]) -> None:  # type: ignore[type-arg]
    path = bundle / "manifest.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def _refused(bundle: Path, *words: str) -> None:
    with pytest.raises(UserError) as raised:
        Bundle.load(bundle).check_all()
    for word in words:
        assert word in raised.value.message
    assert raised.value.hint


def test_a_whole_bundle_opens(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    bundle.check_all()
    assert [variant.name for variant in bundle.manifest.variants] == [
        "ratio-1", "ratio-2", "ratio-3", "ratio-4",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "weights.safetensors",
        "ratio-4.onnx",
        "any-ratio.onnx",
        "plugins/ratio-4/plugin.safetensors",
        "reference/ratio-4.safetensors",
        "tokenizer.json",
    ],
)
def test_a_flipped_byte_is_found(bundle_copy: Path, name: str) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_copy / name).write_bytes(content)
    _refused(bundle_copy, name, "has the sha256", "the manifest says")


@pytest.mark.parametrize("name", ["weights.safetensors", "plugins/ratio-4/plugin.safetensors"])
def test_a_session_refuses_weights_that_were_changed(bundle_copy: Path, name: str) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[-1] ^= 1
    (bundle_copy / name).write_bytes(content)
    with pytest.raises(UserError, match="has the sha256"):
        Bundle.load(bundle_copy).session(variant=4)


def test_a_truncated_file_is_found_without_reading_it(bundle_copy: Path) -> None:
    path = bundle_copy / "weights.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    _refused(bundle_copy, "weights.safetensors", "bytes; the manifest says")


def test_a_missing_file(bundle_copy: Path) -> None:
    (bundle_copy / "ratio-3.onnx").unlink()
    _refused(bundle_copy, "ratio-3.onnx is missing")


def test_links(bundle_copy: Path) -> None:
    path = bundle_copy / "weights.safetensors"
    os.link(path, bundle_copy.parent / "elsewhere")
    _refused(bundle_copy, "weights.safetensors is a hard link")
    path.unlink()
    path.symlink_to(bundle_copy.parent / "elsewhere")
    _refused(bundle_copy, "weights.safetensors", "symbolic link")


def test_a_linked_folder(bundle_copy: Path) -> None:
    (bundle_copy / "plugins").rename(bundle_copy.parent / "plugins")
    (bundle_copy / "plugins").symlink_to(bundle_copy.parent / "plugins")
    _refused(bundle_copy, "symbolic link")


@pytest.mark.parametrize("path", ["../outside.onnx", "/etc/passwd", "a/../../b", "a\\..\\b"])
def test_paths_that_leave_the_bundle(bundle_copy: Path, path: str) -> None:
    def edit(manifest: dict) -> None:  # type: ignore[type-arg]
        manifest["files"][path] = manifest["files"]["ratio-4.onnx"]

    _edit_manifest(bundle_copy, edit)
    _refused(bundle_copy, "leaves the bundle")
    _edit_manifest(bundle_copy, lambda m: (m["files"].pop(path), m["any_ratio"].update(model=path)))
    _refused(bundle_copy, "leaves the bundle")


def test_a_newer_schema(bundle_copy: Path) -> None:
    _edit_manifest(bundle_copy, lambda m: m.update(schema_version=5, novelty=[1]))
    _refused(bundle_copy, "schema version 5", "reads up to 4")


def test_an_earlier_schema(bundle_copy: Path) -> None:
    _edit_manifest(bundle_copy, lambda m: m.update(schema_version=1))
    _refused(bundle_copy, "schema version 1", "of an earlier version")


def test_manifests_that_are_none(bundle_copy: Path, tmp_path: Path) -> None:
    _edit_manifest(bundle_copy, lambda m: m.update(variant=1))
    _refused(bundle_copy, "unknown key 'variant'", "'variants'")
    (bundle_copy / "manifest.json").write_text("{")
    _refused(bundle_copy, "not valid JSON")
    (bundle_copy / "manifest.json").unlink()
    _refused(bundle_copy, "has no file manifest.json")
    _refused(tmp_path / "nowhere", "There is no bundle at")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"heads": 2}, ("backbone.encoder_size.heads",)),
        ({"num_layers": "many"}, ("backbone.encoder_size.num_layers",)),
        ({"hidden_size": 10**9}, ("encoder_size has another hidden_size",)),
    ],
)
def test_sizes_that_no_encoder_has(
    bundle_copy: Path, sizes: dict[str, object], words: tuple[str, ...]
) -> None:
    _edit_manifest(bundle_copy, lambda m: m["backbone"]["encoder_size"].update(sizes))
    _refused(bundle_copy, *words)


def test_a_file_without_its_hash(bundle_copy: Path) -> None:
    _edit_manifest(bundle_copy, lambda m: m["files"].pop("ratio-4.onnx"))
    _refused(bundle_copy, "names ratio-4.onnx without its hash")


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_file_that_every_bundle_has(bundle_copy: Path, name: str) -> None:
    _edit_manifest(bundle_copy, lambda m: m["files"].pop(name))
    _refused(bundle_copy, f"does not list {name}, which every bundle has")


def test_a_variant_that_is_not_there(small_bundle: Path) -> None:
    bundle = Bundle.load(small_bundle)
    assert bundle.variant(4) == bundle.variant("ratio-4")
    with pytest.raises(UserError, match=r"has no variant 8; it has ratio-1 \(ratio 1\), ratio-2"):
        bundle.variant(8)


def test_the_bundle_is_a_hugging_face_folder(small_bundle: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(small_bundle).model_type == "bert"
    assert AutoTokenizer.from_pretrained(small_bundle)("Yes.")["input_ids"] == [101, 2748, 1012, 102]


def test_other_users_can_read_it(small_bundle: Path) -> None:
    for path in small_bundle.rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o044 == 0o044, path.name
