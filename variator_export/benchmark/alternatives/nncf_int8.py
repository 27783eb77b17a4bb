"""OpenVINO in int8: NNCF's post-training quantisation of the export of torch.onnx."""

from variator_export.benchmark.alternatives.exports import plain_graph
from variator_export.benchmark.alternatives.setup import Setup, attempt
from variator_export.engines.base import Runner
from variator_export.engines.openvino.runner import OpenVinoRunner, openvino_core

_NAME = "openvino-nncf"


def openvino_nncf(setup: Setup) -> Runner:
    """Quantise the backbone with NNCF, in its preset for transformers, and open it in OpenVINO."""
    graph = setup.scratch / "nncf.xml"
    if not graph.exists():
        plain = plain_graph(setup)
        with attempt(_NAME, "nncf", "NNCF cannot quantise the backbone"):
            import nncf
            import openvino

            examples = [dict(inputs) for inputs in setup.calibration]
            quantized = nncf.quantize(
                openvino_core().read_model(plain),
                nncf.Dataset(examples),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(examples),
            )
            openvino.save_model(quantized, graph, compress_to_fp16=False)
    return OpenVinoRunner(graph, threads=setup.threads)
