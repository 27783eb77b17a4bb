"""What users of ONNX Runtime do with a graph that torch.onnx exported, for comparison in `bench`."""

import contextlib
import io
import logging
from pathlib import Path

from variator_export.core.environment import require
from variator_export.core.errors import UserError


def optimize_transformer(
    graph: Path, output: Path, *, model_type: str, num_heads: int, hidden_size: int
) -> Path:
    """Optimize a graph with onnxruntime's own transformer optimizer, as its users would.

    The optimizer runs at its own default level for the model type. Without ONNX Runtime's own passes before
    it, the optimizer leaves T5's layer norms unfused.

    Args:
        graph: The graph as `torch.onnx` exported it (`graph.torch_baseline`); our own graphs leave nothing to
            fuse.
        output: The file to write.
        model_type: Model type from the config; the optimizer treats an unknown type as BERT.
        num_heads: Number of attention heads; the optimizer needs the number to fuse the attention.
        hidden_size: Hidden size of the model.

    Raises:
        UserError: The optimizer fails, or needs a package that is not installed.
    """
    require("onnx", "export", "ONNX Runtime's transformer optimizer")
    try:
        from onnxruntime.transformers.optimizer import MODEL_TYPES, optimize_model

        with contextlib.redirect_stdout(io.StringIO()):  # the optimizer prints notes about the graph
            optimized = optimize_model(
                str(graph),
                model_type=model_type if model_type in MODEL_TYPES else "bert",
                num_heads=num_heads,
                hidden_size=hidden_size,
            )
            optimized.save_model_to_file(str(output), use_external_data_format=True)
    except Exception as error:  # the optimizer raises exceptions of any type
        raise UserError(
            f"ONNX Runtime's transformer optimizer fails on {graph}: {error}",
            "Leave it out: choose the others with --runtime.",
        ) from error
    return output


def quantize_dynamically(graph: Path, output: Path) -> Path:
    """Quantise a graph's products with onnxruntime's `quantize_dynamic`, one scale per tensor of activations.

    ONNX Runtime folds the graph first: `quantize_dynamic` finds no constant weight behind a Transpose. Only
    MatMul is quantised: the table of embeddings stays as it is.

    Args:
        graph: The graph as `torch.onnx` exported it (`graph.torch_baseline`).
        output: The file to write.

    Raises:
        UserError: The quantisation fails, or needs a package that is not installed.
    """
    require("onnx", "export", "ONNX Runtime's quantisation")
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # Beside the graph, whose external data the folded graph refers to.
    folded = graph.with_name(f"{graph.stem}.folded.onnx")
    options.optimized_model_filepath = str(folded)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        root.setLevel(logging.ERROR)  # it advises, on the root logger, to do what was done above
        onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        quantize_dynamic(
            folded,
            output,
            op_types_to_quantize=["MatMul"],
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    except Exception as error:  # it raises exceptions of any type
        raise UserError(
            f"ONNX Runtime's quantize_dynamic fails on {graph}: {error}",
            "Leave it out: choose the others with --runtime.",
        ) from error
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers  # its advice sets up logging for the whole process
    return output
