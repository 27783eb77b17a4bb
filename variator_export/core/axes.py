"""Names of the axes whose sizes a caller chooses, and of the tensors that a decoder reads."""

from collections.abc import Mapping, Sequence

# The shape of each input, by name.
InputShapes = Mapping[str, Sequence[int]]

BATCH, LENGTH = "batch_size", "sequence_length"
# The mask of the encoder's tokens, as an input of the decoder.
ENCODER_MASK = "encoder_attention_mask"
# The tokens that a decoder has taken so far.
PAST_LENGTH = "past_sequence_length"

# Keys and values of a decoder layer, (batch_size, heads, tokens, head_size), by Optimum's names: of the
# decoder's own tokens and of the encoder's, as outputs (`present`) and as inputs (`past_key_values`).
_PRESENT, _PAST = "present", "past_key_values"
KINDS = ("key", "value")


def present_name(layer: object, stack: str, kind: str) -> str:
    """The output with keys or values of a decoder layer, of the stack `encoder` or `decoder`.

    Args:
        layer: The layer's number; in the graph of all assemblies, the layers that a module replaces.
        stack: The stack whose tokens the keys and values are of.
        kind: `key` or `value`.
    """
    return f"{_PRESENT}.{layer}.{stack}.{kind}"


def past_name(layer: int, stack: str, kind: str) -> str:
    """The input with keys or values of a decoder layer, of the stack `encoder` or `decoder`."""
    return f"{_PAST}.{layer}.{stack}.{kind}"


def present_names(layers: int, stack: str) -> tuple[str, ...]:
    """The outputs with keys and values of a stack, in the order of the layers."""
    return tuple(present_name(layer, stack, kind) for layer in range(layers) for kind in KINDS)


def past_by_layer(layers: int) -> tuple[str, ...]:
    """The inputs with keys and values of both stacks, layer by layer, as Optimum fills them."""
    return tuple(
        past_name(layer, stack, kind)
        for layer in range(layers)
        for stack in ("decoder", "encoder")
        for kind in KINDS
    )


def past_names(layers: int, stack: str) -> tuple[str, ...]:
    """The inputs with keys and values of a stack, in the order of the layers."""
    return tuple(past_name(layer, stack, kind) for layer in range(layers) for kind in KINDS)


def is_key_or_value(output: str) -> bool:
    """Whether an output is keys or values of a decoder layer."""
    return output.startswith(f"{_PRESENT}.")


def token_axis(output: str) -> int:
    """The axis of tokens in an output with one row per token: after the heads for keys and values."""
    return 2 if is_key_or_value(output) else 1
