"""Functions that the commands of `train` share, apart from their options."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from variator_export.cli import options
from variator_export.cli.output import ConsoleProgress, Output
from variator_export.cli.push import push_result
from variator_export.core.errors import UsageError

if TYPE_CHECKING:
    from variator_export.training.results import TrainedFolders
    from variator_export.training.run import Run


def optimisation_of(**values: Any) -> Any:
    """Create the `training.settings.Optimisation` of a run from options by name."""
    from variator_export.training.precision import choose_precision
    from variator_export.training.settings import Optimisation

    options.choose("--precision", values["precision"], ("auto", "float32", "bfloat16"))
    return options.checked(Optimisation, {**values, "precision": choose_precision(values["precision"])})


def load(
    source: str | None,
    task: str | None,
    architecture: str | None,
    label_words: Mapping[str, str] | None = None,
    decoder_prompt: str = "",
) -> Any:
    """Load a backbone. None loads the default recipe's backbone.

    Raises:
        UsageError: Both a task and an architecture were given.
    """
    options.check_architecture(task, architecture)
    from variator_export.model.backbone import load_backbone
    from variator_export.model.backbone_info import read_backbone_info
    from variator_export.model.source import resolve_source
    from variator_export.text.tokenizer import TextEncoder

    found = resolve_source(source or options.default_backbone())
    return load_backbone(
        read_backbone_info(found, architecture, task, label_words, decoder_prompt),
        TextEncoder(found.folder).pad_token_id,
    )


def plugin_folders(plugins: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the plugins to train further, by name: NAME of `NAME=DIR`, or ratio-K.

    Raises:
        UsageError: Two plugins have the same name.
        UserError: A plugin does not exist.
    """
    from variator_export.model.plugin_file import load_plugin_config
    from variator_export.model.source import plugin_folder

    folders: dict[str, Path] = {}
    for plugin in plugins:
        name, source = options.named_plugin(plugin)
        path = plugin_folder(source)
        key = name if name is not None else f"ratio-{load_plugin_config(path).ratio}"
        if key in folders:
            raise UsageError(
                f"Two plugins have the name {key}.", "Give them different names: --plugin NAME=DIR"
            )
        folders[key] = path
    return folders


def examples_of(
    data: str,
    validation: str | None,
    held_out: float,
    seed: int,
    columns: dict[str, Any],
    label_map: Mapping[str, str] | None = None,
    *,
    by_class: bool = True,
) -> tuple[Any, Any]:
    """Return the examples to train on and the held-out examples to measure the loss on.

    `by_class` is False if the targets are texts, or scores, and not classes.
    """
    from variator_export.data.example_files import read_examples
    from variator_export.data.examples import Columns
    from variator_export.training.task_data import divide

    names = label_map or {}
    read = read_examples(data, Columns(**columns)).relabelled(names)
    if read.targets is not None and by_class:
        read.classes()  # refuses a single class
    if validation is not None:
        other = read_examples(validation, Columns(**columns))
        there = set(other.labels()) if names else set()  # a small file may lack a class
        return read, other.relabelled({label: name for label, name in names.items() if label in there})
    return divide(read, held_out, seed, by_class=by_class)


def module_folders(modules: Sequence[str]) -> dict[str, Path]:
    """Return the folders of the modules to train further, by name: NAME of `NAME=DIR`, or the folder's.

    Raises:
        UsageError: Two folders have the same name.
        UserError: Modules do not exist.
    """
    from variator_export.model.source import modules_folder

    folders: dict[str, Path] = {}
    for text in modules:
        name, source = options.named_plugin(text)
        path = modules_folder(source)
        key = name if name is not None else path.resolve().name
        if key in folders:
            raise UsageError(
                f"Two folders of modules have the name {key}.", "Give them different names: --module NAME=DIR"
            )
        folders[key] = path
    return folders


@contextmanager
def running(
    printer: Output,
    output: Path,
    *,
    replace: bool,
    restart: bool,
    terms: str | None,
    dtype: str = "float16",
) -> Iterator["Run"]:
    """Yield the run of this command, after a check of its output. Restore the terminal afterwards.

    Raises:
        UsageError: The data type is unknown.
        UserError: The output holds something that must not be replaced.
    """
    from variator_export.training.run import Run

    options.choose("--dtype", dtype, ("float16", "float32"))
    with ConsoleProgress(printer) as progress:
        run = Run(
            output=output,
            dtype=cast(Any, dtype),
            replace=replace,
            restart=restart,
            command=options.command_line(),
            terms=terms,
            progress=progress,
        )
        run.check_output()
        yield run


def is_main() -> bool:
    """Whether this process prints the result."""
    from variator_export.training.processes import is_main_process

    return is_main_process()


def print_results(
    printer: Output, kind: str, result: "TrainedFolders", output: Path, push_to: str | None
) -> None:
    """Print the folders that a run published, and push them if requested.

    Args:
        printer: Where to print.
        kind: What the folders hold, the key in the JSON document: `plugins` or `modules`.
        result: The result of the run.
        output: The run's output.
        push_to: The repository to push to; None to push nothing.
    """
    if not is_main():
        return
    if not printer.is_json:
        for name, folder in result.folders.items():
            printer.text(f"{name}: held-out loss {result.losses[name]:.5f}: {folder}")
    pushed = push_result(printer, output, push_to)
    if printer.is_json:
        results = {
            name: {"folder": str(folder), "held_out_loss": result.losses[name]}
            for name, folder in result.folders.items()
        }
        printer.document({kind: results, "steps": result.history.steps, "pushed": pushed})
