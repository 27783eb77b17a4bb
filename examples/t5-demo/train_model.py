"""Train the small T5 of the demo from scratch, on two CPU cores in 25 minutes.

    python examples/t5-demo/train_model.py t5-demo-data --novels NOVELS --output t5-demo-model

Needs the extras `train` and `export`. The tokenizer is made from the novels. The model has T5 v1.1's
architecture, with 4 encoder and 2 decoder layers. The weights are stored in float16.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

VOCABULARY = 4096
SENTINELS = 32
LONGEST, LONGEST_LABEL = 256, 24
PAD, END, UNKNOWN = 0, 1, 2


def make_tokenizer(novels: list[Path], labels: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A Unigram tokenizer as T5 has, with single digits and the tokens of left-out spans."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    sentinels = [f"<extra_id_{index}>" for index in range(SENTINELS)]
    trainer = trainers.UnigramTrainer(
        vocab_size=VOCABULARY - SENTINELS,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        initial_alphabet=list("0123456789£-"),
    )
    texts = (line for path in novels for line in path.read_text(errors="replace").splitlines() if line)
    tokenizer.train_from_iterator((line for source in (texts, labels) for line in source), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=sentinels,
        model_max_length=LONGEST,
    )


def make_model() -> transformers.T5ForConditionalGeneration:
    """A T5 of 4 million parameters with random weights."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=192,
        d_kv=32,
        num_heads=6,
        d_ff=512,
        num_layers=4,
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=PAD,
        tie_word_embeddings=True,
    )
    return transformers.T5ForConditionalGeneration(config)


def main() -> None:
    """Train, and save the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--novels", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    train, dev = (
        [json.loads(line) for line in (arguments.data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "dev")
    )
    tokenizer = make_tokenizer(
        sorted(arguments.novels.glob("*.txt")), [row["label"] for row in train[:: max(1, len(train) // 2000)]]
    )
    model = make_model()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    # T5's weights start at very different scales. AdamW, whose steps ignore them, never learns to read here.
    optimizer = transformers.Adafactor(
        model.parameters(), lr=arguments.learning_rate, scale_parameter=True, relative_step=False
    )
    # After 200 steps of warm-up the rate falls to 0 as a cosine does.
    steps = arguments.steps
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 200, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )

    def encode(texts: list[str], longest: int) -> dict[str, torch.Tensor]:
        return tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")

    def batch(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        sources = encode([row["text"] for row in rows], LONGEST)
        labels = encode([row["label"] for row in rows], LONGEST_LABEL)["input_ids"]
        return {
            "input_ids": sources["input_ids"],
            "attention_mask": sources["attention_mask"],
            "labels": labels.masked_fill(labels == PAD, -100),
        }

    def exact_match(rows: list[dict[str, str]]) -> float:
        right = 0
        model.eval()
        for start in range(0, len(rows), 100):
            part = rows[start : start + 100]
            inputs = batch(part)
            del inputs["labels"]
            found = tokenizer.batch_decode(
                model.generate(**inputs, max_new_tokens=LONGEST_LABEL), skip_special_tokens=True
            )
            right += sum(a.strip() == row["label"] for a, row in zip(found, part, strict=True))
        model.train()
        return right / len(rows)

    model.train()
    started, shown = time.monotonic(), 0.0
    for step in range(steps):
        # Near the place that the schedule of lengths has for this step.
        at = int(step / steps * (len(train) - arguments.batch_size))
        inputs = batch(train[at : at + arguments.batch_size])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        shown += float(loss.detach())
        if (step + 1) % 100 == 0:
            print(f"{step + 1} {time.monotonic() - started:.0f} s loss {shown / 100:.4f}", flush=True)
            shown = 0.0
        if (step + 1) % 1000 == 0:
            print(f"{step + 1} exact match {exact_match(dev[:200]):.3f}", flush=True)
    print(f"exact match on {len(dev)} held-out texts: {exact_match(dev):.4f}")
    model.generation_config.max_new_tokens = LONGEST_LABEL
    model.half().save_pretrained(arguments.output)
    # Calls leave their truncation and padding in the file that is saved.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
