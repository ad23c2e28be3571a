"""The Trainer of transfer learning: the task's loss plus weighted objectives, a trainable set that follows a schedule,
learning rates that follow depth; everything else is plain ``transformers.Trainer``."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from hf_transfer.batch_norm import batch_norms, statistics_by_domain
from hf_transfer.batches import EXAMPLE_INDEX
from hf_transfer.data.domains import DOMAIN, LABELS, DomainCollator, DomainPairs, DomainStream
from hf_transfer.depth import named_parameters, original_name
from hf_transfer.errors import ConfigurationError
from hf_transfer.features import Precision, PrefixCache
from hf_transfer.linear_head import LinearHead
from hf_transfer.linear_loss import LinearLoss, linear_distillation_loss
from hf_transfer.losses import labelled_loss, loss_kind, problem_type, shifts_labels, transformer_in
from hf_transfer.objectives.base import Objective
from hf_transfer.objectives.distillation import TeacherPredictions
from hf_transfer.pooling import HEAD
from hf_transfer.schedules import GradualUnfreeze, Schedule, UnfreezeSchedule
from hf_transfer.tasks import IGNORED
from hf_transfer.training.rates import DepthRates, LearningRateBands
from hf_transfer.training.scaffold import Scaffold
from hf_transfer.training.unfreezing import PlanRow, TrainableLevels, format_plan

logger = logging.getLogger(__name__)


class TransferTrainer(Trainer):
    """``Trainer`` whose loss is ``task_weight * task + sum_i weight_i * objective_i``.

    With no option given it is plain ``Trainer``, but for two repairs: GPT-2 and five other language models count the
    tokens that their loss averages over, not one more per row; and the loss of a model that does not divide by
    ``num_items_in_batch`` (every sequence or token classifier) is weighed by the share of the step's labels that its
    micro-batch holds, so that accumulation and several ranks give the gradient of the whole batch (plain Trainer's is
    4 times too large at 4 accumulation steps, transformers issue 47688).

    Args:
        model: Any transformers model with a loss, with or without a PEFT adapter. What requires a gradient now is
            what may train.
        args: As for ``Trainer``.
        objectives: Terms added to the task's loss while training; evaluation reports the task's loss alone.
        task_weight: Factor of the task's own loss.
        unfreeze: When each level opens (``GradualUnfreeze``, ``TopLevels``). Closed levels cost no backward pass, get
            no weight decay, and are in eval mode.
        layer_decay: Learning rate at depth d is ``learning_rate * layer_decay ** (top - d)``.
        bands: Absolute rates for head, upper and lower blocks.
        base_ratio: The base learns at ``base_ratio`` times the head's rate.
        learning_rate_schedule: Factor of every rate as a function of progress (``SlantedTriangular``), instead of
            ``args.lr_scheduler_type``.
        frozen_prefix_cache: A folder. The closed levels are then computed once, in evaluation mode, and what enters
            the lowest open block is read from there in every epoch: no forward pass below it either. Needs
            ``unfreeze``, a ``datasets.Dataset``, and a collator that makes the same of an example each time.
        frozen_prefix_dtype: What is stored there; ``"float32"`` trains as without the cache, for twice the disk.
        fused_loss: Compute the loss of a causal language model, and a ``Distillation`` among the objectives, from the
            last hidden states a few rows at a time, so that the logits of tokens x vocabulary are never held. Where
            the model or another objective does not allow it, a warning says why and the logits are computed.
        batch_norm_by_domain: Let batch norm layers take each domain of ``DomainPairs`` by its own statistics, as two
            forward passes would, though both are in one batch.
        **trainer_arguments: As for ``Trainer``: ``train_dataset``, ``eval_dataset``, ``processing_class``, ...

    Raises:
        ConfigurationError: Options that contradict each other, a schedule under DeepSpeed or FSDP1 (which fix their
            flat parameters at the start), or a base weight left open under a PEFT adapter, which would be trained and
            then not saved.

    Example:
        >>> trainer = TransferTrainer(model, args, train_dataset=train, unfreeze=GradualUnfreeze(), layer_decay=0.9)
        >>> trainer.train()
    """

    loss_is_scaled_for_ga = True

    model: Any  # the Trainer's annotations admit None, which they never are once it is made
    optimizer: Any
    train_dataset: Any

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *,
        objectives: Iterable[Objective] = (),
        task_weight: float = 1.0,
        unfreeze: UnfreezeSchedule | None = None,
        layer_decay: float | None = None,
        bands: LearningRateBands | None = None,
        base_ratio: float | None = None,
        learning_rate_schedule: Schedule | None = None,
        frozen_prefix_cache: str | Path | None = None,
        frozen_prefix_dtype: Precision = "bfloat16",
        fused_loss: bool = False,
        batch_norm_by_domain: bool = False,
        **trainer_arguments: Any,
    ) -> None:
        self.objectives = list(objectives)
        self.task_weight = task_weight
        self.unfreeze = unfreeze
        self.rates = DepthRates(layer_decay=layer_decay, bands=bands, base_ratio=base_ratio)
        self.learning_rate_schedule = learning_rate_schedule
        self.frozen_prefix_cache = frozen_prefix_cache
        self.frozen_prefix_dtype = frozen_prefix_dtype
        self._prefix: PrefixCache | None = None
        self._levels: TrainableLevels | None = None
        self._step_counts: dict[str, torch.Tensor] | None = None
        self._terms_logged_at = 0
        self._term_sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        args = args or TrainingArguments("tmp_trainer")
        if unfreeze is not None:
            _prepare_arguments_for_schedule(args)
        super().__init__(model, args, **trainer_arguments)
        self._refuse_contradictions()
        self._prefix_rows = self.train_dataset
        if self._index_readers:
            self.train_dataset, self._prefix_rows = self._indexed(self.train_dataset)
        if self._pairs is not None and self.compute_loss_func is None and loss_kind(self.model) == "classification":
            if problem_type(transformer_in(self.model).config) != "single_label_classification":
                self.compute_loss_func = labelled_loss  # the model's own may read -100 as a number
        self._batch_norms = batch_norms(self.model) if batch_norm_by_domain and self._pairs is not None else []
        if self._batch_norms and (self.args.gradient_checkpointing or self.args.activation_checkpointing):
            logger.warning("Batch norm takes both domains together: recomputed activations cannot tell them apart.")
            self._batch_norms = []
        self._loss_shifts_labels = shifts_labels(self.model)
        self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs and self._loss_shifts_labels
        if self._by_depth:
            self._levels = TrainableLevels(self.model, unfreeze)
        self.scaffold: Scaffold | None = None
        if self.objectives:
            for objective in self.objectives:
                objective.prepare(self.model)
            self.scaffold = Scaffold(self.objectives, args, self.accelerator)
        self._head = self._head_to_fuse() if fused_loss else None
        self._epochs = self._expected_epochs()
        self.add_callback(_TransferCallback(self))

    # ---- what trains, and how fast ----

    def plan(self) -> list[PlanRow]:
        """What trains when and at which rate: one row per depth, the head first."""
        levels = self._levels or TrainableLevels(self.model)
        return levels.plan(self._rates(levels), self._epochs)

    def show_plan(self) -> None:
        """Print the plan as a table, once for all ranks."""
        if self.is_world_process_zero():
            print(format_plan(self.plan()))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        _refuse_unsaved_weights(self.model)
        return super().train(*args, **kwargs)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        model = super().call_model_init(trial)
        self._levels = TrainableLevels(model, self.unfreeze) if self._by_depth else None
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self._levels is not None:
            self._levels.open_all()
        if self._levels is None or self.optimizer is not None:
            return super().create_optimizer(model)
        given = self.optimizer_cls_and_kwargs
        cls, options = given or self.get_optimizer_cls_and_kwargs(self.args, self.model)
        if {"params", "model", "optimizer_dict"} & options.keys():
            raise ConfigurationError(f"optim = '{self.args.optim}' groups parameters itself: no rates by depth.")
        self.optimizer_cls_and_kwargs = (cls, {**options, "params": self._parameter_groups(model or self.model)})
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        schedule = self.learning_rate_schedule
        if schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: schedule(min(1.0, step / num_training_steps))
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- the loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        model_inputs = {name: value for name, value in inputs.items() if name not in self._teaching_columns}
        if not model.training:
            return super().compute_loss(model, model_inputs, return_outputs, num_items_in_batch)
        if self._levels is not None:
            self._levels.eval_frozen()
        for wanted in ("hidden_states", "attentions"):
            if any(getattr(objective, wanted) for objective in self.objectives):
                model_inputs[f"output_{wanted}"] = True
        domains = self._pairs.domains if self._pairs is not None else 1
        apart = statistics_by_domain(self._batch_norms, domains)
        with self._replayed(inputs, model_inputs), apart, self._fused(inputs) as fused:
            loss, outputs = super().compute_loss(model, model_inputs, True, num_items_in_batch)
        if num_items_in_batch is None:
            loss = self._shared(loss, "labels", inputs)
        if self.objectives:
            loss = self._add_objectives(loss, inputs, outputs, fused)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        whole = len(batches) == 1 and self.accelerator.num_processes == 1
        self._step_counts = None if whole or not batches else self._count_step(batches, device)
        return batches, items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._term_sums:
            steps = max(1, self.state.global_step - self._terms_logged_at)
            for name, total in sorted(self._term_sums.items()):
                logs[name] = self.accelerator.reduce(total, reduction="mean").item() / steps
            self._term_sums.clear()
            self._terms_logged_at = self.state.global_step
        if "loss" in logs and self._levels is not None and self.unfreeze is not None:
            logs["lowest_open_depth"] = self._levels.lowest_open
        super().log(logs, start_time)

    # ---- resuming ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.scaffold is not None and self.args.should_save:
            self.scaffold.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self._follow_schedule()
            if self.scaffold is not None:
                self.scaffold.load(checkpoint)
        super()._load_optimizer_and_scheduler(checkpoint)

    # ---- internals ----

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple[Any, ...]:
        values = super().set_initial_training_values(args, dataloader)
        if isinstance(self.unfreeze, GradualUnfreeze) and self.unfreeze.until is None and not has_length(dataloader):
            raise ConfigurationError("unfreeze: a data set without length has no epochs to count by. Set 'until'.")
        steps_per_epoch, max_steps = values[1], values[-1]
        self._epochs = max_steps / steps_per_epoch
        return values

    def _expected_epochs(self) -> float:
        """Epochs of the run as far as they can be told before the data are loaded."""
        if self.args.max_steps <= 0 or not has_length(self.train_dataset):
            return float(self.args.num_train_epochs)
        return self.args.max_steps * self.get_total_train_batch_size(self.args) / max(1, len(self.train_dataset))

    @property
    def _by_depth(self) -> bool:
        return self.unfreeze is not None or not self.rates.uniform

    @property
    def _progress(self) -> float:
        return self.state.global_step / max(1, self.state.max_steps)

    @property
    def _teaching_columns(self) -> set[str]:
        """Columns that objectives read and the model must not see."""
        self._set_signature_columns_if_needed()
        return self._objective_columns

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            own: list[str] = self._signature_columns or []
            wanted = {column for objective in self.objectives for column in objective.columns}
            if self._index_readers:
                wanted.add(EXAMPLE_INDEX)
            if self._pairs is not None:
                wanted.add(DOMAIN)
            self._objective_columns = wanted - set(own)
            own += sorted(self._objective_columns)

    def _rates(self, levels: TrainableLevels) -> dict[int, float]:
        return self.rates.at(levels.levels, head=levels.head, learning_rate=self.args.learning_rate)

    def _parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Every level with and without weight decay, the head first (the rate that the Trainer logs is the first)."""
        assert self._levels is not None
        parameters = named_parameters(model)
        decay = set(map(original_name, self.get_decay_parameter_names(model)))
        groups = []
        for depth, rate in self._rates(self._levels).items():
            names = [name for name, at in self._levels.depths.items() if at == depth]
            for weight_decay, chosen in (
                (self.args.weight_decay, [name for name in names if name in decay]),
                (0.0, [name for name in names if name not in decay]),
            ):
                if chosen:
                    group = {"params": [parameters[name] for name in chosen], "lr": rate, "weight_decay": weight_decay}
                    groups.append(group)
        return groups

    def _follow_schedule(self) -> None:
        if self._levels is None:
            return
        changed = self._levels.follow(self._progress, self._epochs)
        if changed and self._prefix is not None:
            self._start_above(self._levels.lowest_open - 1)

    def _cache_frozen_prefix(self) -> None:
        """Store what enters the lowest open block in this stage and every later one."""
        assert self._levels is not None
        assert self.frozen_prefix_cache is not None
        cuts = [lowest - 1 for lowest in self._levels.stages(self._epochs) if lowest > 0]
        with self.args.main_process_first(local=False, desc="caching the frozen prefix"):
            self._prefix = PrefixCache.build(
                self.model,
                self._prefix_rows,
                self.data_collator,
                directory=self.frozen_prefix_cache,
                cuts=cuts,
                dtype=self.frozen_prefix_dtype,
                batch_size=self.args.per_device_train_batch_size,
            )
        self._start_above(self._levels.lowest_open - 1)

    def _start_above(self, depth: int) -> None:
        assert self._prefix is not None
        if depth < 0:
            self._prefix.uninstall()
            self._prefix = None
        else:
            self._prefix.install(depth)

    def _replayed(self, inputs: Mapping[str, Any], model_inputs: dict[str, Any]) -> AbstractContextManager[None]:
        if self._prefix is None:
            return nullcontext()
        index = {name: inputs[name] for name in (EXAMPLE_INDEX,) if name in inputs}
        return self._prefix.replay({**model_inputs, **index})

    @property
    def _index_readers(self) -> list[str]:
        """What looks up by an example's number what was computed of it before."""
        cache = [] if self.frozen_prefix_cache is None else ["frozen_prefix_cache"]
        return cache + [objective.name for objective in self.objectives if EXAMPLE_INDEX in objective.columns]

    def _indexed(self, dataset: Any) -> tuple[Any, Dataset]:
        """``dataset`` with its rows numbered, and these rows as one data set."""
        if isinstance(dataset, DomainPairs):
            return dataset.indexed()
        if not isinstance(dataset, Dataset):
            raise ConfigurationError(
                f"{self._index_readers[0]}: expected a datasets.Dataset to train on, found {type(dataset).__name__}."
            )
        numbered = dataset.add_column(EXAMPLE_INDEX, list(range(len(dataset))))
        return numbered, numbered

    @property
    def _pairs(self) -> DomainPairs | DomainStream | None:
        """The training data, where they are of several domains."""
        return self.train_dataset if isinstance(self.train_dataset, (DomainPairs, DomainStream)) else None

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return DomainCollator(super()._get_collator_with_removed_columns(data_collator, description))

    def _add_objectives(
        self, loss: torch.Tensor, inputs: Mapping[str, Any], outputs: Any, fused: list[LinearLoss]
    ) -> torch.Tensor:
        """The weighted sum of the task's loss and all terms; a fused loss is the sum of the first two already."""
        if not fused:
            weight = self._task_weight_of(inputs)
            if weight or not self.task_weight:
                self._term_sums["task_loss"] += loss.detach()
            loss = weight * loss
        model = self.accelerator.unwrap_model(self.model)
        for objective in self.objectives:
            if fused and objective is self._distillation:
                continue
            objective.measured = {}
            term = self._shared(objective(model, inputs, outputs, self._progress), objective.averaged_over, inputs)
            for key, value in {"loss": term, **objective.measured}.items():
                value = value if key == "loss" else self._shared(value, objective.averaged_over, inputs)
                self._term_sums[f"{objective.name}_{key}"] += value.detach()
            loss = loss + objective.weight_at(self._progress) * term
        return loss

    def _task_weight_of(self, inputs: Mapping[str, Any]) -> float:
        """Factor of the task's own loss on one micro-batch."""
        return self.task_weight

    def _shared(self, mean: torch.Tensor, unit: str, inputs: Mapping[str, Any]) -> torch.Tensor:
        """A micro-batch's mean times what it weighs in the step's; a mean over nothing, which is no number, is 0."""
        share = self._share(unit, inputs)
        return torch.where(share > 0, mean, 0.0) * share

    def _share(self, unit: str, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What this micro-batch's mean weighs in the step's, times the number of ranks that DDP averages over."""
        unit = "labels" if unit == "labels" else "examples"
        count = self._count(inputs)[unit].to(self.args.device)
        if self._step_counts is None:
            return count.clamp(max=1)
        return self.accelerator.num_processes * count / self._step_counts[unit].clamp(min=1)

    # ---- the fused loss ----

    @property
    def _distillation(self) -> TeacherPredictions | None:
        return next((each for each in self.objectives if isinstance(each, TeacherPredictions)), None)

    def _head_to_fuse(self) -> LinearHead | None:
        """The head to leave out of the model's forward, if nothing but the loss reads its logits."""
        readers = [each.name for each in self.objectives if each.logits and not isinstance(each, TeacherPredictions)]
        try:
            if self.compute_loss_func is not None or self.label_smoother is not None:
                raise ConfigurationError("compute_loss_func and label smoothing need the logits.")
            if readers:
                raise ConfigurationError(f"The objective {readers[0]} needs the logits.")
            if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
                raise ConfigurationError("Prompt tuning puts tokens of its own before the text.")
            if self._distillation is not None:
                self._distillation.fuse()
            return LinearHead(self.model)
        except ConfigurationError as error:
            logger.warning("fused_loss is off: %s The logits of tokens x vocabulary are computed.", error)
            return None

    def _fused(self, inputs: Mapping[str, Any]) -> AbstractContextManager[list[LinearLoss]]:
        """In it the model's loss is the weighted sum of the task's and the distillation's, if a head is left out."""
        if self._head is None:
            return nullcontext([])
        return self._head.computing(partial(self._linear_loss, inputs))

    def _linear_loss(
        self, inputs: Mapping[str, Any], hidden: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | int | None
    ) -> LinearLoss:
        assert self._head is not None
        scored = labels != IGNORED
        terms: dict[str, Any] = {}
        task_weight, distillation = self._task_weight_of(inputs), self._distillation
        if distillation is not None:
            terms = distillation.linear_terms(inputs, self._progress)
        fused = linear_distillation_loss(
            hidden[scored],
            self._head.weight,
            labels[scored],
            bias=self._head.bias,
            task_weight=task_weight,
            normalizer=items,
            **terms,
        )
        ranks = self.accelerator.num_processes if items is not None and self.args.average_tokens_across_devices else 1
        if task_weight or not self.task_weight:
            self._term_sums["task_loss"] += ranks * fused.cross_entropy
        if distillation is not None:
            self._term_sums[f"{distillation.name}_loss"] += ranks * fused.divergence
        return fused

    def _count_step(self, batches: list[Mapping[str, Any]], device: torch.device) -> dict[str, torch.Tensor]:
        counts = [self._count(batch) for batch in batches]
        units = ("examples", "labels")
        local = torch.stack([torch.stack([count[unit].to(device) for unit in units]) for count in counts]).sum(0)
        total = self.accelerator.reduce(local, reduction="sum")
        return {"examples": total[0], "labels": total[1]}

    def _count(self, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        first = next(value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim())
        examples = torch.tensor(float(len(first)))
        labels = batch.get("labels")
        if not isinstance(labels, torch.Tensor):
            return {"examples": examples, "labels": examples}
        counted = labels[..., 1:] if self._loss_shifts_labels else labels
        return {"examples": examples, "labels": counted.ne(IGNORED).sum().float()}

    def _refuse_contradictions(self) -> None:
        names = ["task", *(objective.name for objective in self.objectives)]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ConfigurationError(f"objectives: more than one term is called '{repeated.pop()}' in the logs.")
        if self.objectives and self.model_init is not None:
            raise ConfigurationError("objectives are built for one model: pass 'model', not 'model_init'.")
        if not self.rates.uniform and self.optimizer is not None:
            raise ConfigurationError("Rates by depth need the optimizer to be made here: do not pass 'optimizers'.")
        if self.learning_rate_schedule is not None and self.lr_scheduler is not None:
            raise ConfigurationError("learning_rate_schedule: 'optimizers' brings a scheduler. Give one of them.")
        if self.frozen_prefix_cache is not None:
            self._refuse_cache()
        self._refuse_domains()
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.unfreeze is None:
            return
        if self.is_deepspeed_enabled or (fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1):
            found = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP version 1"
            raise ConfigurationError(
                f"unfreeze: {found} fixes its flat parameters at the start, so layers cannot open later. "
                "Use DDP or FSDP version 2, or train without a schedule."
            )

    def _refuse_cache(self) -> None:
        """Refuse a cache of the frozen prefix where there is none, or where something reads what it leaves out."""
        readers = [objective.name for objective in self.objectives if objective.hidden_states or objective.attentions]
        if self.unfreeze is None:
            raise ConfigurationError("frozen_prefix_cache: nothing is frozen. Give 'unfreeze' as well.")
        if readers:
            raise ConfigurationError(
                f"frozen_prefix_cache: {readers[0]} reads hidden states or attentions that are not computed."
            )
        elsewhere = [each.name for each in self.objectives if getattr(each, "pooling", (HEAD,)) != (HEAD,)]
        if elsewhere:
            raise ConfigurationError(
                f"frozen_prefix_cache: {elsewhere[0]} takes features that may lie below the cut. Expected "
                "pooling = 'head'."
            )
        if self.is_fsdp_enabled:
            raise ConfigurationError("frozen_prefix_cache: FSDP shards the weights that the cache is named after.")

    def _refuse_domains(self) -> None:
        """Refuse objectives and data that do not know of the same domains."""
        pairs = self._pairs
        if pairs is not None and (strange := set(self.label_names or ()) - set(LABELS)):
            raise ConfigurationError(
                f"train_dataset: '{strange.pop()}' holds labels, which would be read of the target."
            )
        if pairs is not None and loss_kind(self.model) is None:
            raise ConfigurationError(
                f"train_dataset: {type(transformer_in(self.model)).__name__} is not known to leave out what has no "
                "label. Expected a classifier of examples or tokens, or a language model."
            )
        rows = self.args.per_device_train_batch_size * self.args.world_size
        for objective in self.objectives:
            if (least := getattr(objective, "least_rows", 1)) > rows:
                raise ConfigurationError(f"{objective.name}: {rows} pair in a batch, expected at least {least}.")
            if pairs is not None and EXAMPLE_INDEX in objective.columns:
                raise ConfigurationError(f"{objective.name}: it knows of one data set's rows, not of domain pairs.")
            if pairs is not None and getattr(objective, "domains", pairs.domains) != pairs.domains:
                raise ConfigurationError(
                    f"{objective.name}: domains = {objective.domains}, but train_dataset has {pairs.domains}."
                )
            if pairs is None and DOMAIN in objective.columns and self.train_dataset is not None:
                if DOMAIN not in (getattr(self.train_dataset, "column_names", None) or [DOMAIN]):
                    raise ConfigurationError(
                        f"{objective.name}: train_dataset has one domain. Expected DomainPairs(source, target)."
                    )


class _TransferCallback(TrainerCallback):
    """Calls the trainer at the optimizer-step boundaries."""

    def __init__(self, trainer: TransferTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer._pairs is not None:
            self.trainer._pairs.set_epoch(int(state.epoch + 1e-6))

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._terms_logged_at = state.global_step
        trainer._term_sums.clear()
        if trainer._prefix is not None:  # an interrupted run left it
            trainer._start_above(-1)
        if trainer._levels is not None:
            trainer.show_plan()
        trainer._follow_schedule()
        if trainer.frozen_prefix_cache is not None:
            trainer._cache_frozen_prefix()
        if trainer.scaffold is not None:
            trainer.scaffold.synchronize()

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._follow_schedule()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.scaffold is not None:
            group = trainer.optimizer.param_groups[0]
            top = trainer.plan()[0].learning_rate if trainer._levels else args.learning_rate
            initial = group.get("initial_lr", top)  # a plateau scheduler records none
            trainer.scaffold.step(group["lr"] / initial if initial else 0.0)

    def on_train_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer._prefix is not None:
            trainer._start_above(-1)
        if trainer._levels is not None:
            trainer._levels.open_all()


def _prepare_arguments_for_schedule(args: TrainingArguments) -> None:
    """Under DDP a layer that opens later must have been there when DDP wrapped the model, and may be unused until."""
    if args.ddp_find_unused_parameters is False:
        raise ConfigurationError(
            "unfreeze: ddp_find_unused_parameters=False makes DDP wait for the gradients of frozen layers. "
            "Leave it unset; it is set to True."
        )
    args.ddp_find_unused_parameters = True


def _refuse_unsaved_weights(model: Any) -> None:
    """PEFT saves adapters and ``modules_to_save`` only: anything else that trains would be lost."""
    if isinstance(model, PeftModel):
        states = [
            get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
            for adapter in model.peft_config
        ]
    elif getattr(model, "_hf_peft_config_loaded", False):  # transformers' own model.add_adapter
        states = [model.get_adapter_state_dict(adapter) for adapter in model.peft_config]
    else:
        return
    saved = {tensor.data_ptr() for state in states for tensor in state.values()}
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in saved and "prompt_encoder." not in name
    ]
    if lost:
        raise ConfigurationError(
            f"{len(lost)} base parameters require a gradient under a PEFT adapter (first: {lost[0]}): they would be "
            "trained and then not saved. Freeze them, or name their module in the adapter's modules_to_save."
        )
