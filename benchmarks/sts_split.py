"""Cut STS-B train into a split to choose by, and plain sentences to train on.

    python benchmarks/sts_split.py GLUE/STS-B/train.tsv --output sts

writes `select.tsv` (1,000 pairs with scores, drawn at random) and `train.jsonl` (the sentences of the other
pairs, each once, without those of `select.tsv`, and without scores: pre-training needs no labels). STS-B dev
is not touched: it is for the last reading.
"""

import json
import random
from pathlib import Path

import typer

from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns

NUM_SELECT = 1000


def split(train: Path, output: Path) -> None:
    """Write the two files."""
    examples = read_examples(str(train), Columns("sentence1", "sentence2", "score"))
    assert examples.pairs is not None
    assert examples.targets is not None
    order = list(range(len(examples)))
    random.Random(0).shuffle(order)
    rows = list(zip(examples.texts, examples.pairs, examples.targets, strict=True))
    select, rest = [rows[i] for i in order[:NUM_SELECT]], [rows[i] for i in order[NUM_SELECT:]]
    chosen = {text for first, second, _ in select for text in (first, second)}
    sentences = sorted({text for first, second, _ in rest for text in (first, second)} - chosen)
    output.mkdir(parents=True, exist_ok=True)
    lines = ["first\tsecond\tscore", *("\t".join(row) for row in select)]
    (output / "select.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = (json.dumps({"text": text}, ensure_ascii=False) for text in sentences)
    (output / "train.jsonl").write_text("".join(f"{line}\n" for line in texts), encoding="utf-8")
    print(f"{len(select)} pairs to choose by, {len(sentences)} sentences to train on: {output}")


def main(train: Path, output: Path = Path("sts")) -> None:
    """Split STS-B train."""
    split(train, output)


if __name__ == "__main__":
    typer.run(main)
