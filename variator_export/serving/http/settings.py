"""Settings of the server."""

from dataclasses import dataclass

from variator_export.serving.scheduler import Limits

# The request header that asks for a variant, and the response header that names the ratios that ran.
RATIO_HEADER = "x-variator-ratio"
# The request header that bounds what an answer may lose.
MAX_LOSS_HEADER = "x-variator-max-loss"
# The response header with the mean loss of the variants that ran.
LOSS_HEADER = "x-variator-expected-loss"


@dataclass(frozen=True)
class ServerSettings:
    """Settings of the server, beside those of the model.

    Attributes:
        goal_ms: The latency goal of a request in milliseconds.
        policy: The policy: `backlog`, `slack` or `static`.
        static_variant: The ratio or variant of the policy `static`. None for the best quality.
        model_name: The name that requests use for the model. None for the bundle's own.
        api_keys: Keys, one of which a request must bear. Empty if none is needed.
        max_body_bytes: The largest body of a request.
        max_texts: The largest number of texts in a request.
        max_queue_rows: The largest number of texts that wait.
        max_batch_tokens: The largest number of padded tokens in a batch. None for what calibration found.
        max_batch_rows: The largest number of texts in a batch.
        max_connections: The largest number of open connections.
        refuse_late: Refuse requests that could not meet the goal.
        truncate: Truncate texts that are longer than the model's limit. Otherwise they are refused.
        receive_timeout_s: The time in which a request must have arrived.
        tokenizer_threads: The number of threads that tokenise.
    """

    goal_ms: float = 200.0
    policy: str = "backlog"
    static_variant: str | None = None
    model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 8 * 2**20
    max_texts: int = 2048
    max_queue_rows: int = 20_000
    max_batch_tokens: int | None = None
    max_batch_rows: int = 64
    max_connections: int = 4096
    refuse_late: bool = True
    truncate: bool = True
    receive_timeout_s: float = 10.0
    tokenizer_threads: int = 2

    def limits(self, max_batch_tokens: int) -> Limits:
        """The limits of the queue.

        Args:
            max_batch_tokens: What calibration found to be a full batch.
        """
        return Limits(
            self.goal_ms,
            self.max_batch_tokens or max_batch_tokens,
            self.max_batch_rows,
            self.max_queue_rows,
            self.refuse_late,
        )
