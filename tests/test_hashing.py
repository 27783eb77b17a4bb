"""The digest of the code behind a step: what changes results changes it, and words do not."""

from pathlib import Path

import pytest

from variator_export.core import hashing

CODE = '"""A module."""\nLIMIT = 1  # for now\n\n\ndef half(x):\n    """A half."""\n    return x / 2\n'


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A half", "Half of x", True),
        ("A module", "One module", True),
        ("# for now", "# since ever", True),
        ("x / 2\n", "(x / 2)\n", True),
        ("x / 2", "x / 3", False),
        ("LIMIT = 1", "LIMIT = 2", False),
        ("half(x)", "half(x=1)", False),
    ],
)
def test_words_do_not_count_and_code_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, same: bool
) -> None:
    package = tmp_path / "package"
    (package / "graph").mkdir(parents=True)
    monkeypatch.setattr(hashing, "__file__", str(package / "core" / "hashing.py"))
    digest = hashing.code_digest.__wrapped__
    assert old in CODE
    (package / "graph" / "a.py").write_text(CODE)
    before = digest("graph")
    (package / "graph" / "a.py").write_text(CODE.replace(old, new))
    assert (digest("graph") == before) is same
    (package / "graph" / "b.py").write_text(CODE)
    assert digest("graph") != before, "another file is other code"
