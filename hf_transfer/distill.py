"""The recipe of knowledge distillation: a student, and a teacher that is there or was run before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hf_transfer.errors import ConfigurationError
from hf_transfer.functional import check_divergence
from hf_transfer.models import TeacherSpec, load_processor, load_trained
from hf_transfer.recipe import FineTuneRecipe
from hf_transfer.tasks import find_task
from hf_transfer.vocabularies import shared_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from hf_transfer.data.prepared import PreparedData
    from hf_transfer.tasks import Metrics
    from hf_transfer.teacher_store import TeacherStore
    from hf_transfer.training.trainer import TransferTrainer


@dataclass(frozen=True)
class StoreSpec:
    """What is kept of a teacher that is run once, by ``hf-transfer teach``, before any student is trained.

    Args:
        directory: The store's folder.
        form: top_k keeps the most probable tokens with the mass of all others, for every temperature from 1 up, and a
            classifier's whole distribution; samples are unbiased and smaller (12 draws: 28 bytes per token against
            280), at the recipe's temperature only.
        k: Tokens of top_k.
        draws: Of samples, per token.
        seed: Of the draws.
    """

    directory: str
    form: Literal["top_k", "samples"] = "top_k"
    k: int = 64
    draws: int = 12
    seed: int = 0


@dataclass(kw_only=True)
class DistillationRecipe(FineTuneRecipe):
    """A student that learns from a teacher's predictions and from the labels (Hinton et al. 2015):
    ``alpha T^2 KL(teacher || student) + (1 - alpha) task``.

    The student is the ``model:`` section; ``model.layers`` makes it from some blocks of a checkpoint, which may be the
    teacher's own. All options of ``fine_tune`` combine with it, adapters and gradual unfreezing among them; the
    objectives ``hidden_state_matching`` and ``attention_matching`` teach what lies below the head.

    Args:
        teacher: A model that was trained for the same task: a folder of another run, or a Hub id. Its head and labels
            are the checkpoint's; ``quantization`` makes it small.
        alpha: Weight of the teacher's distribution, in [0, 1]; the labels get 1 - alpha.
        temperature: Of both distributions; 2.5 to 4 suits small students.
        divergence: What is minimised: forward_kl, reverse_kl, jensen_shannon, total_variation or logit_mse.
        beta: The teacher's share in the mixture of jensen_shannon.
        lmbda: Share of the batches that a language model writes itself (on-policy, GKD); 0 is off.
        max_new_tokens: Of these; by default until a row is as long as the batch's longest.
        store: Train from what ``hf-transfer teach`` stored of the teacher, which is then not loaded.
        compare_to_teacher: Whether evaluation runs the teacher too, for agreement and KL, where it is loaded.
        fused_loss: Compute a language model's loss a few rows at a time, so that its logits are never held.
    """

    name: ClassVar[str] = "distillation"
    learns_without_labels: ClassVar[bool] = True
    supplies: ClassVar[frozenset[str]] = frozenset({"teacher"})

    teacher: TeacherSpec
    alpha: float = 0.5
    temperature: float = 2.0
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "logit_mse"] = "forward_kl"
    beta: float = 0.5
    lmbda: float = 0.0
    max_new_tokens: int | None = None
    store: StoreSpec | None = None
    compare_to_teacher: bool = True
    fused_loss: bool | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConfigurationError(f"alpha = {self.alpha}: expected a share between 0 and 1.")
        if not 0 <= self.lmbda <= 1:
            raise ConfigurationError(f"lmbda = {self.lmbda}: expected a share between 0 (off) and 1.")
        check_divergence(self.divergence, self.temperature, self.beta)
        if self.task_weight != 1.0:
            raise ConfigurationError("task_weight is 1 - alpha: give alpha alone.")
        self.teacher = replace(self.teacher, task=self.model.task)
        if self.store is None:
            return
        if self.divergence != "forward_kl":
            raise ConfigurationError(f"divergence = '{self.divergence}': a store serves forward_kl only.")
        from hf_transfer.objectives import OBJECTIVES
        from hf_transfer.schema import supplied

        if asking := next((name for name in self.objectives if supplied(OBJECTIVES[name])), None):
            raise ConfigurationError(
                f"objectives.{asking}: it asks the teacher itself, of which 'store' holds the predictions only. "
                "Leave out one of them."
            )

    def teach(self) -> TeacherStore:
        """Run the teacher over the training data and store what it predicts, or go on where that was stopped.

        Raises:
            ConfigurationError: The recipe has no ``store``, its folder holds a store of something else, or the data or
                the teacher cannot be used.
        """
        from hf_transfer.teacher_store import TeacherStore

        if self.store is None:
            raise ConfigurationError("store is missing: expected at least its folder (store.directory=out/teacher).")
        arguments = self._arguments()
        if arguments.world_size > 1:
            raise ConfigurationError("hf-transfer teach runs in one process: leave out the launcher.")
        processor, data, _ = super()._prepare(arguments)
        _, shared = self._teacher_reads(processor, data)
        samples = self.store.form == "samples"
        return TeacherStore.build(
            self._load_teacher(arguments),
            data.train,
            data.collator,
            directory=self.store.directory,
            form=self.store.form,
            k=self.store.k,
            draws=self.store.draws,
            seed=self.store.seed,
            temperature=self.temperature if samples else 1.0,
            batch_size=arguments.per_device_eval_batch_size,
            tokenizer=processor,
            name=self.teacher.name,
            vocabulary=shared if self.model.task == "causal-lm" else None,
        )

    def _prepare(self, arguments: TrainingArguments) -> tuple[Any, PreparedData, Metrics]:
        from hf_transfer.teacher_store import TeacherStore

        processor, data, metrics = super()._prepare(arguments)
        self._teacher_tokenizer, self._stored = None, None
        if self.store is not None:
            settings = {key: getattr(self.store, key) for key in ("form", "k", "draws", "seed")}
            self._stored = TeacherStore.open(
                self.store.directory,
                data.train,
                data.collator,
                tokenizer=processor,
                name=self.teacher.name,
                **settings,
            )
        else:
            self._teacher_tokenizer, _ = self._teacher_reads(processor, data)
        return processor, data, metrics

    def _teacher_reads(self, processor: Any, data: PreparedData) -> tuple[PreTrainedTokenizerBase | None, int | None]:
        """The teacher's tokenizer and how many tokens it shares with the student, where they read texts; refuses a
        teacher that would misread the student's batches."""
        theirs = load_processor(self.teacher)
        if find_task(self.model.task).reads == "text":
            shared = shared_vocabulary(processor, theirs)
            _refuse_pairs(data, processor, theirs)
            return theirs, shared
        ours, expected = processor.to_dict(), theirs.to_dict()
        different = sorted(key for key in {*ours, *expected} - NOT_READ if ours.get(key) != expected.get(key))
        if different:
            key = different[0]
            raise ConfigurationError(
                f"teacher: its processor has {key} = {expected.get(key)!r}, the student's {ours.get(key)!r}. Both "
                "read the same batch: expected the same processor."
            )
        return None, None

    def _load_teacher(self, arguments: TrainingArguments) -> PreTrainedModel:
        teacher = load_trained(self.teacher)
        if self.teacher.quantization is None:
            teacher.to(arguments.device)  # type: ignore[arg-type]
        return teacher

    def _trainer(self, model: PreTrainedModel, arguments: TrainingArguments, **options: Any) -> TransferTrainer:
        from hf_transfer.training.distillation import DistillationTrainer

        teacher = self._load_teacher(arguments) if self._stored is None else self._stored
        return DistillationTrainer(
            self._adapted(model, arguments),
            arguments,
            teacher=teacher,
            teacher_tokenizer=self._teacher_tokenizer,
            alpha=self.alpha,
            temperature=self.temperature,
            divergence=self.divergence,
            beta=self.beta,
            lmbda=self.lmbda,
            max_new_tokens=self.max_new_tokens,
            compare_to_teacher=self.compare_to_teacher,
            fused_loss=self.fused_loss,
            **self._trainer_options(teacher=teacher),
            **options,
        )


NOT_READ = frozenset({"image_processor_type", "feature_extractor_type", "processor_class"})
"""What a processor says of itself that changes nothing of its output."""


def _refuse_pairs(data: PreparedData, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """A teacher that tells two texts apart by a column must get it: the student's tokenizer makes the columns."""
    missing = set(teacher.model_input_names) - set(student.model_input_names)
    if data.pairs and missing:
        raise ConfigurationError(
            f"teacher: it tells two texts apart by '{missing.pop()}', which the student's tokenizer does not make. "
            "Take a student of the teacher's family."
        )
