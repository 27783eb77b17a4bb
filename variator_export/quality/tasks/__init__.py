"""The tasks that quality is measured on. To add a task, write an `EvaluationTask` and a line here."""

from variator_export.core.errors import UserError
from variator_export.core.registry import Registry
from variator_export.data.examples import Examples
from variator_export.quality.tasks.base import EvaluatedModel, EvaluationTask

# In the order in which the first task that fits is chosen.
TASKS: Registry[EvaluationTask] = Registry(
    kind="evaluation task",
    group="variator_export.evaluation_tasks",
    contract=EvaluationTask,  # type: ignore[type-abstract]
    own={
        "classification": "variator_export.quality.tasks.classification:CLASSIFICATION",
        "multi-label": "variator_export.quality.tasks.classification:MULTI_LABEL",
        "regression": "variator_export.quality.tasks.classification:REGRESSION",
        "token-classification": "variator_export.quality.tasks.entities:TOKEN_CLASSIFICATION",
        "question-answering": "variator_export.quality.tasks.answers:QUESTION_ANSWERING",
        "fill-mask": "variator_export.quality.tasks.masked_tokens:FILL_MASK",
        "text2text-generation": "variator_export.quality.tasks.generated_text:TEXT_TO_TEXT",
        "similarity": "variator_export.quality.tasks.embeddings:SIMILARITY",
        "embedding": "variator_export.quality.tasks.embeddings:EMBEDDING",
        "hidden-states": "variator_export.quality.tasks.embeddings:HIDDEN_STATES",
    },
)


def choose_task(name: str | None, model: EvaluatedModel, examples: Examples) -> EvaluationTask:
    """Return the task of that name, or the first task that the model and the examples allow.

    Raises:
        UserError: The model or the examples do not fit the task, or any task.
    """
    if name is not None:
        task = TASKS.find(name)
        if (wrong := task.unfit_model(model) or task.unfit_data(examples)) is not None:
            raise wrong
        return task
    refused: UserError | None = None
    for task in TASKS.all().values():
        if task.unfit_model(model) is not None:
            continue
        if (wrong := task.unfit_data(examples)) is None:
            return task
        if task.name == model.task:  # its own task, which the data should have fitted
            raise wrong
        refused = refused or wrong
    if refused is not None:
        raise refused
    raise UserError(
        f"{model.source} returns {', '.join(model.outputs)}, on which no task can be measured.",
        "Build the bundle with another --task.",
    )
