"""ELECTRA: the discriminator, and the generator for masked language modelling."""

from variator_export.model.families import bert_layers
from variator_export.model.families.base import Family, encoder_heads

ELECTRA = Family(
    name="electra",
    heads=encoder_heads("Electra"),
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    positions=bert_layers.absolute_positions,
    stack="encoder.layer",
    wrap_ffns=bert_layers.wrap_ffns,
    size=bert_layers.size,
    max_length=lambda config: config.max_position_embeddings,
    refuse=bert_layers.refuse_decoder,
)
