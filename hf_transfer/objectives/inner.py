"""Terms that make a student's inner layers compute what its teacher's compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.objectives.base import Objective
from hf_transfer.objectives.teacher import Teacher
from hf_transfer.pooling import real_tokens
from hf_transfer.schedules import Schedule
from hf_transfer.schema import Supplied
from hf_transfer.students import LayerMap, layer_map, tower_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Distance = Literal["mse", "cosine"]
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")
TaughtBy = Annotated[nn.Module | Teacher, Supplied()]


def hidden_state_distance(student: Tensor, teacher: Tensor, real: Tensor, *, distance: Distance = "mse") -> Tensor:
    """The mean over examples of the mean over their real tokens of how far two hidden states are apart.

    ``"mse"``: ``1/D sum_d (s_d - t_d)^2`` (Romero et al. 2015, FitNets, eq. 3; Jiao et al. 2020, TinyBERT, eq. 8).
    ``"cosine"``: ``1 - cos(s, t)``, blind to length (Sanh et al. 2019, DistilBERT, section 2).

    Args:
        student: (B, T, D) hidden states.
        teacher: (B, T, D) what they should be.
        real: (B, T), True at tokens that are not padding.
        distance: Between two vectors of size D.

    Returns:
        A scalar, in 32 bits. An example without a real token counts as zero.
    """
    student, teacher = student.float(), teacher.float()
    if distance == "cosine":
        return _mean_over_tokens(1 - functional.cosine_similarity(student, teacher, dim=-1), real)
    return _mean_over_tokens((student - teacher).square().mean(-1), real)


def attention_distance(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """The mean over examples, heads, real queries and real keys of ``(a_S - a_T)^2`` (TinyBERT, eq. 7).

    TinyBERT matches the scores before the softmax; here it is the probabilities, which transformers models return.
    Where the numbers of heads differ, the means over heads are matched.

    Args:
        student: (B, H, T, T) attention probabilities, queries before keys.
        teacher: (B, G, T, T) what they should be.
        real: (B, T), True at tokens that are not padding.

    Returns:
        A scalar, in 32 bits. An example of n real tokens counts its n * n pairs, whatever it is padded to.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.float().mean(1, keepdim=True), teacher.float().mean(1, keepdim=True)
    squares = (student.float() - teacher.float()).square().mean(1)
    over_keys = squares.masked_fill(~real.unsqueeze(1), 0).sum(-1) / real.sum(1, keepdim=True).clamp(min=1)
    return _mean_over_tokens(over_keys, real)


class _LayerMatching(Objective):
    """Layer by layer, a student's output against its teacher's: the mean of a distance over the mapped layers."""

    logits: ClassVar[bool] = False

    _field: ClassVar[str]
    """Name of the output that holds one tensor per layer, the second last axis of which are tokens."""

    _lowest: ClassVar[int]
    """The depth of the first of these tensors."""

    _axes: ClassVar[int]
    """How many axes each has."""

    def __init__(self, teacher: TaughtBy, *, weight: float | Schedule, layers: LayerMap) -> None:
        super().__init__(weight=weight)
        self.teacher = Teacher.of(teacher)
        self.columns = tuple(sorted(self.teacher.inputs))
        self.layers = layers

    def prepare(self, model: nn.Module) -> None:
        from hf_transfer.cuts import CutModel

        self.teacher.serve(self, model)
        self._student = CutModel(model)
        ours, theirs = (_tower_sizes(self.name, core) for core in (self._student.core, self.teacher.core))
        if ours.keys() != theirs.keys():
            raise ConfigurationError(
                f"{self.name}: {type(self._student.core).__name__} and {type(self.teacher.core).__name__} have no "
                "layers to match. Expected two encoder-decoders, or none."
            )
        if isinstance(self.layers, Mapping) and (len(ours) > 1 or min(self.layers, default=0) < self._lowest):
            found = "an encoder and a decoder" if len(ours) > 1 else dict(self.layers)
            raise ConfigurationError(
                f"{self.name}: 'layers' as a map is for one line of blocks, from depth {self._lowest} up, found "
                f"{found}. Use 'uniform' or 'last'."
            )
        self._sizes = {"student": ours, "teacher": theirs}
        maps = {tower: layer_map(size, theirs[tower], how=self.layers) for tower, size in ours.items()}
        self._pairs = [
            (tower, student, teacher)
            for tower, depths in maps.items()
            for student, teacher in depths.items()
            if student >= self._lowest
        ]

    def forward(self, model: nn.Module, batch: Mapping[str, Any], outputs: Any, progress: float) -> Tensor:
        answer = self.teacher(batch)
        terms = []
        for tower, ours, theirs in self._pairs:
            student = self._layer("student", outputs, tower, ours)
            teacher = self._layer("teacher", answer, tower, theirs)
            real = self._real_tokens(batch, tower, student)
            if (len(student), student.shape[-2]) != (len(teacher), teacher.shape[-2]):
                raise ConfigurationError(
                    f"{self.name}: the student's {self._field} have shape {tuple(student.shape)}, the teacher's "
                    f"{tuple(teacher.shape)}. Expected the same tokens: use one tokenizer or processor for both."
                )
            terms.append(self._distance_of(f"{tower}{ours}", student, teacher, real))
        return torch.stack(terms).mean()

    def _distance_of(self, layer: str, student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define _distance_of().")

    def _layer(self, role: str, outputs: Any, tower: str, depth: int) -> Tensor:
        found: tuple[Tensor, ...] = getattr(outputs, f"{tower}{self._field}", None) or ()
        expected = self._sizes[role][tower] + 1 - self._lowest
        if len(found) != expected or found[0].dim() != self._axes:
            shape = f" of shape {tuple(found[0].shape)}" if found else ""
            raise ConfigurationError(
                f"{self.name}: expected '{tower}{self._field}' of the {role} to be {expected} tensors of {self._axes} "
                f"axes, one for each layer, found {len(found)}{shape}."
            )
        return found[depth - self._lowest]

    def _real_tokens(self, batch: Mapping[str, Any], tower: str, states: Tensor) -> Tensor:
        """(B, T), True where ``states`` are a real token's."""
        shape = (len(states), states.shape[-2])
        if not tower:
            real = real_tokens(self._student.core, batch, width=shape[1]).to(states.device)
            if real.shape != shape:
                raise ConfigurationError(
                    f"{self.name}: {self._field} of {shape} tokens where the batch's mask has {tuple(real.shape)}."
                )
            return real
        labels = batch.get("labels")
        masks = [batch.get("attention_mask")]
        if tower == "decoder_":
            masks = [batch.get("decoder_attention_mask"), None if labels is None else labels.ne(-100), *masks]
        fitting = (mask.bool() for mask in masks if mask is not None and mask.shape == shape)
        return next(fitting, torch.ones(shape, dtype=torch.bool, device=states.device))


class HiddenStateMatching(_LayerMatching):
    """Pull hidden states towards those of a teacher's layers: the mean over layers of ``hidden_state_distance``.

    Where the widths differ, every mapped layer gets a linear map of its own, ``s W`` (FitNets' regressor, Romero et
    al. 2015, section 2.2; TinyBERT's ``W_h``, Jiao et al. 2020, eq. 8), which trains beside the student and is dropped
    with the objective. The last layer's state is what the model reports as such: after the final norm in most
    decoders. TinyBERT sums over layers; the mean keeps the term's size from following their number.

    Relations: ``AttentionMatching`` pulls on what the layers look at, which no width hinders; TinyBERT uses both.
    Students of ``student_from`` have the teacher's width and need no map, like MobileBERT's (Sun et al. 2020).

    Args:
        teacher: A transformers model, bare or in a PEFT model, with the student's tokenizer; or a ``Teacher`` of it.
            It is frozen, and stays on its device and in its precision. One forward pass serves all objectives.
        weight: Factor of the term.
        layers: Which teacher layer each student layer learns from, as for ``layer_map``; of an encoder-decoder, in
            encoder and decoder apart.
        distance: ``"mse"``, or ``"cosine"`` where only the direction should agree.

    Raises:
        ConfigurationError: An unknown distance; from ``prepare``, layers that cannot be mapped, or a teacher that
            shares weights with the student; in training, models that cut their input into different tokens.

    Example:
        >>> HiddenStateMatching(teacher, weight=0.5, layers="last", distance="cosine")
    """

    name: ClassVar[str] = "hidden_state_matching"
    hidden_states: ClassVar[bool] = True
    _field: ClassVar[str] = "hidden_states"
    _lowest: ClassVar[int] = 0
    _axes: ClassVar[int] = 3

    def __init__(
        self,
        teacher: TaughtBy,
        *,
        weight: float | Schedule = 1.0,
        layers: LayerMap = "uniform",
        distance: Distance = "mse",
    ) -> None:
        super().__init__(teacher, weight=weight, layers=layers)
        if distance not in get_args(Distance):
            raise ConfigurationError(
                f"{self.name}: unknown distance {distance!r}. {nearest(distance, get_args(Distance))}"
            )
        self.distance: Distance = distance
        self.projections = nn.ModuleDict()

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        for tower, depth, _ in self._pairs:
            ours, theirs = (_width(self.name, core, tower) for core in (self._student.core, self.teacher.core))
            if ours != theirs:
                self.projections[f"{tower}{depth}"] = nn.Linear(
                    ours, theirs, bias=False, device=self._student.core.device
                )

    def _distance_of(self, layer: str, student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
        if layer in self.projections:
            student = self.projections[layer](student.float())
        return hidden_state_distance(student, teacher, real, distance=self.distance)


class AttentionMatching(_LayerMatching):
    """Pull attention towards that of a teacher's layers: the mean over layers of ``attention_distance``.

    Both models must be loaded with ``attn_implementation="eager"``: the faster ones never hold the probabilities; and
    the student without dropout of its attention, which would fall on the probabilities themselves. Of
    an encoder-decoder, self-attention is matched; the decoder's attention to the encoder is not.

    Relations: ``HiddenStateMatching`` runs with any attention. MiniLM (Wang et al. 2020) takes the last layer alone,
    as ``layers={M: N}`` does here, but a divergence in place of the square.

    Args:
        teacher: As for ``HiddenStateMatching``; it may have another width and another number of heads.
        weight: Factor of the term. Squared differences of probabilities are small: weights far above 1 are usual.
        layers: As for ``HiddenStateMatching``; there is no depth 0.

    Raises:
        ConfigurationError: As for ``HiddenStateMatching``; from ``prepare``, a model whose attention is not eager, or
            a student's that has dropout.
    """

    name: ClassVar[str] = "attention_matching"
    attentions: ClassVar[bool] = True
    _field: ClassVar[str] = "attentions"
    _lowest: ClassVar[int] = 1
    _axes: ClassVar[int] = 4

    def __init__(
        self,
        teacher: TaughtBy,
        *,
        weight: float | Schedule = 1.0,
        layers: LayerMap = "uniform",
    ) -> None:
        super().__init__(teacher, weight=weight, layers=layers)

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        for role, core in (("student", self._student.core), ("teacher", self.teacher.core)):
            kind = core.config.get_text_config()._attn_implementation
            if kind != "eager":
                raise ConfigurationError(
                    f"{self.name}: the {role}'s attention is '{kind}', which keeps no probabilities. Expected "
                    '\'eager\': load it with attn_implementation="eager", or call set_attn_implementation("eager").'
                )

        config = self._student.core.config.get_text_config()
        dropped = next((name for name in _ATTENTION_DROPOUT if getattr(config, name, 0)), None)
        if dropped is not None:
            raise ConfigurationError(
                f"{self.name}: the student's {dropped} is {getattr(config, dropped)}, which falls on the "
                f"probabilities that are matched. Expected 0: load it with {dropped}=0.0."
            )

    def _distance_of(self, layer: str, student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
        return attention_distance(student, teacher, real)


def _mean_over_tokens(values: Tensor, real: Tensor) -> Tensor:
    """The mean over examples of the mean of ``values`` (B, T) over their real tokens."""
    return (values.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)).mean()


def _tower_sizes(name: str, core: PreTrainedModel) -> dict[str, int]:
    """Number of blocks by the prefix of the outputs that they make."""
    sizes = tower_sizes(core)
    if hasattr(core.config, "depths") or len(sizes) > 2:
        raise ConfigurationError(
            f"{name}: {type(core).__name__} has stages of different widths, expected equal blocks."
        )
    return {"": sizes[0]} if len(sizes) == 1 else {"encoder_": sizes[0], "decoder_": sizes[1]}


def _width(name: str, core: PreTrainedModel, tower: str) -> int:
    config = core.config.get_text_config()
    if tower:  # a model made of two has a config for each
        config = getattr(core.config, tower.rstrip("_"), core.config)
    width = getattr(config, "hidden_size", None)
    if width is None:
        raise ConfigurationError(f"{name}: {type(config).__name__} has no hidden_size to tell the width of states.")
    return width
