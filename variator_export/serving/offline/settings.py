"""Settings of a run, and the identity by which a later run knows the parts of an unfinished one."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variator_export.bundle.files import BundleFiles
from variator_export.bundle.manifest import MANIFEST_NAME
from variator_export.core.environment import DISTRIBUTION, default_threads, platform_tag, versions
from variator_export.core.hashing import sha256_file
from variator_export.engines.batches import BATCH_SIZE
from variator_export.engines.targets import TARGETS
from variator_export.serving.offline.formats import OutputFormat

# Texts of a chunk. Longer chunks make batches of more similar length; shorter ones lose less in a kill.
CHUNK_SIZE = 4096


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class EmbedSettings:
    """How texts become vectors.

    Attributes:
        bundle: The bundle's folder.
        variant: The name of the variant to run.
        target: The runtime, as for `Bundle.session`.
        threads: Threads of one process on a CPU; None as for `Bundle.session`.
        prompt_name: The prompt to put before each text; None for the model's default prompt.
        prompt: The text of a prompt, instead of its name; empty for no prompt.
        truncate: Whether to truncate texts to the model's limit, or to refuse longer ones.
        normalize: Whether to scale each vector to length 1, where the model does not do it itself.
        batch_size: The largest number of texts to run at once.
        chunk_size: Number of texts in a chunk.
        with_text: Whether the output repeats the texts.
        allow_unverified: As for `Bundle.session`.
        lean_runtime: As for `Bundle.session`.
    """

    bundle: Path
    variant: str
    target: str = "onnxruntime"
    threads: int | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    truncate: bool = True
    normalize: bool = False
    batch_size: int = BATCH_SIZE
    chunk_size: int = CHUNK_SIZE
    with_text: bool = False
    allow_unverified: bool = False
    lean_runtime: Path | None = None

    def identity(self, bundle: BundleFiles, output: OutputFormat) -> dict[str, Any]:
        """Everything that the bytes of the output depend on, beside the texts and the machine.

        Threads are among it: ONNX Runtime cuts a product into blocks by their number, which moves the last
        bit.
        """
        return {
            "bundle": sha256_file(bundle.path / MANIFEST_NAME),
            "variant": self.variant,
            "target": self.target,
            "threads": self.threads or default_threads() or available_cores(),
            "prompt": self.prompt_name if self.prompt is None else [self.prompt],
            "truncate": self.truncate,
            "normalize": self.normalize,
            "batch size": self.batch_size,
            "chunk size": self.chunk_size,
            "output": output.suffix,
            "text in the output": self.with_text,
            "platform": platform_tag(),
            **versions(DISTRIBUTION, "tokenizers", "numpy", *output.distributions),
            **TARGETS.find(self.target).versions(),
        }
