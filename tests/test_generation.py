"""Greedy search, beam search and sampling: the tokens of transformers' `generate`, whatever the settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from variator_export import UserError
from variator_export.generation.rules import Rules, log_softmax
from variator_export.generation.sampling import Sampler, best
from variator_export.generation.search import Sequences, generate, rows_per_input, stream
from variator_export.generation.settings import GenerationSettings, read_settings

VOCABULARY, START, PAD, EOS = 40, 0, 1, 2
BASE = GenerationSettings(
    decoder_start_token_id=START, pad_token_id=PAD, eos_token_id=(EOS,), max_new_tokens=12
)


@pytest.fixture(scope="module", params=["t5", "bart"])
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    """A tiny random model with a vocabulary so small that texts end and repeat."""
    torch.manual_seed(3)
    ids = {
        **{"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": EOS},
        **{"decoder_start_token_id": START, "d_model": 16},
    }
    if request.param == "t5":
        sizes = {
            "num_decoder_layers": 3,
            "d_kv": 4,
            "num_heads": 4,
            "d_ff": 24,
            "num_layers": 1,
            "initializer_factor": 3.0,
        }
        made: Any = transformers.T5ForConditionalGeneration(transformers.T5Config(**ids, **sizes))
    else:
        layers = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "init_std": 0.5}
        config = transformers.BartConfig(
            **ids, **layers, **heads, bos_token_id=START, forced_eos_token_id=None
        )
        made = transformers.BartForConditionalGeneration(config)
    made.generation_config.forced_eos_token_id = None
    # In float64 rounding does not depend on the batch; both searches get scores in float32.
    return made.eval().requires_grad_(False).double()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Rows of different length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (9, 8), generator=generator)
    mask = (torch.arange(8) < torch.tensor([8, 3, 5, 1, 8, 7, 2, 6, 4])[:, None]).long()
    return {"input_ids": torch.where(mask > 0, ids, PAD), "attention_mask": mask}


class _TorchDecoder:
    """The decoder of a transformers model, with transformers' cache."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor], copies: int) -> None:
        self._model = model
        states = model.get_encoder()(**inputs).last_hidden_state.repeat_interleave(copies, 0)
        self._fixed = {
            "encoder_outputs": BaseModelOutput(last_hidden_state=states),
            "attention_mask": inputs["attention_mask"].repeat_interleave(copies, 0),
        }
        self._cache = EncoderDecoderCache(DynamicCache(), DynamicCache())

    def step(self, tokens: np.ndarray) -> np.ndarray:
        found = self._model(
            **self._fixed,
            decoder_input_ids=torch.from_numpy(tokens)[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        return found.logits[:, -1].float().numpy()

    def select(self, rows: np.ndarray) -> None:
        self._cache.reorder_cache(torch.from_numpy(rows))


def _sources(inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    return [row[kept > 0].tolist() for row, kept in pairs]


def _ours(model: Any, inputs: dict[str, torch.Tensor], settings: GenerationSettings) -> Sequences:
    decoder = _TorchDecoder(model, inputs, rows_per_input(settings))
    return generate(decoder, _sources(inputs), settings)


def _theirs(model: Any, inputs: dict[str, torch.Tensor], changes: dict[str, Any]) -> list[list[int]]:
    # transformers' own cache has as many layers as the encoder.
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    settings = {"max_new_tokens": BASE.max_new_tokens} | changes
    found = model.generate(**inputs, **settings, past_key_values=cache)
    eos = {EOS} if "eos_token_id" not in changes else set(changes["eos_token_id"])
    rows = []
    for row in found[:, 1:].tolist():
        end = next((index + 1 for index, token in enumerate(row) if token in eos), len(row))
        rows.append(row[:end])
    return rows


RULES: list[dict[str, Any]] = [
    {},
    {"max_new_tokens": 1},
    {"min_new_tokens": 6},
    {"min_new_tokens": 12},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 2},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"suppress_tokens": [5, 6, 7, 8, 9, 10]},
    {"begin_suppress_tokens": [*range(3, 25)]},
    {"forced_bos_token_id": 7},
    {"forced_bos_token_id": 7, "begin_suppress_tokens": [*range(3, 25)]},
    {"forced_eos_token_id": EOS},
    {"forced_eos_token_id": EOS, "min_new_tokens": 12},
    {"eos_token_id": [EOS, 9, 11, 13]},
    {"bad_words_ids": [[3], [4], [12, 13], [EOS]]},
    {"renormalize_logits": True, "suppress_tokens": [3, 4]},
]
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 3, "early_stopping": True},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": -1.0},
    {"num_beams": 5, "length_penalty": 0.0},
    {"num_beams": 3, "length_penalty": 3.0, "early_stopping": True, "num_return_sequences": 3},
    {"num_beams": 7, "num_return_sequences": 2},
]


def _changed(changes: dict[str, Any]) -> GenerationSettings:
    return BASE.changed({k: tuple(v) if k == "eos_token_id" else v for k, v in changes.items()})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: ", ".join(rule) or "none")
def test_greedy_search_gives_the_tokens_of_transformers(
    model: Any, inputs: dict[str, torch.Tensor], rule: dict[str, Any]
) -> None:
    found = _ours(model, inputs, _changed(rule))
    assert [sequences[0].tolist() for sequences in found.tokens] == _theirs(model, inputs, rule)


@pytest.mark.parametrize("beams", BEAMS, ids=lambda beams: ", ".join(f"{k} {v}" for k, v in beams.items()))
@pytest.mark.parametrize("rule", RULES[:1] + RULES[2:], ids=lambda rule: ", ".join(rule) or "none")
def test_beam_search_gives_the_sequences_of_transformers(
    model: Any, inputs: dict[str, torch.Tensor], rule: dict[str, Any], beams: dict[str, Any]
) -> None:
    found = _ours(model, inputs, _changed(rule | beams))
    flat = [sequence.tolist() for sequences in found.tokens for sequence in sequences]
    assert flat == _theirs(model, inputs, rule | beams)
    assert all(list(scores) == sorted(scores, reverse=True) for scores in found.scores)


def test_a_row_does_not_depend_on_its_batch(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    for changes in ({}, {"num_beams": 4}):
        together = _ours(model, inputs, BASE.changed(changes))
        for row in range(len(inputs["input_ids"])):
            alone = _ours(model, {k: v[row : row + 1] for k, v in inputs.items()}, BASE.changed(changes))
            assert np.array_equal(alone.tokens[0][0], together.tokens[row][0])


def test_streaming_yields_the_tokens_of_greedy_search(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    whole = _ours(model, inputs, BASE).tokens
    steps = np.stack(list(stream(_TorchDecoder(model, inputs, 1), _sources(inputs), BASE)), axis=1)
    for row, (sequence,) in zip(steps, whole, strict=True):
        assert np.array_equal(row[: len(sequence)], sequence)
        assert set(row[len(sequence) :]) <= {PAD}


def test_beams_cannot_be_streamed(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    settings = BASE.changed({"num_beams": 2})
    with pytest.raises(UserError, match="no tokens to stream"):
        stream(_TorchDecoder(model, inputs, 2), _sources(inputs), settings)


# Sampling.


def _scores(rows: int = 6) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 3, (rows, VOCABULARY)).astype(np.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 0},
        {"top_k": 5},
        {"top_k": 500},
        {"temperature": 0.3, "top_k": 0},
        {"temperature": 4.0, "top_p": 0.7},
        {"top_p": 0.05, "top_k": 0},
        {"min_p": 0.1, "top_k": 0},
        {"min_p": 1.0, "top_p": 0.9, "temperature": 1.5, "top_k": 20},
        {"num_beams": 3, "top_p": 0.01},
        {"num_beams": 3, "min_p": 1.0, "top_k": 1},
    ],
    ids=str,
)
def test_the_tokens_to_draw_from_are_those_of_transformers(model: Any, changes: dict[str, Any]) -> None:
    settings = BASE.changed({"do_sample": True, **changes})
    config = transformers.GenerationConfig(do_sample=True, **({"top_k": 50, "num_beams": 1} | changes))
    config._eos_token_tensor = torch.tensor([EOS])
    processors = model._get_logits_processor(config, input_ids_seq_length=1)
    scores = _scores()
    expected = processors(torch.zeros((len(scores), 1), dtype=torch.long), torch.from_numpy(scores)).numpy()
    np.testing.assert_allclose(Sampler(settings).narrow(scores), expected, rtol=1e-6)


def test_draws_follow_the_probabilities() -> None:
    scores = np.log(np.array([[0.5, 0.3, 0.15, 0.05, 0.0]], np.float32) + np.float32(1e-30))
    scores[0, 4] = -np.inf
    sampler = Sampler(BASE.changed({"do_sample": True, "seed": 5}))
    draws = sampler.draw(np.repeat(scores, 40_000, axis=0))[:, 0]
    shares = np.bincount(draws, minlength=5) / len(draws)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05, 0], atol=0.01)
    pairs = sampler.draw(np.repeat(scores, 40_000, axis=0), 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()
    # Without replacement: the second is the second of the two in proportion to what is left.
    second = pairs[pairs[:, 0] == 0][:, 1]
    np.testing.assert_allclose(
        np.bincount(second, minlength=5)[1:4] / len(second), [0.6, 0.3, 0.1], atol=0.02
    )


def test_a_seed_makes_draws_repeatable(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    def drawn(**changes: Any) -> list[list[int]]:
        found = _ours(model, inputs, BASE.changed({"do_sample": True, "temperature": 3.0, **changes}))
        return [sequence.tolist() for sequences in found.tokens for sequence in sequences]

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn() != drawn(), "without a seed every call differs"
    several = drawn(seed=1, num_return_sequences=3)
    assert len(several) == 3 * len(inputs["input_ids"])
    beams = drawn(seed=1, num_beams=3)
    assert beams == drawn(seed=1, num_beams=3)
    assert all(sequence for sequence in beams)


# Parts.


def test_best_are_the_best_in_order() -> None:
    scores = _scores()
    for count in (1, 2, 7, VOCABULARY):
        expected = torch.topk(torch.from_numpy(scores), count)[1].numpy()
        assert np.array_equal(best(scores, count), expected)
    # A large vocabulary, with rows of which a rule allows few tokens, next to each other.
    large = np.random.default_rng(0).normal(size=(3, 5000)).astype(np.float32)
    large[1, 20:] = -np.inf
    large[2, :4900] = -np.inf
    for count in (2, 8, 20, 64):
        expected = torch.topk(torch.from_numpy(large), count)[1].numpy()
        allowed = np.isfinite(np.take_along_axis(large, expected, axis=1))
        assert np.array_equal(best(large, count)[allowed], expected[allowed])


def test_rules_leave_the_given_scores_alone() -> None:
    scores, tokens = _scores(2), np.array([[START, 3, 4], [START, 5, 5]])
    kept = scores.copy()
    Rules(BASE.changed({"no_repeat_ngram_size": 1}), [[], []]).apply(tokens, scores)
    assert np.array_equal(scores, kept)


def test_log_softmax_is_torchs() -> None:
    scores = _scores() * 100
    expected = torch.log_softmax(torch.from_numpy(scores), -1).numpy()
    np.testing.assert_allclose(log_softmax(scores), expected, rtol=1e-5, atol=1e-5)


def test_scores_that_are_not_numbers_are_refused(inputs: dict[str, torch.Tensor]) -> None:
    class Broken:
        def step(self, tokens: np.ndarray) -> np.ndarray:
            return np.full((len(tokens), VOCABULARY), np.nan, np.float32)

        def select(self, rows: np.ndarray) -> None:
            del rows

    for changes in ({}, {"num_beams": 2}):
        with pytest.raises(UserError, match="not numbers"):
            generate(Broken(), _sources(inputs), BASE.changed(changes))


# Settings.


def _written(folder: Path, **content: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


def test_settings_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    content = {
        **{
            "max_length": 142,
            "min_length": 56,
            "num_beams": 4,
            "length_penalty": 2.0,
            "early_stopping": True,
        },
        **{"no_repeat_ngram_size": 3, "forced_bos_token_id": 0, "forced_eos_token_id": 2, "eos_token_id": 2},
        **{"decoder_start_token_id": 2, "pad_token_id": 1, "bos_token_id": 0},
        **{"use_cache": True, "typical_p": 1.0, "bad_words_ids": None},
    }
    found = read_settings(_written(tmp_path, **content))
    # The start token counts as one of the length.
    assert (found.max_new_tokens, found.min_new_tokens) == (141, 55)
    assert (found.eos_token_id, found.forced_eos_token_id) == ((2,), (2,))
    short = found.changed({"max_new_tokens": 10})
    assert (short.max_new_tokens, short.min_new_tokens) == (10, 10)
    # Without a file, the model's configuration has them.
    (tmp_path / "generation_config.json").rename(tmp_path / "config.json")
    assert read_settings(tmp_path) == found


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"eos_token_id": 1}, "no decoder_start_token_id"),
        ({"decoder_start_token_id": 0, "penalty_alpha": 0.6}, "sets penalty_alpha to 0.6"),
        ({"decoder_start_token_id": 0, "num_beams": 0}, "'num_beams' is 0"),
        ({"decoder_start_token_id": 0, "max_new_tokens": "many"}, "'max_new_tokens' is 'many'"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(
    tmp_path: Path, content: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as caught:
        read_settings(_written(tmp_path, **content))
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_beam": 3}, "no generation setting 'num_beam'"),
        ({"num_beams": 0}, "'num_beams' is 0"),
        ({"temperature": 0.5}, "temperature has no effect without do_sample"),
        ({"seed": 5, "num_beams": 2}, "seed has no effect without do_sample"),
        ({"length_penalty": 0.5}, "length_penalty has no effect without num_beams"),
        ({"num_return_sequences": 2}, "greedy search has one sequence"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_beams is 2"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, "max_new_tokens is 4"),
        ({"forced_bos_token_id": 3, "suppress_tokens": [3]}, "among suppress_tokens"),
        ({"do_sample": True, "top_p": 1.5}, "'top_p' is 1.5"),
        ({"do_sample": True, "temperature": float("nan")}, "'temperature'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_of_a_call_that_make_no_sense_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        BASE.changed(changes)
    assert words in caught.value.message
    if "num_beam" in changes:
        assert caught.value.hint == "Did you mean 'num_beams'?"
