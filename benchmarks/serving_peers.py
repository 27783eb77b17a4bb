"""Servers that users write today, beside `serving.py`: one model, without ratios.

    python benchmarks/serving_peers.py --data ../shared/data --folder BUNDLES --python PEERS/bin/python \
        --output benchmarks/results/serving-peers.json

`fastapi`: FastAPI with sentence-transformers on its ONNX backend, a request at a time in a thread, as its
documentation shows. `litserve`: LitServe with batches by count (at most 16, waiting at most 10 ms), the same
model. Both answer `POST /embed` as text-embeddings-inference does. They run with `--python`, of an
environment of their own, since their ranges do not fit here: `pip install litserve optimum-onnx
fastapi uvicorn 'sentence-transformers==5.*'`. `--folder` is that of `serving.py`, whose bundle is used.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import describe, write_result
from serving import GOAL_MS, LONGEST, PARTS, Loop, serving, summarise, with_rates
from serving_load import free_port, read_corpus, read_trace, replay, texts_of_lengths
from variator_export.serving.model import ModelOptions, ServedModel

_FASTAPI = """
import sys
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(sys.argv[1], backend="onnx")
app = FastAPI()


class Body(BaseModel):
    inputs: str | list[str]


@app.post("/embed")
def embed(body: Body) -> list[list[float]]:
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    return model.encode(texts, normalize_embeddings=True, show_progress_bar=False).tolist()


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
"""
_LITSERVE = """
import sys
import litserve as ls
from sentence_transformers import SentenceTransformer


class Embed(ls.LitAPI):
    def setup(self, device):
        self.model = SentenceTransformer(sys.argv[1], backend="onnx")

    def decode_request(self, request):
        return request["inputs"]

    def predict(self, texts):
        return self.model.encode(texts, normalize_embeddings=True, show_progress_bar=False)

    def encode_response(self, vector):
        return [vector.tolist()]


# Its workers are new processes, which import this file.
if __name__ == "__main__":
    api = Embed(max_batch_size=16, batch_timeout=0.01, api_path="/embed")
    ls.LitServer(api, accelerator="cpu", timeout=False).run(
        host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False, log_level="warning"
    )
"""
_DISTRIBUTIONS = (
    *("fastapi", "litserve", "sentence-transformers", "optimum-onnx", "onnxruntime", "starlette", "uvicorn"),
)
PEERS = {"fastapi": _FASTAPI, "litserve": _LITSERVE}
LOADS = (0.3, 0.5, 0.7, 0.85)


@contextlib.contextmanager
def running(python: str, program: str, model: Path) -> Iterator[tuple[str, int]]:
    """A peer in a process of its own, and its address."""
    port = free_port()
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name, "program.py")
    path.write_text(program)
    command = [python, str(path), str(model), str(port)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet, start_new_session=True)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                body = json.dumps({"inputs": "warm up"}).encode()
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/embed", body, {"content-type": "application/json"}
                )
                urllib.request.urlopen(request).read()
                break
            time.sleep(0.1)
        else:
            raise RuntimeError("the server did not start")
        yield "127.0.0.1", port
    finally:
        # With the workers, which LitServe leaves running when it is terminated.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        folder.cleanup()


def _versions(python: str) -> dict[str, str]:
    """The versions that the peers run with, from their own environment."""
    code = "import json, sys; from importlib.metadata import version; "
    code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    found = subprocess.run([python, "-c", code, *_DISTRIBUTIONS], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(found.stdout)
    return versions


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--python", required=True, help="of the environment that has the peers")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=600)
    options = parser.parse_args()
    bundle = options.folder / "float32"
    model = ServedModel.open(bundle, ModelOptions(calibration_seconds=2.0))
    trace = read_trace(
        options.data / "azure-llm-2023/azure_conv.csv", PARTS["conv"], options.requests, LONGEST
    )
    texts = texts_of_lengths(read_corpus(options.data), model.text.encoder, [point.tokens for point in trace])
    loop = Loop(model, texts)
    capacity = sorted(loop.seconds(0, 0.34) for _ in range(3))[1]
    runs = []
    peers = [
        (name, running(options.python, program, options.folder / "backbone"))
        for name, program in PEERS.items()
    ]
    ours = serving(bundle, "--policy", "static", "--ratio", "1", "--no-refuse-late")
    for name, server in [*peers, ("k=1", ours)]:
        with server as (host, port, *_):
            for load in LOADS:
                scale = capacity / load / trace[-1].at_s
                due = [point.at_s * scale for point in trace]
                outcomes = asyncio.run(replay((host, port), "/embed", "inputs", texts, due))
                run = {"server": name, "load": load} | with_rates(
                    summarise(outcomes, {1: 0.0}), [{"capacity_s": capacity}], load
                )
                runs.append(run)
                print(json.dumps(run), flush=True)
    described = describe("starlette", "uvicorn") | {"peers": _versions(options.python)}
    write_result(options.output, described | {"goal_ms": GOAL_MS, "capacity_s": capacity, "runs": runs})


if __name__ == "__main__":
    main()
