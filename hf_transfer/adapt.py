"""The recipes of domain adaptation: labelled examples of one domain, unlabelled ones of another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_transfer.data.domain_spec import DomainDataSpec
from hf_transfer.discrepancy import MULTIPLES
from hf_transfer.recipe import FineTuneRecipe
from hf_transfer.schedules import Ramp, Schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from hf_transfer.data.prepared import PreparedData
    from hf_transfer.tasks import Metrics
    from hf_transfer.training.trainer import TransferTrainer

RAMP = Ramp()


@dataclass(kw_only=True)
class DomainRecipe(FineTuneRecipe):
    """What the methods have in common.

    With ``training.eval_strategy``, evaluations tell what is known of the target without labels, and ``metrics.json``
    has under ``selection`` what each way of choosing a checkpoint would take: ``source``, by source validation data;
    ``honest``, by ``criterion``; and where the target has labelled test data, ``oracle``, by those.

    Args:
        data: Source and target examples. A batch size counts pairs of one of each.
        criterion: What ``honest`` goes by. To keep that checkpoint, set ``training.load_best_model_at_end`` and
            ``training.metric_for_best_model``.
    """

    two_domains: ClassVar[bool] = True

    data: DomainDataSpec  # type: ignore[assignment]
    criterion: Literal[
        "deep_embedded_risk",
        "importance_weighted_risk",
        "target_entropy",
        "soft_neighborhood_density",
        "proxy_a_distance",
    ] = "deep_embedded_risk"

    def _prepare(self, arguments: TrainingArguments) -> tuple[Any, PreparedData, Metrics]:
        processor, data, metrics = super()._prepare(arguments)
        self._oracle = data.test
        return processor, data, metrics

    def _findings(self, trainer: TransferTrainer, scored: Metrics) -> dict[str, Any]:
        from hf_transfer.training.label_free import selections

        history = trainer.state.log_history
        if not any(f"eval_{self.criterion}" in entry for entry in history):
            return {}
        chosen = selections(
            history, metric=scored.best, greater_is_better=scored.greater_is_better, criterion=self.criterion
        )
        return {"selection": chosen}


@dataclass(kw_only=True)
class DomainAdversarialRecipe(DomainRecipe):
    """Features that a critic cannot tell the domains by (DANN; with ``conditional``, CDAN), and that the task is
    learned from on the source. All options of ``fine_tune`` combine with it.

    Args:
        conditional: Let the critic see the class predictions too.
        weight: Factor of the critic's term.
        strength: Of the gradient's reversal: a number, or a function of progress; by default the paper's ramp.
        pooling: What of an example the critic reads: head (what the last layer reads), cls, mean, last, or the name of
            a module.
        hidden_size: Width of the critic's two layers.
        dropout: Between them.
        spectral_norm: Bound the critic's slope.
        critic_learning_rate: By default the run's.
        batch_norm_by_domain: Let batch norm layers take each domain by its own statistics, as two forward passes do.
    """

    name: ClassVar[str] = "domain_adversarial"

    conditional: bool = False
    weight: float | Schedule = 1.0
    strength: float | Schedule = RAMP
    pooling: str = "head"
    hidden_size: int = 256
    dropout: float = 0.0
    spectral_norm: bool = False
    critic_learning_rate: float | None = None
    batch_norm_by_domain: bool = True

    def _trainer(self, model: PreTrainedModel, arguments: TrainingArguments, **options: Any) -> TransferTrainer:
        from hf_transfer.training.domains import DomainAdversarialTrainer

        return DomainAdversarialTrainer(
            self._adapted(model, arguments),
            arguments,
            conditional=self.conditional,
            weight=self.weight,
            strength=self.strength,
            pooling=self.pooling,
            hidden_size=self.hidden_size,
            dropout=self.dropout,
            spectral_norm=self.spectral_norm,
            critic_learning_rate=self.critic_learning_rate,
            batch_norm_by_domain=self.batch_norm_by_domain,
            oracle_dataset=self._oracle,
            task_weight=self.task_weight,
            fused_loss=self.fused_loss,
            **self._trainer_options(),
            **options,
        )


@dataclass(kw_only=True)
class DomainAlignmentRecipe(DomainRecipe):
    """``L_task + weight * discrepancy``: source and target features are drawn together in distribution (DAN, JAN, Deep
    CORAL). All options of ``fine_tune`` combine with it.

    Args:
        discrepancy: That of the batch: mmd; joint_mmd, of features and predictions; or coral.
        weight: lambda: a number, or a function of progress.
        pooling: What of an example is compared; see ``domain_adversarial``. Several places add up.
        estimator: Of mmd: biased, unbiased, or for large batches linear or random_features.
        bandwidth: Of the kernels: a number, mean or median (of the squared distances in each batch).
        multiples: Of the bandwidth, one kernel each.
        batch_norm_by_domain: Let batch norm layers take each domain by its own statistics, as two forward passes do.
    """

    name: ClassVar[str] = "domain_alignment"

    discrepancy: Literal["mmd", "joint_mmd", "coral"] = "mmd"
    weight: float | Schedule = 1.0
    pooling: str | list[str] = "head"
    estimator: Literal["biased", "unbiased", "linear", "random_features"] = "biased"
    bandwidth: float | Literal["mean", "median"] = "mean"
    multiples: tuple[float, ...] = MULTIPLES
    batch_norm_by_domain: bool = False

    def _trainer(self, model: PreTrainedModel, arguments: TrainingArguments, **options: Any) -> TransferTrainer:
        from hf_transfer.training.domains import DomainAlignmentTrainer

        return DomainAlignmentTrainer(
            self._adapted(model, arguments),
            arguments,
            discrepancy=self.discrepancy,
            weight=self.weight,
            pooling=self.pooling,
            estimator=self.estimator,
            bandwidth=self.bandwidth,
            multiples=self.multiples,
            batch_norm_by_domain=self.batch_norm_by_domain,
            oracle_dataset=self._oracle,
            task_weight=self.task_weight,
            fused_loss=self.fused_loss,
            **self._trainer_options(),
            **options,
        )
