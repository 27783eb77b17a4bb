"""From texts to generated texts, for one session that generates."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from variator_export.bundle.manifest import BackboneEntry
from variator_export.core.errors import UserError
from variator_export.core.parts import DECODER
from variator_export.engines.batches import BATCH_SIZE, batches_by_length
from variator_export.engines.target import GeneratingSession, Session
from variator_export.text.tokenizer import TextEncoder, TokenRow, pad_rows

# What a tokenizer shows for bytes that are no character yet.
_UNFINISHED = "\ufffd"


@dataclass(frozen=True)
class TextToText:
    """A model from text to generated text.

    Attributes:
        session: The session.
        variant: The variant to run.
        encoder: The model's tokenizer.
        backbone: The model's inputs.
    """

    session: GeneratingSession
    variant: str
    encoder: TextEncoder
    backbone: BackboneEntry

    def generate(
        self, rows: Sequence[TokenRow], batch_size: int = BATCH_SIZE, **settings: Any
    ) -> list[list[str]]:
        """Generate texts from rows of tokens, in batches of similar length.

        Args:
            rows: The rows.
            batch_size: The largest number of rows in a batch.
            **settings: Settings of the generation (`GenerationSettings`).

        Returns:
            The texts of each row, best first, without special tokens.

        Raises:
            UserError: A setting does not exist, or contradicts another one.
        """
        found: dict[int, list[str]] = {}
        for batch in batches_by_length(rows, batch_size):
            inputs = self._inputs([rows[index] for index in batch])
            sequences = self.session.generate(inputs, self.variant, **settings)
            for index, tokens in zip(batch, sequences.tokens, strict=True):
                found[index] = [self.encoder.plain(sequence.tolist()) for sequence in tokens]
        return [found[index] for index in range(len(rows))]

    def stream(self, row: TokenRow, **settings: Any) -> Iterator[str]:
        """Generate a text piece by piece; errors are those of `generate`.

        Yields:
            Pieces that together are the text. A character whose bytes are not all there is held back.
        """
        ids: list[int] = []
        shown = text = ""
        for tokens in self.session.stream(self._inputs([row]), self.variant, **settings):
            ids.append(int(tokens[0]))
            text = self.encoder.plain(ids)
            if text.startswith(shown) and not text.endswith(_UNFINISHED) and len(text) > len(shown):
                yield text[len(shown) :]
                shown = text
        if text.startswith(shown) and len(text) > len(shown):
            yield text[len(shown) :]

    def _inputs(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        return pad_rows(rows, self.backbone.inputs, self.backbone.pad_token_id)


def text_to_text(session: Session, variant: str, encoder: TextEncoder, backbone: BackboneEntry) -> TextToText:
    """The model from text to text, of a session.

    Raises:
        UserError: The model does not generate text.
    """
    if not isinstance(session, GeneratingSession):
        raise UserError(
            f"The model does not generate text: it has no part {DECODER}.",
            "Use embed, predict, or session().run for its outputs.",
        )
    return TextToText(session, variant, encoder, backbone)


def one_text(texts: Iterable[Sequence[str]]) -> list[str]:
    """The best text of each row."""
    return [row[0] for row in texts]
