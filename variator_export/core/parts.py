"""Names of the parts of a model (`bundle.parts` describes a part)."""

# The name of the part in a one-part model.
MODEL = "model"
# The parts of a model that generates text.
ENCODER, DECODER = "encoder_model", "decoder_with_past_model"
