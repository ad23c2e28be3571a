"""One term of a training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from hf_transfer.schedules import Schedule


class Objective(nn.Module):
    """A term that is added to the task's loss while training, and is gone when the model ships.

    A subclass states what it needs as class attributes, builds what depends on the model in :meth:`prepare`, and
    returns a scalar from :meth:`forward`. Parameters it registers (a critic, a projection) are trained beside the
    model by the scaffold; persistent buffers (an anchor, a Fisher matrix) are saved with every checkpoint, so that a
    resumed run continues with the same ones.

    Args:
        weight: Factor of the term in the sum: a number, or a schedule of progress such as ``Ramp()``.

    Example:
        >>> class Sparsity(Objective):
        ...     name = "sparsity"
        ...     def forward(self, model, batch, outputs, progress):
        ...         return outputs.logits.abs().mean()
    """

    name: ClassVar[str]
    """Key of the term in recipes and in the logs (``<name>_loss``)."""

    columns: tuple[str, ...] = ()
    """Columns read from the batch beyond the model's own inputs; kept in the data set and never shown to the model."""

    logits: ClassVar[bool] = True
    """Whether ``outputs.logits`` is read: they are not there where the loss is fused with the head."""

    hidden_states: ClassVar[bool] = False
    """Whether ``outputs.hidden_states`` is read."""

    attentions: ClassVar[bool] = False
    """Whether ``outputs.attentions`` is read, which only eager attention returns."""

    averaged_over: Literal["examples", "labels", "steps"] = "examples"
    """What the scalar is a mean over: the micro-batch's examples, its labels that are not -100, or nothing in the
    batch at all ("steps": a term of the weights). The trainer weighs micro-batches and ranks accordingly, so that
    the sum is the mean over the whole step however the step is cut."""

    learning_rate: float | None = None
    """Rate of the objective's own parameters; ``None`` takes the run's ``learning_rate``."""

    def __init__(self, *, weight: float | Schedule = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.measured: dict[str, torch.Tensor] = {}
        """What the last :meth:`forward` saw beside its value, scalars that are averaged as it is; the logs have them
        as ``<name>_<key>``."""

    def weight_at(self, progress: float) -> float:
        """The term's factor at ``progress``."""
        return self.weight(progress) if callable(self.weight) else self.weight

    def prepare(self, model: nn.Module) -> None:
        """Build what depends on ``model`` (unwrapped, on its device, before the first step). Called once."""

    def forward(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, progress: float) -> torch.Tensor:
        """The term of one micro-batch, unweighted.

        Args:
            model: The unwrapped model, for terms that read its weights.
            batch: The collated micro-batch with labels and the declared ``columns``.
            outputs: What the model returned for it.
            progress: Share of the run that is done, in [0, 1].

        Returns:
            A scalar tensor.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward().")
