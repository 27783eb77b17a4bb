"""Other exports of the backbone, on ONNX Runtime as it comes."""

from pathlib import Path

from variator_export.benchmark.alternatives.setup import Setup
from variator_export.engines.base import Runner
from variator_export.engines.onnxruntime.alternatives import optimize_transformer, quantize_dynamically
from variator_export.engines.onnxruntime.graph import OnnxRuntimeRunner
from variator_export.graph.torch_baseline import export_plain


def torch_onnx(setup: Setup) -> Runner:
    """The export of torch.onnx."""
    return _open(setup, plain_graph(setup))


def optimizer(setup: Setup) -> Runner:
    """The export of torch.onnx after ONNX Runtime's transformer optimizer."""
    graph = setup.scratch / "optimized.onnx"
    if not graph.exists():
        config = setup.backbone.info.config
        optimize_transformer(
            plain_graph(setup),
            graph,
            model_type=config.model_type,
            num_heads=int(config.num_attention_heads),
            hidden_size=setup.backbone.info.size.hidden_size,
        )
    return _open(setup, graph)


def quantize_dynamic(setup: Setup) -> Runner:
    """The export of torch.onnx after ONNX Runtime's `quantize_dynamic`."""
    graph = setup.scratch / "quantized.onnx"
    if not graph.exists():
        quantize_dynamically(plain_graph(setup), graph)
    return _open(setup, graph)


def plain_graph(setup: Setup) -> Path:
    """The export of torch.onnx, made once."""
    graph = setup.scratch / "plain.onnx"
    return graph if graph.exists() else export_plain(setup.backbone, graph)


def _open(setup: Setup, graph: Path) -> Runner:
    return OnnxRuntimeRunner(graph, threads=setup.threads, as_it_comes=True)
