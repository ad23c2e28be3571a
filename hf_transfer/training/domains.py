"""Domain adaptation as trainers: a labelled source, an unlabelled target, features that serve both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn
from transformers import TrainingArguments

from hf_transfer.data.domains import DomainPairs, DomainStream
from hf_transfer.discrepancy import MULTIPLES, Bandwidth
from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.objectives.base import Objective
from hf_transfer.objectives.domains import (
    CORAL,
    MMD,
    RAMP,
    ConditionalAdversarial,
    DomainAdversarial,
    Estimator,
    JointMMD,
)
from hf_transfer.pooling import HEAD
from hf_transfer.schedules import Schedule
from hf_transfer.training.trainer import TransferTrainer

Pairs = DomainPairs | DomainStream


class DomainAdversarialTrainer(TransferTrainer):
    """``TransferTrainer`` whose features learn that a critic cannot tell source from target (DANN, CDAN).

    One batch, one forward pass: the task's loss is that of the source rows, the critic's that of all.

    Args:
        model: As for ``TransferTrainer``.
        args: As for ``TransferTrainer``; a batch size counts pairs.
        train_dataset: ``DomainPairs(source, target)``, or a ``DomainStream``. Target labels are never read.
        conditional: Let the critic see the class predictions too (CDAN); for classifiers of one class per example.
        weight: See ``DomainAdversarial``.
        strength: See ``DomainAdversarial``.
        pooling: See ``DomainAdversarial``.
        hidden_size: See ``DomainAdversarial``.
        dropout: See ``DomainAdversarial``.
        spectral_norm: See ``DomainAdversarial``.
        critic_learning_rate: See ``DomainAdversarial``.
        objectives: Further terms.
        **options: As for ``TransferTrainer``.

    Raises:
        ConfigurationError: ``train_dataset`` has one domain, and what the objective and ``TransferTrainer`` refuse.

    Example:
        >>> pairs = DomainPairs(source=books, target=kitchen)
        >>> trainer = DomainAdversarialTrainer(model, args, train_dataset=pairs, eval_dataset=books_held_out)
        >>> trainer.train()

    References:
        Ganin et al. 2016, Domain-Adversarial Training of Neural Networks. Long et al. 2018, Conditional Adversarial
        Domain Adaptation.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Pairs,
        conditional: bool = False,
        weight: float | Schedule = 1.0,
        strength: float | Schedule = RAMP,
        pooling: str = HEAD,
        hidden_size: int = 256,
        dropout: float = 0.0,
        spectral_norm: bool = False,
        critic_learning_rate: float | None = None,
        objectives: Iterable[Objective] = (),
        **options: Any,
    ) -> None:
        kind = ConditionalAdversarial if conditional else DomainAdversarial
        term = kind(
            weight=weight,
            strength=strength,
            pooling=pooling,
            hidden_size=hidden_size,
            dropout=dropout,
            spectral_norm=spectral_norm,
            learning_rate=critic_learning_rate,
            domains=_domains_of(train_dataset),
        )
        super().__init__(model, args, train_dataset=train_dataset, objectives=[term, *objectives], **options)


class DomainAlignmentTrainer(TransferTrainer):
    """``TransferTrainer`` with ``L_task + weight * discrepancy`` of source and target features (DAN, JAN, Deep CORAL).

    Args:
        model: As for ``TransferTrainer``.
        args: As for ``TransferTrainer``; a batch size counts pairs, and the discrepancy is that of a batch: take 32
            pairs or more.
        train_dataset: ``DomainPairs(source, target)``, or a ``DomainStream``. Target labels are never read.
        discrepancy: "mmd"; "joint_mmd", of features and predictions; or "coral".
        weight: lambda. Of MMD 1 is usual; CORAL is as large as the features' fourth power.
        pooling: One or several places; see ``hf_transfer.pooling.PooledFeatures``.
        estimator: Of "mmd"; see ``MMD``. "joint_mmd" takes "biased" or "unbiased".
        bandwidth: Of the kernels; see ``MMD``.
        multiples: Of the bandwidth; see ``MMD``.
        objectives: Further terms.
        **options: As for ``TransferTrainer``.

    Raises:
        ConfigurationError: ``train_dataset`` has one domain, and what the objective and ``TransferTrainer`` refuse.

    References:
        Long et al. 2015 (DAN), Long et al. 2017 (JAN), Sun & Saenko 2016 (Deep CORAL).
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Pairs,
        discrepancy: Literal["mmd", "joint_mmd", "coral"] = "mmd",
        weight: float | Schedule = 1.0,
        pooling: str | Sequence[str] = HEAD,
        estimator: Estimator = "biased",
        bandwidth: float | Bandwidth = "mean",
        multiples: Sequence[float] = MULTIPLES,
        objectives: Iterable[Objective] = (),
        **options: Any,
    ) -> None:
        alike: dict[str, Any] = {"weight": weight, "pooling": pooling, "domains": _domains_of(train_dataset)}
        kernels: dict[str, Any] = {"bandwidth": bandwidth, "multiples": multiples}
        term: Objective
        if discrepancy == "mmd":
            term = MMD(estimator=estimator, **kernels, **alike)
        elif discrepancy == "joint_mmd" and estimator in ("biased", "unbiased"):
            term = JointMMD(unbiased=estimator == "unbiased", **kernels, **alike)
        elif discrepancy == "coral":
            term = CORAL(**alike)
        elif discrepancy == "joint_mmd":
            raise ConfigurationError(f"estimator = {estimator!r}: joint_mmd takes 'biased' or 'unbiased'.")
        else:
            raise ConfigurationError(
                f"discrepancy = {discrepancy!r}. {nearest(discrepancy, ('mmd', 'joint_mmd', 'coral'))}"
            )
        super().__init__(model, args, train_dataset=train_dataset, objectives=[term, *objectives], **options)


def _domains_of(train_dataset: Any) -> int:
    if not isinstance(train_dataset, (DomainPairs, DomainStream)):
        raise ConfigurationError(
            f"train_dataset: found {type(train_dataset).__name__}, expected DomainPairs(source, target)."
        )
    return train_dataset.domains
