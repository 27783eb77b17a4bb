"""A finished bundle, for those who use it. Needs neither torch nor transformers."""

from pathlib import Path

from variator_export.bundle.files import BundleFiles
from variator_export.core.json_file import read_json_object
from variator_export.engines.target import Session, SessionOptions
from variator_export.engines.targets import TARGETS
from variator_export.model.tokenizer import TextEncoder


class Bundle(BundleFiles):
    """A bundle on disk: sessions and its tokenizer.

    Attributes:
        path: Its folder.
        manifest: The content of its manifest.
    """

    @classmethod
    def load(cls, path: str | Path) -> "Bundle":
        """Open a bundle.

        Raises:
            UserError: A file is missing, a link, or of another size than the manifest says. Hashes are
                compared when a file is used; `check_all` compares all of them.
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
            target: What runs it: `onnxruntime`, on the CPU, or one of its providers for NVIDIA GPUs; or
                `tensorrt-rtx` or `tensorrt`, with an engine of the bundle. What is asked for runs, or fails:
                no other one takes its place.
            variant: A ratio or the name of a variant: a session for that one. None: one session that runs
                every ratio, changed from call to call: `session.run(inputs, ratio=4)`.
            threads: Of one operator; None: `OMP_NUM_THREADS`, or all cores. Of `onnxruntime`.
            allow_unverified: Run an engine that was built and never verified on a device.
            trust_host_code: Let an engine bring a program of its own (TensorRT's lean runtime).
            cuda_graphs: Record an engine's work once for each shape and variant, and replay it. Of
                `tensorrt-rtx` and `tensorrt`.

        Raises:
            UserError: The target cannot run here, or there is no such variant or engine.
        """
        options = SessionOptions(threads, allow_unverified, trust_host_code, cuda_graphs)
        name = None if variant is None else self.variant(variant).name
        return TARGETS.find(target).open(self, name, options)

    def labels(self) -> tuple[str, ...] | None:
        """The classes of a text classifier by their index; None for other tasks and for a single score."""
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
