"""What `variator-export embed` costs beside its session, and whether its memory grows with the input.

    python benchmarks/embed.py --bundle artifacts/minilm --texts agnews.txt \\
        --output benchmarks/results/embed-cpu.json

Speed: a session in a loop over batches that are padded already, beside whole runs of what the command calls,
one for each format of the output and one with two processes. All have the same chunks, so the same batches.
Runs take turns, each opens its session anew, and opening is not timed. `--texts` has a text on each line.

Memory: the peak of the command's process, for short lines and a small random model with MiniLM's tokenizer.
Needs the extras export, onnxruntime and parquet.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common import copy_tokenizer, describe, write_result
from variator_export import Bundle, build
from variator_export.engines.batches import BATCH_SIZE, batches_by_length
from variator_export.recipe.recipe import Recipe
from variator_export.serving.offline.run import embed_file
from variator_export.serving.offline.settings import EmbedSettings
from variator_export.serving.offline.source import TextSource
from variator_export.text.tokenizer import pad_rows

CHUNK_SIZE = 1000
LINES = (20_000, 200_000)


def session_alone(bundle: Bundle, source: Path) -> float:
    """Tokens per second of a session that runs the batches of every chunk, padded before the clock starts."""
    encoder, inputs = bundle.text_encoder(), bundle.manifest.backbone.inputs
    batches, tokens = [], 0
    for chunk in TextSource(str(source)).chunks(CHUNK_SIZE):
        rows = encoder.token_rows(chunk.texts)
        tokens += sum(len(row.ids) for row in rows)
        batches += [
            pad_rows([rows[index] for index in batch], inputs, encoder.pad_token_id)
            for batch in batches_by_length(rows, BATCH_SIZE)
        ]
    session = bundle.session(variant=1)
    started = time.perf_counter()
    for batch in batches:
        session.run(batch)
    return tokens / (time.perf_counter() - started)


def command(bundle: Bundle, source: Path, output: Path, processes: int = 1) -> float:
    """Tokens per second of a whole run, as the command reports them."""
    settings = EmbedSettings(bundle.path, "ratio-1", chunk_size=CHUNK_SIZE)
    return embed_file(
        TextSource(str(source)), output, settings, processes=processes, replace=True
    ).tokens_per_second


def speed(bundle: Bundle, source: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """Every subject in turns; the share of the session's own speed is that of the same round."""
    subjects: dict[str, Callable[[], float]] = {
        "session alone": lambda: session_alone(bundle, source),
        "npy": lambda: command(bundle, source, folder / "v.npy"),
        "parquet": lambda: command(bundle, source, folder / "v.parquet"),
        "jsonl": lambda: command(bundle, source, folder / "v.jsonl"),
        "npy, two processes": lambda: command(bundle, source, folder / "v.npy", 2),
    }
    runs: dict[str, list[float]] = {name: [] for name in subjects}
    for turn in range(rounds):
        # A drift of the machine's speed within a round favours no subject.
        for name in subjects if turn % 2 == 0 else reversed(subjects):
            runs[name].append(round(subjects[name](), 1))
    alone = runs["session alone"]
    return {
        "tokens_per_second": {name: median(found) for name, found in runs.items()},
        "share_of_the_session": {
            name: round(median(one / own for one, own in zip(found, alone, strict=True)), 4)
            for name, found in runs.items()
        },
        "runs": runs,
    }


def make_small_bundle(folder: Path) -> Path:
    """A bundle of a random BERT with two layers and mean pooling."""
    import transformers

    model = folder / "model"
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    transformers.BertModel(config).save_pretrained(model)
    copy_tokenizer(model)
    kinds = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, path) in enumerate(kinds.items())
    ]
    (model / "modules.json").write_text(json.dumps(modules))
    (model / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (model / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    recipe = {"name": "small", "backbone": {"source": str(model)}, "targets": ["onnxruntime"], "speed": None}
    return build(Recipe.model_validate(recipe), folder / "bundle").bundle


# The peak of this program alone: getrusage also counts the process that started it.
_MEMORY = """
import re, sys
from pathlib import Path
from variator_export.cli.main import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak_bytes(bundle: Path, lines: int, suffix: str, folder: Path) -> int:
    """The largest resident memory of the command, on a number of short lines."""
    source = folder / "lines.txt"
    source.write_text("".join(f"{number} boats\n" for number in range(lines)))
    arguments = ["embed", str(bundle), "--input", str(source), "--output", str(folder / f"v{suffix}")]
    result = subprocess.run(
        [sys.executable, "-c", _MEMORY, *arguments, "--replace", "--batch-size", "256"],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(result.stdout.split()[-1]) * 1024


def main() -> None:
    """Measure both and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bundle = Bundle.load(options.bundle)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = make_small_bundle(folder)
        memory = {
            suffix: {str(lines): peak_bytes(small, lines, suffix, folder) for lines in LINES}
            for suffix in (".npy", ".parquet", ".jsonl")
        }
        found = speed(bundle, options.texts, folder, options.rounds)
    write_result(
        options.output,
        {
            "question": "What does embed cost beside its session, and does its memory grow with the input?",
            **describe("pyarrow"),
            "bundle": options.bundle.name,
            "texts": sum(1 for _ in options.texts.open(encoding="utf-8")),
            "chunk_size": CHUNK_SIZE,
            "batch_size": BATCH_SIZE,
            **found,
            "peak_memory_bytes_by_lines": memory,
        },
    )


if __name__ == "__main__":
    main()
