"""Make the task of the T5 demo: find a date or a sum of money in a passage, and write it in digits.

    python examples/t5-demo/make_data.py NOVELS --output t5-demo-data

NOVELS is a folder of plain-text novels. Their passages are the background; into each one or two sentences
with a date or a sum, written as such books write them, are put. Novels whose names start with a name of
HELD_OUT appear only in the held-out file. Lines are {"text": "date: …", "label": "1813-06-04"} or
{"text": "sum: …", "label": "£12 6s"}.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

HELD_OUT = ("Austen_Pride", "Dickens_Hard", "Trollope_Prime")
# A sentence ends here, and not after a title.
_BETWEEN = re.compile(r"(?<=[.!?])(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)\s+(?=[A-Z\"'])")


def _words(*lines: str) -> list[str]:
    return " ".join(lines).split()


_UNITS = _words(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
    "seventeen eighteen nineteen",
)
_TENS = _words("zero ten twenty thirty forty fifty sixty seventy eighty ninety")
_ORDINALS = {
    **{"one": "first", "two": "second", "three": "third", "five": "fifth", "eight": "eighth"},
    **{"nine": "ninth", "twelve": "twelfth", "twenty": "twentieth", "thirty": "thirtieth"},
}
_MONTHS = _words("January February March April May June July August September October November December")
_DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
_DATED = (
    "The letter was dated {}.",
    "It was on {} that the carriage first came to the door.",
    "They were married on {}, in the parish church.",
    "He was born on {}.",
    "On {} she left the house for ever.",
    "The deed bears the date of {}.",
    "I remember it well; it was {}.",
    "The ship sailed from Portsmouth on {}, and was not heard of again.",
    "Her journal for {} has one line only.",
    "On the morning of {}, a stranger was seen in the lane.",
    "The lease runs from {}.",
    "You will find it in the newspaper of {}.",
    "From {} he never spoke of it again.",
    "The stone says that he died on {}.",
    "We arrived in Bath on {}.",
    "The school was opened on {}, with nine pupils.",
)
_PAID = (
    "He had left her {} in his will.",
    "The whole debt came to {}.",
    "She counted {} upon the table.",
    "The horse was sold for {}.",
    "His income was {} a year.",
    "They asked {} for the cottage.",
    "I have lent him {}, and shall not see it again.",
    "The rent was {}.",
    "There were {} in the box.",
    "Her uncle paid {} for the picture.",
    "He offered {} to whoever should find the dog.",
    "The bill, he said, was {}.",
    "{} had been stolen from the desk.",
    "The living was worth {}.",
)


def in_words(number: int) -> str:
    """A number from 1 to 9,999 in words."""
    parts = []
    thousands, rest = divmod(number, 1000)
    hundreds, small = divmod(rest, 100)
    if thousands:
        parts.append(f"{in_words(thousands)} thousand")
    if hundreds:
        parts.append(f"{_UNITS[hundreds]} hundred")
    if small:
        tens, units = divmod(small, 10)
        words = _UNITS[small] if small < 20 else _TENS[tens] + (f"-{_UNITS[units]}" if units else "")
        parts.append(f"and {words}" if parts else words)
    return " ".join(parts)


def ordinal(day: int) -> str:
    """A day of a month as an ordinal in words."""
    before, hyphen, last = in_words(day).rpartition("-")
    return before + hyphen + _ORDINALS.get(last, f"{last}th")


def _date(rng: random.Random) -> tuple[str, str]:
    year, month, day = rng.randint(1700, 1899), rng.randint(1, 12), rng.randint(1, 28)
    century, rest = divmod(year, 100)
    years = [str(year)] * 3 + [in_words(year)]
    years.append(f"{_UNITS[century]} hundred and {in_words(rest)}" if rest else f"{_UNITS[century]} hundred")
    if rest > 9:
        years.append(f"{_UNITS[century]} {in_words(rest)}")
    ending = {1: "st", 2: "nd", 3: "rd"}.get(day % 10 if day not in (11, 12, 13) else 0, "th")
    name, number = _MONTHS[month - 1], rng.choice(years)
    forms = [
        f"the {ordinal(day)} of {name}, {number}",
        f"{name} the {ordinal(day)}, {number}",
        f"the {day}{ending} of {name}, {number}",
        f"{name} {day}{ending}, {number}",
        f"the {day}{ending} day of {name} in the year {number}",
        f"{rng.choice(_DAYS)}, the {ordinal(day)} of {name}, {number}",
        f"{day} {name} {number}",
    ]
    return rng.choice(forms), f"{year}-{month:02}-{day:02}"


def _sum(rng: random.Random) -> tuple[str, str]:
    pounds = rng.choice(
        (rng.randint(2, 99), rng.randint(100, 999), rng.randint(1, 9) * 1000, rng.randint(2, 9999))
    )
    shillings, pence = rng.choice((0, 0, 0, rng.randint(2, 19))), rng.choice((0, 0, 0, rng.randint(2, 11)))
    spoken = [f"{in_words(pounds)} pounds"]
    written = [f"£{pounds}"]
    if shillings:
        spoken.append(f"{in_words(shillings)} shillings")
        written.append(f"{shillings}s")
    if pence:
        spoken.append(f"{in_words(pence)} pence")
        written.append(f"{pence}d")
    words = spoken[0] if len(spoken) == 1 else ", ".join(spoken[:-1]) + f" and {spoken[-1]}"
    return words, " ".join(written)


def _sentences(path: Path) -> list[str]:
    text = " ".join(path.read_text(encoding="utf-8", errors="replace").split())
    found = _BETWEEN.split(text)
    # A year or a sum of the novel's own would be a second answer.
    own = re.compile(r"\d|pound|shilling|" + "|".join(_MONTHS[:4] + _MONTHS[5:]))
    return [sentence for sentence in found if 20 <= len(sentence) <= 400 and not own.search(sentence)]


def _example(sentences: Sequence[str], rng: random.Random, words: int) -> dict[str, str]:
    start = rng.randrange(len(sentences) - 60)
    chosen: list[str] = []
    while sum(len(sentence.split()) for sentence in chosen) < words:
        chosen.append(sentences[start + len(chosen)])
    if words:
        chosen = _BETWEEN.split(" ".join(" ".join(chosen).split()[:words]))
    kinds = {"date": (_DATED, _date), "sum": (_PAID, _sum)}
    task = rng.choice(tuple(kinds))
    label = ""
    for kind in (task, *(() if rng.random() < 0.5 else ({"date": "sum", "sum": "date"}[task],))):
        templates, make = kinds[kind]
        said, found = make(rng)
        sentence = rng.choice(templates).format(said)
        chosen.insert(rng.randint(0, len(chosen)), sentence[0].upper() + sentence[1:])
        label = found if kind == task else label
    return {"text": f"{task}: {' '.join(chosen)}", "label": label}


def main() -> None:
    """Write train.jsonl and dev.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("novels", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=90_000, help="number of lines to train on")
    parser.add_argument("--dev", type=int, default=1000, help="number of held-out lines")
    parser.add_argument("--words", type=int, default=60, help="the longest background in words")
    arguments = parser.parse_args()
    files = sorted(arguments.novels.glob("*.txt"))
    held_out = [path for path in files if path.stem.startswith(HELD_OUT)]
    if not held_out or len(held_out) == len(files):
        parser.error(
            f"{arguments.novels} needs .txt files, some of whose names start with {', '.join(HELD_OUT)}"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, count, held_out in (("train", arguments.train, False), ("dev", arguments.dev, True)):
        rng = random.Random(f"{name} of the demo")
        books = [_sentences(path) for path in files if path.stem.startswith(HELD_OUT) is held_out]
        books = [sentences for sentences in books if len(sentences) > 100]
        with (arguments.output / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for index in range(count):
                # The first lines are short, so that a new model soon finds out what it should look for.
                share = 1.0 if held_out else min(1.0, 2 * index / count)
                words = rng.randint(0, max(1, int(arguments.words * share)))
                example = _example(rng.choice(books), rng, words)
                file.write(json.dumps(example, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
