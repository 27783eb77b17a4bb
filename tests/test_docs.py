"""The documentation: its commands exist, its links lead somewhere, and its guides can be followed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from command_line import call
from documented import REPOSITORY, Mention, arguments_of, blocks, lines_of, mentions, pages, problems
from typer.main import get_command

from variator_export import __version__
from variator_export.cli.app import make_app
from variator_export.recipe.recipe import Recipe

GUIDES = REPOSITORY / "docs" / "guides"
# So that a guide is followed in a minute; the last of an option that is given twice counts.
QUICKLY = {
    "build": ["--no-speed"],
    "verify": ["--ratio", "4"],
    "bench": ["--openings", "2", "--block-seconds", "0.02", "--max-rounds", "4"],
    "evaluate": ["--runtime", "onnxruntime"],
    "train": ["--steps", "2", "--batch-size", "4", "--held-out-passages", "8"],
}


def _wrong(command_line: object) -> list[str]:
    return [
        f"{page.relative_to(REPOSITORY)}: {problem}"
        for page in pages()
        for mention in mentions(page.read_text(encoding="utf-8"))
        for problem in problems(command_line, mention)
    ]


def test_every_command_and_option_in_the_documentation_exists() -> None:
    assert _wrong(get_command(make_app())) == []
    for page in GUIDES.glob("*.md"):
        found = [mention for mention in mentions(page.read_text(encoding="utf-8")) if mention.whole]
        assert len(found) >= 5, f"{page.name} shows {found}"


def test_an_option_that_changes_its_name_is_missed() -> None:
    command_line = get_command(make_app())
    for name, old in (("bench", "--fail-under"), ("evaluate", "--card"), ("build", "--no-speed")):
        command = command_line.commands[name]  # type: ignore[attr-defined]
        (option,) = (p for p in command.params if old in (*p.opts, *p.secondary_opts))
        option.opts, option.secondary_opts = ["--renamed"], []
    wrong = "\n".join(_wrong(command_line))
    assert "docs/guides/ci.md: variator-export bench has no --fail-under" in wrong
    assert "docs/guides/classifier.md: variator-export evaluate has no --card" in wrong
    assert "docs/evaluation.md: no command has --card" in wrong
    assert "docs/guides/ci.md: variator-export build has no --no-speed" in wrong


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("variator-export bild", "variator-export has no command bild"),
        ("variator-export train finetun --data x", "variator-export train has no command finetun"),
        ("variator-export inspect", "Missing parameter: bundle"),
        ("variator-export inspect a b", "unexpected extra argument"),
        ("variator-export bench a --max-rounds many > file", "valid integer"),
        ("torchrun -m variator_export train adapt --shape 1x1", "train adapt has no --shape"),
        ("variator-export inspect a --format xml || true", "'xml'"),
    ],
)
def test_a_wrong_command_line_is_found(line: str, problem: str) -> None:
    (mention,) = mentions(f"```\n{line}\n```\n")
    assert problem in " ".join(problems(get_command(make_app()), mention))


def test_commands_are_found_where_pages_have_them() -> None:
    text = (
        "Words `verify --bisect`, `variator-export bench BUNDLE\n--profile`, `--card`, `--hidden=1`, `x`.\n"
        "```\n$ variator-export build a.yaml \\\n    --ratio 4 > log   # a comment\nmake test\n```\n"
        "```python\nvariator-export = 1\n```\n"
        "```yaml\n- run: variator-export inspect 'a b' | tee log\n```\n"
        "```\ntorchrun -m variator_export train … --seed 1\n```\n"
    )
    assert list(mentions(text)) == [
        Mention(("build", "a.yaml", "--ratio", "4"), whole=True),
        Mention(("inspect", "a b"), whole=True),
        Mention(("train", "…", "--seed", "1"), whole=False),
        Mention(("verify", "--bisect"), whole=False),
        Mention(("bench", "BUNDLE", "--profile"), whole=False),
        Mention(("--card",), whole=False),
        Mention(("--hidden=1",), whole=False),
    ]


def test_links_to_other_sites_are_addresses() -> None:
    """Whether they answer is not asked: there may be no network."""
    for page in pages():
        for address in re.findall(r"(?:\]\(|<)(\w+://[^)>]*)", page.read_text(encoding="utf-8")):
            parts = urlsplit(address)
            assert parts.scheme == "https", (page, address)
            assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]+", parts.netloc), (page, address)
            assert not re.search(r"\s", address), (page, address)


def test_the_build_of_the_documentation_checks_links(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "tool.py").write_text("pass\n")
    (tmp_path / "README.md").write_text(
        "# Read me\n\n[a](docs/index.md#there) [b](tool.py)\n"
        "[c](docs/nowhere.md) [d](docs/index.md#not-there) [e](nothing.py)\n"
    )
    (tmp_path / "docs" / "index.md").write_text(
        "# First\n\n```{toctree}\n../README\n```\n\n## There\n\n"
        "```{eval-rst}\n:py:class:`variator_export.Bundel`\n```\n"
    )
    (tmp_path / "docs" / "alone.md").write_text("# Alone\n")
    command = ["-m", "sphinx", "-n", "-q", "-E", "-c", REPOSITORY / "docs", tmp_path, tmp_path / "build"]
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    found = [line for line in result.stderr.splitlines() if "WARNING" in line]
    for words in ("docs/nowhere.md", "not-there", "nothing.py", "variator_export.Bundel", "alone.md"):
        assert len([line for line in found if words in line]) == 1, (words, result.stderr)
    assert len(found) == 5, result.stderr
    assert len(list((tmp_path / "build" / "_downloads").rglob("tool.py"))) == 1
    assert "docs/index.html" in (tmp_path / "build" / "index.html").read_text()


@pytest.mark.timeout(900)
def test_the_guide_on_embeddings_can_be_followed(tmp_path: Path, minilm_bundle: Path) -> None:
    # As if followed before, and with ratio 2: what is built from nothing is in other tests, and takes long.
    shutil.copytree(minilm_bundle, tmp_path / "embeddings")
    (tmp_path / "pairs.tsv").write_bytes((REPOSITORY / "tests/data/sentence_pairs.tsv").read_bytes())
    (tmp_path / "mine.txt").write_bytes((REPOSITORY / "docs/training.md").read_bytes())
    ran = []
    for language, block in blocks((GUIDES / "embeddings.md").read_text(encoding="utf-8")):
        if language == "python":
            result = subprocess.run(
                [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True
            )
            assert result.returncode == 0, result.stderr
            similarities = {
                int(k): (float(a), float(b)) for k, a, b in re.findall(r"(\d) \[(\S+) (\S+)\]", result.stdout)
            }
            assert similarities.keys() == {1, 2, 4, 8}
            assert all(boat > shares + 0.2 for boat, shares in similarities.values())
            ran.append("python")
        for line in lines_of(block) if language == "" else ():
            arguments = arguments_of(line)
            if arguments is None:
                assert line.startswith("pip install"), line
                continue
            called = call(*arguments, *QUICKLY.get(arguments[0], []), cwd=tmp_path)
            assert called.returncode == 0, (line, called.stderr)
            if arguments[0] == "build":
                assert re.search("^reused +trace ", called.stderr, re.MULTILINE), called.stderr
            ran.append(arguments[0])
    assert ran == ["build", "evaluate", "bench", "report", "verify", "python", "train", "build", "run"]
    assert (tmp_path / "embeddings.html").is_file()


def test_the_guide_on_ci_can_be_followed(tmp_path: Path, small_recipe: Recipe) -> None:
    recipe = small_recipe.model_dump(mode="json", exclude_defaults=True)
    recipe["plugins"] = [{"ratio": k, "initialise": {}} for k in (4, 8)]
    (tmp_path / "my-model.yaml").write_text(json.dumps(recipe | {"name": "my-model"}))
    own = f'variator-export() {{ {sys.executable} -m variator_export "$@"; }}\n'
    text = (GUIDES / "ci.md").read_text(encoding="utf-8")
    build, failure = (
        next(block for language, block in blocks(text) if language == "" and words in block)
        for words in ("--summary", "--ratio 9")
    )
    result = subprocess.run(
        ["bash", "-c", own + build],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"CI": "true"},
    )
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "build.json").read_text())
    assert document["published"]
    assert document["untrained"] == ["ratio-4", "ratio-8"]
    assert "<testsuite " in (tmp_path / "verification.xml").read_text()
    assert "all checks passed" in (tmp_path / "verification.md").read_text()
    result = subprocess.run(["bash", "-c", own + failure], cwd=tmp_path, capture_output=True, text=True)
    (shown,) = (json.loads(block) for language, block in blocks(text) if language == "json")
    assert json.loads(result.stdout) == shown
    assert result.returncode == shown["error"]["exit_code"]


def test_the_commands_of_the_example_workflow_exist() -> None:
    workflow = yaml.safe_load((REPOSITORY / "examples" / "engines-in-ci" / "workflow.yml").read_text())
    command_line = get_command(make_app())
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    commands = [run for run in runs if run.startswith("variator-export ")]
    assert {run.split()[1] for run in commands} == {"build", "verify", "compile", "merge", "doctor"}
    for run in commands:
        arguments = arguments_of(" ".join(run.split()))
        assert arguments is not None
        assert problems(command_line, Mention(tuple(arguments), whole=True)) == []


def test_the_wheel_of_the_pages_is_the_one_that_is_made() -> None:
    for page in pages():
        for name in re.findall(r"variator_export-[\w.]+\.whl", page.read_text(encoding="utf-8")):
            assert name == f"variator_export-{__version__}-py3-none-any.whl", page
