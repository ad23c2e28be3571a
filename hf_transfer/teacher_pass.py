"""A teacher at work: which columns it reads, which positions it is asked about, and what it says of them."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from hf_transfer.activations import adapter_settings, fingerprint, tensors_digest
from hf_transfer.batches import Batches, Collator
from hf_transfer.errors import ConfigurationError
from hf_transfer.losses import (
    CLASSIFICATION,
    LossKind,
    label_names,
    loss_kind,
    problem_type,
    shifts_labels,
    transformer_in,
    with_decoder_inputs,
)
from hf_transfer.tasks import IGNORED
from hf_transfer.teacher_rows import Columns, Form
from hf_transfer.vocabularies import token_count, within_vocabulary

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 1 << 23  # logits turned into rows at a time: 32 MiB of float32

# What a configuration holds that the logits do not follow from.
_BESIDE_THE_LOGITS = {
    "_name_or_path",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class Source:
    """How a teacher's data are read: plain data, so that they can be compared when there is no teacher.

    Args:
        main_input: The column that there must be.
        inputs: What the teacher reads of a batch, and the labels.
        targets: Columns that the collator may read besides.
        shifted: Whether position t is compared with ``labels[t + 1]``.
    """

    main_input: str
    inputs: list[str]
    targets: list[str]
    shifted: bool

    def batches(self, dataset: Dataset, data_collator: Collator, device: torch.device | str = "cpu") -> Batches:
        """The data as the teacher reads them."""
        return Batches(
            dataset,
            data_collator,
            main_input=self.main_input,
            inputs=self.inputs,
            targets=self.targets,
            device=device,
        )

    def learnt(self, labels: Tensor) -> Tensor:
        """(B, T), True at the positions whose prediction is compared with a label of ``labels`` (B, T)."""
        learnt = labels != IGNORED
        return nn.functional.pad(learnt[:, 1:], (0, 1)) if self.shifted else learnt

    def most_rows(self, batch: Mapping[str, Tensor]) -> int:
        """The most positions that an example of ``batch`` is learnt from."""
        labels = batch.get("labels")
        return 1 if labels is None or labels.dim() < 2 else max(1, int(self.learnt(labels).sum(1).max()))


class TeacherPass:
    """A language model, with an encoder or without, or a classifier of transformers, bare or inside a PEFT model.

    Raises:
        ConfigurationError: It is none, or its outputs are no distributions over classes.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers.utils import find_labels

        core = transformer_in(model)
        kind = loss_kind(core)
        if kind is None:
            raise ConfigurationError(
                f"teacher: {type(core).__name__} is for another task, expected a classifier of examples or tokens, or "
                "a language model."
            )
        problem = problem_type(core.config)
        if kind == "classification" and problem in ("multi_label_classification", "regression"):
            raise ConfigurationError(
                f"teacher: its problem_type is '{problem}', expected a language model or a classifier with one label "
                "of several: a store holds distributions over classes."
            )
        arguments = inspect.signature(core.forward).parameters
        inputs = {*arguments, "labels"}
        targets = {"label", "label_ids", *find_labels(type(core))} - inputs
        self._model = model
        self._core = core
        self._options = {"use_cache": False} if "use_cache" in arguments else {}
        self.device: torch.device = core.device
        self.source = Source(core.main_input_name, sorted(inputs), sorted(targets), shifts_labels(core))
        self.kind: LossKind = kind
        self.label_names = label_names(core.config) if kind in CLASSIFICATION else None

    def digest(self) -> str:
        """A digest of everything that the logits follow from but the data."""
        settings = self._core.config.to_dict()
        tensors = dict(self._model.named_parameters()) | dict(self._model.named_buffers())
        return fingerprint(
            type(self._core).__name__,
            {key: value for key, value in settings.items() if key not in _BESIDE_THE_LOGITS},
            adapter_settings(self._model),
            tensors_digest(tensors),
        )

    def rows_of(
        self,
        batches: Batches,
        examples: Tensor,
        *,
        form: Form,
        seed: int,
        batch_size: int,
        vocabulary: int | None = None,
    ) -> tuple[Columns, int]:
        """What the teacher says of ``examples`` (N,), consecutive numbers in any order.

        Args:
            batches: The data.
            examples: Their numbers.
            form: How rows are stored.
            seed: Of the draws.
            batch_size: Examples in a batch.
            vocabulary: Keep only so many leading classes or tokens.

        Returns:
            The encoded rows, with the ``starts`` and ``lengths`` of the examples in the order of their numbers, and
            the size of the vocabulary.

        Raises:
            ConfigurationError: The batches have no labels of the logits' shape, or the logits are not finite.
        """
        from hf_transfer.cuts import evaluating

        encoded: dict[str, list[Tensor]] = defaultdict(list)
        counts = []
        with evaluating(self._model):
            for chosen in examples.split(batch_size):
                batch = batches[chosen]
                labels = batch.pop("labels", None)
                batch = with_decoder_inputs(self._core, batch, labels, self.source.inputs)
                batch = within_vocabulary(batch, token_count(self._core))
                logits = self._model(**batch, **self._options).logits[..., :vocabulary]
                positions = self._positions(logits, labels)
                counts.append(positions.sum(1).cpu())
                uniforms = _uniforms(seed, chosen, counts[-1])
                for columns in encoded_rows(logits, positions, uniforms, form):
                    for name, column in columns.items():
                        encoded[name].append(column.cpu())
        lengths = torch.cat(counts)
        in_order = examples.argsort()
        columns = {name: torch.cat(parts) for name, parts in encoded.items()}
        columns |= {"starts": (lengths.cumsum(0) - lengths)[in_order], "lengths": lengths[in_order]}
        return columns, logits.shape[-1]

    def _positions(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """(B, T), True at the positions that are stored; (B, 1) where there is one distribution per example."""
        if logits.dim() == 2:
            return torch.ones(len(logits), 1, dtype=torch.bool, device=logits.device)
        found = None if labels is None else tuple(labels.shape)
        if labels is None or found != tuple(logits.shape[:2]):
            raise ConfigurationError(
                f"labels: found {found or 'none in the batch'}, expected {tuple(logits.shape[:2])} as the teacher's "
                "logits: they say which positions are learnt from."
            )
        return self.source.learnt(labels)


def encoded_rows(logits: Tensor, positions: Tensor, uniforms: Tensor, form: Form) -> Iterator[Columns]:
    """The rows of ``logits`` (B, T, V) at ``positions`` (B, T), some at a time."""
    flat = logits.reshape(-1, logits.shape[-1])
    size = max(1, _CHUNK // logits.shape[-1])
    for rows, noise in zip(positions.flatten().nonzero().squeeze(1).split(size), uniforms.split(size), strict=True):
        chunk = flat[rows].float()
        if not chunk.amax(-1).isfinite().all():
            raise ConfigurationError("teacher: its logits are not finite (NaN or infinity) for these data.")
        yield form.encode(chunk, noise)


def _uniforms(seed: int, examples: Tensor, lengths: Tensor) -> Tensor:
    """(R,) in [0, 1): ``lengths`` numbers that follow from ``seed`` and the example's number alone."""
    pairs = zip(examples.tolist(), lengths.tolist(), strict=True)
    return torch.from_numpy(
        np.concatenate([np.random.default_rng((seed, example)).random(length) for example, length in pairs])
    )
