"""MPNet: BERT's layers with a relative position bias, and positions that skip padding."""

from variator_export.model.families import bert_layers
from variator_export.model.families.base import Family, encoder_heads

# The pad token's id, which transformers hard-codes for MPNet instead of reading it from the configuration.
_PADDING_IDX = 1

MPNET = Family(
    name="mpnet",
    heads=encoder_heads("MPNet", {"add_pooling_layer": False}),
    inputs=("input_ids", "attention_mask"),
    positions=lambda ids, config: bert_layers.padding_aware_positions(ids, config, _PADDING_IDX),
    stack="encoder.layer",
    wrap_ffns=bert_layers.wrap_ffns,
    size=bert_layers.size,
    max_length=lambda config: config.max_position_embeddings - _PADDING_IDX - 1,
)
