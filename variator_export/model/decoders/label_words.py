"""Label words: classes of a model that generates text, as the scores of one token each (arXiv 2310.15724).

The decoder runs one step from its start token, without a cache, so a graph goes from token ids to the scores
of the label words. Shapes: B batch, S tokens, C labels, d hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from variator_export.core.errors import UserError
from variator_export.text.tokenizer import TextEncoder


@dataclass(frozen=True)
class LabelWords:
    """Label words of a model.

    Attributes:
        words: The word of each label, in the order of the classes.
        prompt: What the decoder reads after its start token; empty for nothing.
        word_ids: The token of each word.
        prompt_ids: The decoder's input: its start token, then the prompt.
    """

    words: Mapping[str, str]
    prompt: str
    word_ids: tuple[int, ...]
    prompt_ids: tuple[int, ...]


def read_label_words(
    words: Mapping[str, str], prompt: str, encoder: TextEncoder, start_token_id: object
) -> LabelWords:
    """Find the tokens of label words.

    Args:
        words: The word of each label.
        prompt: What the decoder reads after its start token, such as `<extra_id_0>`.
        encoder: The model's tokenizer.
        start_token_id: The decoder's start token, as the model's configuration names it.

    Raises:
        UserError: There are fewer than two words, a word is not one token, two words are the same token, or
            the configuration names no start token.
    """
    if len(words) < 2:
        raise UserError(
            f"A classifier needs at least two label words; {len(words)} was given.",
            "Give a word for each label.",
        )
    if not isinstance(start_token_id, int):
        raise UserError(
            "The model's config.json has no decoder_start_token_id.",
            "Add it: the first token that the decoder gets.",
        )
    found: dict[int, str] = {}
    for label, (ids, _) in zip(words, encoder.encode_plain(list(words.values())), strict=True):
        word, tokens = words[label], ", ".join(map(encoder.token, ids))
        if len(ids) != 1:
            raise UserError(
                f"The label word {word!r} has {len(ids)} tokens ({tokens}); one step of the decoder scores "
                "single tokens.",
                "Choose a word that is one token of this model.",
            )
        if ids[0] in found:
            raise UserError(
                f"The label words {found[ids[0]]!r} and {word!r} are the same token ({tokens}).",
                "Choose words that differ.",
            )
        found[ids[0]] = word
    after = encoder.encode_plain([prompt])[0][0] if prompt else []
    return LabelWords(dict(words), prompt, tuple(found), (start_token_id, *after))


def label_word_scores(model: Any, states: Any, mask: Any, label_words: LabelWords) -> Any:
    """The scores of the label words, (B, C), from the encoder's states (B, S, d) and its mask (B, S)."""
    from variator_export.model.decoders.decoding import encoder_outputs

    prompt = mask.new_tensor(label_words.prompt_ids).expand(mask.shape[0], -1)
    found = model(
        encoder_outputs=encoder_outputs(states),
        attention_mask=mask,
        decoder_input_ids=prompt,
        use_cache=False,
    )
    return found.logits[:, -1].index_select(1, mask.new_tensor(label_words.word_ids))
