"""Features that do not tell the domains apart: adversarially, or by a discrepancy between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from hf_transfer.adversarial import certainty_weight, multilinear_map, reverse_gradient
from hf_transfer.data.domains import DOMAIN
from hf_transfer.discrepancy import MULTIPLES, Bandwidth, coral, linear_mmd, mmd, random_feature_mmd
from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.losses import label_names, loss_kind, problem_type, transformer_in
from hf_transfer.objectives.base import Objective
from hf_transfer.pooling import HEAD, PooledFeatures
from hf_transfer.ranks import gather_rows
from hf_transfer.schedules import Ramp, Schedule

Estimator = Literal["biased", "unbiased", "linear", "random_features"]

RAMP = Ramp()
LARGEST_MAP = 4096  # entries of an outer product of features and predictions, as in Long et al. 2018


class DomainObjective(Objective):
    """A term of the pooled features of a batch of ``DomainPairs``.

    Args:
        weight: Factor of the term in the loss.
        pooling: Where the features are taken; see ``hf_transfer.pooling.PooledFeatures``.
        domains: How many there are, the target included.
    """

    columns = (DOMAIN,)
    logits: ClassVar[bool] = False

    def __init__(self, *, weight: float | Schedule, pooling: str | Sequence[str], domains: int) -> None:
        super().__init__(weight=weight)
        self.pooling = (pooling,) if isinstance(pooling, str) else tuple(pooling)
        self.domains = domains
        if domains < 2 or not self.pooling:
            raise ConfigurationError(
                f"{self.name}: {domains} domains and {len(self.pooling)} places to take features from: expected at "
                "least 2 and 1."
            )

    def prepare(self, model: nn.Module) -> None:
        self._features = [PooledFeatures(model, pooling) for pooling in self.pooling]

    def _layers(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """The features (N, D) of every place, in float32 at least."""
        layers = [features.take(batch) for features in self._features]
        return [layer.to(torch.promote_types(layer.dtype, torch.float32)) for layer in layers]


class DomainAdversarial(DomainObjective):
    """DANN: a critic learns to tell the domains of pooled features apart, the features learn that it cannot.

    The term is the critic's cross-entropy, a mean over the rows of all domains (half of the paper's sum of two means);
    between features and critic the gradient is reversed, with a strength that follows the run. The logs have
    ``domain_adversarial_accuracy`` beside the loss: with two domains, a critic at 0.5 from the first steps on has
    collapsed, one at 1.0 throughout is not fooled.

    Args:
        weight: Factor of the whole term, the critic's own learning included.
        strength: lambda of the reversal: a number, or a function of progress. The paper's ramp by default, which
            spares the features while the critic knows nothing yet.
        pooling: Where the features are taken; see ``hf_transfer.pooling.PooledFeatures``.
        hidden_size: Width of the critic's two hidden layers; 1,024 in the paper, for 4,096 features.
        dropout: Between the critic's layers.
        spectral_norm: Bound the critic's slope (Miyato et al. 2018), so that its gradient does not run away.
        learning_rate: Of the critic, which starts at random and may take ten times a pretrained model's; the run's by
            default.
        domains: How many; 2 for one source and the target.

    References:
        Ganin et al. 2016, Domain-Adversarial Training of Neural Networks.
    """

    name: ClassVar[str] = "domain_adversarial"

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        strength: float | Schedule = RAMP,
        pooling: str = HEAD,
        hidden_size: int = 256,
        dropout: float = 0.0,
        spectral_norm: bool = False,
        learning_rate: float | None = None,
        domains: int = 2,
    ) -> None:
        super().__init__(weight=weight, pooling=pooling, domains=domains)
        if hidden_size < 1 or not 0 <= dropout < 1:
            raise ConfigurationError(
                f"{self.name}: hidden_size = {hidden_size}, dropout = {dropout}: expected a width of at least 1 and a "
                "share below 1."
            )
        self.strength = strength
        self.hidden_size = hidden_size
        self.dropout = dropout
        self.spectral_norm = spectral_norm
        self.learning_rate = learning_rate

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        bound = spectral_norm if self.spectral_norm else _unbound
        sizes = [self._input_size(model), self.hidden_size, self.hidden_size]
        layers: list[nn.Module] = []
        for size, following in pairwise(sizes):
            layers += [bound(nn.Linear(size, following)), nn.ReLU(), nn.Dropout(self.dropout)]
        self.critic = nn.Sequential(*layers, bound(nn.Linear(self.hidden_size, self.domains)))

    def forward(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, progress: float) -> Tensor:
        strength = self.strength(progress) if callable(self.strength) else self.strength
        inputs, weight = self._inputs(batch, outputs)
        domain = batch[DOMAIN].to(inputs.device)
        guess = self.critic(reverse_gradient(inputs, strength))
        self.measured = {"accuracy": (guess.argmax(-1) == domain).float().mean()}
        return (weight * functional.cross_entropy(guess, domain, reduction="none")).mean()

    def _input_size(self, model: nn.Module) -> int:
        return sum(features.size for features in self._features)

    def _inputs(self, batch: Mapping[str, Any], outputs: Any) -> tuple[Tensor, Tensor | float]:
        """What the critic reads, (N, size), and what each row counts."""
        return torch.cat(self._layers(batch), 1), 1.0


class ConditionalAdversarial(DomainAdversarial):
    """CDAN: a critic of the features together with the class predictions, which aligns the domains class by class.

    It reads the outer product of both, or a random map of it where that has more than 4,096 entries; predictions are
    detached, so that the classifier is not trained to fool the critic. Rows count ``1 + exp(-H)`` of their
    prediction's entropy H, so that what is hard to classify does not lead (CDAN+E); the weights are not normalised, as
    in the paper's eq. 8, where its code divides them by their sum in each domain.

    Args:
        entropy_weighting: Whether they do.
        map_size: Entries of the random map; the paper's 1,024.
        **options: As for ``DomainAdversarial``.

    Raises:
        ConfigurationError: The model does not choose one class per example.

    References:
        Long et al. 2018, Conditional Adversarial Domain Adaptation.
    """

    name: ClassVar[str] = "conditional_adversarial"
    logits: ClassVar[bool] = True

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        strength: float | Schedule = RAMP,
        pooling: str = HEAD,
        hidden_size: int = 256,
        dropout: float = 0.0,
        spectral_norm: bool = False,
        learning_rate: float | None = None,
        domains: int = 2,
        entropy_weighting: bool = True,
        map_size: int = 1024,
    ) -> None:
        super().__init__(
            weight=weight,
            strength=strength,
            pooling=pooling,
            hidden_size=hidden_size,
            dropout=dropout,
            spectral_norm=spectral_norm,
            learning_rate=learning_rate,
            domains=domains,
        )
        self.entropy_weighting = entropy_weighting
        self.map_size = map_size
        self.of_features: Tensor | None
        self.of_predictions: Tensor | None
        self.register_buffer("of_features", None)
        self.register_buffer("of_predictions", None)

    def _input_size(self, model: nn.Module) -> int:
        _refuse_unless_one_class(self.name, model, instead="domain_adversarial")
        size, classes = super()._input_size(model), len(label_names(transformer_in(model).config))
        if size * classes <= LARGEST_MAP:
            return size * classes
        self.of_features = torch.randn(size, self.map_size)
        self.of_predictions = torch.randn(classes, self.map_size)
        return self.map_size

    def _inputs(self, batch: Mapping[str, Any], outputs: Any) -> tuple[Tensor, Tensor | float]:
        features, weight = super()._inputs(batch, outputs)
        predictions = outputs.logits.detach().to(features.dtype).softmax(-1)
        if self.entropy_weighting:
            weight = certainty_weight(predictions)
        if self.of_features is None or self.of_predictions is None:
            return multilinear_map(features, predictions), weight
        return multilinear_map(features, predictions, (self.of_features, self.of_predictions)), weight


class DiscrepancyObjective(DomainObjective):
    """A discrepancy between each source's features and the target's, of the rows of all ranks at once.

    It couples the rows of a batch: its value depends on how many there are, and a step of several micro-batches takes
    the mean of theirs. A micro-batch of too few rows, as the last of an epoch may be, adds nothing.
    """

    least_rows = 1
    """Of each domain."""

    def forward(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, progress: float) -> Tensor:
        layers = [gather_rows(layer) for layer in self._compared(batch, outputs)]
        domain = gather_rows(batch[DOMAIN].to(layers[0].device))
        target = [layer[domain == self.domains - 1] for layer in layers]
        if len(target[0]) < self.least_rows:
            return 0 * layers[0].sum()
        sources = ([layer[domain == number] for layer in layers] for number in range(self.domains - 1))
        return torch.stack([self._discrepancy(source, target) for source in sources]).mean()

    def _compared(self, batch: Mapping[str, Any], outputs: Any) -> list[Tensor]:
        return self._layers(batch)

    def _discrepancy(self, source: list[Tensor], target: list[Tensor]) -> Tensor:
        """Of features (N, D) and (M, D), place by place."""
        raise NotImplementedError(f"{type(self).__name__} must define _discrepancy().")


class MMD(DiscrepancyObjective):
    """DAN: the squared maximum mean discrepancy of the domains' features, under a mixture of Gaussian kernels.

    Of several places the discrepancies are added up (Long et al. 2015); ``JointMMD`` compares their joint
    distribution.

    Args:
        weight: lambda of ``L_task + lambda MMD``.
        pooling: One or several places; see ``hf_transfer.pooling.PooledFeatures``.
        estimator: "biased" is never below 0, "unbiased" has no floor that depends on the batch; both take all pairs.
            "linear" and "random_features" take time linear in the batch, for batches of thousands.
        bandwidth: A number, or "mean" or "median": of the squared distances in each batch.
        multiples: Of the bandwidth, one kernel each.
        features: How many random ones.
        domains: How many domains; 2 for one source and the target.

    Raises:
        ConfigurationError: As for ``hf_transfer.discrepancy.mmd``.

    References:
        Long et al. 2015, Learning Transferable Features with Deep Adaptation Networks. Gretton et al. 2012.
    """

    name: ClassVar[str] = "mmd"

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        pooling: str | Sequence[str] = HEAD,
        estimator: Estimator = "biased",
        bandwidth: float | Bandwidth = "mean",
        multiples: Sequence[float] = MULTIPLES,
        features: int = 2048,
        domains: int = 2,
    ) -> None:
        super().__init__(weight=weight, pooling=pooling, domains=domains)
        if estimator not in get_args(Estimator):
            raise ConfigurationError(f"estimator = {estimator!r}. {nearest(estimator, get_args(Estimator))}")
        self.estimator = estimator
        self.features = features
        self.least_rows = 2 if estimator in ("unbiased", "linear") else 1
        self.kernels: dict[str, Any] = {"bandwidth": bandwidth, "multiples": multiples}

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        if self.estimator == "random_features":
            for place, features in enumerate(self._features):
                self.register_buffer(f"directions_{place}", torch.randn(self.features, features.size))

    def _discrepancy(self, source: list[Tensor], target: list[Tensor]) -> Tensor:
        return torch.stack(
            [self._estimate(place, *pair) for place, pair in enumerate(zip(source, target, strict=True))]
        ).sum()

    def _estimate(self, place: int, source: Tensor, target: Tensor) -> Tensor:
        if self.estimator == "linear":
            return linear_mmd(source, target, **self.kernels)
        if self.estimator == "random_features":
            return random_feature_mmd(source, target, self.get_buffer(f"directions_{place}"), **self.kernels)
        return mmd(source, target, unbiased=self.estimator == "unbiased", **self.kernels)


class JointMMD(DiscrepancyObjective):
    """JAN: the discrepancy of the domains' joint distribution of features and class probabilities.

    Every layer has the same mixture of kernels, where the paper's code has a single one of a fixed width for the
    probabilities.

    Args:
        weight: lambda of ``L_task + lambda JMMD``.
        pooling: One or several places, beside the predictions.
        unbiased: See ``hf_transfer.discrepancy.mmd``.
        bandwidth: See ``MMD``.
        multiples: See ``MMD``.
        domains: See ``MMD``.

    Raises:
        ConfigurationError: The model does not choose one class per example.

    References:
        Long et al. 2017, Deep Transfer Learning with Joint Adaptation Networks.
    """

    name: ClassVar[str] = "joint_mmd"
    logits: ClassVar[bool] = True

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        pooling: str | Sequence[str] = HEAD,
        unbiased: bool = False,
        bandwidth: float | Bandwidth = "mean",
        multiples: Sequence[float] = MULTIPLES,
        domains: int = 2,
    ) -> None:
        super().__init__(weight=weight, pooling=pooling, domains=domains)
        self.least_rows = 2 if unbiased else 1
        self.options: dict[str, Any] = {"unbiased": unbiased, "bandwidth": bandwidth, "multiples": multiples}

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        _refuse_unless_one_class(self.name, model, instead="mmd")

    def _compared(self, batch: Mapping[str, Any], outputs: Any) -> list[Tensor]:
        layers = self._layers(batch)
        return [*layers, outputs.logits.to(layers[0].dtype).softmax(-1)]

    def _discrepancy(self, source: list[Tensor], target: list[Tensor]) -> Tensor:
        return mmd(source, target, **self.options)


class CORAL(DiscrepancyObjective):
    """Deep CORAL: the distance of the domains' feature covariances, ``|C_s - C_t|^2 / (4 D^2)``.

    Its scale is that of the features to the fourth power: expect to need a large ``weight`` for normalised ones.

    Args:
        weight: lambda of ``L_task + lambda CORAL``.
        pooling: One or several places, whose terms are added up.
        domains: How many domains; 2 for one source and the target.

    References:
        Sun & Saenko 2016, Deep CORAL: Correlation Alignment for Deep Domain Adaptation.
    """

    name: ClassVar[str] = "coral"
    least_rows = 2

    def __init__(
        self, *, weight: float | Schedule = 1.0, pooling: str | Sequence[str] = HEAD, domains: int = 2
    ) -> None:
        super().__init__(weight=weight, pooling=pooling, domains=domains)

    def _discrepancy(self, source: list[Tensor], target: list[Tensor]) -> Tensor:
        return torch.stack([coral(*pair) for pair in zip(source, target, strict=True)]).sum()


def _refuse_unless_one_class(name: str, model: nn.Module, *, instead: str) -> None:
    core = transformer_in(model)
    one_class = problem_type(core.config) in (None, "single_label_classification")
    if loss_kind(core) != "classification" or not one_class:
        raise ConfigurationError(
            f"{name}: {type(core).__name__} does not choose one class per example. Take {instead}."
        )


def _unbound(layer: nn.Module) -> nn.Module:
    return layer
