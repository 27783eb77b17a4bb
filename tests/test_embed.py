"""`variator-export embed`: files of texts to files of vectors, and what kills and bad input leave."""

import fcntl
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from command_line import call, process_environment
from conftest import BLOCK
from small_disk import run_on_small_disk

from variator_export import Bundle
from variator_export.cli.output import Format, Output
from variator_export.cli.serving.embed_progress import ConsoleEmbedProgress
from variator_export.core.errors import UserError
from variator_export.inference import TextModel
from variator_export.serving.offline import unfinished
from variator_export.serving.offline.ray_data import EmbedTexts
from variator_export.serving.offline.source import TextSource
from variator_export.text.tokenizer import TokenRow

WORDS = [
    "the",
    "ferry",
    "leaves",
    "Älesund",
    "at",
    "seven,",
    "and",
    "a",
    "boat",
    "follows;",
    "prices",
    "rose",
]


def _texts(count: int, longest: int = 20) -> list[str]:
    rng = random.Random(0)
    return [f"{number} " + " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for number in range(count)]


def _lines(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _jsonl(path: Path, texts: Sequence[str], key: str = "text") -> Path:
    return _lines(path, [json.dumps({key: text, "name": f"no-{n}", "n": n}) for n, text in enumerate(texts)])


def _embed(bundle: Path, source: Path, output: Path, *options: str) -> dict[str, object]:
    """Run the command, which succeeds. Returns what it says in JSON."""
    result = call(
        "embed", str(bundle), "--input", str(source), "--output", str(output), *options, "--format", "json"
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def _refused(bundle: Path, source: Path, output: Path, *options: str, code: int = 1) -> str:
    """Run the command, which is refused. Returns its message."""
    result = call("embed", str(bundle), "--input", str(source), "--output", str(output), *options)
    assert result.returncode == code, result.stderr
    assert "hint: " in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def expected(embedding_bundle: Path) -> np.ndarray:
    """The vectors of the first 100 texts."""
    return Bundle.load(embedding_bundle).embed(_texts(100), 1)


def test_every_format_holds_the_vectors_of_the_bundle_in_the_order_of_the_texts(
    embedding_bundle: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    texts = _texts(100)
    source = _jsonl(tmp_path / "texts.jsonl", texts)
    found = _embed(embedding_bundle, source, tmp_path / "v.npy")
    vectors = np.load(tmp_path / "v.npy", mmap_mode="r")
    assert (vectors.dtype, vectors.shape) == (np.float32, (100, 32))
    np.testing.assert_array_equal(vectors, expected)
    encoder = Bundle.load(embedding_bundle).text_encoder()
    assert found["tokens"] == sum(len(row.ids) for row in encoder.token_rows(texts))
    assert (found["variant"], found["texts"], found["resumed_texts"], found["truncated"]) == (
        "ratio-1", 100, 0, 0,
    )  # fmt: skip

    options = ("--id-column", "name", "--with-text", "--chunk-size", "30")
    _embed(embedding_bundle, source, tmp_path / "v.jsonl", *options)
    rows = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [(row["id"], row["text"]) for row in rows] == [(f"no-{n}", text) for n, text in enumerate(texts)]
    in_chunks = np.array([row["embedding"] for row in rows], np.float32)
    np.testing.assert_allclose(in_chunks, expected, atol=1e-5)

    _embed(embedding_bundle, source, tmp_path / "v.parquet", *options)
    table = pyarrow.parquet.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["id", "text", "embedding"]
    assert table.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 32)
    assert table["id"].to_pylist() == [row["id"] for row in rows]
    # Nine digits are the whole number.
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), in_chunks)
    assert _names(tmp_path) == ["texts.jsonl", "v.jsonl", "v.npy", "v.parquet"]


def test_every_kind_of_input(embedding_bundle: Path, expected: np.ndarray, tmp_path: Path) -> None:
    texts = _texts(100)
    quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
    inputs = {
        "a.txt": _lines(tmp_path / "a.txt", texts),
        "b.jsonl": _jsonl(tmp_path / "b.jsonl", texts, "body"),
        "c.tsv": _lines(tmp_path / "c.tsv", ["n\tbody", *(f"{n}\t{t}" for n, t in enumerate(texts))]),
        "d.csv": _lines(tmp_path / "d.csv", [f"{n},{text}" for n, text in enumerate(quoted)]),
        "e.parquet": tmp_path / "e.parquet",
    }
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    table = pyarrow.table({"n": range(100), "body": texts})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    for name, source in inputs.items():
        options = {"a.txt": [], "d.csv": ["--no-header", "--text-column", "2", "--id-column", "1"]}
        chosen = options.get(name, ["--text-column", "body", "--id-column", "n"])
        _embed(embedding_bundle, source, tmp_path / "v.parquet", "--replace", "--chunk-size", "64", *chosen)
        found = pyarrow.parquet.read_table(tmp_path / "v.parquet")
        vectors = np.array(found["embedding"].to_pylist(), np.float32)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert list(map(str, found["id"].to_pylist())) == list(map(str, range(100))), name


def test_without_torch_from_standard_input(
    embedding_bundle: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    code = BLOCK + "from variator_export.cli.main import main; main()"
    command = ["embed", str(embedding_bundle), "--input", "-", "--output", str(tmp_path / "v.npy")]
    result = subprocess.run(
        [sys.executable, "-c", code, *command],
        input="\n".join(_texts(100)),
        capture_output=True,
        text=True,
        env=process_environment(),
    )
    assert "100 texts" in result.stdout, result.stderr
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), expected)


def test_settings_that_change_the_vectors(embedding_bundle: Path, tmp_path: Path) -> None:
    texts = _texts(30)
    source, output = _lines(tmp_path / "a.txt", texts), tmp_path / "v.npy"
    bundle = Bundle.load(embedding_bundle)
    for options, wanted in (
        (("--ratio", "4"), bundle.embed(texts, 4)),
        (("--variant", "ratio-2", "--batch-size", "7"), bundle.embed(texts, 2, batch_size=7)),
    ):
        _embed(embedding_bundle, source, output, "--replace", *options)
        np.testing.assert_array_equal(np.load(output), wanted)
    _embed(embedding_bundle, source, output, "--replace", "--normalize")
    own = bundle.embed(texts, 1)
    assert abs(np.linalg.norm(own[0]) - 1) > 0.1
    np.testing.assert_allclose(np.load(output), own / np.linalg.norm(own, axis=1, keepdims=True), rtol=1e-5)


def test_a_text_beyond_the_limit_is_truncated_or_refused(embedding_bundle: Path, tmp_path: Path) -> None:
    source = _lines(tmp_path / "a.txt", [*_texts(10), "word " * 500, *_texts(10)])
    found = _embed(embedding_bundle, source, tmp_path / "v.npy")
    assert found["truncated"] == 1
    message = _refused(embedding_bundle, source, tmp_path / "w.npy", "--no-truncate", "--chunk-size", "8")
    assert "a.txt, line 11: the text is longer than the model's limit of 64 tokens" in message
    # The chunk before it is there.
    assert f"finished texts are kept in {tmp_path / 'w.npy.parts'}" in message


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts of 40 chunks of 50."""
    return _lines(tmp_path_factory.mktemp("many") / "texts.txt", _texts(2000))


def _in_chunks(bundle: Path, source: Path | str, output: Path, *options: str) -> list[str]:
    arguments = ["embed", str(bundle), "--input", str(source), "--output", str(output), "--chunk-size", "50"]
    return [*arguments, *options]


class _Run:
    """A run in a process of its own, on the first 30 chunks of texts: the rest never comes.

    Attributes:
        parts: The folder of the finished chunks.
        process: The process.
    """

    def __init__(self, bundle: Path, source: Path, output: Path, *options: str) -> None:
        self.parts = output.with_name(f"{output.name}.parts")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "variator_export", *_in_chunks(bundle, "-", output, *options)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=process_environment(),
            start_new_session=True,
        )
        assert self.process.stdin is not None
        with source.open() as file:
            self.process.stdin.writelines(itertools.islice(file, 30 * 50))
        self.process.stdin.flush()

    def wait_for_parts(self, count: int) -> None:
        until = time.monotonic() + 60
        while len(list(self.parts.glob("*.part"))) < count:
            assert time.monotonic() < until
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.005)

    def workers(self) -> list[int]:
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Send a signal, or end the input, and wait. Returns the exit code and standard error."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)  # a terminal sends it to every process
        elif number is not None:
            self.process.send_signal(number)
        assert self.process.stdin is not None
        assert self.process.stderr is not None
        with self.process.stdin, self.process.stderr:
            if number is None:
                self.process.stdin.close()
            err = self.process.stderr.read()
        return self.process.wait(), err


@pytest.mark.parametrize(
    ("suffix", "options", "kills"),
    [(".npy", (), (2, 20)), (".parquet", ("--processes", "2"), (20,))],
    ids=["one-process", "two-processes"],
)
def test_a_killed_run_goes_on_and_writes_the_same_bytes(
    embedding_bundle: Path,
    many: Path,
    tmp_path: Path,
    suffix: str,
    options: tuple[str, ...],
    kills: tuple[int, ...],
) -> None:
    whole, output = tmp_path / f"whole{suffix}", tmp_path / f"killed{suffix}"
    options = (*options, "--threads", "1")
    assert call(*_in_chunks(embedding_bundle, many, whole, *options)).returncode == 0
    for count in kills:
        run = _Run(embedding_bundle, many, output, *options)
        run.wait_for_parts(count)
        assert run.end(signal.SIGKILL) == (-signal.SIGKILL, "")
    assert not output.exists()
    # Parts that one process wrote are those of two.
    found = json.loads(
        call(*_in_chunks(embedding_bundle, many, output, "--threads", "1", "--format", "json")).stdout
    )
    assert 20 * 50 <= found["resumed_texts"] <= 30 * 50
    assert found["texts"] == 2000
    assert output.read_bytes() == whole.read_bytes()
    assert not run.parts.exists()


def test_ctrl_c_and_a_killed_process_leave_what_is_finished(
    embedding_bundle: Path, many: Path, tmp_path: Path
) -> None:
    run = _Run(embedding_bundle, many, tmp_path / "v.npy", "--processes", "2")
    run.wait_for_parts(1)
    workers = run.workers()
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    code, err = run.end()
    assert code == 1
    assert "One of the 2 processes was ended by SIGKILL" in err
    assert "--processes 1 --threads 1" in err
    assert f"finished texts are kept in {run.parts}" in err

    for options in (("--processes", "2"), ("--threads", "1")):
        run = _Run(embedding_bundle, many, tmp_path / "v.npy", *options)
        run.wait_for_parts(20)
        workers = run.workers()
        code, err = run.end(signal.SIGINT)
        assert code == 130, err
        assert "Traceback" not in err
        assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert len(list(run.parts.glob("*.part"))) >= 20


def test_a_kill_after_the_output_is_in_its_place(
    embedding_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = _lines(tmp_path / "a.txt", _texts(20)), tmp_path / "v.npy"

    clear = unfinished._clear

    def killed(folder: Path) -> None:
        if output.exists():
            raise SystemExit(9)
        clear(folder)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "_clear", killed)
        assert call(*_in_chunks(embedding_bundle, source, output)).returncode == 9
    assert np.load(output).shape == (20, 32)
    assert list((tmp_path / "v.npy.parts").glob("*.part"))
    found = _embed(embedding_bundle, source, output, "--chunk-size", "50")
    assert (found["texts"], found["resumed_texts"]) == (20, 20)
    assert not (tmp_path / "v.npy.parts").exists()
    assert "v.npy is there already" in _refused(embedding_bundle, source, output)


def test_an_unfinished_run_goes_on_only_with_its_settings_and_its_texts(
    embedding_bundle: Path, tmp_path: Path
) -> None:
    texts, output = _texts(100), tmp_path / "v.npy"
    lines = [json.dumps({"text": text}) for text in texts]
    source = _lines(tmp_path / "a.jsonl", [*lines, "{"])
    message = _refused(embedding_bundle, source, output, "--chunk-size", "20", "--processes", "2")
    assert "a.jsonl, line 101 is not JSON" in message
    assert "finished texts are kept in" in message
    message = _refused(
        embedding_bundle, source, output, "--chunk-size", "20", "--ratio", "4", "--no-truncate"
    )
    assert 'unfinished run with other settings: variant is "ratio-4", was "ratio-1"' in message
    assert "truncate is false, was true." in message
    assert "--restart" in message
    # The bad line is removed, and a text of the second chunk is another one.
    texts[30] = "another text"
    _lines(source, [json.dumps({"text": text}) for text in texts])
    found = _embed(embedding_bundle, source, output, "--chunk-size", "20")
    assert found["resumed_texts"] == 80
    np.testing.assert_allclose(np.load(output), Bundle.load(embedding_bundle).embed(texts, 1), atol=1e-5)


def test_restart_discards_an_unfinished_run(embedding_bundle: Path, tmp_path: Path) -> None:
    source, output = _lines(tmp_path / "a.jsonl", ['{"text": "a"}', '{"text": "b"}', "x"]), tmp_path / "v.npy"
    _refused(embedding_bundle, source, output, "--chunk-size", "1")
    _lines(source, ['{"text": "a"}', '{"text": "b"}'])
    found = _embed(embedding_bundle, source, output, "--chunk-size", "1", "--ratio", "2", "--restart")
    assert (found["resumed_texts"], found["variant"]) == (0, "ratio-2")


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("a.txt", b"", (), "a.txt holds no text"),
        ("a.csv", b"text\n", (), "a.csv holds no text"),
        ("a.txt", b"good\nb\xe4d\n", (), "a.txt, line 2 is not UTF-8: byte 0xe4 at column 2"),
        ("a.jsonl", b'{"text": "a"}\n\n', (), "a.jsonl, line 2 is empty"),
        ("a.jsonl", b'{"text": null}\n', (), "a.jsonl, line 1: the column 'text' is null"),
        ("a.jsonl", b'{"text": 7}\n', (), "line 1: the column 'text' holds 7, of type int, not a text"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', (), "a.jsonl, line 1 is not valid Unicode"),
        ("a.jsonl", b'{"texts": "a"}\n', (), "line 1 has no column 'text'; it has 'texts'"),
        ("a.jsonl", b'{"text": "a", "n": 1.5}\n', ("--id-column", "n"), "holds 1.5; an id is a whole number"),
        (
            "a.jsonl",
            b'{"text": "a", "n": 1}\n{"text": "b", "n": "2"}\n',
            ("--id-column", "n"),
            "line 2: the id '2' is of type str, those before it of type int",
        ),
        (
            "a.jsonl",
            b'{"text": "a", "n": 9223372036854775808}\n',
            ("--id-column", "n"),
            "needs more than 64 bits",
        ),
        ("a.csv", b"text,n\na\n", (), "a.csv, line 2 has 1 columns; the first line has 2"),
        ("a.txt", b"a\n", ("--id-column", "n"), "is lines of text, without ids"),
        ("a.md", b"a\n", (), "a.md has the suffix .md; texts are read from"),
        ("a.parquet", b"no", (), "a.parquet is not a Parquet file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_input_that_cannot_be_read(
    embedding_bundle: Path, tmp_path: Path, name: str, content: bytes, options: tuple[str, ...], words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    message = _refused(embedding_bundle, tmp_path / name, tmp_path / "v.jsonl", *options)
    assert words in message
    assert _names(tmp_path) == [name]


def test_a_null_and_a_missing_column_in_parquet(embedding_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    message = _refused(embedding_bundle, path, tmp_path / "v.npy")
    assert "a.parquet, row 2: the column 'text' is null" in message
    assert "has no column 'body'; it has 'text'" in _refused(
        embedding_bundle, path, tmp_path / "v.npy", "--text-column", "body"
    )


def test_outputs_that_cannot_be_written(embedding_bundle: Path, small_bundle: Path, tmp_path: Path) -> None:
    source, there = _jsonl(tmp_path / "a.jsonl", ["a"]), tmp_path / "there.npy"
    there.write_text("old")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "other.npy.parts").mkdir()
    (tmp_path / "other.npy.parts" / "mine").touch()
    for output, code, words in (
        (there, 1, "there.npy is there already"),
        (tmp_path / "v.bin", 2, "has the suffix .bin"),
        (tmp_path / "none" / "v.npy", 1, f"There is no folder {tmp_path / 'none'}"),
        (tmp_path / "folder.npy", 1, "folder.npy is a folder"),
        (source, 2, "is both the input and the output"),
        (tmp_path / "other.npy", 1, "is a folder that no run of embed wrote"),
        (source / "v.npy", 1, "There is no folder"),
    ):
        assert words in _refused(embedding_bundle, source, output, code=code)
    assert "vectors only" in _refused(
        embedding_bundle, source, tmp_path / "v.npy", "--id-column", "n", code=2
    )
    assert "no sentence embeddings" in _refused(small_bundle, source, tmp_path / "v.npy")
    assert not (tmp_path / "v.npy.parts").exists()
    assert there.read_text() == "old"
    _embed(embedding_bundle, source, there, "--replace")
    assert np.load(there).shape == (1, 32)


def test_two_runs_do_not_write_the_same_output(embedding_bundle: Path, tmp_path: Path) -> None:
    source, parts = _lines(tmp_path / "a.txt", ["a"]), tmp_path / "v.npy.parts"
    parts.mkdir()
    with (parts / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "Another run is writing to" in _refused(embedding_bundle, source, tmp_path / "v.npy")
        assert (parts / "lock").exists()
    _embed(embedding_bundle, source, tmp_path / "v.npy")


def test_a_full_disk(embedding_bundle: Path, tmp_path: Path) -> None:
    """The second run has the space that the first one lacked to put the parts together."""
    source = _lines(tmp_path / "a.txt", _texts(3000, 1))
    embed = f"python -m variator_export embed {embedding_bundle} --input {source} --chunk-size 500"
    script = (
        f'{embed} --output "$DISK/v.parquet"; echo "code $?"; ls "$DISK"; '
        f'mount -o remount,size=4m "$DISK"; {embed} --output "$DISK/v.parquet"'
    )
    result = run_on_small_disk(script, tmp_path / "disk", size="500k")
    assert "Cannot write to" in result.stderr, result.stderr
    assert "no space left on device" in result.stderr
    assert "hint: Free some space" in result.stderr
    assert "Traceback" not in result.stderr
    assert "code 1\nv.parquet.parts\n" in result.stdout
    assert "3,000 texts (3,000 by an earlier run)" in result.stdout


def test_progress_in_lines_and_nothing_beside_json(embedding_bundle: Path, tmp_path: Path) -> None:
    source = _lines(tmp_path / "a.txt", _texts(50))
    result = call(*_in_chunks(embedding_bundle, source, tmp_path / "v.npy"))
    assert "v.npy: 50 texts" in result.stdout
    assert "; writing the output" in result.stderr
    result = call(*_in_chunks(embedding_bundle, source, tmp_path / "w.npy", "--format", "json"))
    assert result.stderr == ""
    assert json.loads(result.stdout)["tokens_per_second"] > 0
    lines = []
    for output in (Output(), Output(Format.JSON)):
        output.err.file = written = io.StringIO()
        progress = ConsoleEmbedProgress(output, 0)
        progress.expected_texts = 1000
        progress.opened()
        progress.advanced(250, 2000)
        lines.append(written.getvalue())
    line, nothing = lines
    assert nothing == ""
    assert "embed: 250 of about 1,000 texts" in line
    assert "tokens/s" in line
    assert line.endswith("left\n")


def test_the_number_of_texts_is_known_ahead(tmp_path: Path) -> None:
    source = TextSource(str(_lines(tmp_path / "a.txt", ["a line of text"] * 1000)))
    assert source.expected_texts is None
    chunks = source.chunks(100)
    next(chunks)
    assert source.expected_texts == 1000
    assert sum(len(chunk.texts) for chunk in chunks) == 900
    assert source.expected_texts == 1000


def test_memory_does_not_grow_with_the_input(embedding_bundle: Path, tmp_path: Path) -> None:
    """The texts of the longer file take 12 MB as strings, and their vectors 5 MB."""
    peaks = []
    for count in (4_000, 40_000):
        source = _lines(tmp_path / f"{count}.txt", _texts(count))
        # Not getrusage, which also counts the process that started this one.
        code = (
            "import re; from pathlib import Path; from variator_export.cli.main import main\n"
            "try: main()\n"
            "finally: print(re.search(r'VmHWM:\\s+(.*) kB', Path('/proc/self/status').read_text())[1])"
        )
        command = _in_chunks(embedding_bundle, source, tmp_path / f"{count}.npy", "--batch-size", "200")
        result = subprocess.run(
            [sys.executable, "-c", code, *command, "--chunk-size", "1000"],
            capture_output=True,
            text=True,
            env=process_environment(),
            check=True,
        )
        peaks.append(int(result.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 3, "MiB"


def test_a_vector_that_is_not_finite_is_refused(
    embedding_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(self: TextModel, rows: Sequence[TokenRow], batch_size: int) -> np.ndarray:
        del self, batch_size
        vectors = np.zeros((len(rows), 32), np.float32)
        vectors[2, 5] = np.inf
        return vectors

    monkeypatch.setattr(TextModel, "embed_rows", overflow)
    source = _lines(tmp_path / "a.txt", _texts(5))
    message = _refused(embedding_bundle, source, tmp_path / "v.npy")
    assert "a.txt, line 3: the vector of this text holds numbers that are not finite" in message


def test_ray_data_calls_it_with_columns(embedding_bundle: Path, expected: np.ndarray) -> None:
    embed = EmbedTexts(str(embedding_bundle), text_column="body", output_column="vector", threads=1)
    batch = {"body": np.array(_texts(100), object), "n": np.arange(100)}
    found = embed(batch)
    assert list(found) == ["body", "n", "vector"]
    np.testing.assert_array_equal(found["vector"], expected)
    with pytest.raises(UserError, match="has no column 'body'"):
        embed({"text": batch["body"]})
    four = EmbedTexts(str(embedding_bundle), ratio=4, text_column="body")(batch)["embedding"]
    np.testing.assert_array_equal(four, Bundle.load(embedding_bundle).embed(_texts(100), 4))
