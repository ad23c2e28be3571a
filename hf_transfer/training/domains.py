"""Domain adaptation as trainers: a labelled source, an unlabelled target, features that serve both."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.utils.data import Subset
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from hf_transfer.data.domains import DomainPairs, DomainStream
from hf_transfer.discrepancy import MULTIPLES, Bandwidth
from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.losses import loss_kind, problem_type, transformer_in
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
from hf_transfer.pooling import HEAD, PooledFeatures
from hf_transfer.schedules import Schedule
from hf_transfer.training.label_free import CRITERIA, SCORED, Answers, label_free_scores
from hf_transfer.training.trainer import TransferTrainer

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

logger = logging.getLogger(__name__)

Pairs = DomainPairs | DomainStream


class DomainTrainer(TransferTrainer):
    """``TransferTrainer`` on ``DomainPairs``, whose evaluations also tell what is known of the target without labels.

    Beside the metrics of ``eval_dataset``, which should be source examples that are not trained on, an evaluation has
    ``eval_deep_embedded_risk``, ``eval_importance_weighted_risk``, ``eval_target_entropy``,
    ``eval_soft_neighborhood_density`` and ``eval_proxy_a_distance`` (``hf_transfer.scores``); any of them can be
    ``metric_for_best_model``, and ``greater_is_better`` is set to suit it: the risks, the entropy and the distance are
    better low, the density high; the distance says nothing of the classes. Where ``eval_dataset`` is several sets they
    are left out.

    Args:
        model: As for ``TransferTrainer``.
        args: As for ``TransferTrainer``; a batch size counts pairs.
        train_dataset: ``DomainPairs(source, target)``, or a ``DomainStream``. Target labels are never read.
        target_eval_dataset: Target examples for these scores; by default 1,000 of those that are trained on.
            ``False`` leaves the scores out.
        oracle_dataset: Labelled target examples, which every evaluation scores too, as ``eval_oracle_...``: to see
            what the choice without labels costs. Nothing else reads them.
        pooling: Where the features are taken; see ``hf_transfer.pooling.PooledFeatures``.
        **options: As for ``TransferTrainer``.

    Raises:
        ConfigurationError: ``train_dataset`` has one domain, and what ``TransferTrainer`` refuses.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        train_dataset: Pairs,
        target_eval_dataset: Any = None,
        oracle_dataset: Any = None,
        pooling: str | Sequence[str] = HEAD,
        **options: Any,
    ) -> None:
        _domains_of(train_dataset)
        if target_eval_dataset is None and isinstance(train_dataset, DomainPairs):
            target = train_dataset.rows["target"]
            target_eval_dataset = Subset(target, range(0, len(target), math.ceil(len(target) / SCORED)))
        super().__init__(model, args, train_dataset=train_dataset, **options)
        self.target_eval_dataset = target_eval_dataset
        self.oracle_dataset = oracle_dataset
        self._listening: Answers | None = None
        self._scores_domains = False
        self._settle_choice()
        self._place = PooledFeatures(self.model, pooling if isinstance(pooling, str) else pooling[0])
        self._place.listens = False
        self._chooses = loss_kind(self.model) == "classification" and problem_type(
            transformer_in(self.model).config
        ) in (None, "single_label_classification")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        own = eval_dataset is None or eval_dataset is self.eval_dataset
        self._scores_domains = own and not isinstance(self.eval_dataset, dict)
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._scores_domains = False

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        if not self._scores_domains:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        self._scores_domains, self._place.listens, self._listening = False, True, Answers()
        arguments = (description, prediction_loss_only, ignore_keys)
        try:
            output = super().evaluation_loop(dataloader, *arguments, metric_key_prefix)
            source, self._listening = self._listening, None
            found: dict[str, float] = {}
            if self.target_eval_dataset is not None and self.target_eval_dataset is not False:
                # a test loader: the one for evaluation may be kept, and then serves any data set
                found = label_free_scores(source, self._answers(self.get_test_dataloader(self.target_eval_dataset)))
        finally:
            self._listening, self._place.listens = None, False
        scores = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        if self.oracle_dataset is not None:
            loader, prefix = self.get_test_dataloader(self.oracle_dataset), f"{metric_key_prefix}_oracle"
            scores |= super().evaluation_loop(loader, *arguments, prefix).metrics or {}
        if output.metrics is not None:
            output.metrics.update(scores)
        return output

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self._listening is not None:
            self._listen(self._listening, inputs, outputs, labels)
        return (loss, outputs) if return_outputs else loss

    def _settle_choice(self) -> None:
        """Which way the criterion for the best checkpoint is better, if it is one that needs no target labels."""
        criterion = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if isinstance(self.eval_dataset, dict) and (self.oracle_dataset is not None or criterion in CRITERIA):
            raise ConfigurationError(
                "eval_dataset: found several; expected one, of source examples, for the scores of the target."
            )
        if criterion in CRITERIA and self.args.greater_is_better != CRITERIA[criterion]:
            logger.warning(
                "greater_is_better is set to %s, for that is what %s means.", CRITERIA[criterion], criterion
            )
            self.args.greater_is_better = CRITERIA[criterion]

    @torch.no_grad()
    def _answers(self, loader: DataLoader) -> Answers:
        answers = Answers()
        for batch in loader:
            inputs = self._prepare_inputs(batch)
            inputs.pop("labels", None)
            with self.compute_loss_context_manager():
                outputs = self.model(**inputs)
            self._listen(answers, inputs, outputs, None)
        return answers

    def _listen(self, answers: Answers, inputs: Mapping[str, Any], outputs: Any, labels: torch.Tensor | None) -> None:
        """Note the answers to one batch, of all ranks."""
        parts = [self._place.take(inputs), *([outputs.logits] if self._chooses else [])]
        parts += [labels] if self._chooses and labels is not None else []
        features, *others = self.accelerator.gather_for_metrics(tuple(parts))
        logits, known = (*others, None, None)[:2]
        answers.add(features, logits, known)


class DomainAdversarialTrainer(DomainTrainer):
    """``DomainTrainer`` whose features learn that a critic cannot tell source from target (DANN, CDAN).

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
        batch_norm_by_domain: See ``TransferTrainer``. On by default: between MNIST and USPS a critic gained 0 to 4
            points from it, a discrepancy lost 1 to 3.
        **options: As for ``DomainTrainer``.

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
        batch_norm_by_domain: bool = True,
        **options: Any,
    ) -> None:
        options["batch_norm_by_domain"] = batch_norm_by_domain
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
        super().__init__(
            model, args, train_dataset=train_dataset, pooling=pooling, objectives=[term, *objectives], **options
        )


class DomainAlignmentTrainer(DomainTrainer):
    """``DomainTrainer`` with ``L_task + weight * discrepancy`` of source and target features (DAN, JAN, Deep CORAL).

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
        **options: As for ``DomainTrainer``.

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
        super().__init__(
            model, args, train_dataset=train_dataset, pooling=pooling, objectives=[term, *objectives], **options
        )


def _domains_of(train_dataset: Any) -> int:
    if not isinstance(train_dataset, (DomainPairs, DomainStream)):
        raise ConfigurationError(
            f"train_dataset: found {type(train_dataset).__name__}, expected DomainPairs(source, target)."
        )
    return train_dataset.domains
