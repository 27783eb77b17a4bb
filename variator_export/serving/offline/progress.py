"""Progress of a run: the command line shows it, a library call is silent."""


class EmbedProgress:
    """Counts the texts and tokens of a run. This base class shows nothing.

    Attributes:
        texts: Texts embedded so far in this run.
        tokens: Their tokens, without padding.
        resumed_texts: Texts that an earlier run embedded.
        expected_texts: The number of texts in the input: an estimate until its end is read. None if unknown.
    """

    def __init__(self) -> None:
        self.texts = 0
        self.tokens = 0
        self.resumed_texts = 0
        self.expected_texts: int | None = None

    def opened(self) -> None:
        """Called when the session, or the first one of several, is open."""

    def advanced(self, texts: int, tokens: int) -> None:
        """Called after each batch with its number of texts and of tokens."""
        self.texts += texts
        self.tokens += tokens

    def assembling(self) -> None:
        """Called when all texts are embedded, before the parts are put together."""
