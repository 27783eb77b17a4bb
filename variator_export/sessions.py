"""The public API for a finished bundle. Needs neither torch nor transformers."""

from pathlib import Path

from variator_export.bundle.files import BundleFiles
from variator_export.core.json_file import read_json_object
from variator_export.engines.target import Session, SessionOptions
from variator_export.engines.targets import TARGETS
from variator_export.model.tokenizer import TextEncoder


class Bundle(BundleFiles):
    """A bundle on disk, with its sessions and its tokenizer.

    Attributes:
        path: The bundle's folder.
        manifest: The content of `manifest.json`.
    """

    @classmethod
    def load(cls, path: str | Path) -> "Bundle":
        """Open a bundle.

        Raises:
            UserError: A file is missing, is a link, or differs in size from the manifest. Hashes are
                checked when a file is used; `check_all` checks all of them.
        """
        return cls(path)

    def session(
        self,
        target: str = "onnxruntime",
        variant: int | str | None = None,
        *,
        threads: int | None = None,
        allow_unverified: bool = False,
        trust_host_code: bool = False,
        cuda_graphs: bool = False,
    ) -> Session:
        """Open a session.

        Args:
            target: The runtime: `onnxruntime` on the CPU, one of its providers for NVIDIA GPUs, or
                `tensorrt-rtx` or `tensorrt` with an engine of the bundle. The requested target runs or
                fails; there is no fallback to another one.
            variant: A ratio or a variant name, for a session that runs that variant. None for one session
                that runs every ratio, chosen per call: `session.run(inputs, ratio=4)`.
            threads: Threads per operator, `onnxruntime` only. None for `OMP_NUM_THREADS`, or all cores.
            allow_unverified: Run an engine that was built but never verified on a device.
            trust_host_code: Allow an engine that contains a program (TensorRT's lean runtime).
            cuda_graphs: Capture an engine's work once per shape and variant, and replay it.
                `tensorrt-rtx` and `tensorrt` only.

        Raises:
            UserError: The target cannot run on this machine, or the variant or engine does not exist.
        """
        options = SessionOptions(threads, allow_unverified, trust_host_code, cuda_graphs)
        name = None if variant is None else self.variant(variant).name
        return TARGETS.find(target).open(self, name, options)

    def labels(self) -> tuple[str, ...] | None:
        """Class names of a text classifier, by index; None for other tasks and for a single score."""
        if self.manifest.backbone.task != "text-classification":
            return None
        config = read_json_object(self.file("config.json"), "Build the bundle again.")
        named = config.get("id2label") or {}
        labels = tuple(str(named[key]) for key in sorted(named, key=int))
        several = config.get("problem_type") == "multi_label_classification"
        return labels if len(labels) > 1 and not several else None

    def text_encoder(self) -> TextEncoder:
        """The backbone's tokenizer."""
        for name in self.manifest.files:
            if "/" not in name and not name.endswith((".onnx", ".safetensors")):
                self.file(name)
        return TextEncoder(self.path)
