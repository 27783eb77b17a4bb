"""The model behind `model.py` in Triton's Python backend: one session that runs every ratio of a bundle.

Triton's own module `triton_python_backend_utils` exists only in its process, so it comes in as an argument.
"""

import json
import os
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from variator_export.core.errors import UserError
from variator_export.engines.base import Arrays
from variator_export.serving.triton.requests import Work, read_request
from variator_export.serving.triton.tensors import RATIO, answered
from variator_export.sessions import Bundle
from variator_export.text.tokenizer import TokenRow

# A row of an `execute` call: the number of its request, and its number in the request.
_Place = tuple[int, int]


class PythonModel:
    """A bundle, opened once for every ratio.

    Args:
        pb_utils: The module `triton_python_backend_utils`.
        args: What Triton gives to `initialize`.
        folder: The folder of the model's version. A relative path of the bundle starts there.

    Raises:
        pb_utils.TritonModelException: The bundle or its target cannot be opened, or a variant does not run.
    """

    def __init__(self, pb_utils: Any, args: Mapping[str, str], folder: Path) -> None:
        self._pb = pb_utils
        config = json.loads(args["model_config"])
        given = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self._batch_size = max(1, int(config["max_batch_size"]))
        if args["model_instance_kind"] == "GPU":
            _use_gpu(int(args["model_instance_device_id"]))
        try:
            self._open(given, folder)
        except UserError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def _open(self, given: Mapping[str, str], folder: Path) -> None:
        bundle = self._bundle = Bundle.load(folder / given["bundle"])
        self._backbone, self._answered = bundle.manifest.backbone, answered(bundle.manifest.backbone)
        session = bundle.session(
            given["target"],
            given.get("variant"),
            threads=int(given["threads"]) if "threads" in given else None,
            allow_unverified=given.get("allow_unverified") == "true",
            lean_runtime=Path(given["lean_runtime"]) if "lean_runtime" in given else None,
        )
        self._models = {name: bundle.text_model(name, session=session) for name in session.names}
        self._default = bundle.variant(given["default_variant"]).name
        # So that a model that cannot run is never ready, and the first request waits for nothing.
        row = TokenRow([self._backbone.pad_token_id] * 8, [0] * 8)
        for model in self._models.values():
            model.outputs([row])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests. Rows of one ratio run together, by length; a wrong request gets its own error.

        Args:
            requests: `pb_utils.InferenceRequest`, from one batch of Triton's.

        Returns:
            A `pb_utils.InferenceResponse` for each request, in their order.
        """
        works: dict[int, Work] = {}
        errors: dict[int, Any] = {}
        for number, request in enumerate(requests):
            if request.is_cancelled():
                errors[number] = self._pb.TritonError("The client cancelled.", self._pb.TritonError.CANCELLED)
                continue
            try:
                works[number] = read_request(
                    request, self._backbone, self._models[self._default], self._variant_of
                )
            except Exception as error:
                errors[number] = self._error(error)
        found = self._run(works, errors)
        return [
            self._pb.InferenceResponse(error=errors[number])
            if number in errors
            else self._response(request, works[number], found, number)
            for number, request in enumerate(requests)
        ]

    def _run(self, works: Mapping[int, Work], errors: dict[int, Any]) -> dict[_Place, Arrays]:
        """Run all rows, and add the requests that fail to `errors`."""
        groups: dict[str, list[_Place]] = {}
        for number, work in works.items():
            for row, variant in enumerate(work.variants):
                groups.setdefault(variant, []).append((number, row))
        found: dict[_Place, Arrays] = {}
        for variant, places in groups.items():
            try:
                found |= self._outputs(variant, places, works)
            except Exception:
                # One of the requests does not run: each alone, so that the others are not affected.
                for number in dict.fromkeys(number for number, _ in places):
                    own = [place for place in places if place[0] == number]
                    try:
                        found |= self._outputs(variant, own, works)
                    except Exception as error:
                        errors[number] = self._error(error)
        return found

    def _outputs(
        self, variant: str, places: Sequence[_Place], works: Mapping[int, Work]
    ) -> dict[_Place, Arrays]:
        rows = [works[number].rows[row] for number, row in places]
        outputs = self._models[variant].outputs(rows, self._batch_size, self._answered)
        return dict(zip(places, outputs, strict=True))

    def _response(self, request: Any, work: Work, found: Mapping[_Place, Arrays], number: int) -> Any:
        """The outputs that the request asks for, (rows, …) each."""
        rows = [found[number, row] for row in range(len(work.rows))]
        asked = set(request.requested_output_names())
        tensors = [
            self._pb.Tensor(name, self._stacked(name, rows, work.width))
            for name in self._answered
            if name in asked
        ]
        if RATIO in asked:
            ratios = [[self._bundle.variant(variant).ratio] for variant in work.variants]
            tensors.append(self._pb.Tensor(RATIO, np.array(ratios, np.int32)))
        return self._pb.InferenceResponse(output_tensors=tensors)

    def _stacked(self, name: str, rows: Sequence[Arrays], width: int) -> np.ndarray:
        """One output of all rows. Outputs with one row per token are filled with zeros after their tokens."""
        values = [row[name] for row in rows]
        if name in self._backbone.token_outputs:
            rest = [(0, 0)] * (values[0].ndim - 1)
            values = [np.pad(value, [(0, width - len(value)), *rest]) for value in values]
        return np.stack(values)

    def _variant_of(self, choice: int | str) -> str:
        """The name of the variant to run; the default for an empty name.

        Raises:
            UserError: The bundle has no such variant, or this model does not run it.
        """
        name = self._default if choice == "" else self._bundle.variant(choice).name
        if name not in self._models:
            raise UserError(f"This model runs {', '.join(self._models)}, not {choice!r}.")
        return name

    def _error(self, error: Exception) -> Any:
        """An error for one request; one that is not the client's fault is logged with its place."""
        kind = self._pb.TritonError
        if isinstance(error, UserError):
            return kind(str(error), kind.INVALID_ARG)
        self._pb.Logger.log_error("".join(traceback.format_exception(error)))
        return kind(f"variator-export failed: {type(error).__name__}: {error}", kind.INTERNAL)


def _use_gpu(device: int) -> None:
    """Show this process only the GPU of its instance. Triton runs each instance in a process of its own."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[device] if visible else str(device)
