"""Optimum's part of text_to_text.py, for an interpreter with optimum-onnx: it needs an older transformers.

    python benchmarks/text_to_text_optimum.py MODEL FOLDER

Exports MODEL with Optimum into FOLDER, unless it is there, and opens it. Each line of standard input is a
request, as JSON; its seconds go to standard output.
"""

import contextlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path

import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForSeq2SeqLM

PACKAGES = ("optimum-onnx", "optimum", "transformers", "onnxruntime", "torch")


def main() -> None:
    """Answer requests until standard input ends."""
    source, folder = map(Path, sys.argv[1:])
    with contextlib.redirect_stdout(sys.stderr):
        if not folder.exists():
            main_export(str(source), folder, task="text2text-generation-with-past", do_validation=False)
        model = ORTModelForSeq2SeqLM.from_pretrained(folder)
    print(json.dumps({name: importlib.metadata.version(name) for name in PACKAGES}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        ids = torch.tensor(order["ids"])
        tokens = {"max_new_tokens": order["new_tokens"], "min_new_tokens": order["new_tokens"]}
        started = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            num_beams=order["beams"],
            do_sample=False,
            **tokens,
        )
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main()
