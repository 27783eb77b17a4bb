"""Opens bundles with Optimum; runs in an environment that has Optimum and not this project.

    python open_in_optimum.py job.json OUTPUT

Writes OUTPUT/outputs/BUNDLE/VARIANT.safetensors, a tensor WAY/CASE/inputs|outputs/NAME for every call of a
model, and OUTPUT/opened.json: the versions, what was printed, what failed. Judges nothing: check_optimum.py
does, in the other environment.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import optimum.onnxruntime as ort
import sentence_transformers
import torch
import transformers
from safetensors.numpy import load_file, save_file

VERSIONS = (
    "optimum-onnx",
    "optimum",
    "sentence-transformers",
    "transformers",
    "tokenizers",
    "onnxruntime",
    "onnx",
    "torch",
    "numpy",
    "safetensors",
)
# A note of transformers' pipeline, whatever the model.
EXPECTED_OUTPUT = "Device set to use cpu"
# The optimizer that our own session leaves out, and how a session is told by its options.
DISABLE = ("optimization.disable_specified_optimizers", "SkipLayerNormFusion")
TEXTS = ["The ferry leaves at seven.", "No.", "She read every letter again, from the first to the last."]


def main() -> None:
    """Do the job."""
    job, output = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    assert importlib.util.find_spec("variator_export") is None, "this is to show that it is not needed"
    torch.set_num_threads(2)
    opened = {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in VERSIONS},
        "bundles": [open_bundle(bundle, output) for bundle in job["bundles"]],
        "tokenizers": [open_tokenizer(item, job["tokenizer_texts"]) for item in job["tokenizers"]],
    }
    (output / "opened.json").write_text(json.dumps(opened, indent=2))


class Attempts:
    """Tries things one after the other; what fails or is printed is written down."""

    def __init__(self) -> None:
        self.printed: dict[str, list[str]] = {}
        self.failed: dict[str, str] = {}

    def __call__(self, name: str, function: Callable[[], Any]) -> Any:
        """The function's result; None if it failed."""
        result = None
        with captured_stderr() as lines:
            try:
                result = function()
            except Exception as error:  # whatever it is, it is the finding
                self.failed[name] = f"{type(error).__name__}: {error}"
        if lines := [line for line in lines if line != EXPECTED_OUTPUT]:
            self.printed[name] = lines
        return result


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """What Python, transformers' and Optimum's logging and ONNX Runtime itself write to stderr."""
    lines: list[str] = []
    with tempfile.TemporaryFile() as file, warnings.catch_warnings():
        warnings.simplefilter("always")
        for category in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning, ImportWarning):
            warnings.simplefilter("ignore", category)  # as Python's own default
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            lines += [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]


class Calls:
    """Every call of a model with its inputs and outputs."""

    def __init__(self) -> None:
        self.tensors: dict[str, np.ndarray] = {}

    def run(self, way: str, case: str, model: Any, inputs: dict[str, Any]) -> None:
        """Call a model and keep what went in and came out."""
        self.keep(way, case, model, inputs, model(**inputs))

    def keep(self, way: str, case: str, model: Any, inputs: dict[str, Any], outputs: Any) -> None:
        """Keep one call. Optimum gives a graph zeros for token types that it was not given."""
        zeros = np.zeros_like(as_array(inputs["input_ids"]))
        for name in model.input_names:
            value = inputs.get(name)
            self.tensors[f"{way}/{case}/inputs/{name}"] = zeros if value is None else as_array(value)
        for name, value in outputs.items():
            self.tensors[f"{way}/{case}/outputs/{name}"] = as_array(value)


def as_array(value: Any) -> np.ndarray:
    """A tensor or array as an array of its own."""
    return np.array(value)


def open_bundle(bundle: dict[str, Any], output: Path) -> dict[str, Any]:
    """Every way to open every graph of one bundle."""
    variants = {}
    for variant in bundle["variants"]:
        attempts, calls = Attempts(), Calls()
        saved = output / "saved" / bundle["name"] / variant["name"]
        open_variant(bundle, variant, attempts, calls, saved)
        path = output / "outputs" / bundle["name"] / f"{variant['name']}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(array) for name, array in calls.tensors.items()}, path)
        variants[variant["name"]] = {"printed": attempts.printed, "failed": attempts.failed}
    return {
        "name": bundle["name"],
        "variants": variants,
        "limits": limits(bundle),
        "sentence_transformers": open_as_sentence_transformer(bundle),
    }


def open_as_sentence_transformer(bundle: dict[str, Any]) -> dict[str, Any]:
    """Embeddings of the bundle's texts by variant, with sentence-transformers; empty if it has no modules."""
    folder, found = Path(bundle["folder"]), {}
    if not (folder / "modules.json").is_file():
        return {}
    for variant in bundle["variants"]:
        options = {"file_name": variant["file"], "provider": "CPUExecutionProvider"}
        model = sentence_transformers.SentenceTransformer(
            str(folder), backend="onnx", model_kwargs=options, local_files_only=True
        )
        found[variant["name"]] = model.encode(bundle["embedded_texts"]).tolist()
    return found


def open_variant(
    bundle: dict[str, Any], variant: dict[str, Any], attempts: Attempts, calls: Calls, saved: Path
) -> None:
    """Every way to open one graph."""
    model_class = getattr(ort, bundle["class"])
    cases = read_cases(Path(bundle["folder"]) / variant["reference"])

    def opened(folder: str | Path, **options: Any) -> Any:
        return model_class.from_pretrained(
            folder, file_name=variant["file"], provider="CPUExecutionProvider", **options
        )

    def run_all(way: str, convert: Callable[[np.ndarray], Any] = torch.from_numpy, **options: Any) -> Any:
        model = opened(bundle["folder"], **options)
        for case, inputs in cases.items():
            calls.run(way, case, model, {name: convert(array) for name, array in inputs.items()})
        return model

    def run_saved(way: str, folder: Path) -> None:
        calls.run(way, "real text", opened(folder), as_tensors(cases["real text"]))

    def tokenize(tokenizer: Any, model: Any) -> None:
        for case, texts in bundle["texts"].items():
            limit = {"truncation": True, "max_length": bundle["max_length"]} if bundle["max_length"] else {}
            inputs = tokenizer(texts, padding=True, return_tensors="pt", **limit)
            calls.run("tokenizer", case, model, dict(inputs))

    model = attempts("default", lambda: run_all("default"))
    attempts("io_binding", lambda: run_all("io_binding", use_io_binding=True))
    attempts("numpy", lambda: run_all("numpy", np.asarray))
    attempts("same_optimizers", lambda: run_all("same_optimizers", session_options=same_optimizers()))
    if model is None:
        return
    tokenizer = attempts("tokenizer", lambda: transformers.AutoTokenizer.from_pretrained(bundle["folder"]))
    if tokenizer is not None:
        attempts("tokenizer", lambda: tokenize(tokenizer, model))
        attempts("pipeline", lambda: run_pipeline(bundle["task"], model, tokenizer, calls))
    if attempts("save_pretrained", lambda: model.save_pretrained(saved) or True):
        attempts("saved", lambda: run_saved("saved", saved))
        shutil.copytree(Path(bundle["folder"]) / "plugins", saved / "plugins")
        attempts("saved_with_plugins", lambda: run_saved("saved_with_plugins", saved))
    if bundle["sentence_embedding"]:
        attempts("custom_tasks", lambda: run_custom(bundle["folder"], variant["file"], cases, calls))


def as_tensors(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Arrays as torch tensors."""
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def same_optimizers() -> onnxruntime.SessionOptions:
    """Session options with which ONNX Runtime runs the same operators as our own session."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*DISABLE)
    return options


def read_cases(reference: Path) -> dict[str, dict[str, np.ndarray]]:
    """The inputs of a stored reference by case and name."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    for key, array in load_file(reference).items():
        case, part, name = key.split("/")
        if part == "inputs":
            cases.setdefault(case, {})[name] = array
    return cases


def run_pipeline(task: str, model: Any, tokenizer: Any, calls: Calls) -> None:
    """transformers' pipeline of a task, several texts at once; what it gives the model is kept."""
    forward, count = model.forward, 0

    @functools.wraps(forward)  # the pipeline looks at its parameters
    def keeping(**inputs: Any) -> Any:
        nonlocal count
        outputs = forward(**inputs)
        calls.keep("pipeline", f"call {count}", model, inputs, outputs)
        count += 1
        return outputs

    model.forward = keeping
    try:
        run = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
        if task == "question-answering":
            answers = [run(question="When does it leave?", context=text) for text in (TEXTS[0], TEXTS[2])]
        elif task == "fill-mask":
            answers = run([f"{tokenizer.mask_token} {text}" for text in TEXTS], batch_size=3)
        else:
            answers = run(TEXTS, batch_size=3)
    finally:
        del model.forward
    if not count or len(answers) < 2:
        raise AssertionError(f"the pipeline made {count} calls and {len(answers)} answers")


def run_custom(folder: str, file: str, cases: dict[str, Any], calls: Calls) -> None:
    """The class that gives every output of a graph, `sentence_embedding` too."""
    model = ort.ORTModelForCustomTasks.from_pretrained(folder, file_name=file)
    for case, inputs in cases.items():
        calls.run("custom_tasks", case, model, as_tensors(inputs))


def limits(bundle: dict[str, Any]) -> dict[str, Any]:
    """What Optimum does where a bundle is used as it is not meant to be: a fact each, not judged."""
    attempts, model_class = Attempts(), getattr(ort, bundle["class"])

    def call(file: str, length: int) -> str:
        ids = torch.full((1, length), 7)
        model_class.from_pretrained(bundle["folder"], file_name=file)(
            input_ids=ids, attention_mask=torch.ones_like(ids)
        )
        return "runs"

    chosen = attempts("no file_name", lambda: model_class.from_pretrained(bundle["folder"]))
    found: dict[str, Any] = {
        "without_file_name": {
            "took": None if chosen is None else chosen.path.name,
            "warned": "no file_name" in attempts.printed,
        }
    }
    for name, file, length in (
        ("any_ratio", "any-ratio.onnx", 8),
        ("more_tokens_than_the_model_knows", bundle["variants"][-1]["file"], (bundle["max_length"] or 0) + 1),
    ):
        if length > 1:
            found[name] = attempts(name, functools.partial(call, file, length)) or attempts.failed[name]
    return found


def open_tokenizer(item: dict[str, str], texts: list[str]) -> dict[str, Any]:
    """A tokenizer as transformers 5 saves it: as it is, and by the way round where that fails."""
    attempts = Attempts()

    def ids(load: Callable[[], Any]) -> Any:
        return load()(texts)["input_ids"]

    ways = {
        "AutoTokenizer": lambda: transformers.AutoTokenizer.from_pretrained(item["folder"]),
        "AutoTokenizer, extra_special_tokens={}": lambda: transformers.AutoTokenizer.from_pretrained(
            item["folder"], extra_special_tokens={}
        ),
        "PreTrainedTokenizerFast": lambda: transformers.PreTrainedTokenizerFast.from_pretrained(
            item["folder"]
        ),
    }
    found = None
    for way, load in ways.items():
        found = attempts(way, functools.partial(ids, load))
        if found is not None:
            break
    return {
        "model_type": item["model_type"],
        "opened_by": way if found is not None else None,
        "failed": attempts.failed,
        "printed": attempts.printed,
        "ids": found,
    }


if __name__ == "__main__":
    main()
