"""In the place of Triton: its schema of configurations, and the module that its Python backend gives models.

The schema is the real one, from tritonclient. The rest behaves as the documentation of the Python backend
says: a request's tensors are gone after `execute`, a response is a list of tensors or an error, and only what
the configuration declares is taken or handed out.
"""

import importlib.util
import json
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from google.protobuf import json_format, text_format

_NUMPY = {"TYPE_INT32": np.int32, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32, "TYPE_STRING": np.object_}


def _load(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _schema() -> types.ModuleType:
    """The messages alone: `tritonclient.grpc` imports grpc."""
    if "triton_model_config" not in sys.modules:
        spec = importlib.util.find_spec("tritonclient")
        assert spec is not None, "tritonclient is one of the extra dev"
        assert spec.submodule_search_locations is not None
        folder = Path(next(iter(spec.submodule_search_locations)))
        sys.modules["triton_model_config"] = _load(
            "triton_model_config", folder / "grpc" / "model_config_pb2.py"
        )
    return sys.modules["triton_model_config"]


def parse_config(text: str) -> Any:
    """A ModelConfig from the text of a config.pbtxt; an unknown field is an error."""
    return text_format.Parse(text, _schema().ModelConfig())


class Tensor:
    """`pb_utils.Tensor`, on the CPU."""

    def __init__(self, name: str, array: np.ndarray) -> None:
        if array.dtype.type is np.str_:
            raise TritonModelError("Tensor dtype is not supported, use np.object_.")
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    """`pb_utils.TritonError`."""

    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class TritonModelError(Exception):
    """`pb_utils.TritonModelException`."""


class InferenceRequest:
    """`pb_utils.InferenceRequest`."""

    def __init__(
        self,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[str] = (),
        parameters: Mapping[str, object] | None = None,
        *,
        cancelled: bool = False,
    ) -> None:
        self.arrays = {name: np.array(array) for name, array in inputs.items()}
        self._outputs, self._cancelled = list(outputs), cancelled
        self._parameters = json.dumps(parameters) if parameters else ""

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self.arrays.items()]

    def requested_output_names(self) -> list[str]:
        return self._outputs

    def parameters(self) -> str:
        return self._parameters

    def is_cancelled(self) -> bool:
        return self._cancelled


class InferenceResponse:
    """`pb_utils.InferenceResponse`."""

    def __init__(self, output_tensors: Sequence[Tensor] = (), error: TritonError | None = None) -> None:
        self._tensors, self._error = list(output_tensors), error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def error(self) -> TritonError | None:
        return self._error


class Logger:
    """`pb_utils.Logger`."""

    lines: list[str] = []  # noqa: RUF012  # of all models of a process, as in Triton

    @classmethod
    def log_error(cls, line: str) -> None:
        cls.lines.append(line)


class Answer:
    """What a client gets: arrays by name, or an error."""

    def __init__(self, response: InferenceResponse) -> None:
        self.error = response.error()
        self.arrays = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}

    def __getitem__(self, name: str) -> np.ndarray:
        assert self.error is None, self.error.message()
        return self.arrays[name]


class Served:
    """A model of the Python backend, loaded from a repository."""

    def __init__(self, folder: Path, kind: str = "CPU") -> None:
        self.config = parse_config((folder / "config.pbtxt").read_text())
        assert (self.config.name, self.config.backend) == (folder.name, "python")
        utils = types.ModuleType("triton_python_backend_utils")
        for name in ("Tensor", "TritonError", "InferenceRequest", "InferenceResponse", "Logger"):
            setattr(utils, name, globals()[name])
        utils.TritonModelException = TritonModelError  # type: ignore[attr-defined]
        with mock.patch.dict(sys.modules, {utils.__name__: utils}):
            module = _load("1.model", folder / "1" / "model.py")
        config = json_format.MessageToDict(
            self.config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        self._model = module.TritonPythonModel()
        self._model.initialize(
            {
                "model_config": json.dumps(config),
                "model_instance_kind": kind,
                "model_instance_device_id": "0",
                "model_repository": str(folder),
                "model_version": "1",
                "model_name": folder.name,
            }
        )

    def infer(self, *requests: InferenceRequest) -> list[Answer]:
        """One batch of requests, as the dynamic batcher hands it over."""
        for request in requests:
            request._outputs = request._outputs or [output.name for output in self.config.output]
            for name, array in request.arrays.items():
                self._check(name, array, self.config.input)
        sizes = [len(next(iter(request.arrays.values()))) for request in requests]
        assert sum(sizes) <= self.config.max_batch_size
        responses = self._model.execute(list(requests))
        assert len(responses) == len(requests)
        answers = [Answer(response) for response in responses]
        for request, answer, rows in zip(requests, answers, sizes, strict=True):
            for array in request.arrays.values():
                array[...] = 0  # what a model keeps of a request is lost
            if answer.error is None:
                assert set(answer.arrays) == set(request.requested_output_names())
            for name, array in answer.arrays.items():
                assert len(array) == rows
                self._check(name, array, self.config.output)
        return answers

    def _check(self, name: str, array: np.ndarray, declared: Any) -> None:
        (found,) = (tensor for tensor in declared if tensor.name == name)
        assert array.dtype == _NUMPY[_schema().DataType.Name(found.data_type)], name
        assert array.ndim == len(found.dims) + 1, name
        assert all(dim in (-1, size) for dim, size in zip(found.dims, array.shape[1:], strict=True)), name
