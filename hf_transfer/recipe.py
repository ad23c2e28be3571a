"""Recipes: an experiment as plain data, from YAML or from Python, checked whole before a model is loaded."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import yaml

from hf_transfer import schema
from hf_transfer.data.spec import DataSpec
from hf_transfer.environment import versions
from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.models import ModelSpec, load_model, load_processor, new_modules
from hf_transfer.report import RunFolder, is_main_process
from hf_transfer.schedules import GradualUnfreeze, Schedule, TopLevels
from hf_transfer.schema import Checked, apply_overrides, bind, construct, plain
from hf_transfer.tasks import Metrics, find_task
from hf_transfer.training.rates import DepthRates, LearningRateBands

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, TrainingArguments

    from hf_transfer.data.prepared import PreparedData
    from hf_transfer.training.trainer import TransferTrainer

AnyRecipe = TypeVar("AnyRecipe", bound="Recipe")
Split = Literal["validation", "test"]

RECIPES: dict[str, str] = {
    "feature_extraction": "hf_transfer.recipe:FeatureExtractionRecipe",
    "fine_tune": "hf_transfer.recipe:FineTuneRecipe",
    "gradual_unfreeze": "hf_transfer.recipe:GradualUnfreezeRecipe",
    "lora": "hf_transfer.recipe:LoraRecipe",
    "distillation": "hf_transfer.distill:DistillationRecipe",
    "domain_adversarial": "hf_transfer.adapt:DomainAdversarialRecipe",
    "domain_alignment": "hf_transfer.adapt:DomainAlignmentRecipe",
    "compare": "hf_transfer.compare:CompareRecipe",
}
"""What ``recipe:`` can name, and where the class is."""

RENAMED_TRAINING_ARGUMENTS = {
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps",
}
"""What transformers 5 calls the training arguments of earlier versions."""

PEFT_TASK_TYPES = {
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "causal-lm": "CAUSAL_LM",
}


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Args:
        folder: The run folder; ``from_pretrained`` loads the model from it.
        metrics: The content of its ``metrics.json``.
    """

    folder: Path
    metrics: dict[str, Any]


def recipe_class(name: str) -> type[Recipe]:
    """The recipe class that ``recipe: name`` asks for.

    Raises:
        ConfigurationError: No recipe has that name.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ConfigurationError(f"recipe = {name!r}: there is no such recipe. {nearest(name, RECIPES)}")
    return resolve_name(RECIPES[name])


def adapter_class(method: str, *, where: str = "adapter") -> type[PeftConfig]:
    """PEFT's configuration class for the method called ``method`` in lower case, those registered by others included.

    Raises:
        ConfigurationError: PEFT knows no such method.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    import hf_transfer.adapters  # noqa: F401  (its method registers itself)

    classes = {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(method, str) or method not in classes:
        raise ConfigurationError(f"{where}.method = {method!r}: PEFT has no such method. {nearest(method, classes)}")
    return classes[method]


class Recipe(ABC):
    """An experiment as plain data: what its constructor takes, a YAML file can say, and both are checked alike."""

    name: ClassVar[str]
    """What ``recipe:`` calls it."""

    def __post_init__(self) -> None:
        given = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        for option, value in bind(type(self), given).items():
            setattr(self, option, value)

    @classmethod
    def load(cls: type[AnyRecipe], path: str | Path, overrides: Iterable[str] = ()) -> AnyRecipe:
        """Read a recipe from a YAML file.

        Args:
            path: The file. ``recipe:`` in it names the class; called on a named class, that is the class it must name.
            overrides: Changes as ``key.path=value``, the value in YAML.

        Raises:
            ConfigurationError: The file is not there or is not YAML, or something in it cannot work; all that is wrong
                with keys and types is said at once.
        """
        return cls.from_values(apply_overrides(_read_yaml(Path(path)), overrides))

    @classmethod
    def from_values(cls: type[AnyRecipe], values: Mapping[str, Any]) -> AnyRecipe:
        """Build the recipe that ``values`` describe, as a YAML file would hold them."""
        options = dict(values)
        name = options.pop("recipe", getattr(cls, "name", None))
        if name is None:
            raise ConfigurationError(f"recipe is missing: expected one of {', '.join(RECIPES)}.")
        found = recipe_class(name)
        if not issubclass(found, cls):
            raise ConfigurationError(f"recipe = {name!r}: expected one that is a {cls.__name__}.")
        return construct(found, options)

    def values(self) -> dict[str, Any]:
        """The resolved recipe as plain data: ``from_values`` and YAML take it back."""
        return {"recipe": self.name, **plain(self)}

    @abstractmethod
    def run(self, *, overwrite: bool = False, resume: bool = False) -> RunResult:
        """Carry the experiment out and write its run folder.

        Args:
            overwrite: Delete an earlier run in the folder.
            resume: Continue an earlier run from its last complete checkpoint; a finished one is read.

        Raises:
            ConfigurationError: Something cannot work, or the folder holds something and neither was asked for.
        """


def _training_options(values: Any, where: str) -> dict[str, Any]:
    from transformers import TrainingArguments

    options = bind(TrainingArguments, values, where=where, renamed=RENAMED_TRAINING_ARGUMENTS)
    if not options.get("output_dir"):
        raise ConfigurationError(f"{where}.output_dir is missing: expected the run folder (--output).")
    if "hub_token" in options:
        raise ConfigurationError(f"{where}.hub_token: a recipe is kept with its run; put the token into HF_TOKEN.")
    return options


def _adapter_options(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigurationError(
            f"{where} = {values!r}: expected a mapping of options, such as {{method: lora, r: 8}}."
        )
    options = dict(values)
    method = options.pop("method", "lora")
    return {"method": method, **bind(adapter_class(method, where=where), options, where=where)}


def _objective_options(values: Any, where: str) -> dict[str, Any]:
    from hf_transfer.objectives import OBJECTIVES

    if not isinstance(values, Mapping):
        raise ConfigurationError(
            f"{where} = {values!r}: expected a mapping of objectives, such as {{l2sp: {{weight: 0.01}}}}."
        )
    unknown = [name for name in values if name not in OBJECTIVES]
    if unknown:
        raise ConfigurationError(
            f"{where}.{unknown[0]}: there is no such objective. {nearest(unknown[0], OBJECTIVES)}"
        )
    return {name: bind(OBJECTIVES[name], options or {}, where=f"{where}.{name}") for name, options in values.items()}


@dataclass(kw_only=True)
class TrainingRecipe(Recipe):
    """One model trained on one data set: what all methods share.

    Args:
        model: The pretrained model and the task it is to learn.
        data: The examples to learn it from.
        training: Options of ``transformers.TrainingArguments``; ``output_dir`` is the run folder.
    """

    model: ModelSpec
    data: DataSpec
    training: Annotated[dict[str, Any], Checked(_training_options)]

    learns_without_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.unlabelled is not None and not self.learns_without_labels:
            raise ConfigurationError(
                f"data.unlabelled: the recipe '{self.name}' learns from labels alone. Take recipe: distillation, "
                "whose teacher needs none."
            )

    def build(self) -> TransferTrainer:
        """The trainer, ready for ``train()``: the data are read and checked first, the model is loaded last.

        Raises:
            ConfigurationError: Something cannot work.
        """
        trainer, _, _ = self._build(self._arguments())
        return trainer

    def check(self) -> PreparedData:
        """Read and check the data for the model, without loading it.

        Raises:
            ConfigurationError: Something cannot work.
        """
        _, data, _ = self._prepare(self._arguments())
        return data

    def run(
        self,
        *,
        overwrite: bool = False,
        resume: bool = False,
        score: Sequence[Split] = ("validation", "test"),
        save: bool = True,
    ) -> RunResult:
        """Train, score, and write the run folder; see :meth:`Recipe.run`.

        Args:
            overwrite: Delete an earlier run in the folder.
            resume: Continue an earlier run from its last complete checkpoint; a finished one is read.
            score: The splits to score on in the end, where they are there; a run that is one of several to choose from
                leaves the test split alone.
            save: Keep the model, or the adapter.
        """
        arguments = self._arguments()
        folder = RunFolder(Path(self.training["output_dir"]))
        writes = is_main_process()
        if writes:
            folder.check(self.values(), overwrite=overwrite, resume=resume)
        if resume and folder.is_finished:
            return RunResult(folder.path, folder.read("metrics.json"))
        trainer, data, scored = self._build(arguments)
        plan, trainable = _plan(trainer)
        if writes:
            facts = {"seed": arguments.seed, "processes": arguments.world_size, "labels": data.label_names}
            folder.claim(self.values(), overwrite=overwrite, resume=resume, **facts, versions=versions())
            folder.write("plan.txt", plan + "\n")
            processes = f"{arguments.world_size} {'process' if arguments.world_size == 1 else 'processes'}"
            print(f"{self.name}: {processes} on {arguments.device.type}, {trainable:,} parameters train")
            print("\n".join(data.report()))
            if trainer.unfreeze is None and trainer.rates.uniform:  # otherwise the trainer prints it
                print(plan)
        trainer.accelerator.wait_for_everyone()
        checkpoint = folder.last_checkpoint() if resume else None
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        seconds = time.perf_counter() - started
        splits = {"validation": data.validation, "test": data.test}
        scores: dict[str, Any] = {
            name: _scores(trainer, rows, name) for name in score if (rows := splits[name]) is not None
        }
        metrics = scores | {
            "metric": {"name": scored.best, "greater_is_better": scored.greater_is_better},
            "trainable_parameters": trainable,
            "seconds": round(seconds, 3),
            **self._findings(trainer, scored),
        }
        if save:
            self._save(trainer)
        if writes:
            folder.write("metrics.json", metrics)
            folder.write("log_history.json", trainer.state.log_history)
            folder.finish()
            for split, named in scores.items():
                print(f"{split}: " + ", ".join(f"{name} {value:.4g}" for name, value in named.items()))
            print(f"written to {folder.path}")
        trainer.accelerator.wait_for_everyone()
        return RunResult(folder.path, metrics)

    @abstractmethod
    def _trainer(self, model: PreTrainedModel, arguments: TrainingArguments, **options: Any) -> TransferTrainer:
        """The method's trainer for the loaded model; ``options`` are data and metrics, as ``Trainer`` takes them."""

    def _findings(self, trainer: TransferTrainer, scored: Metrics) -> dict[str, Any]:
        """What a method has to say beside the scores."""
        return {}

    def _save(self, trainer: TransferTrainer) -> None:
        trainer.save_model()

    def _arguments(self) -> TrainingArguments:
        from transformers import TrainingArguments

        try:
            return TrainingArguments(**{"log_level_replica": "error", **self.training})
        except (ValueError, ImportError) as error:
            raise ConfigurationError(f"training: {_one_line(error)}") from error

    def _prepare(self, arguments: TrainingArguments) -> tuple[Any, PreparedData, Metrics]:
        """The model's processor, the data that it has encoded, and how they are scored."""
        task = find_task(self.model.task)
        processor = load_processor(self.model)
        with arguments.main_process_first(desc="preparing the data"):
            data = self.data.prepare(self.data.load(task=task.name), processor, task=task.name)
        metrics = task.metrics(data.problem_type, data.label_names)
        self._settle_evaluation(arguments, data, metrics)
        return processor, data, metrics

    def _build(self, arguments: TrainingArguments) -> tuple[TransferTrainer, PreparedData, Metrics]:
        processor, data, metrics = self._prepare(arguments)
        model = load_model(
            self.model,
            tokenizer=processor if find_task(self.model.task).reads == "text" else None,
            label_names=data.label_names,
            problem_type=data.problem_type,
            seed=arguments.seed,
        )
        trainer = self._trainer(
            model,
            arguments,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=processor,
            data_collator=data.collator,
            compute_metrics=metrics.compute,
            preprocess_logits_for_metrics=find_task(self.model.task).preprocess_logits_for_metrics,
        )
        return trainer, data, metrics

    def _settle_evaluation(self, arguments: TrainingArguments, data: PreparedData, metrics: Metrics) -> None:
        """Choose the best checkpoint by the task's own metric, unless another is named; refuse what has no data."""
        if data.validation is None and arguments.eval_strategy != "no":
            raise ConfigurationError(
                f"training.eval_strategy = '{self.training['eval_strategy']}': data.validation = 0 leaves nothing to "
                "evaluate on."
            )
        if arguments.load_best_model_at_end and "metric_for_best_model" not in self.training:
            arguments.metric_for_best_model = metrics.best
            arguments.greater_is_better = metrics.greater_is_better


@dataclass(kw_only=True)
class FeatureExtractionRecipe(TrainingRecipe):
    """A new head on a frozen base, which runs over the data once: its features are cached, the head learns from them.

    The cheapest method, hence the one to beat. A head of one linear layer is fitted to its optimum, regularised as
    validation data choose; epochs and learning rate matter to other heads only. Sentence encoders want
    ``model.pooling: mean``.

    Args:
        features_dir: Folder of the cache, which runs with the same base and data share; by default in the run folder.
        features_dtype: What the base computes in; "auto" is bfloat16 where the device has it natively.
    """

    name: ClassVar[str] = "feature_extraction"

    features_dir: str | None = None
    features_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not find_task(self.model.task).new_head:
            raise ConfigurationError(
                f"model.task = '{self.model.task}' has no new head to train on features. Take another recipe."
            )

    def _trainer(self, model: PreTrainedModel, arguments: TrainingArguments, **options: Any) -> TransferTrainer:
        from hf_transfer.training.named import FeatureExtractionTrainer

        return FeatureExtractionTrainer(
            model, arguments, features_dir=self.features_dir, features_dtype=self.features_dtype, **options
        )


@dataclass(kw_only=True)
class FineTuneRecipe(TrainingRecipe):
    """Train the whole model, or an adapter on it; rates may follow depth, and layers may open one after another.

    From scratch is this recipe with ``model.pretrained: false``.

    Args:
        adapter: A PEFT method and its options, such as ``{method: lora, r: 8, target_modules: all-linear}``; the
            task's new head is trained and saved with it. ``hf-transfer describe adapter.lora`` lists what LoRA takes.
        merge_adapter: Save the base with the adapter merged into it, an ordinary model, instead of the adapter.
        unfreeze: When each level opens: by epochs or by share of the run, or the highest ``blocks`` only.
        layer_decay: The rate of each level is this factor of the level's above it.
        bands: Absolute rates for head, upper and lower blocks.
        base_ratio: The base learns at this ratio of the head's rate; 0.01 to 0.1 is usual.
        learning_rate_schedule: Factor of every rate over the run, instead of ``training.lr_scheduler_type``.
        objectives: Further terms of the loss by name, each with its options.
        task_weight: Factor of the task's own loss.
        frozen_prefix_cache: A folder. Closed levels are computed once, and every epoch starts from what they gave.
        frozen_prefix_dtype: What is stored there; float32 trains as without the cache, for twice the disk.
        fused_loss: Compute a language model's loss a few rows at a time, so that its logits are never held.
    """

    name: ClassVar[str] = "fine_tune"
    supplies: ClassVar[frozenset[str]] = frozenset()
    """What its objectives can be given beside their options."""
    two_domains: ClassVar[bool] = False

    adapter: Annotated[dict[str, Any], Checked(_adapter_options)] | None = None
    merge_adapter: bool = False
    unfreeze: GradualUnfreeze | TopLevels | None = None
    layer_decay: float | None = None
    bands: LearningRateBands | None = None
    base_ratio: float | None = None
    learning_rate_schedule: Schedule | None = None
    objectives: Annotated[dict[str, Any], Checked(_objective_options)] = field(default_factory=dict)
    task_weight: float = 1.0
    frozen_prefix_cache: str | None = None
    frozen_prefix_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "bfloat16"
    fused_loss: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        DepthRates(layer_decay=self.layer_decay, bands=self.bands, base_ratio=self.base_ratio)
        self._refuse_objectives()
        if self.adapter is not None:
            config = _adapter_config(self.adapter, self.model.task)
            if self.merge_adapter and config.is_prompt_learning:
                raise ConfigurationError(f"merge_adapter: {self.adapter['method']} is no change of weights to merge.")
            if not self.model.pretrained and not self.merge_adapter:
                raise ConfigurationError(
                    "model.pretrained = False: an adapter is saved without its base, which nobody could make again. "
                    "Set merge_adapter: true, or leave out the adapter."
                )
            changed = [name for name in ("pooling", "layers") if getattr(self.model, name) is not None]
            if changed and not self.merge_adapter:
                raise ConfigurationError(
                    f"model.{changed[0]} = {getattr(self.model, changed[0])!r} changes the base, which is not saved "
                    "with an adapter. Set merge_adapter: true."
                )
        elif self.model.quantization is not None:
            raise ConfigurationError(
                f"model.quantization = {self.model.quantization!r}: quantised weights cannot be trained. "
                "Add an adapter, or take recipe: lora."
            )
        elif self.merge_adapter:
            raise ConfigurationError("merge_adapter: there is no adapter to merge.")
        if self.frozen_prefix_cache is not None and self.unfreeze is None:
            raise ConfigurationError("frozen_prefix_cache: nothing is frozen without 'unfreeze'.")
        unread = [
            name for name in ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps") if name in self.training
        ]
        if self.learning_rate_schedule is not None and unread:
            raise ConfigurationError(
                f"training.{unread[0]} and learning_rate_schedule each set the course of the rates: give one of them."
            )
        fixed = _fixed_by_launch(self.training)
        if self.unfreeze is not None and fixed:
            raise ConfigurationError(
                f"unfreeze: {fixed} fixes its flat parameters at the start, so layers cannot open later. "
                "Use DDP or FSDP version 2, or train without a schedule."
            )

    def _refuse_objectives(self) -> None:
        """Refuse objectives that need what this recipe does not supply."""
        from hf_transfer.data.domains import DOMAIN
        from hf_transfer.objectives import OBJECTIVES

        for name in self.objectives:
            if missing := schema.supplied(OBJECTIVES[name]) - self.supplies:
                raise ConfigurationError(
                    f"objectives.{name}: it needs a {missing.pop()}, which the recipe '{self.name}' has not. "
                    "Take recipe: distillation."
                )
            if DOMAIN in OBJECTIVES[name].columns and not self.two_domains:
                raise ConfigurationError(
                    f"objectives.{name}: it compares two domains, and the recipe '{self.name}' has one. Take recipe: "
                    "domain_adversarial or domain_alignment."
                )

    def _trainer(self, model: PreTrainedModel, arguments: TrainingArguments, **options: Any) -> TransferTrainer:
        from hf_transfer.training.trainer import TransferTrainer

        return TransferTrainer(
            self._adapted(model, arguments),
            arguments,
            task_weight=self.task_weight,
            fused_loss=self.fused_loss,
            **self._trainer_options(),
            **options,
        )

    def _adapted(self, model: PreTrainedModel, arguments: TrainingArguments) -> PreTrainedModel | PeftModel:
        if self.adapter is None:
            return model
        return _add_adapter(model, self.adapter, self.model, seed=arguments.seed)

    def _trainer_options(self, **supplied: Any) -> dict[str, Any]:
        """What the trainers of all these methods take alike; objectives get what they need of ``supplied``."""
        from hf_transfer.objectives import OBJECTIVES

        alike = ("unfreeze", "layer_decay", "bands", "base_ratio", "learning_rate_schedule")
        cache = ("frozen_prefix_cache", "frozen_prefix_dtype")
        return {
            "objectives": [
                OBJECTIVES[name](**terms, **{key: supplied[key] for key in schema.supplied(OBJECTIVES[name])})
                for name, terms in self.objectives.items()
            ],
            **{name: getattr(self, name) for name in (*alike, *cache)},
        }

    def _save(self, trainer: TransferTrainer) -> None:
        if self.merge_adapter:
            trainer.model = trainer.model.merge_and_unload()
        super()._save(trainer)


@dataclass(kw_only=True)
class GradualUnfreezeRecipe(FineTuneRecipe):
    """Fine-tuning that opens the model from the top, by default one level more each epoch (ULMFiT).

    Args:
        unfreeze: When each level opens: by epochs or by share of the run.
    """

    name: ClassVar[str] = "gradual_unfreeze"

    unfreeze: GradualUnfreeze | TopLevels = field(default_factory=GradualUnfreeze)


def _lora_on_all_layers() -> dict[str, Any]:
    return {"method": "lora", "target_modules": "all-linear"}


@dataclass(kw_only=True)
class LoraRecipe(FineTuneRecipe):
    """Low-rank adapters on a frozen base (Hu et al. 2021), trained and saved with the task's head.

    Args:
        adapter: Options of PEFT's ``LoraConfig``; by default every linear layer of the base is adapted, because PEFT's
            own choice misses many architectures and the attention alone learns less (Dettmers et al. 2023, QLoRA).
    """

    name: ClassVar[str] = "lora"

    adapter: Annotated[dict[str, Any], Checked(_adapter_options)] = field(default_factory=_lora_on_all_layers)

    def __post_init__(self) -> None:
        if isinstance(self.adapter, Mapping):
            self.adapter = {**_lora_on_all_layers(), **self.adapter}
        super().__post_init__()


def _adapter_config(options: Mapping[str, Any], task: str) -> PeftConfig:
    keywords = {"task_type": PEFT_TASK_TYPES.get(task), **options}
    cls = adapter_class(keywords.pop("method"))
    try:
        return cls(**keywords)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigurationError(f"adapter: {_one_line(error)}") from error


def _add_adapter(model: PreTrainedModel, options: Mapping[str, Any], spec: ModelSpec, *, seed: int) -> PeftModel:
    """``model`` inside PEFT: base frozen, adapter and new head trained and saved."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import set_seed

    config = _adapter_config(options, spec.task)
    if find_task(spec.task).new_head and getattr(config, "modules_to_save", ...) is None:
        setattr(config, "modules_to_save", new_modules(model))  # noqa: B010 - not every method has it
    if spec.quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    set_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ConfigurationError(f"adapter: {_one_line(error)}") from error


def _fixed_by_launch(training: Mapping[str, Any]) -> str | None:
    """The strategy, asked for by the recipe or by ``accelerate launch``, that cannot change what trains."""
    environment = os.environ
    if training.get("deepspeed") or environment.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return "DeepSpeed"
    if environment.get("ACCELERATE_USE_FSDP") == "true" and environment.get("FSDP_VERSION", "1") == "1":
        return "FSDP version 1"
    return None


def _plan(trainer: TransferTrainer) -> tuple[str, int]:
    """The table of what trains when, and how many parameters that is; also for a model whose depth cannot be told."""
    from hf_transfer.training.unfreezing import format_plan

    try:
        rows = trainer.plan()
    except ConfigurationError as error:
        return str(error), sum(value.numel() for value in trainer.model.parameters() if value.requires_grad)
    return format_plan(rows), sum(row.parameters for row in rows if isfinite(row.opens_at_epoch))


def _scores(trainer: TransferTrainer, rows: Dataset, split: str) -> dict[str, float]:
    """The loss and the task's metrics on ``rows``."""
    scores = trainer.evaluate(rows, metric_key_prefix=split)
    costs = ("runtime", "samples_per_second", "steps_per_second")
    named = {name.removeprefix(f"{split}_"): value for name, value in scores.items() if name.startswith(f"{split}_")}
    return {name: value for name, value in named.items() if name not in costs}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _UniqueKeyLoader(yaml.SafeLoader):
    """``yaml.safe_load`` that refuses a key given twice, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if repeated := next((key for index, key in enumerate(keys) if key in keys[:index]), None):
            raise yaml.constructor.ConstructorError(None, None, f"'{repeated}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError:
        there = [other.name for other in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigurationError(
            f"Recipe '{path}' is not a file that can be read. {nearest(path.name, there)}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"Recipe '{path}' is not YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"Recipe '{path}' holds no mapping of sections, but {values!r}.")
    return values
