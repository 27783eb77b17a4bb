"""What each ratio loses, and what helps: ablations of pre-training, and three tasks with the paper's.

    python benchmarks/quality.py --data DIR --work WORK --output benchmarks/results/quality-cpu.json

DIR holds STS-B, SST-2, MRPC, agnews and corpus/british_fiction. Every finished part is kept in WORK and not
done again, so a run that was stopped goes on. Nothing here reads STS-B dev: choices are made on a split of
train.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from common import describe, write_result
from sts_split import split
from variator_export.building.evaluate import evaluate
from variator_export.core.json_file import write_json
from variator_export.core.progress import Progress
from variator_export.data.example_files import read_examples
from variator_export.data.examples import Columns, Examples
from variator_export.data.texts import read_texts
from variator_export.model.backbone import load_backbone
from variator_export.model.backbone_info import read_backbone_info
from variator_export.model.plugin_file import load_plugin, load_plugin_config, save_plugin
from variator_export.model.plugin_layout import Plugin
from variator_export.model.source import BackboneSource, resolve_source
from variator_export.recipe.recipe_file import load_recipe
from variator_export.text.tokenizer import TextEncoder
from variator_export.training.adapt import adapt
from variator_export.training.finetune import finetune, steps_for_epochs
from variator_export.training.precision import choose_precision
from variator_export.training.pretrain import new_plugin, pretrain
from variator_export.training.run import Run
from variator_export.training.settings import (
    PRETRAIN_PRESETS,
    Losses,
    Optimisation,
    PluginShape,
    PretrainPreset,
)
from variator_export.training.task_data import divide

RATIOS = (2, 4, 8)
SHIPPED = "shipped"
SEED = 0
PAPER, DEFAULT = PRETRAIN_PRESETS["paper"], PRETRAIN_PRESETS["default"]


class Printed(Progress):
    """Notes with the time."""

    def note(self, text: str) -> None:
        """Print it."""
        print(time.strftime("%H:%M:%S"), text, flush=True)


@dataclass(frozen=True)
class Ablation:
    """One setting of pre-training: what it changes of a preset.

    Attributes:
        base: The preset.
        changes: Fields of the preset that differ.
        decompression: Whether there is a decompression layer.
        with_sts: Whether sentences of STS-B train are half of the text.
    """

    base: PretrainPreset
    changes: dict[str, Any] = field(default_factory=dict)
    decompression: bool = True
    with_sts: bool = True


# At equal steps for each. The first two are the paper's; the others change one thing of the default.
ABLATIONS = {
    "paper": Ablation(PAPER),
    "paper, short passages": Ablation(PAPER, {"passages": DEFAULT.passages}),
    "default": Ablation(DEFAULT),
    "masking none": Ablation(DEFAULT, {"masking": "none"}),
    "no decompression": Ablation(DEFAULT, decompression=False),
    "hidden states only": Ablation(DEFAULT, {"losses": Losses()}),
    "embedding only": Ablation(DEFAULT, {"losses": Losses(hidden=0, embedding=1)}),
    "every layer": Ablation(DEFAULT, {"losses": DEFAULT.losses.model_copy(update={"layers": 0.1})}),
    "other start": Ablation(DEFAULT, {"start": "paper" if DEFAULT.start != "paper" else "teacher"}),
    "bottleneck 128": Ablation(DEFAULT, {"bottleneck_size": 128}),
    "learning rate 1e-3": Ablation(DEFAULT, {"learning_rate": 1e-3}),
    "novels only": Ablation(DEFAULT, with_sts=False),
}


@dataclass(frozen=True)
class Task:
    """One real task.

    Attributes:
        train: The file to train on, below the data folder.
        dev: The file to measure on; None: a tenth of `train` is cut off.
        columns: Of both.
        epochs: Of fine-tuning.
    """

    train: str
    dev: str | None
    columns: Columns
    epochs: float


TASKS = {
    "SST-2": Task("SST-2/train.tsv", "SST-2/dev.tsv", Columns("sentence", None, "label"), 1.0),
    "MRPC": Task("MRPC/train.tsv", "MRPC/dev.tsv", Columns("#1 String", "#2 String", "Quality"), 5.0),
    "AG News": Task("agnews/dev.tsv", None, Columns("1", None, "2", header=False), 3.0),
}


class Bench:
    """One run of the benchmark.

    Args:
        data: The data folder.
        work: Where intermediate results are kept.
        steps: Of each pre-training.
        batch_size: Of each pre-training.
        adaptation_steps: Of each adaptation.
    """

    def __init__(self, data: Path, work: Path, steps: int, batch_size: int, adaptation_steps: int) -> None:
        self.data, self.work = data, work
        self.steps, self.batch_size, self.adaptation_steps = steps, batch_size, adaptation_steps
        self.precision = choose_precision("auto")
        self._refuse_other_settings()
        self.source = resolve_source(load_recipe("minilm").backbone.source)
        if not (work / "sts").exists():
            split(data / "STS-B/train.tsv", work / "sts")

    def _refuse_other_settings(self) -> None:
        """Results of other settings are not reused."""
        settings = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "adaptation_steps": self.adaptation_steps,
            "precision": self.precision,
        }
        path = self.work / "settings.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != settings:
            raise SystemExit(f"{self.work} holds results of other settings; give another --work.")
        write_json(path, settings)

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gave, now or in an earlier run."""
        path = self.work / "results" / f"{name}.json"
        if not path.exists():
            write_json(path, make())
        return json.loads(path.read_text(encoding="utf-8"))

    def backbone(self, source: BackboneSource) -> Any:
        """A loaded model."""
        return load_backbone(read_backbone_info(source), TextEncoder(source.folder).pad_token_id)

    def pretrained(self, name: str) -> Path:
        """The plugins of one setting."""
        if name == SHIPPED:
            return Path(__file__).parent.parent / "recipes" / "minilm"
        output = self.work / "pretrained" / name.replace(" ", "-").replace(",", "")
        if output.exists():
            return output
        ablation = ABLATIONS[name]
        preset = ablation.base.model_copy(update=ablation.changes)
        texts = [str(self.data / "corpus/british_fiction")]
        if ablation.with_sts:
            texts.append(f"{self.work / 'sts' / 'train.jsonl'}@0.5")
        pretrain(
            self.backbone(self.source),
            read_texts(texts),
            Run(output, progress=Printed()),
            plugins=PluginShape(
                ratios=RATIOS,
                bottleneck_size=preset.bottleneck_size,
                masking=preset.masking,
                start=preset.start,
                decompression=ablation.decompression,
            ),
            losses=preset.losses,
            passages=preset.passages,
            optimisation=Optimisation(
                steps=self.steps,
                batch_size=self.batch_size,
                learning_rate=preset.learning_rate,
                seed=SEED,
                precision=self.precision,
                eval_every=max(1, self.steps // 4),
            ),
        )
        return output

    def measure_pretraining(self, name: str) -> dict[str, Any]:
        """Similarity on the split to choose by, at every ratio."""
        folder = self.pretrained(name)
        pairs = read_examples(str(self.work / "sts" / "select.tsv"), Columns("first", "second", "score"))
        quality = evaluate(
            [folder / f"ratio-{k}" for k in RATIOS], pairs, runtimes=("onnxruntime",), progress=Printed()
        )
        training = load_plugin_config(folder / "ratio-4").training
        assert training is not None
        return {
            "settings": training["settings"],
            "held_out_loss": {
                k: (load_plugin_config(folder / f"ratio-{k}").training or {})["loss"] for k in RATIOS
            },
            "ratios": {row.ratio: {**row.metrics, "lost": row.relative_loss} for row in quality.rows},
        }

    def measure_task(self, name: str) -> dict[str, Any]:
        """Fine-tune, adapt and measure one task, with the paper's ablations."""
        train, dev = self._examples(name)
        cut = self._cut(train)
        folder = self.work / "tasks" / name.replace(" ", "-")
        self.finetuned(name, folder, cut)
        results = {}
        for way, plugins, adapted in (
            ("pre-trained and adapted", "default", True),
            ("the shipped plugins, adapted", SHIPPED, True),
            ("no adaptation", "default", False),
            ("no pre-training", None, True),
            ("no decompression", "no decompression", True),
            ("masking none", "masking none", True),
        ):
            results[way] = self.kept(
                f"task-{name}-{way}".replace(" ", "-"),
                lambda way=way, plugins=plugins, adapted=adapted: self._measure_way(
                    folder, way, plugins, adapted, cut, dev
                ),
            )
        return {"examples": {"train": len(cut[0]), "held_out": len(cut[1]), "dev": len(dev)}, "ways": results}

    def finetuned(self, name: str, folder: Path, cut: tuple[Examples, Examples]) -> None:
        """Fine-tune MiniLM to a classifier for a task: FOLDER/backbone."""
        if not (folder / "backbone").exists():
            finetune(
                self.source,
                *cut,
                Run(folder / "backbone", progress=Printed()),
                optimisation=Optimisation(
                    steps=steps_for_epochs(cut[0], 32, TASKS[name].epochs),
                    batch_size=32,
                    learning_rate=1e-4,
                    warmup_steps=100,
                    weight_decay=0.0,
                    max_grad_norm=1.0,
                    seed=SEED,
                    precision=self.precision,
                    eval_every=200,
                ),
            )

    def _measure_way(
        self,
        folder: Path,
        way: str,
        plugins: str | None,
        adapted: bool,
        cut: tuple[Examples, Examples],
        dev: Examples,
    ) -> dict[str, Any]:
        source = resolve_source(str(folder / "backbone"))
        start = self.pretrained(plugins) if plugins else self._untrained(folder)
        folders = {f"ratio-{k}": start / f"ratio-{k}" for k in RATIOS}
        output = folder / way.replace(" ", "-")
        if not adapted:
            for name, plugin in folders.items():
                self._for_backbone(plugin, source, output / name)
        elif not output.exists():
            adapt(
                self.backbone(source),
                folders,
                *cut,
                Run(output, progress=Printed()),
                losses=Losses(hidden=1.0, logits=0.1),
                optimisation=Optimisation(
                    steps=self.adaptation_steps,
                    batch_size=32,
                    learning_rate=1e-3,
                    warmup_steps=0,
                    seed=SEED,
                    precision=self.precision,
                    eval_every=max(1, self.adaptation_steps // 4),
                ),
            )
        quality = evaluate(
            [output / f"ratio-{k}" for k in RATIOS],
            dev,
            backbone=str(folder / "backbone"),
            max_tokens=128,
            progress=Printed(),
        )
        return {
            row.ratio: {**row.metrics, "lost": row.relative_loss}
            for row in quality.rows
            if row.runtime == "onnxruntime"
        }

    def _for_backbone(self, plugin: Path, source: BackboneSource, output: Path) -> None:
        """The same plugin, said to be for another backbone: what the ablation without adaptation measures."""
        read = load_plugin(plugin)
        identity = read_backbone_info(source).identity
        save_plugin(Plugin(read.config.model_copy(update={"backbone": identity}), read.tensors), output)

    def _untrained(self, folder: Path) -> Path:
        """Plugins where training starts, for the ablation without pre-training."""
        output = folder / "untrained"
        shape = PluginShape(ratios=RATIOS, masking=DEFAULT.masking, start=DEFAULT.start)
        backbone = self.backbone(self.source)
        for ratio in RATIOS:
            plugin = new_plugin(backbone, shape, ratio, SEED)
            save_plugin(plugin.to_file(), output / f"ratio-{ratio}")
        return output

    def _examples(self, name: str) -> tuple[Examples, Examples]:
        task = TASKS[name]
        train = read_examples(str(self.data / task.train), task.columns)
        if task.dev is None:
            return divide(train, 0.1, SEED)
        return train, read_examples(str(self.data / task.dev), task.columns)

    def _cut(self, train: Examples) -> tuple[Examples, Examples]:
        """What is trained on, and what the loss is looked at on; the held-out data of the task is neither."""
        return divide(train, min(0.1, 500 / len(train)), SEED)


def main(
    data: Annotated[Path, typer.Option(help="The data folder.")],
    work: Annotated[Path, typer.Option(help="Where intermediate results are kept.")],
    output: Path = Path("benchmarks/results/quality-cpu.json"),
    steps: int = 400,
    batch_size: int = 32,
    adaptation_steps: int = 200,
    only: Annotated[list[str] | None, typer.Option(help="Names of ablations or tasks; default: all.")] = None,
    threads: int | None = None,
) -> None:
    """Measure quality."""
    if threads is not None:
        torch.set_num_threads(threads)
    bench = Bench(data, work, steps, batch_size, adaptation_steps)
    result: dict[str, Any] = {**describe(), "precision": bench.precision, "pretraining": {}, "tasks": {}}
    result["settings"] = {"steps": steps, "batch_size": batch_size, "adaptation_steps": adaptation_steps}
    for name in ABLATIONS:
        if not only or name in only:
            key = f"pretraining-{name}".replace(" ", "-").replace(",", "")
            result["pretraining"][name] = bench.kept(key, lambda name=name: bench.measure_pretraining(name))
    for name in TASKS:
        if not only or name in only:
            result["tasks"][name] = bench.measure_task(name)
    write_result(output, result)


if __name__ == "__main__":
    typer.run(main)
