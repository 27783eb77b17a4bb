"""OpenVINO as a target: the graphs of each ratio on a CPU."""

from dataclasses import dataclass

from variator_export.bundle.files import BundleFiles
from variator_export.core.errors import UserError
from variator_export.engines.openvino.runner import HINTS
from variator_export.engines.target import Session, SessionOptions, Target


@dataclass(frozen=True)
class OpenVinoTarget(Target):
    """OpenVINO on a CPU."""

    name: str = "openvino"
    module: str = "openvino"
    distributions: tuple[str, ...] = ("openvino",)
    gpu: bool = False

    def require(self, bundle: BundleFiles) -> None:
        """Refuse float16, which is slower than float32 here, and quantisations that OpenVINO cannot run.

        Raises:
            UserError: OpenVINO does not run the bundle's precision.
        """
        bundle.refuse_decoder("the target openvino")
        precision = bundle.manifest.precision
        if precision not in HINTS:
            raise UserError(
                f"{bundle.path} is in {precision}; OpenVINO runs bundles in {', '.join(HINTS)}.",
                "Choose the target onnxruntime, or build it with --precision int8-static or bfloat16.",
            )

    def runs_graphs(self, bundle: BundleFiles, installed: str) -> bool:
        """Whether the probe lists the CPU, and its capability for the precision."""
        precision = bundle.manifest.precision
        return "CPU" in installed and precision in HINTS and (precision != "bfloat16" or "BF16" in installed)

    def open(self, bundle: BundleFiles, variant: str | None, options: SessionOptions) -> Session:
        """Open the graph of a variant, or the graphs of all variants."""
        from variator_export.engines.openvino.session import OpenVinoSession

        self.require(bundle)
        return OpenVinoSession(bundle, variant, threads=options.threads)


OPENVINO = OpenVinoTarget()
