"""Program for a reproduction folder that builds and runs an engine without this package."""

from collections.abc import Mapping
from typing import Any

_TENSORRT = '''"""Build an engine of one module and compare it with eager PyTorch: python reproduce.py"""

import numpy as np
import MODULE as trt
import torch
from safetensors.torch import load_file

runtime = f"MODULE {trt.__version__}"
inputs = load_file("inputs.safetensors")
expected = load_file("expected.safetensors")["output"].numpy()

log = trt.Logger(trt.Logger.WARNING)
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
if not parser.parse_from_file("graph.onnx"):
    raise SystemExit("\\n".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
DECOMPOSED
config = builder.create_builder_config()
OPTIONS
profile = builder.create_optimization_profile()
for i in range(network.num_inputs):
    tensor = network.get_input(i)
    if -1 in tuple(tensor.shape):
        profile.set_shape(tensor.name, *[tuple(inputs[tensor.name].shape)] * 3)
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
if plan is None:
    raise SystemExit("no engine was built")
if not torch.cuda.is_available():
    raise SystemExit(f"an engine was built; PyTorch {torch.__version__} sees no GPU to run it on")

opener = trt.Runtime(log)
engine = opener.deserialize_cuda_engine(plan)
context = engine.create_execution_context()
tensors = {name: tensor.cuda() for name, tensor in inputs.items()}
for name, tensor in tensors.items():
    context.set_input_shape(name, tuple(tensor.shape))
    context.set_tensor_address(name, tensor.data_ptr())
names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
(output,) = (name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT)
types = {"FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16}
dtype = types[engine.get_tensor_dtype(output).name]
result = torch.empty(tuple(context.get_tensor_shape(output)), dtype=dtype, device="cuda")
context.set_tensor_address(output, result.data_ptr())
stream = torch.cuda.Stream()
stream.wait_stream(torch.cuda.current_stream())
if not context.execute_async_v3(stream.cuda_stream):
    raise SystemExit("the engine does not run")
stream.synchronize()
found = result.float().cpu().numpy()
'''


# For an engine whose builder had no fused kernel for attention.
_DECOMPOSED = """for i in range(network.num_layers):
    layer = network.get_layer(i)
    if layer.type == trt.LayerType.ATTENTION_INPUT:
        layer.__class__ = trt.IAttentionBoundaryLayer
        layer.attention.decomposable = True
"""


# For an engine whose attention adds its products in float32.
_IN_FLOAT32 = """# The engine has casts to float32 around attention, and a bool mask. This one is built as
# exported: attention in float16 adds its products in float16.
"""
_FORMS = {"decomposed": _DECOMPOSED, "fused-float32": _IN_FLOAT32}


def script_for_tensorrt(module: str, sidecar: Mapping[str, Any]) -> str:
    """The program that builds and runs an engine of `graph.onnx`.

    Args:
        module: TensorRT's Python module.
        sidecar: Sidecar of the engine that failed, which holds its build options.
    """
    built = sidecar["options"]
    options = [] if built["tf32"] else ["config.clear_flag(trt.BuilderFlag.TF32)"]
    if (level := built["optimization_level"]) is not None:
        options.append(f"config.builder_optimization_level = {level}")
    if (workspace := built["workspace_mib"]) is not None:
        options.append(f"config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, {workspace} << 20)")
    if (compatibility := built["hardware_compatibility"]) != "none":
        level = compatibility.replace("-", "_").upper()
        options.append(f"config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.{level}")
    decomposed = _FORMS.get(sidecar.get("attention") or "", "")
    return (
        _TENSORRT.replace("DECOMPOSED\n", decomposed)
        .replace("MODULE", module)
        .replace("OPTIONS\n", "".join(f"{o}\n" for o in options))
    )
