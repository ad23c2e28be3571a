"""Knowledge distillation as a trainer: the loss of Hinton et al. 2015, and how near the student is to its teacher."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import nn
from transformers import GenerationMixin, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from hf_transfer.errors import ConfigurationError
from hf_transfer.functional import Divergence
from hf_transfer.losses import problem_type, shifts_labels, transformer_in
from hf_transfer.models import TeacherSpec, load_tokenizer, load_trained
from hf_transfer.objectives.base import Objective
from hf_transfer.objectives.distillation import ON_POLICY, Distillation, TeacherPredictions
from hf_transfer.objectives.stored import StoredDistillation
from hf_transfer.teacher_store import TeacherStore
from hf_transfer.training.on_policy import sampled_batch
from hf_transfer.training.trainer import TransferTrainer
from hf_transfer.vocabularies import shared_vocabulary

if TYPE_CHECKING:
    from torch.utils.data import DataLoader


class DistillationTrainer(TransferTrainer):
    """``TransferTrainer`` with the loss ``alpha T^2 KL(teacher || student) + (1 - alpha) task``.

    For every head that :class:`~hf_transfer.objectives.Distillation` knows. Evaluation reports the task's loss, hence
    compares with a training without teacher, and beside it ``eval_teacher_agreement`` (the share of answers that are
    the teacher's) and ``eval_teacher_kl`` (at temperature 1; for a regression ``eval_teacher_mse``).

    Args:
        model: The student. ``student_from(teacher, layers=...)`` makes one from the teacher's own layers.
        args: As for ``Trainer``.
        teacher: A model that is trained for the same task, or its Hub id or folder; or a ``TeacherStore`` of the
            training data, and then there is no teacher in memory.
        alpha: Weight of the teacher's distribution, in [0, 1]; the labels get ``1 - alpha``. At 1 they are not used.
        temperature: See ``Distillation``.
        divergence: See ``Distillation``; of a store, ``forward_kl``.
        beta: See ``Distillation``.
        lmbda: Share of the micro-batches that the student writes itself (on-policy; Agarwal et al. 2024, GKD), by
            ``generate``: what it learns there is what the teacher says to its own mistakes, and ``divergence`` alone
            counts. 0 is off; GKD found 1 best with ``reverse_kl`` or ``jensen_shannon``, and 0.5 a good mixture.
        max_new_tokens: Of these; by default until a row is as long as the batch's longest.
        teacher_tokenizer: Compared with ``processing_class`` token by token, where both are given; read from the
            teacher's folder where that is given.
        compare_to_teacher: Whether evaluation runs the teacher too, where it is there.
        fused_loss: See ``TransferTrainer``; by default on for causal language models.
        objectives: Further terms.
        **options: As for ``TransferTrainer``, except ``task_weight``, which is ``1 - alpha``.

    Raises:
        ConfigurationError: ``alpha`` outside [0, 1], a store of other data or for another divergence, and what
            ``Distillation`` and ``StoredDistillation`` refuse.

    Example:
        >>> trainer = DistillationTrainer(student, args, teacher=teacher, alpha=0.7, temperature=3, train_dataset=rows)
        >>> trainer.train()

    References:
        Hinton et al. 2015, Distilling the Knowledge in a Neural Network.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        teacher: nn.Module | TeacherStore | str | Path,
        alpha: float = 0.5,
        temperature: float = 2.0,
        divergence: Divergence = "forward_kl",
        beta: float = 0.5,
        lmbda: float = 0.0,
        max_new_tokens: int | None = None,
        teacher_tokenizer: PreTrainedTokenizerBase | None = None,
        compare_to_teacher: bool = True,
        fused_loss: bool | None = None,
        objectives: Iterable[Objective] = (),
        **options: Any,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise ConfigurationError(
                f"alpha = {alpha}: expected a share between 0 (labels only) and 1 (teacher only)."
            )
        if not 0 <= lmbda <= 1:
            raise ConfigurationError(
                f"lmbda = {lmbda}: expected a share between 0 (off) and 1 (all batches are the student's own)."
            )
        if "task_weight" in options:
            raise ConfigurationError("task_weight is 1 - alpha: give alpha alone.")
        if model is None:
            raise ConfigurationError("A teacher is compared with one student: pass 'model', not 'model_init'.")
        loaded: Any = None
        if isinstance(teacher, (str, Path)):
            spec = TeacherSpec(str(teacher))
            teacher = load_trained(spec)
            loaded = teacher
            if teacher_tokenizer is None and isinstance(options.get("processing_class"), PreTrainedTokenizerBase):
                teacher_tokenizer = load_tokenizer(spec)
        self.lmbda = lmbda
        self.max_new_tokens = max_new_tokens
        self._counts: torch.Tensor | None = None
        self.distillation: TeacherPredictions
        self._compared: Distillation | None = None
        if isinstance(teacher, TeacherStore):
            if divergence != "forward_kl":
                raise ConfigurationError(
                    f"divergence = '{divergence}': a stored teacher serves 'forward_kl', the one divergence that what "
                    "is stored is enough for."
                )
            self.distillation = StoredDistillation(teacher, weight=alpha, temperature=temperature)
        else:
            self.distillation = Distillation(
                teacher,
                weight=alpha,
                temperature=temperature,
                divergence=divergence,
                beta=beta,
                vocabulary=_vocabulary(options.get("processing_class"), teacher_tokenizer),
            )
            self._compared = self.distillation if compare_to_teacher else None
        super().__init__(
            model,
            args,
            objectives=[self.distillation, *objectives],
            task_weight=1 - alpha,
            fused_loss=shifts_labels(model) if fused_loss is None else fused_loss,
            **options,
        )
        if loaded is not None:
            loaded.to(self.args.device)
        if isinstance(teacher, TeacherStore) and isinstance(options.get("train_dataset"), Dataset):
            teacher.check(options["train_dataset"], self.data_collator)
        if lmbda > 0:
            self._refuse_on_policy()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        if self.lmbda > 0:
            epoch_iterator = starmap(self._perhaps_sampled, enumerate(epoch_iterator))
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _perhaps_sampled(self, index: int, batch: dict[str, Any]) -> dict[str, Any]:
        """``batch``, or what the student writes in its place; a resumed run, and every rank, decides the same."""
        draws = random.Random(f"{self.args.seed} {self.state.global_step} {index}")
        if draws.random() >= self.lmbda:
            return batch
        model, seed = self.accelerator.unwrap_model(self.model), draws.getrandbits(32) + self.args.process_index
        return sampled_batch(model, batch, seed=seed, max_new_tokens=self.max_new_tokens)

    def _task_weight_of(self, inputs: Mapping[str, Any]) -> float:
        return 0.0 if ON_POLICY in inputs else super()._task_weight_of(inputs)

    def _refuse_on_policy(self) -> None:
        core = transformer_in(self.model)
        writes = getattr(type(core), "generate", None) is GenerationMixin.generate and core.can_generate()
        if not writes or core.main_input_name != "input_ids":
            raise ConfigurationError(
                f"lmbda = {self.lmbda}: {type(core).__name__} does not write texts from texts by transformers' own "
                "generate."
            )
        reader = next((each for each in self.objectives if set(type(each).columns) - {ON_POLICY}), None)
        if reader is not None:
            raise ConfigurationError(
                f"lmbda = {self.lmbda}: {reader.name} reads columns of the training data, which say nothing of "
                "what the student will write."
            )
        if self._index_readers:
            raise ConfigurationError(
                f"lmbda = {self.lmbda}: {self._index_readers[0]} knows of the training data only."
            )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigurationError(f"lmbda = {self.lmbda}: a model in shards cannot generate between two steps.")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self._compared is not None and not model.training:
            counts = self._compared.agreement(self.accelerator.unwrap_model(model), inputs, outputs)
            total = self.accelerator.gather_for_metrics(counts).sum(0).cpu().double()
            self._counts = total if self._counts is None else self._counts + total
        return (loss, outputs) if return_outputs else loss

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self._counts = None
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self._counts is not None and self._compared is not None and output.metrics is not None:
            same, distance, answers = self._counts.tolist()
            number = problem_type(transformer_in(self.model).config) == "regression"
            output.metrics[f"{metric_key_prefix}_teacher_{'mse' if number else 'kl'}"] = distance / max(1.0, answers)
            if not number:
                output.metrics[f"{metric_key_prefix}_teacher_agreement"] = same / max(1.0, answers)
        return output


def _vocabulary(student: Any, teacher: PreTrainedTokenizerBase | None) -> int | None:
    """How many token ids mean the same to both, where that can be told; refuses tokenizers that differ."""
    if not isinstance(student, PreTrainedTokenizerBase) or teacher is None:
        return None
    return shared_vocabulary(student, teacher)
