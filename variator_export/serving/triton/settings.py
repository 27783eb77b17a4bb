"""What a user chooses about a model in Triton: how requests wait, and how many instances there are."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from variator_export.core.errors import UsageError
from variator_export.serving.triton.prototext import Symbol


@dataclass(frozen=True)
class Scheduling:
    """How Triton batches requests for a model and runs it.

    Attributes:
        max_batch_size: The largest number of rows in a batch. None for the default of the backend.
        preferred_batch_sizes: Sizes at which Triton runs a batch at once, although requests might still
            come. Empty for none.
        max_queue_delay_ms: How long a request may wait for others to join its batch.
        queue_timeout_ms: How long a request may wait before it is refused. None for no limit. A client may
            ask for less.
        max_queue_size: The number of waiting requests from which on requests are refused. None for no limit.
        priority_levels: The number of priorities; 1 is the highest. 0 for none. A request that names none has
            the lowest.
        instances: Instances for each device.
        gpus: The GPUs that have instances. Empty for all.
    """

    max_batch_size: int | None = None
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_ms: float = 0.0
    queue_timeout_ms: float | None = None
    max_queue_size: int | None = None
    priority_levels: int = 0
    instances: int = 1
    gpus: tuple[int, ...] = ()

    def batch_size(self, default: int, limit: int | None = None) -> int:
        """The largest batch.

        Args:
            default: The value if the user chose none.
            limit: What the engines of the model take. None if there is no limit.

        Raises:
            UsageError: The user's choice is above the limit, or below a preferred size.
        """
        size = self.max_batch_size or (default if limit is None else min(default, limit))
        if limit is not None and size > limit:
            raise UsageError(
                f"--max-batch-size {size} is more than the engines take: their profiles end at {limit}.",
                f"--max-batch-size {limit}, or compile engines with other profiles",
            )
        if (largest := max(self.preferred_batch_sizes, default=0)) > size:
            raise UsageError(
                f"--preferred-batch-size {largest} is more than the largest batch, {size}.",
                f"--max-batch-size {largest}, or a smaller preferred size",
            )
        return size

    def dynamic_batching(self) -> dict[str, Any]:
        """The fields of `dynamic_batching`."""
        fields: dict[str, Any] = {
            "preferred_batch_size": sorted(self.preferred_batch_sizes),
            "max_queue_delay_microseconds": _microseconds(self.max_queue_delay_ms),
        }
        if self.priority_levels:
            fields["priority_levels"] = self.priority_levels
            fields["default_priority_level"] = self.priority_levels
        policy: dict[str, Any] = {}
        if self.queue_timeout_ms is not None:
            policy = {
                "timeout_action": Symbol("REJECT"),
                "default_timeout_microseconds": _microseconds(self.queue_timeout_ms),
                "allow_timeout_override": True,
            }
        if self.max_queue_size is not None:
            policy["max_queue_size"] = self.max_queue_size
        if policy:
            fields["default_queue_policy"] = policy
        return fields

    def instance_group(self, *, gpu: bool) -> dict[str, Any]:
        """The fields of the one `instance_group`.

        Raises:
            UsageError: GPUs are named for a model that runs on the CPU.
        """
        if self.gpus and not gpu:
            raise UsageError(
                "--gpu names a GPU, and the model runs on the CPU.",
                "Leave it out, or choose another --target.",
            )
        kind = Symbol("KIND_GPU" if gpu else "KIND_CPU")
        return {"count": self.instances, "kind": kind, "gpus": list(self.gpus)}


def string_parameters(values: Mapping[str, str]) -> dict[str, Mapping[str, str]]:
    """The values of the map `parameters`."""
    return {key: {"string_value": value} for key, value in values.items()}


def _microseconds(milliseconds: float) -> int:
    return round(milliseconds * 1000)
