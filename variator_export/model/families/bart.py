"""BART, mBART and Pegasus: the feed-forward network is two linear layers of the encoder layer."""

from typing import Any

import torch
from torch import Tensor, nn

from variator_export.core.encoder_size import DecoderSize, EncoderSize
from variator_export.model.families.base import TEXT_TO_TEXT, Decoder, Family, WrapFFN


def _wrap_ffns(model: nn.Module, wrap: WrapFFN) -> None:
    for index, layer in enumerate(_encoder(model).layers):
        layer.fc1 = wrap(index, nn.Sequential(layer.fc1, layer.activation_fn, layer.fc2))
        layer.activation_fn, layer.fc2 = nn.Identity(), nn.Identity()


class _ClampedPositions(nn.Module):
    """The embeddings of positions, of which the last one stands for all that come after it."""

    def __init__(self, embeddings: nn.Module, last: int) -> None:
        super().__init__()
        self.embeddings, self.last = embeddings, last

    def forward(self, ids: Tensor | torch.Size) -> Tensor:
        """The embeddings for (B, N) ids, or for their shape, as the family's own module takes them."""
        length = (ids.shape if isinstance(ids, Tensor) else ids)[1]
        positions = torch.arange(length).clamp(max=self.last)
        embedded: Tensor = self.embeddings(ids, position_ids=positions)
        return embedded


def _clamp_positions(model: nn.Module) -> None:
    encoder = _encoder(model)
    last = encoder.config.max_position_embeddings - 1
    encoder.embed_positions = _ClampedPositions(encoder.embed_positions, last)


def _encoder(model: Any) -> Any:
    return model.base_model.encoder


def _size(config: Any) -> EncoderSize:
    return EncoderSize(
        num_layers=config.encoder_layers,
        hidden_size=config.d_model,
        attention_size=config.d_model,
        intermediate_size=config.encoder_ffn_dim,
        num_ffn_matrices=2,
    )


def _decoder_size(config: Any) -> DecoderSize:
    return DecoderSize(
        num_layers=config.decoder_layers,
        num_heads=config.decoder_attention_heads,
        head_size=config.d_model // config.decoder_attention_heads,
        intermediate_size=config.decoder_ffn_dim,
        num_ffn_matrices=2,
        vocab_size=config.vocab_size,
    )


def _cross_projections(layer: Any) -> tuple[nn.Module, nn.Module]:
    return layer.encoder_attn.k_proj, layer.encoder_attn.v_proj


def _family(name: str, prefix: str, *, texts_like_sources: bool = True) -> Family:
    return Family(
        name=name,
        heads={f"{prefix}ForConditionalGeneration": TEXT_TO_TEXT},
        inputs=("input_ids", "attention_mask"),
        positions=None,
        stack="encoder.layers",
        wrap_ffns=_wrap_ffns,
        size=_size,
        max_length=lambda config: config.max_position_embeddings,
        clamp_positions=_clamp_positions,
        decoder=Decoder(
            stack="decoder.layers",
            cross_projections=_cross_projections,
            size=_decoder_size,
            max_length=lambda config: config.max_position_embeddings,
            texts_like_sources=texts_like_sources,
        ),
    )


BART, PEGASUS = _family("bart", "Bart"), _family("pegasus", "Pegasus")
MBART = _family("mbart", "MBart", texts_like_sources=False)
