"""What a transformers model's own loss scores: which kind of prediction, per example or per token, shifted or not."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from hf_transfer.errors import ConfigurationError
from hf_transfer.tasks import IGNORED

LossKind = Literal[
    "classification", "token classification", "causal language model", "masked language model", "encoder-decoder"
]

CLASSIFICATION: tuple[LossKind, ...] = ("classification", "token classification")
"""The kinds whose classes have names."""

_KINDS: dict[str, LossKind] = {
    "ForSequenceClassification": "classification",
    "ForImageClassification": "classification",
    "ForVideoClassification": "classification",
    "ForAudioClassification": "classification",
    "ForTokenClassification": "token classification",
    "ForCausalLM": "causal language model",
    "ForMaskedLM": "masked language model",
}
# Their loss is ForCausalLMLoss, because no loss answers to their names; the Trainer takes them for classifiers.
_CAUSAL_BY_DEFAULT = {
    "BertGenerationDecoder",
    "BertLMHeadModel",
    "CTRLLMHeadModel",
    "GPT2LMHeadModel",
    "OpenAIGPTLMHeadModel",
    "ReformerModelWithLMHead",
}


def transformer_in(model: nn.Module) -> PreTrainedModel:
    """The transformers model that ``model`` is or wraps (PEFT, DDP).

    Raises:
        ConfigurationError: There is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise ConfigurationError(f"{type(model).__name__} is not a transformers model and wraps none.")


def loss_kind(model: nn.Module) -> LossKind | None:
    """What the model predicts, as far as its class tells; ``None`` for any other task.

    ``"classification"`` gives one answer per example, be it one class, several, or a number.
    """
    core = transformer_in(model)
    if type(core).__name__ in _CAUSAL_BY_DEFAULT:
        return "causal language model"
    loss_type = getattr(core, "loss_type", None) or ""
    if loss_type.endswith("ForConditionalGeneration"):
        return "encoder-decoder" if core.config.is_encoder_decoder else "causal language model"
    return _KINDS.get(loss_type)


def shifts_labels(model: nn.Module) -> bool:
    """Whether position t is scored against label t + 1, as decoder-only language models do."""
    return loss_kind(model) == "causal language model"


def with_decoder_inputs(
    model: PreTrainedModel, inputs: Mapping[str, Any], labels: Any, accepted: Container[str]
) -> dict[str, Any]:
    """``inputs`` and, where an encoder-decoder would be asked without its decoder's, those that its ``labels`` shifted
    by one are.

    Args:
        model: The model to ask.
        inputs: Of a batch, without labels.
        labels: (B, T), or anything where there are none.
        accepted: What the model takes.
    """
    if "decoder_input_ids" not in accepted or "decoder_input_ids" in inputs or not isinstance(labels, Tensor):
        return dict(inputs)
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shifted is not None:
        return {**inputs, "decoder_input_ids": shifted(labels)}
    return {**inputs, "labels": labels} if labels.dim() == 2 else dict(inputs)  # Whisper shifts them itself


def label_names(config: PreTrainedConfig) -> list[str]:
    """The names of a classifier's classes, in the order of its logits."""
    return [name for _, name in sorted((config.id2label or {}).items())]


def problem_type(config: PreTrainedConfig) -> str | None:
    """What a classifier of examples answers, as transformers' loss decides it; ``None`` where labels will tell."""
    if config.problem_type is not None or config.num_labels != 1:
        return config.problem_type
    return "regression"


def labelled_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """The loss of a classifier of examples over those that are labelled; a ``compute_loss_func``.

    It is transformers' own where no label is missing; that one would read -100 as a number to predict where labels are
    numbers.

    Args:
        outputs: With ``logits`` (B, C).
        labels: -100 where there is none; classes (B,), or as floats one number (B,) or several labels (B, C) each.
        num_items_in_batch: Labels of the whole step.
    """
    known, logits = labels != IGNORED, outputs.logits
    items = max(1, int(known.sum())) if num_items_in_batch is None else num_items_in_batch
    if not labels.is_floating_point():
        return functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / items
    compare = functional.mse_loss if logits.shape[-1] == 1 else functional.binary_cross_entropy_with_logits
    return compare(logits.view_as(labels)[known], labels[known].to(logits.dtype), reduction="sum") / items
