"""The decoder of a model that generates text, in eager PyTorch: along a given text, and step by step.

Shapes: B batch, S tokens of the source, T tokens of the text, P tokens before, d hidden size, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

DECODER_STATES, DECODER_ATTENTIONS = "decoder_hidden_states", "decoder_attentions"
CROSS_ATTENTIONS = "cross_attentions"


def decoder_outputs(
    model: Any,
    states: Tensor,
    mask: Tensor,
    labels: Tensor,
    *,
    layers: bool = False,
    attentions: bool = False,
) -> dict[str, Tensor]:
    """Run the decoder along the target text, as transformers does in training.

    Args:
        model: transformers' model.
        states: The encoder's last hidden states, (B, S, d).
        mask: The encoder's attention mask, (B, S).
        labels: The tokens of the text without the start token, int64 (B, T), with -100 for padding.
        layers: Whether to return the states of each layer too.
        attentions: Whether to return the attention of each layer too.

    Returns:
        `decoder_hidden_states`: the last ones, (B, T, d); and `logits`, (B, T, V). Of decoder layer i, with
        `layers` also `decoder_hidden_states.{i}`; with `attentions` its attention to its own tokens,
        `decoder_attentions.{i}` (B, heads, T, T), and to the encoder's, `cross_attentions.{i}`
        (B, heads, T, S).
    """
    found = model(
        encoder_outputs=encoder_outputs(states),
        attention_mask=mask,
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels),
        output_hidden_states=True,
        output_attentions=attentions,
        use_cache=False,
    )
    result = {DECODER_STATES: found.decoder_hidden_states[-1], "logits": found.logits}
    of_layers: dict[str, Sequence[Tensor]] = {}
    if layers:  # the first entry is the output of the embedding layer
        of_layers[DECODER_STATES] = found.decoder_hidden_states[1:]
    if attentions:
        of_layers[DECODER_ATTENTIONS] = found.decoder_attentions
        of_layers[CROSS_ATTENTIONS] = found.cross_attentions
    return result | {
        f"{name}.{i}": value for name, values in of_layers.items() for i, value in enumerate(values)
    }


def encoder_outputs(states: Tensor) -> Any:
    """The encoder's states (B, S, d) as transformers' models take them instead of a source."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)


class DecoderStep(nn.Module):
    """The decoder and the head of a model that generates text: one token as a function of the cache.

    The scores are float32 in every precision. Keys and values are in the type of the weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, encoder_attention_mask: Tensor, input_ids: Tensor, own: list[Tensor], cross: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Take one token of each row.

        Args:
            encoder_attention_mask: int64 (B, S).
            input_ids: int64 (B, 1).
            own: Keys and values of each layer of the tokens before, (B, heads, P, head size) each.
            cross: Keys and values of each layer of the encoder, (B, heads, S, head size) each.

        Returns:
            The scores, float32 (B, 1, V), and each layer's keys and values, (B, heads, P + 1, head size).
        """
        from transformers import EncoderDecoderCache

        cache = EncoderDecoderCache(_cache(own), _cache(cross))
        cache.is_updated = dict.fromkeys(range(len(cross) // 2), True)
        model: Any = self.model
        # Only shape and type of the encoder's states are read: their keys and values are in the cache.
        states = encoder_attention_mask[:, :, None].to(cross[0].dtype).expand(-1, -1, model.config.d_model)
        outputs = model(
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            encoder_outputs=encoder_outputs(states),
            past_key_values=cache,
            use_cache=True,
        )
        layers = outputs.past_key_values.self_attention_cache.layers
        return (outputs.logits.float(), *(kind for layer in layers for kind in (layer.keys, layer.values)))


def _cache(tensors: Sequence[Tensor]) -> Any:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in zip(tensors[::2], tensors[1::2], strict=True):
        layer = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache
