"""Settings of generation, with the names and the defaults of transformers' `GenerationConfig`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from variator_export.core.errors import UserError
from variator_export.core.json_file import read_json_object
from variator_export.core.nearest import nearest
from variator_export.core.validation import describe_validation_error

SETTINGS_NAME = "generation_config.json"
_CONFIG_NAME = "config.json"
_TokenId = Field(ge=0)

# Settings that change what is generated, and that this package does not have, with the value for "off".
_UNSUPPORTED: dict[str, Any] = {
    "constraints": None,
    "diversity_penalty": 0.0,
    "dola_layers": None,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "guidance_scale": 1.0,
    "max_time": None,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "remove_invalid_values": False,
    "sequence_bias": None,
    "stop_strings": None,
    "top_h": None,
    "typical_p": 1.0,
    "watermarking_config": None,
}
_ONLY_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed")
_ONLY_BEAMS = ("early_stopping", "length_penalty")


class GenerationSettings(BaseModel):
    """Settings of one call.

    Attributes:
        max_new_tokens: The largest number of tokens to generate, the end token included.
        min_new_tokens: The smallest number of tokens before the end token.
        num_beams: The number of beams. 1 for greedy search or sampling.
        num_return_sequences: The number of sequences for each input.
        early_stopping: When beam search stops: True as soon as there are `num_beams` finished sequences;
            False when a better one is unlikely; "never" when a better one is impossible.
        length_penalty: The exponent of the length by which the score of a beam is divided.
        do_sample: Whether to draw the next token, instead of taking the most likely one.
        temperature: The number by which scores are divided before a draw.
        top_k: The number of most likely tokens to draw from. 0 for all.
        top_p: The share of probability to draw from, the most likely tokens first.
        min_p: The smallest probability to draw from, as a share of the most likely token's.
        seed: The seed of the draws. None for a new one in each call.
        repetition_penalty: The number by which scores of tokens that occurred are made worse. 1 for none.
        no_repeat_ngram_size: The size of the n-grams that occur only once. 0 for no limit.
        encoder_no_repeat_ngram_size: The size of the n-grams of the input that do not occur. 0 for no limit.
        bad_words_ids: Sequences of tokens that are never generated.
        suppress_tokens: Tokens that are never generated.
        begin_suppress_tokens: Tokens that are not generated first.
        renormalize_logits: Whether scores are made log probabilities again after all rules.
        forced_bos_token_id: The token that is generated first.
        forced_eos_token_id: The tokens of which one is generated last, if nothing ended before.
        decoder_start_token_id: The decoder's first input.
        eos_token_id: The tokens that end a sequence.
        pad_token_id: The token that stands after the end of a sequence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(20, ge=1)
    min_new_tokens: int = Field(0, ge=0)
    num_beams: int = Field(1, ge=1)
    num_return_sequences: int = Field(1, ge=1)
    early_stopping: bool | Literal["never"] = False
    length_penalty: FiniteFloat = 1.0
    do_sample: bool = False
    temperature: FiniteFloat = Field(1.0, gt=0)
    top_k: int = Field(50, ge=0)
    top_p: FiniteFloat = Field(1.0, gt=0, le=1)
    min_p: FiniteFloat | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=0)
    repetition_penalty: FiniteFloat = Field(1.0, gt=0)
    no_repeat_ngram_size: int = Field(0, ge=0)
    encoder_no_repeat_ngram_size: int = Field(0, ge=0)
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    renormalize_logits: bool = False
    forced_bos_token_id: int | None = Field(None, ge=0)
    forced_eos_token_id: tuple[int, ...] = ()
    decoder_start_token_id: int = _TokenId
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int = _TokenId

    @model_validator(mode="after")
    def _fit_together(self) -> "GenerationSettings":
        sequences = self.num_return_sequences
        if sequences > 1 and self.num_beams == 1 and not self.do_sample:
            raise ValueError(
                f"num_return_sequences is {sequences}, and greedy search has one sequence; "
                "set num_beams or do_sample"
            )
        if self.num_beams > 1 and sequences > self.num_beams:
            raise ValueError(f"num_return_sequences is {sequences}, and num_beams is {self.num_beams}")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}, and max_new_tokens is {self.max_new_tokens}"
            )
        for name, forced in (
            ("forced_bos_token_id", (self.forced_bos_token_id,)),
            ("forced_eos_token_id", self.forced_eos_token_id),
        ):
            if set(forced) & set(self.suppress_tokens):
                raise ValueError(f"{name} is among suppress_tokens")
        return self

    def changed(self, changes: Mapping[str, Any]) -> "GenerationSettings":
        """These settings with a caller's changes.

        Args:
            changes: Settings by name.

        Raises:
            UserError: A setting does not exist, its value is not allowed, or it contradicts another one.
        """
        for names, needed in ((_ONLY_SAMPLING, "do_sample=True"), (_ONLY_BEAMS, "num_beams above 1")):
            given = [name for name in names if changes.get(name) is not None]
            values = self.model_copy(update=dict(changes))
            used = values.do_sample if names is _ONLY_SAMPLING else values.num_beams != 1
            if given and not used:
                raise UserError(
                    f"The generation setting {given[0]} has no effect without {needed}.",
                    f"Set {needed} too, or leave out {given[0]}.",
                )
        known = self.model_dump() | dict(changes)
        if "min_new_tokens" not in changes and isinstance(known["max_new_tokens"], int):
            # The model's own minimum gives way to the caller's maximum.
            known["min_new_tokens"] = min(known["min_new_tokens"], max(known["max_new_tokens"], 0))
        return _validate(
            known, "The generation settings are not valid: ", "Correct the settings of the call."
        )


def read_settings(folder: Path) -> GenerationSettings:
    """Read a model's own settings, as transformers does: from generation_config.json, else from config.json.

    Args:
        folder: The model's folder.

    Raises:
        UserError: A file is broken, or it sets something that this package does not have.
    """
    path = folder / SETTINGS_NAME
    if not path.is_file():
        path = folder / _CONFIG_NAME
    hint = "Restore it from its source, or correct it."
    content = {name: value for name, value in read_json_object(path, hint).items() if value is not None}
    for name, off in _UNSUPPORTED.items():
        if content.get(name, off) != off:
            raise UserError(
                f"{path} sets {name} to {content[name]!r}, which generation does not have here.",
                f"Remove {name} from the model's {path.name} if its text may differ from transformers'.",
            )
    found = {name: content[name] for name in GenerationSettings.model_fields if name in content}
    found |= _lengths(content)
    found.setdefault("decoder_start_token_id", content.get("bos_token_id"))
    if not isinstance(found["decoder_start_token_id"], int):
        raise UserError(
            f"{path} has no decoder_start_token_id.", "Add it: the first token that the decoder gets."
        )
    if "pad_token_id" not in found:
        ends = found.get("eos_token_id", 0)
        found["pad_token_id"] = ends if isinstance(ends, int) else next(iter(ends), 0)
    return _validate(found, f"{path} is not valid: ", hint)


def _lengths(content: Mapping[str, Any]) -> dict[str, Any]:
    """The limits in new tokens. `max_length` and `min_length` count the start token too."""
    found = {}
    for new, total in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if new not in content and isinstance(content.get(total), int):
            found[new] = max(content[total] - 1, 0)
    longest = content.get("max_new_tokens", found.get("max_new_tokens"))
    if isinstance(longest, int) and isinstance(found.get("min_new_tokens"), int):
        found["min_new_tokens"] = min(found["min_new_tokens"], longest)
    return found


def _validate(content: Mapping[str, Any], begin: str, hint: str) -> GenerationSettings:
    known = sorted(GenerationSettings.model_fields)
    for name in content:
        if name not in known:
            guess = nearest(name, known)
            raise UserError(
                f"There is no generation setting {name!r}.",
                f"Did you mean {guess!r}?" if guess else f"Choose from {', '.join(known)}.",
            )
    several = {
        name: (content[name],)
        for name in ("eos_token_id", "forced_eos_token_id")
        if isinstance(content.get(name), int)
    }
    try:
        return GenerationSettings.model_validate({**content, **several})
    except ValidationError as error:
        raise UserError(begin + describe_validation_error(error, GenerationSettings), hint) from error
