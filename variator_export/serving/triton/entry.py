"""A bundle of variator-export in Triton's Python backend. Installed there: variator-export[onnxruntime]."""

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils  # type: ignore[import-not-found]  # Triton has it

from variator_export.serving.triton.python_model import PythonModel


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle."""
        self._model = PythonModel(pb_utils, args, Path(__file__).parent)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request."""
        return self._model.execute(requests)
