"""`variator-export serve` as clients meet it: over HTTP, in a process of its own."""

import base64
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx2
import numpy as np
import pytest
from command_line import call
from huggingface_hub import InferenceClient

from variator_export.serving.http.live import LiveRecord
from variator_export.serving.variants import ServedVariant
from variator_export.sessions import Bundle

KEY = "a-key-that-is-long-enough"
TEXTS = ["The ferry leaves at seven.", "A cat", "It rains in the mountains, they say."]


@dataclass(frozen=True)
class Server:
    """A server in a process of its own, and a client without a key."""

    process: subprocess.Popen[str]
    address: str
    client: httpx2.Client

    def post(self, path: str, content: Any, **headers: str) -> httpx2.Response:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(path, json=content, headers=sent)

    def metric(self, name: str) -> float:
        text = self.client.get("/metrics").text
        return sum(
            float(value) for value in re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        )


@contextlib.contextmanager
def serving(bundle: Path, *options: str, quick: str = "0.05") -> Iterator[Server]:
    command = [sys.executable, "-m", "variator_export", "serve", str(bundle), "--port", "0"]
    command += ["--calibration-seconds", quick, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("listening on "):
            break
    else:
        raise AssertionError("".join(lines))
    address = lines[-1].split()[-1]
    with httpx2.Client(base_url=address, timeout=30) as client:
        try:
            yield Server(process, address, client)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.fixture(scope="module")
def evaluated(embedding_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small embedding model with a stored evaluation."""
    bundle = shutil.copytree(embedding_bundle, tmp_path_factory.mktemp("evaluated") / "small")
    data = bundle.parent / "pairs.tsv"
    words = ["ferry", "cat", "rain", "mountain", "harbour", "night", "letter", "garden"]
    lines = [
        f"The {a} and a {b}\tThe {b} in it\t{(3 * i + j) % 7}"
        for i, a in enumerate(words)
        for j, b in enumerate(words)
    ]
    data.write_text("first\tsecond\tscore\n" + "\n".join(lines) + "\n")
    done = call(
        *("evaluate", str(bundle), "--data", str(data), "--text-column", "first", "--pair-column", "second"),
        *("--label-column", "score", "--runtime", "onnxruntime"),
    )
    assert done.returncode == 0, done.stderr
    return bundle


@pytest.fixture(scope="module")
def unevaluated(embedding_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small embedding model without an evaluation, which other tests may have stored."""
    bundle = shutil.copytree(embedding_bundle, tmp_path_factory.mktemp("unevaluated") / "small")
    (bundle / "reports/quality.json").unlink(missing_ok=True)
    return bundle


@pytest.fixture(scope="module")
def server(evaluated: Path) -> Iterator[Server]:
    with serving(evaluated, "--slo-ms", "5000", "--max-texts", "100") as found:
        yield found


@pytest.fixture(scope="module")
def locked(unevaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a key, small limits, and a bundle that was not evaluated."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{KEY}\nanother-key-for-another-client\n")
    options = [
        "--api-key-file",
        str(file),
        "--max-body-mb",
        "0.02",
        "--no-truncate",
        "--allow-unknown-quality",
    ]
    with serving(unevaluated, *options) as found:
        yield found


def _units(bundle: Path, texts: list[str], ratio: int) -> np.ndarray:
    vectors = Bundle.load(bundle).embed(texts, ratio=ratio)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# Answers.


def test_the_official_client_of_openai(server: Server, evaluated: Path) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
    for form in ("float", "base64"):
        found = client.embeddings.create(model="small@4", input=TEXTS, encoding_format=form)
        vectors = [item.embedding for item in found.data]
        if form == "base64":
            vectors = [
                np.frombuffer(base64.b64decode(v), "<f4") if isinstance(v, str) else v for v in vectors
            ]
        assert np.allclose(vectors, _units(evaluated, TEXTS, 4), atol=1e-5)
        assert [item.index for item in found.data] == [0, 1, 2]
        ids = Bundle.load(evaluated).text_encoder().token_rows(TEXTS)
        assert found.usage.prompt_tokens == found.usage.total_tokens == sum(len(row.ids) for row in ids)
    raw = client.embeddings.with_raw_response.create(model="small@ratio-2", input=TEXTS[0])
    assert raw.headers["x-variator-ratio"] == "2"
    by_ids = client.embeddings.create(model="small@1", input=[list(row.ids) for row in ids])
    assert np.allclose([item.embedding for item in by_ids.data], _units(evaluated, TEXTS, 1), atol=1e-5)
    one = client.embeddings.create(model="small@1", input=list(ids[1].ids), dimensions=5)
    expected = Bundle.load(evaluated).embed([TEXTS[1]], ratio=1)[0][:5]
    assert np.allclose(one.data[0].embedding, expected / np.linalg.norm(expected), atol=1e-5)
    assert {m.id for m in client.models.list()} == {
        "small",
        "small@ratio-1",
        "small@ratio-2",
        "small@ratio-4",
    }
    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'"):
        client.embeddings.create(model="gpt", input="x")
    with pytest.raises(openai.NotFoundError, match="no variant '3'; there is ratio-1"):
        client.embeddings.create(model="small@3", input="x")
    with pytest.raises(openai.BadRequestError, match="dimensions must be a whole number from 1 to 32"):
        client.embeddings.create(model="small", input="x", dimensions=99)


def test_the_client_of_the_hugging_face_hub(server: Server, evaluated: Path) -> None:
    found = InferenceClient(model=f"{server.address}/embed").feature_extraction(TEXTS[0])
    assert np.allclose(found, _units(evaluated, TEXTS[:1], 1), atol=1e-5)


def test_embed_as_text_embeddings_inference_has_it(server: Server, evaluated: Path) -> None:
    plain = server.post("/embed", {"inputs": TEXTS, "normalize": False}, x_variator_ratio="4")
    assert np.allclose(plain.json(), Bundle.load(evaluated).embed(TEXTS, ratio=4), atol=1e-5)
    assert plain.headers["x-variator-ratio"] == "4"
    assert server.post("/embed", {"inputs": "A cat", "dimensions": 3}).json()[0].__len__() == 3
    info = server.client.get("/info").json()
    assert info["model_id"] == "small"
    assert info["max_client_batch_size"] == 100
    assert [v["ratio"] for v in info["variants"]] == [1, 2, 4]
    assert server.client.get("/health").text == "ok"
    assert server.client.get("/ready").text == "ready"


def test_a_bound_on_the_loss(server: Server) -> None:
    losses = {v["ratio"]: v["loss"] for v in server.client.get("/info").json()["variants"]}
    assert losses[1] == 0
    found = server.post("/embed", {"inputs": TEXTS}, x_variator_max_loss="0%")
    assert found.headers["x-variator-ratio"] == "1"
    assert float(found.headers["x-variator-expected-loss"]) == 0
    wrong = server.post("/embed", {"inputs": TEXTS}, x_variator_max_loss="lots")
    assert wrong.status_code == 400
    assert "lots is not a share from 0 to 1" in wrong.json()["error"]
    most = max(losses, key=lambda ratio: losses[ratio])
    if losses[most] > 0:
        both = {"x_variator_ratio": str(most), "x_variator_max_loss": "0"}
        refused = server.post("/embed", {"inputs": TEXTS}, **both)
        assert refused.status_code == 400
        assert "is asked for, and no such one loses at most 0.00%" in refused.json()["error"]


def test_a_classifier_gives_labels(bundle_of: Callable[[str], Bundle]) -> None:
    bundle = bundle_of("bert-classifier")
    with serving(bundle.path, "--allow-unknown-quality") as server:
        found = server.post("/predict", {"inputs": "A cat"}, x_variator_ratio="4").json()
        expected = bundle.predict("A cat", ratio=4)["scores"]
        assert {item["label"]: item["score"] for item in found} == pytest.approx(expected, abs=1e-6)
        assert [item["score"] for item in found] == sorted((i["score"] for i in found), reverse=True)
        pairs = server.post(
            "/predict", {"inputs": [["A cat", "A dog"], ["It rains", "No"]], "raw_scores": True}
        )
        assert [len(row) for row in pairs.json()] == [3, 3]
        mixed = server.post("/predict", {"inputs": [["A cat", "A dog"], ["It rains"]]})
        assert mixed.status_code == 422
        assert "Some rows are pairs" in mixed.json()["error"]
        labels = InferenceClient(model=f"{server.address}/predict").text_classification("A cat")
        assert labels.label == found[0]["label"]  # the best, as with text-embeddings-inference
        assert server.post("/embed", {"inputs": "x"}).status_code == 422
        assert "use /predict" in server.post("/v1/embeddings", {"input": "x"}).json()["error"]["message"]


# Bad input.


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/embeddings", b"{", 400, "The body is not JSON in UTF-8"),
        ("/v1/embeddings", b'{"input": "\xff\xfe"}', 400, "The body is not JSON in UTF-8"),
        ("/v1/embeddings", b"[]", 400, "The body is not a JSON object"),
        ("/v1/embeddings", b"{}", 400, "The field input is missing"),
        ("/v1/embeddings", b'{"input": 5}', 400, "input must be a string, a list of strings"),
        ("/v1/embeddings", b'{"input": null}', 400, "The field input is missing"),
        ("/v1/embeddings", b'{"input": ["a", 5]}', 400, "input must be a string, a list of strings"),
        ("/v1/embeddings", b'{"input": [5, "a"]}', 400, "input must be a string, a list of strings"),
        ("/v1/embeddings", b'{"input": [true]}', 400, "input must be a string, a list of strings"),
        ("/v1/embeddings", b'{"input": []}', 400, "There is no text"),
        ("/v1/embeddings", b'{"input": [[]]}', 400, "input must be"),
        ("/v1/embeddings", b'{"input": [[1], [true]]}', 400, "input must be"),
        ("/v1/embeddings", b'{"input": "a", "model": 4}', 400, "model must be a string"),
        ("/v1/embeddings", b'{"input": [-1]}', 400, "token id that is not from 0 to"),
        ("/v1/embeddings", b'{"input": [99999999]}', 400, "token id that is not from 0 to"),
        (
            "/v1/embeddings",
            b'{"input": "a", "encoding_format": "hex"}',
            400,
            "encoding_format must be one of",
        ),
        ("/v1/embeddings", b'{"input": "a", "dimensions": 0}', 400, "dimensions must be"),
        ("/v1/embeddings", b'{"input": "a", "dimensions": 2.5}', 400, "dimensions must be"),
        ("/v1/embeddings", b'{"input": "\\ud800"}', 400, "not JSON"),
        ("/embed", b"null", 422, "not a JSON object"),
        ("/embed", b'{"inputs": {"a": 1}}', 422, "inputs must be a string, a list of strings"),
        ("/embed", b'{"inputs": ["a"], "prompt_name": "nope"}', 422, "The model has no prompt 'nope'"),
        ("/embed", json.dumps({"inputs": ["a"] * 101}).encode(), 413, "at most 100 are allowed"),
        ("/embed", b'{"inputs": "a", "normalize": 1}', 422, "normalize must be true or false"),
        ("/predict", b'{"inputs": [["a", "b", "c"]]}', 422, "inputs must be a string, a pair of strings"),
        ("/predict", b'{"inputs": [["a"], "b"]}', 422, "inputs must be a string, a pair of strings"),
        ("/predict", b'{"inputs": "a"}', 422, "The model's task is feature-extraction"),
        ("/nowhere", b"", 404, "There is no /nowhere"),
    ],
)
def test_bad_input_gets_one_clear_error(
    server: Server, path: str, body: bytes, status: int, said: str
) -> None:
    found = server.client.post(path, content=body)
    assert found.status_code == status, found.text
    content = found.json()
    if path.startswith("/v1"):
        assert set(content["error"]) == {"message", "type", "param", "code"}
        assert said in content["error"]["message"]
    else:
        assert set(content) == {"error", "error_type"}
        assert said in content["error"]


def test_a_wrong_method(server: Server) -> None:
    found = server.client.get("/embed")
    assert found.status_code == 405
    assert found.headers["allow"] == "POST"
    assert "/embed does not take GET" in found.json()["error"]


@pytest.mark.parametrize("item", ["null", "[]", "{}", "[[]]", '"a", 1'])
def test_a_large_wrong_body_does_not_hold_the_server(server: Server, item: str) -> None:
    body = f'{{"input": [{",".join([item] * 400_000)}]}}'.encode()
    times: list[float] = []
    done = threading.Event()

    def watch() -> None:
        with httpx2.Client(base_url=server.address) as own:
            while not times or not done.is_set():
                started = time.monotonic()
                own.get("/health")
                times.append(time.monotonic() - started)

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = server.client.post("/v1/embeddings", content=body)
    done.set()
    watcher.join()
    assert found.status_code == 413
    assert max(times) < 1.0


def test_a_text_with_few_tokens_for_its_characters_is_read_to_its_end(
    server: Server, evaluated: Path
) -> None:
    text = " " * 100_000 + TEXTS[0]
    found = server.post("/embed", {"inputs": [text, "x"]}, x_variator_ratio="1")
    assert np.allclose(found.json()[0], _units(evaluated, [text], 1)[0], atol=1e-5)


def test_a_huge_text_is_truncated_quickly(server: Server, evaluated: Path) -> None:
    huge = "harbour " * 500_000
    started = time.monotonic()
    found = server.post("/embed", {"inputs": huge}, x_variator_ratio="1")
    assert time.monotonic() - started < 5
    assert np.allclose(found.json(), _units(evaluated, ["harbour " * 100], 1), atol=1e-5)


def test_keys_and_limits(locked: Server) -> None:
    ask = {"input": "A cat"}
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {KEY}"},
        {"authorization": b"Bearer \xe9"},
    ):
        found = locked.client.post("/v1/embeddings", json=ask, headers=headers)
        assert found.status_code == 401, headers
        assert found.headers["www-authenticate"] == "Bearer"
    for path in ("/metrics", "/info", "/live.json", "/v1/models"):
        assert locked.client.get(path).status_code == 401
    assert [locked.client.get(path).status_code for path in ("/health", "/ready", "/")] == [200] * 3
    for key in (KEY, "another-key-for-another-client"):
        assert locked.post("/v1/embeddings", ask, authorization=f"Bearer {key}").status_code == 200
    mine = {"authorization": f"Bearer {KEY}"}
    large = locked.post("/v1/embeddings", {"input": "a " * 20_000}, **mine)
    assert large.status_code == 413
    assert "larger than 20000 bytes" in large.json()["error"]["message"]

    def parts() -> Iterator[bytes]:
        yield from [b'{"input": "', b"a " * 20_000, b'"}']

    assert locked.client.post("/v1/embeddings", content=parts(), headers=mine).status_code == 413
    long = locked.post("/v1/embeddings", {"input": "a " * 200}, **mine)
    assert long.status_code == 400
    assert "Text 1 has 202 tokens; the limit is" in long.json()["error"]["message"]
    bound = locked.post("/v1/embeddings", ask, x_variator_max_loss="1%", **mine)
    assert bound.status_code == 400
    assert "no stored evaluation" in bound.json()["error"]["message"]
    assert "x-variator-expected-loss" not in locked.post("/v1/embeddings", ask, **mine).headers


# Clients that misbehave.


def _host_and_port(server: Server) -> tuple[str, int]:
    host, port = server.address.removeprefix("http://").split(":")
    return host, int(port)


def _raw(server: Server) -> socket.socket:
    return socket.create_connection(_host_and_port(server), timeout=20)


def _embed_request(texts: list[str]) -> bytes:
    body = json.dumps({"inputs": texts}).encode()
    return f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def _load(server: Server, clients: int, rows: int, within_s: float = 20) -> list[socket.socket]:
    """Connections with a large request each, of which at least so many rows wait."""
    connections = [_raw(server) for _ in range(clients)]
    for connection in connections:
        connection.sendall(_embed_request(["harbour " * 60] * 100))
    ends = time.monotonic() + within_s
    while server.metric("variator_queue_rows") < rows:
        assert time.monotonic() < ends
    return connections


def test_clients_that_never_finish_a_request_are_let_go(evaluated: Path) -> None:
    with serving(evaluated, "--receive-timeout", "1") as server:
        silent, header, body = _raw(server), _raw(server), _raw(server)
        header.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\n")
        body.sendall(b"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        started = time.monotonic()
        assert silent.recv(1) == b""
        assert header.recv(1) == b""
        assert body.recv(1000).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 5
        # So is one whose second request is not finished, or that goes on sending a body which nobody reads.
        for first, rest in (
            (b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /he"),
            (b"GET /health HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n", b"{"),
        ):
            again = _raw(server)
            again.sendall(first)
            assert again.recv(1000).startswith(b"HTTP/1.1 200")
            started = time.monotonic()
            # A connection that is closed before all was read is reset.
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                again.sendall(rest)
                while again.recv(1000):
                    pass
            assert time.monotonic() - started < 5
        # A connection that is kept open between two requests is not silent.
        with httpx2.Client(base_url=server.address) as client:
            assert client.post("/embed", json={"inputs": "a"}).status_code == 200
            time.sleep(1.5)
            assert client.post("/embed", json={"inputs": "a"}).status_code == 200


def test_a_client_that_does_not_read_its_answer_does_not_keep_the_server_from_stopping(
    evaluated: Path,
) -> None:
    with serving(evaluated, "--receive-timeout", "1", "--slo-ms", "60000") as server:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(_host_and_port(server))
        client.sendall(_embed_request(["a"] * 2000))
        while not server.metric("variator_requests_total"):
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        client.close()


def test_the_work_of_a_client_that_hangs_up_is_dropped(server: Server) -> None:
    before = server.metric("variator_tokens_total")
    for client in _load(server, 20, 500, within_s=10):
        client.close()
    ends = time.monotonic() + 10
    while server.metric("variator_queue_rows") and time.monotonic() < ends:
        time.sleep(0.01)
    ran = server.metric("variator_tokens_total") - before
    assert ran < 0.8 * 20 * 100 * 62
    assert server.metric("variator_cancelled_total") >= 5
    assert server.post("/embed", {"inputs": "still there"}).status_code == 200


def test_many_connections_at_once(server: Server) -> None:
    idle = [_raw(server) for _ in range(800)]
    assert server.post("/embed", {"inputs": "A cat"}).status_code == 200
    for connection in idle:
        connection.close()


def test_a_busy_server_refuses_early_and_says_when_to_return(evaluated: Path) -> None:
    with serving(evaluated, "--slo-ms", "30", "--max-queue", "150") as server:

        def ask(text: str) -> httpx2.Response:
            content = {"input": [text * 50] * 20}
            return httpx2.post(f"{server.address}/v1/embeddings", json=content, timeout=30)

        with ThreadPoolExecutor(24) as pool:
            found = list(pool.map(ask, ["harbour "] * 120))
        statuses = {response.status_code for response in found}
        assert statuses == {200, 429}
        refused = next(response for response in found if response.status_code == 429)
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert server.metric("variator_refused_total") == sum(r.status_code == 429 for r in found)


# Signals.


def test_sigterm_under_load_answers_what_was_accepted(evaluated: Path) -> None:
    with serving(evaluated, "--slo-ms", "60000") as server:
        clients = _load(server, 40, 1000)
        server.process.send_signal(signal.SIGTERM)
        answers = []
        for client in clients:
            with client, client.makefile("rb") as stream:
                answers.append(stream.readline())
        assert server.process.wait(30) == 0
        # What was not accepted yet is told so; nothing is dropped.
        assert set(answers) <= {b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 503 Service Unavailable\r\n"}
        assert answers.count(b"HTTP/1.1 200 OK\r\n") >= 10
        with pytest.raises(ConnectionRefusedError):
            _raw(server)


def test_a_second_sigint_gives_up_what_waits(evaluated: Path) -> None:
    with serving(evaluated, "--slo-ms", "60000") as server:
        clients = _load(server, 30, 500)
        for _ in range(2):
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        assert server.process.wait(5) == 0
        assert server.process.stderr is not None
        said = server.process.stderr.read()
        assert "stopped; what waited was given up" in said
        assert "Traceback" not in said
        assert "terminate called" not in said
        for client in clients:
            client.close()


def test_sighup_takes_a_new_bundle_without_losing_a_request(evaluated: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(evaluated, tmp_path / "served")
    with serving(bundle, "--slo-ms", "60000") as server:
        stop = threading.Event()

        def client(_: int) -> list[int]:
            statuses = []
            with httpx2.Client(base_url=server.address, timeout=30) as own:
                while not stop.is_set():
                    statuses.append(own.post("/embed", json={"inputs": TEXTS}).status_code)
            return statuses

        pool = ThreadPoolExecutor(3)
        clients = pool.map(client, range(3))
        # The bundle is replaced, then is broken, under the running server, which goes on with what it has.
        replaced = json.loads((bundle / "manifest.json").read_text())
        shutil.rmtree(bundle)
        time.sleep(0.2)
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert server.metric("variator_reloads_total") == 0
        assert server.post("/embed", {"inputs": TEXTS}).status_code == 200
        shutil.copytree(evaluated, bundle)
        replaced["recipe"]["name"] = "renamed"
        (bundle / "manifest.json").write_text(json.dumps(replaced))
        server.process.send_signal(signal.SIGHUP)
        ends = time.monotonic() + 20
        while not server.metric("variator_reloads_total") and time.monotonic() < ends:
            time.sleep(0.05)
        stop.set()
        statuses = [status for found in clients for status in found]
        assert server.client.get("/info").json()["model_id"] == "renamed"
        assert set(statuses) == {200}
        assert len(statuses) > 10


def test_a_new_bundle_without_the_static_ratio_is_not_taken(evaluated: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(evaluated, tmp_path / "served")
    with serving(bundle, "--policy", "static", "--ratio", "ratio-4") as server:
        assert server.post("/embed", {"inputs": "a"}).headers["x-variator-ratio"] == "4"
        manifest = json.loads((bundle / "manifest.json").read_text())
        manifest["variants"] = [v for v in manifest["variants"] if v["ratio"] != 4]
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        server.process.send_signal(signal.SIGHUP)
        time.sleep(1.0)
        assert server.metric("variator_reloads_total") == 0
        assert server.post("/embed", {"inputs": "a"}).headers["x-variator-ratio"] == "4"


# The command line.


def test_what_cannot_be_served_is_said_at_once(
    small_bundle: Path, unevaluated: Path, tmp_path: Path, server: Server
) -> None:
    def failed(bundle: Path, *options: str) -> tuple[int, str]:
        # What is served all the same would be served for ever.
        with mock.patch("variator_export.serving.http.server.serve", return_value=True):
            done = call("serve", str(bundle), "--port", "0", "--calibration-seconds", "0", *options)
        return done.returncode, done.stderr

    code, said = failed(unevaluated)
    assert code == 1
    assert "has no stored evaluation" in said
    assert f"variator-export evaluate {unevaluated}" in said
    assert failed(tmp_path / "none")[0] == 1
    code, said = failed(small_bundle, "--allow-unknown-quality")
    assert code == 1
    assert "neither sentence embeddings nor a task with predictions" in said
    port = server.address.rpartition(":")[2]
    done = call("serve", str(unevaluated), "--port", port)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in done.stderr
    for options, said in (
        (["--slo-ms", "0"], "--slo-ms 0 is not above 0"),
        (["--policy", "best"], "--policy"),
        (["--ratio", "4"], "--ratio is the ratio of --policy static"),
        (["--index", "--max-loss", "1%"], "--index serves ratio 1"),
        (["--max-loss", "2"], "--max-loss 2 is not a share"),
    ):
        code, error = failed(unevaluated, *options)
        assert code == 2, options
        assert said in error
    (tmp_path / "short").write_text("abc\n")
    (tmp_path / "empty").write_text("\n")
    for name, said in (("short", "can be guessed"), ("empty", "holds no key"), ("absent", "cannot be read")):
        code, error = failed(unevaluated, "--api-key-file", str(tmp_path / name))
        assert code == 1
        assert said in error
    code, error = failed(unevaluated, "--allow-unknown-quality", "--max-loss", "1%")
    assert code == 1
    assert "no stored evaluation" in error


def test_an_index_is_made_at_ratio_1(evaluated: Path) -> None:
    with serving(evaluated, "--index", "--slo-ms", "1") as server:
        found = server.post("/embed", {"inputs": TEXTS * 20})
        assert found.status_code == 200
        assert found.headers["x-variator-ratio"] == "1"
        assert server.post("/embed", {"inputs": "a"}, x_variator_ratio="4").status_code == 404


# Metrics and the page.


def test_the_metrics_count_what_happened(server: Server) -> None:
    names = (
        "variator_tokens_total",
        'variator_ratio_selected_total{ratio="2"}',
        "variator_expected_loss_total",
    )
    before = [server.metric(name) for name in names[:1]]
    text_before = server.client.get("/metrics").text
    server.post("/embed", {"inputs": TEXTS}, x_variator_ratio="2")
    text = server.client.get("/metrics").text
    count = lambda found: float(re.search(r'variator_ratio_selected_total{ratio="2"} (\S+)', found)[1])  # noqa: E731
    assert count(text) - count(text_before) == 3
    assert server.metric("variator_tokens_total") > before[0]
    for name in (
        *("variator_queue_rows", "variator_queue_tokens", "variator_request_duration_seconds_bucket"),
        *(
            "variator_batch_duration_seconds_bucket",
            "variator_batch_rows_bucket",
            "variator_batch_tokens_bucket",
        ),
        *(
            "variator_choosing_seconds_bucket",
            "variator_expected_loss_total",
            'variator_refused_total{reason="late"}',
        ),
        *("variator_requests_within_goal_total", "variator_latency_goal_seconds"),
    ):
        assert f"\n{name}" in text, name
    from prometheus_client.parser import text_string_to_metric_families

    assert len(list(text_string_to_metric_families(text))) > 12


def test_the_record_of_the_live_page() -> None:
    now = [100.0]
    record = LiveRecord(50.0, lambda: now[0])
    record.batch(ServedVariant("a", 4, 0.01), texts=3, tokens=30, ms=20.0)
    record.batch(ServedVariant("b", 1, 0.0), texts=1, tokens=10, ms=20.0)
    for ms in (10.0, 40.0, 60.0):
        record.request(ms)
    now[0] = 101.5
    record.refused()
    first, second = record.document(7)["seconds"]
    assert first["ratios"] == {"1": 1, "4": 3}
    assert first["lost"] == pytest.approx(0.0075)
    assert (first["requests"], first["within"], first["p50"]) == (3, 2, 40.0)
    assert (second["at"], second["refused"], second["lost"]) == (1, 1, None)
    assert record.document(7, since=1)["seconds"] == [second]
    now[0] = 1000.0
    record.refused()
    for step in range(400):
        now[0] = 1001.0 + step
        record.refused()
    assert len(record.document(0)["seconds"]) == 300


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_live_page(server: Server, tmp_path: Path) -> None:
    for ratio in ("1", "2", "4", "4"):
        server.post("/embed", {"inputs": TEXTS}, x_variator_ratio=ratio)
    time.sleep(1.1)
    assert CHROMIUM is not None
    page = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"),
            *("--dump-dom", "--virtual-time-budget=4000", f"{server.address}/"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert '<h1 id="model">small</h1>' in page
    assert re.search(r'<p id="state"[^>]*>live</p>', page)
    for ratio in (1, 2, 4):
        assert f"ratio {ratio}</span>" in page
    load = re.search(r'<svg id="load">(.*?)</svg></figure>', page, re.DOTALL)
    assert load is not None
    assert {"k0", "k1", "k2"} <= set(re.findall(r'<rect class="(k\d)"', load[1]))
    latency = re.search(r'<svg id="latency">(.*?)</svg></figure>', page, re.DOTALL)
    assert latency is not None
    assert 'class="goal"' in latency[1]
    assert re.search(r'<dd id="within">100\.0 %</dd>', page)
