"""Whether `Bundle.embed` at ratio 1 returns what sentence-transformers returns, on texts of every length.

    python benchmarks/embeddings.py --output benchmarks/results/embeddings.json

1,000 texts of 1 to 600 tokens, of the words of this repository's documentation, by all-MiniLM-L6-v2, which
truncates at 256 tokens; without prompts, and with a default prompt and a named one. Needs the extras export,
onnxruntime and demo.
"""

import argparse
import json
import random
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from common import describe, minilm_folder, write_result
from variator_export import Bundle, build
from variator_export.recipe.recipe import Recipe

PROMPTS = {"query": "query: ", "passage": "passage: "}
LONGEST = 600


def main() -> None:
    """Build a bundle of the model, embed all texts both ways, and write the differences."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        shutil.copytree(minilm_folder(), folder)
        content = {"prompts": PROMPTS, "default_prompt_name": "passage"}
        (folder / "config_sentence_transformers.json").write_text(json.dumps(content))
        recipe = {"name": "embeddings", "backbone": {"source": str(folder)}, "speed": None}
        bundle = Bundle.load(
            build(Recipe.model_validate({**recipe, "targets": ["onnxruntime"]}), Path(work) / "bundle").bundle
        )
        theirs = SentenceTransformer(str(folder), device="cpu")
        texts = make_texts(arguments.texts)
        lengths = [len(row.ids) for row in bundle.text_encoder().token_rows(texts, 10**6, prompt="")]
        runs = [
            compare(bundle, theirs, texts, options)
            for options in ({"prompt": ""}, {}, {"prompt_name": "query"})
        ]
    write_result(
        arguments.output,
        {
            "question": "Is Bundle.embed at ratio 1 what sentence-transformers returns?",
            "texts": len(texts),
            "tokens": {"shortest": min(lengths), "longest": max(lengths), "limit": 256},
            "largest_difference": max(run["largest_difference"] for run in runs),
            "least_cosine": min(run["least_cosine"] for run in runs),
            "comparisons": runs,
            **describe(),
        },
    )


def make_texts(count: int) -> list[str]:
    """Texts of 1 to about 600 tokens, in random order, of words of the documentation."""
    page = Path(__file__).parent.parent / "README.md"
    words = re.findall(r"[A-Za-z]+[.,]?", page.read_text(encoding="utf-8"))
    rng = random.Random(0)
    # A word has 1.3 tokens on average.
    lengths = [1 + index * int(LONGEST / 1.3) // (count - 1) for index in range(count)]
    rng.shuffle(lengths)
    return [" ".join(rng.choices(words, k=length)) for length in lengths]


def compare(
    bundle: Bundle, theirs: SentenceTransformer, texts: list[str], options: dict[str, str]
) -> dict[str, Any]:
    """Embed all texts both ways with a prompt."""
    started = time.perf_counter()
    expected = theirs.encode(texts, batch_size=32, **options)  # type: ignore[call-overload]
    between = time.perf_counter()
    found = bundle.embed(texts, batch_size=32, **options)  # type: ignore[arg-type]
    ended = time.perf_counter()
    cosines = (found * expected).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)
    return {
        "prompt": options,
        "largest_difference": float(np.abs(found - expected).max()),
        "least_cosine": float(cosines.min()),
        "seconds": {"sentence_transformers": between - started, "bundle": ended - between},
    }


if __name__ == "__main__":
    main()
