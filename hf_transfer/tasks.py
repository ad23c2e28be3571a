"""What a model can be trained to do: its auto class, its collator, and how its predictions are scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from hf_transfer.errors import ConfigurationError, nearest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import EvalPrediction, PreTrainedTokenizerBase

TaskName = Literal[
    "sequence-classification", "token-classification", "causal-lm", "image-classification", "audio-classification"
]
Inputs = Literal["text", "image", "audio"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

IGNORED = -100  # the label that transformers' losses leave out


@dataclass(frozen=True)
class Metrics:
    """How predictions of one problem are scored, and which score says that one checkpoint is better than another.

    Args:
        scores: Takes the gathered predictions and labels (numpy arrays), gives named floats.
        best: The name to put into ``TrainingArguments.metric_for_best_model``.
        greater_is_better: Whether ``best`` grows with quality.
    """

    scores: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    best: str
    greater_is_better: bool = True

    def compute(self, prediction: EvalPrediction) -> dict[str, float]:
        """The Trainer's ``compute_metrics``."""
        return self.scores(cast("np.ndarray", prediction.predictions), cast("np.ndarray", prediction.label_ids))


@dataclass(frozen=True)
class Task:
    """A kind of prediction.

    Args:
        name: The key in `TASKS`, as recipes write it.
        reads: What an example is.
        auto_class: The name of the transformers auto class that builds the model.
        new_head: Whether a head that the checkpoint lacks is expected; a language model must bring its own.
        collator: Makes the data collator from the model's processor. Padding is dynamic: to the longest example of a
            batch.
        metrics: Makes the `Metrics` from the problem type and the label names.
        preprocess_logits_for_metrics: Reduces a batch's ``(logits, labels)`` on its device before the Trainer gathers
            and keeps them, so that evaluation holds a few numbers per example or token instead of all logits.
    """

    name: TaskName
    reads: Inputs
    auto_class: str
    new_head: bool
    collator: Callable[[Any], Any]
    metrics: Callable[[ProblemType | None, Sequence[str]], Metrics]
    preprocess_logits_for_metrics: Callable[[Any, torch.Tensor], torch.Tensor]


def find_task(name: str) -> Task:
    """The task called ``name``.

    Raises:
        ConfigurationError: no task has that name.
    """
    if name not in TASKS:
        raise ConfigurationError(f"task: '{name}' is not a task. {nearest(name, TASKS)}")
    return TASKS[name]


def single_label_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1 over the classes that occur, and Matthews correlation (for unbalanced classes).

    Args:
        logits: ``[N, C]``.
        labels: ``[N]`` class ids.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    predicted = logits.argmax(axis=-1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0.0)),
        "matthews_correlation": float(matthews_corrcoef(labels, predicted)),
    }


def multi_label_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Micro- and macro-F1, and the share of examples whose whole set of labels is right; a label is predicted above
    probability 0.5.

    Args:
        logits: ``[N, C]``.
        labels: ``[N, C]`` of zeros and ones.
    """
    from sklearn.metrics import accuracy_score, f1_score

    truth, predicted = labels > 0.5, logits > 0.0
    return {
        "micro_f1": float(f1_score(truth, predicted, average="micro", zero_division=0.0)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0.0)),
        "subset_accuracy": float(accuracy_score(truth, predicted)),
    }


def regression_scores(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean squared error, Pearson and Spearman correlation; a constant correlates with nothing, so it scores 0.

    Args:
        predictions: ``[N]`` or ``[N, 1]``.
        labels: the same number of values.
    """
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_squared_error

    predictions, labels = predictions.reshape(-1), labels.reshape(-1)
    constant = len(labels) < 2 or predictions.min() == predictions.max() or labels.min() == labels.max()
    return {
        "mse": float(mean_squared_error(labels, predictions)),
        "pearson": 0.0 if constant else float(pearsonr(predictions, labels).statistic),
        "spearman": 0.0 if constant else float(spearmanr(predictions, labels).statistic),
    }


def is_bio(tags: Sequence[str]) -> bool:
    """Whether every tag is ``O``, ``B-type`` or ``I-type``, and at least one opens an entity."""
    return all(tag == "O" or tag[:2] in ("B-", "I-") for tag in tags) and any(tag != "O" for tag in tags)


def entity_spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of one BIO sequence as ``(type, first, end)``, ``end`` exclusive.

    Malformed sequences are read as conlleval reads them: an ``I-`` tag that continues nothing of its type opens an
    entity.

    Example:
        >>> sorted(entity_spans(["B-place", "I-place", "O", "I-person"]))
        [('person', 3, 4), ('place', 0, 2)]
    """
    spans = set()
    kind, first = "", -1  # no entity is open
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, found = tag.partition("-")
        if first >= 0 and (prefix != "I" or found != kind):
            spans.add((kind, first, position))
            first = -1
        if first < 0 and prefix != "O":
            kind, first = found, position
    return spans


def entity_scores(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 over the entities of all sentences; one is right when its type and both ends are."""
    right = found = expected = 0
    for predicted_tags, true_tags in zip(predicted, truth, strict=True):
        predicted_spans, true_spans = entity_spans(predicted_tags), entity_spans(true_tags)
        right += len(predicted_spans & true_spans)
        found += len(predicted_spans)
        expected += len(true_spans)
    return {
        "precision": right / found if found else 0.0,
        "recall": right / expected if expected else 0.0,
        "f1": 2 * right / (found + expected) if found + expected else 0.0,
    }


def token_scores(predicted: np.ndarray, labels: np.ndarray, *, names: Sequence[str]) -> dict[str, float]:
    """Token accuracy, with entity-level scores for BIO tags and macro-F1 for any other (parts of speech).

    Args:
        predicted: ``[N, T]`` tag ids.
        labels: ``[N, T]`` tag ids, -100 where there is nothing to score (padding, further pieces of a word).
        names: The tags in the order of their ids.
    """
    from sklearn.metrics import f1_score

    scored = labels != IGNORED
    scores = {"token_accuracy": float((predicted == labels)[scored].mean())}
    if not is_bio(names):
        macro_f1 = f1_score(labels[scored], predicted[scored], average="macro", zero_division=0.0)
        return {**scores, "macro_f1": float(macro_f1)}

    def tags(ids: np.ndarray) -> list[list[str]]:
        return [[names[tag] for tag in row[keep]] for row, keep in zip(ids, scored, strict=True)]

    return {**scores, **entity_scores(tags(predicted), tags(labels))}


def language_model_sums(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """What a batch adds to perplexity and accuracy, one row per sequence.

    The Trainer averages the loss over batches, which weighs the tokens of short batches more; sums per sequence make
    the mean exact over tokens, also across ranks, and no logits are kept. One sequence is upcast at a time.

    Args:
        logits: ``[B, T, V]``, or a tuple that starts with it.
        labels: ``[B, T]``, not shifted, -100 where nothing is predicted.

    Returns:
        float32 ``[B, 3]``: summed negative log-likelihood in nats, tokens predicted right, tokens predicted.
    """
    import torch
    from torch.nn.functional import cross_entropy

    rows = []
    for sequence, targets in zip(_logits(logits)[:, :-1], labels[:, 1:], strict=True):
        loss = cross_entropy(sequence.float(), targets, ignore_index=IGNORED, reduction="sum")
        right = (sequence.argmax(dim=-1) == targets).sum()
        rows.append(torch.stack([loss, right.float(), (targets != IGNORED).sum().float()]))
    return torch.stack(rows)


def language_model_scores(sums: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Perplexity (exp of the mean loss over all predicted tokens) and token accuracy from `language_model_sums`."""
    loss, right, tokens = sums.sum(axis=0, dtype="float64")
    mean = loss / tokens
    return {"perplexity": math.exp(mean) if mean < 700 else math.inf, "token_accuracy": float(right / tokens)}


def bits_per_character(perplexity: float, *, characters_per_token: float) -> float:
    """Perplexity per token on a scale that compares models with different tokenizers."""
    return math.log2(perplexity) / characters_per_token


def _logits(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs  # encoder-decoders also return encoder states


def _keep_logits(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return _logits(outputs)


def _keep_classes(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return _logits(outputs).argmax(dim=-1)


def _sequence_metrics(problem_type: ProblemType | None, label_names: Sequence[str]) -> Metrics:
    if problem_type == "regression":
        return Metrics(regression_scores, best="mse", greater_is_better=False)
    if problem_type == "multi_label_classification":
        return Metrics(multi_label_scores, best="micro_f1")
    return Metrics(single_label_scores, best="accuracy")


def _token_metrics(problem_type: ProblemType | None, label_names: Sequence[str]) -> Metrics:
    return Metrics(partial(token_scores, names=label_names), best="f1" if is_bio(label_names) else "token_accuracy")


def _language_model_metrics(problem_type: ProblemType | None, label_names: Sequence[str]) -> Metrics:
    return Metrics(language_model_scores, best="perplexity", greater_is_better=False)


def _pad_inputs(tokenizer: PreTrainedTokenizerBase) -> Any:
    from transformers import DataCollatorWithPadding

    return DataCollatorWithPadding(tokenizer)


def _stack_images(processor: Any) -> Any:
    from transformers import default_data_collator

    return default_data_collator


def _pad_sounds(processor: Any) -> Any:
    return partial(_padded_sounds, processor)


def _padded_sounds(extractor: Any, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch whose sounds are as long as its longest, with a mask where the model reads one."""
    from transformers import default_data_collator

    name = extractor.model_input_names[0]
    sounds = extractor.pad({name: [row[name] for row in examples]}, return_tensors="pt")
    rest = [{column: row[column] for column in row if column != name} for row in examples]
    return {**sounds, **(default_data_collator(rest) if rest[0] else {})}


def _pad_inputs_and_labels(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Also for language models: DataCollatorForLanguageModeling hides every label that equals the padding token, thus
    the end-of-text token of each model that pads with it."""
    from transformers import DataCollatorForTokenClassification

    return DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sequence-classification",
            reads="text",
            auto_class="AutoModelForSequenceClassification",
            new_head=True,
            collator=_pad_inputs,
            metrics=_sequence_metrics,
            preprocess_logits_for_metrics=_keep_logits,
        ),
        Task(
            name="token-classification",
            reads="text",
            auto_class="AutoModelForTokenClassification",
            new_head=True,
            collator=_pad_inputs_and_labels,
            metrics=_token_metrics,
            preprocess_logits_for_metrics=_keep_classes,
        ),
        Task(
            name="causal-lm",
            reads="text",
            auto_class="AutoModelForCausalLM",
            new_head=False,
            collator=_pad_inputs_and_labels,
            metrics=_language_model_metrics,
            preprocess_logits_for_metrics=language_model_sums,
        ),
        Task(
            name="image-classification",
            reads="image",
            auto_class="AutoModelForImageClassification",
            new_head=True,
            collator=_stack_images,
            metrics=_sequence_metrics,
            preprocess_logits_for_metrics=_keep_logits,
        ),
        Task(
            name="audio-classification",
            reads="audio",
            auto_class="AutoModelForAudioClassification",
            new_head=True,
            collator=_pad_sounds,
            metrics=_sequence_metrics,
            preprocess_logits_for_metrics=_keep_logits,
        ),
    )
}
