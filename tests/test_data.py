"""Reading text and labelled examples: what is read, and what is said of broken files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from variator_export.core.errors import UserError
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns
from variator_export.data.texts import read_texts


def _write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def _message(error: pytest.ExceptionInfo[UserError]) -> str:
    return f"{error.value.message} {error.value.hint}"


def test_a_folder_is_read_file_by_file_with_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    _write(tmp_path / "b.txt", b"\xef\xbb\xbfOne line.\r\nTwo.\r\n")
    _write(tmp_path / "a.jsonl", '{"text": "First."}\n{"text": "Second.", "other": 1}\n')
    _write(tmp_path / "notes.md", "not text to train on")
    first, second = read_texts([str(tmp_path)])
    assert (first.name, first.documents) == ("a.jsonl", ("First.", "Second."))
    assert second.documents == ("One line.\nTwo.",)


def test_a_data_set_is_read_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "reviews"
    folder.mkdir()
    rows = [{"text": "Good.", "label": "yes"}, {"text": "Bad.", "label": "no"}]
    _write(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read_texts([f"datasets:{folder}"])[0].documents == ("Good.", "Bad.")
    examples = read_examples(f"datasets:{folder},train", Columns())
    assert (examples.texts, examples.targets) == (("Good.", "Bad."), ("yes", "no"))
    with pytest.raises(UserError, match=r"cannot read datasets:.*test"):
        read_examples(f"datasets:{folder},test", Columns())
    with pytest.raises(UserError, match="no column 'body'"):
        read_texts([f"datasets:{folder}"], "body")


def test_a_data_set_that_only_the_hub_has_says_what_failed() -> None:
    code = "from variator_export.data.texts import read_texts; read_texts(['datasets:nobody/nothing'])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert "cannot read datasets:nobody/nothing" in result.stderr
    assert "or give a local file instead" in result.stderr
    with pytest.raises(UserError, match="not written as"):
        read_texts(["datasets:a,b,c,d"])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"fine\nbr\xf6ken\n", "a.txt, line 2 is not UTF-8: byte 0xf6 at column 3"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"one\ntw\0o\n", "line 2 contains a NUL"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "y"}\n', "line 2 is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "no text in the field 'text'; found: body"),
        ("a.jsonl", b'{"text": "  "}\n', "line 1 has an empty text"),
        ("a.csv", b"text\nx\n", "has the suffix .csv"),
    ],
)
def test_broken_text_is_refused_with_its_line(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    with pytest.raises(UserError) as error:
        read_texts([_write(tmp_path / name, content)])
    assert expected in _message(error)


def test_text_given_twice_or_not_there_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.txt", "Text.")
    _write(tmp_path / "copy.txt", "Text.")
    with pytest.raises(UserError, match=r"copy\.txt was given twice, also as a\.txt"):
        read_texts([path, str(tmp_path / "copy.txt")])
    with pytest.raises(UserError, match="There is no text at"):
        read_texts([str(tmp_path / "missing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no \.txt or \.jsonl file"):
        read_texts([str(tmp_path / "empty")])


def test_tab_separated_files_know_no_quoting(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tsv", '\ufeffq\ttext\tlabel\r\n1\tHe said "no.\tgood\r\n2\t"Fine"\tbad\r\n')
    examples = read_examples(path, Columns())
    assert examples.texts == ('He said "no.', '"Fine"')
    assert examples.targets == ("good", "bad")
    assert examples.places[1].endswith("a.tsv, line 3")


def test_comma_separated_files_know_quoting_and_count_lines(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", 'text,label\n"a, ""b""\nand more",x\nlast,y\n')
    examples = read_examples(path, Columns())
    assert examples.texts == ('a, "b"\nand more', "last")
    assert [place[-6:] for place in examples.places] == ["line 2", "line 4"]


def test_a_table_without_a_header_has_columns_by_number(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tsv", "First.\t0\nSecond.\t1\n")
    examples = read_examples(path, Columns("1", None, "2", header=False))
    assert (examples.texts, examples.targets) == (("First.", "Second."), ("0", "1"))


def test_classes_are_in_the_order_of_numbers_or_of_the_alphabet(tmp_path: Path) -> None:
    numbers = read_examples(_write(tmp_path / "a.tsv", "text\tlabel\na\t10\nb\t2\n"), Columns())
    words = read_examples(_write(tmp_path / "b.tsv", "text\tlabel\na\tno\nb\tmaybe\n"), Columns())
    assert (numbers.classes(), words.classes()) == (["2", "10"], ["maybe", "no"])


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.tsv", "text\tlabel\na\tx\n\nb\ty\n", "line 3 is empty"),
        ("a.tsv", "text\tlabel\na\tx\tmore\n", "line 2 has 3 columns; the first line has 2"),
        ("a.tsv", "text\tlabel\n\tx\n", "line 2: the column 'text' is empty"),
        ("a.tsv", "text\tlabel\n", "a header and no rows"),
        ("a.tsv", "text\ttext\n", "has the column 'text' twice"),
        ("a.tsv", "texts\tlabel\na\tx\n", "has no column 'text'; it has 'texts', 'label'"),
        ("a.tsv", "texts\tlabel\na\tx\n", "--text-column 'texts'"),
        ("a.csv", 'text,label\n"a,x\n', "unexpected end of data"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2 has no column 'label'"),
        ("a.jsonl", '{"text": {"a": 1}, "label": 1}\n', "does not hold a single value"),
        ("a.jsonl", '{"text": ["a b"], "label": 1}\n', "is not a list of words: it holds 'a b'"),
        ("a.jsonl", '{"text": "a", "label": [1, ""]}\n', "the column 'label' is empty"),
        ("a.conll", "a O\nb\n", "line 2 has a word and no tag"),
        ("a.conll", "-DOCSTART- O\n", "no rows"),
        ("a.jsonl", '["a"]\n', "line 1 is not a JSON object"),
        ("a.json", "{}", "has the suffix .json"),
    ],
)
def test_broken_tables_are_refused_with_their_line(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    with pytest.raises(UserError) as error:
        read_examples(_write(tmp_path / name, content), Columns())
    assert expected in _message(error)


def test_one_class_only_and_scores_that_are_none_are_refused(tmp_path: Path) -> None:
    one = read_examples(_write(tmp_path / "a.tsv", "text\tlabel\na\tx\nb\tx\n"), Columns())
    with pytest.raises(UserError, match=r"All 2 examples of a\.tsv have the label 'x'"):
        one.classes()
    with pytest.raises(UserError, match=r"line 2: the score 'x' is not a number"):
        one.scores()
    equal = read_examples(_write(tmp_path / "b.tsv", "text\tlabel\na\t1\nb\t1\n"), Columns())
    with pytest.raises(UserError, match=r"All 2 scores of b\.tsv are equal"):
        equal.scores()


def test_scores_are_no_classes(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tsv", "text\tlabel\na\t2\nb\t3.5\n")
    with pytest.raises(UserError, match=r"holds scores, such as 3\.5; a classifier learns classes"):
        read_examples(path, Columns()).classes()
    path = _write(tmp_path / "b.jsonl", '{"text": "a", "label": ["x", "y"]}\n')
    with pytest.raises(UserError, match="holds 2 values, not one"):
        read_examples(path, Columns()).classes()


def test_words_and_lists(tmp_path: Path) -> None:
    rows = '{"text": ["Ms", "Smith"], "label": ["O", "B"]}\n{"text": "It rains.", "label": []}\n'
    examples = read_examples(_write(tmp_path / "a.jsonl", rows), Columns())
    assert examples.texts == ("Ms Smith", "It rains.")
    assert examples.targets == (("O", "B"), ())
    conll = "-DOCSTART- -X- O O\n\nMs NNP B-NP B-PER\nSmith NNP I-NP I-PER\n\n\nYes UH O O\n"
    read = read_examples(_write(tmp_path / "a.conll", conll), Columns())
    assert (read.texts, read.targets) == (("Ms Smith", "Yes"), (("B-PER", "I-PER"), ("O",)))
    assert [place.rpartition(", ")[2] for place in read.places] == ["line 3", "line 7"]
