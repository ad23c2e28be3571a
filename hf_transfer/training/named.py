"""Trainers named after their method: ``TransferTrainer`` with the method's option set."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput

from hf_transfer.depth import head_names
from hf_transfer.errors import ConfigurationError
from hf_transfer.features import Precision, extract_features, reads_every_token
from hf_transfer.heads import fit_head
from hf_transfer.schedules import GradualUnfreeze, TopLevels, UnfreezeSchedule
from hf_transfer.training.trainer import TransferTrainer


class GradualUnfreezeTrainer(TransferTrainer):
    """``TransferTrainer`` that opens the model from the top, by default one level more each epoch (ULMFiT).

    Combine it with ``layer_decay`` and ``SlantedTriangular`` for the paper's whole recipe. Use ``TopLevels`` with
    ``TransferTrainer`` where the lower blocks should never train.

    Args:
        model: As for ``TransferTrainer``.
        args: As for ``TransferTrainer``.
        unfreeze: When each level opens.
        **options: As for ``TransferTrainer``.

    References:
        Howard & Ruder 2018, Universal Language Model Fine-tuning for Text Classification, section 3.3.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        unfreeze: UnfreezeSchedule | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, args, unfreeze=unfreeze or GradualUnfreeze(), **options)


class FeatureExtractionTrainer(TransferTrainer):
    """Frozen base, new head: the base runs once over the data, the head is trained on what it gave.

    A head of one linear layer is fitted to its optimum by ``fit_head``, its regularisation chosen on ``eval_dataset``
    (without one, by cross-validation); epochs and learning rate then play no part. Any other head (RoBERTa's two
    layers, token classification), or a run with a loss or objectives of its own, trains by gradient steps from the
    cached features. Either way what is saved is the ordinary model. Use ``add_mean_pooling`` first for a sentence
    encoder of the BERT family: its first position was never trained to stand for the sentence.

    Args:
        model: A model with a new head. Its base is left as it is, and stays in evaluation mode.
        args: As for ``TransferTrainer``.
        features_dir: Folder for the cached features, which any run with the same base and data shares. By default
            ``features`` in ``args.output_dir``.
        features_dtype: What the base computes in. ``"auto"`` is bfloat16 where the device has it natively.
        **options: As for ``TransferTrainer``, except ``unfreeze`` and ``frozen_prefix_cache``, which are the method.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        features_dir: str | Path | None = None,
        features_dtype: Precision = "auto",
        **options: Any,
    ) -> None:
        args = args or TrainingArguments("tmp_trainer")
        self.features_dir = Path(features_dir or Path(str(args.output_dir)) / "features")
        super().__init__(
            model,
            args,
            unfreeze=TopLevels(0),
            frozen_prefix_cache=self.features_dir,
            frozen_prefix_dtype=features_dtype,
            **options,
        )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Fit the head, or train it from the cache; arguments are as for ``Trainer.train``."""
        names = head_names(self.model)
        if not names:
            raise ConfigurationError(
                f"{type(self.model).__name__} has no head with weights of its own: nothing to train on features."
            )
        linear = len(names) == 1 and isinstance(self.model.get_submodule(names[0]), nn.Linear)
        plain_loss = not self.objectives and self.compute_loss_func is None and self.label_smoother is None
        if linear and plain_loss and not reads_every_token(self.model, self.train_dataset, self.data_collator):
            return self._fit()
        return super().train(*args, **kwargs)

    def _fit(self) -> TrainOutput:
        started = time.perf_counter()
        self.show_plan()
        validation = self.eval_dataset if isinstance(self.eval_dataset, Dataset) else None
        with self.args.main_process_first(local=False, desc="extracting features"):
            features = self._features(self.train_dataset)
            held_out = None if validation is None else (self._features(validation), _labels_of(validation))
        fit = fit_head(self.model, features, _labels_of(self.train_dataset), validation=held_out)
        seconds = time.perf_counter() - started
        self.log({"head_C": fit.C, "head_validation_loss": fit.validation_loss, "train_runtime": round(seconds, 4)})
        return TrainOutput(self.state.global_step, fit.validation_loss, {"train_runtime": seconds})

    def _features(self, dataset: Dataset) -> Any:
        return extract_features(
            self.model,
            dataset,
            data_collator=self.data_collator,
            cache_dir=self.features_dir,
            dtype=self.frozen_prefix_dtype,
            batch_size=self.args.per_device_eval_batch_size,
        )


def _labels_of(dataset: Dataset) -> Any:
    """The labels under any of the names that collators know."""
    names = ("labels", "label", "label_ids")
    found = next((name for name in names if name in dataset.column_names), None)
    if found is None:
        raise ConfigurationError(f"dataset: expected a column of {names}. Found: {', '.join(dataset.column_names)}.")
    return dataset.with_format(None)[found][:]
