"""The decoder of a model that generates text, along a given text, in eager PyTorch.

Shapes: B batch, S tokens of the source, T tokens of the text, d hidden size, V vocabulary.
"""

from typing import Any

from torch import Tensor

DECODER_STATES = "decoder_hidden_states"


def decoder_outputs(model: Any, states: Tensor, mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Run the decoder along the right text, as transformers does in training.

    Args:
        model: transformers' model.
        states: The encoder's last hidden states, (B, S, d).
        mask: The encoder's attention mask, (B, S).
        labels: The tokens of the text without the start token, int64 (B, T), with -100 for padding.

    Returns:
        `decoder_hidden_states`: the last ones, (B, T, d); and `logits`, (B, T, V).
    """
    found = model(
        encoder_outputs=encoder_outputs(states),
        attention_mask=mask,
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        output_hidden_states=True,
        use_cache=False,
    )
    return {DECODER_STATES: found.decoder_hidden_states[-1], "logits": found.logits}


def encoder_outputs(states: Tensor) -> Any:
    """The encoder's states (B, S, d) as transformers' models take them instead of a source."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)
