"""ONNX Runtime as a target: on the CPU, and on NVIDIA GPUs through its providers."""

from dataclasses import dataclass
from typing import Any

from variator_export.bundle.files import BundleFiles
from variator_export.core.errors import UserError
from variator_export.core.precision import find_precision
from variator_export.engines.onnxruntime.compiled_bundle import profiles_of, require_no_tf32
from variator_export.engines.onnxruntime.kernels import check_quantized
from variator_export.engines.onnxruntime.providers import CPU, PROVIDERS, Provider
from variator_export.engines.target import Session, SessionOptions, Target


@dataclass(frozen=True)
class OnnxRuntimeTarget(Target):
    """One provider of ONNX Runtime.

    Attributes:
        provider: The provider.
    """

    name: str
    provider: Provider
    module: str = "onnxruntime"
    distributions: tuple[str, ...] = ("onnxruntime", "onnxruntime-gpu")

    @property
    def gpu(self) -> bool:  # type: ignore[override]
        """Whether the target runs on a GPU."""
        return self.provider.device != "cpu"

    def require(self, bundle: BundleFiles) -> None:
        """Refuse a precision in which ONNX Runtime computes no products on the provider's device."""
        precision = find_precision(bundle.manifest.precision)
        if self.provider is CPU and not precision.on_a_cpu:
            raise UserError(
                f"{bundle.path} is in {precision.name}, and ONNX Runtime has no {precision.name} products on "
                "a CPU.",
                "Choose the target openvino, run it on a GPU (onnxruntime-cuda), or build it with "
                "--precision float32.",
            )
        if self.provider is CPU and precision.quantizes:
            check_quantized(precision.name, bundle.manifest.opset)
        if self.gpu and precision.quantizes:
            raise UserError(
                f"{bundle.path} is in {precision.name}: ONNX Runtime's providers for GPUs would run its "
                "products on the CPU, or in floating point.",
                "Compile engines of int8-float16 or fp8 (--target tensorrt), or build the bundle with "
                "--precision float16 or bfloat16.",
            )

    def runs_graphs(self, bundle: BundleFiles, installed: str) -> bool:
        """Whether the installed ONNX Runtime lists the provider, and the provider can run the precision."""
        precision = find_precision(bundle.manifest.precision)
        can = not precision.quantizes if self.gpu else precision.on_a_cpu
        return self.provider.name in installed and can

    def open(self, bundle: BundleFiles, variant: str | None, options: SessionOptions) -> Session:
        """Open the graph of a variant, or the any-ratio graph."""
        from variator_export.engines.onnxruntime.graph import IoBindingRunner, require_provider
        from variator_export.engines.onnxruntime.session import (
            OnnxRuntimeSession,
            OnnxRuntimeVariantSession,
        )

        self.require(bundle)
        require_provider(self.provider)
        if self.provider.compiler is not None:
            require_no_tf32(bundle, self.name)
        how: dict[str, Any] = {"threads": options.threads, "provider": self.provider}
        session = (
            OnnxRuntimeSession(bundle, **how)
            if variant is None
            else OnnxRuntimeVariantSession(bundle, variant, **how)
        )
        if bundle.manifest.backbone.generates:
            from variator_export.engines.decoder import Decoder
            from variator_export.engines.text_session import TextSession

            backbone, decoders = bundle.manifest.backbone, {}
            for own in bundle.manifest.by_decoder(variant):
                part = backbone.decoder_part(own.assembly)
                profiles = profiles_of(bundle, self.provider.compiler, own.name, part)
                graph = bundle.graph(own.decoder_graph)
                runner = IoBindingRunner(graph, bind=True, profiles=profiles, **how)
                decoders[own.decoder_name] = Decoder(runner, backbone, own.assembly)
            return TextSession(bundle, session, decoders)
        return session


CPU_TARGET, CUDA_TARGET, TENSORRT_TARGET, TENSORRT_RTX_TARGET = (
    OnnxRuntimeTarget(name, provider) for name, provider in PROVIDERS.items()
)
