"""The ``data:`` section of a recipe: which examples to load, how to split them, how to encode them for a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_transfer.data import media, tokens
from hf_transfer.data.checks import OPTIONAL, ROLES, SPLITS, checked_splits, is_withheld, roles_of, texts_of
from hf_transfer.data.files import DataFiles, read_dataset
from hf_transfer.data.labels import Labels, infer_problem_type, read_labels, read_tags, unseen_labels
from hf_transfer.data.prepared import PreparedData, SplitSummary
from hf_transfer.data.splits import draw_few, hold_out
from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.tasks import ProblemType, find_task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

VALIDATION_NAMES = ("validation", "dev", "valid", "val")
VALIDATION_SHARE = 0.1
DEFAULT_LENGTH = {"sequence-classification": 512, "token-classification": 512, "causal-lm": 1024}


@dataclass(frozen=True)
class DataSpec:
    """Texts, images or sounds for one task, found by `datasets.load_dataset` under its own argument names.

    Args:
        path: A Hub id, a folder, or a format: json (.jsonl too), csv (.tsv too), parquet, text, and imagefolder or
            audiofolder, whose data_dir holds train/CLASS/FILE.
        name: The configuration of a Hub data set that has several.
        data_dir: A folder of data files, for a file format.
        data_files: A file, a list of files, or files for each split; patterns with * work, and .gz files.
        revision: Branch, tag or commit of a Hub data set.
        columns: Which of their columns plays which role: text, text_pair, image, audio, label; tokens, tags. A role
            left out is read from the column of its own name.
        train: The split to train on.
        validation: A split's name, or the share of train to hold out (by class, seeded); 0 for none. By default the
            split called validation, dev, valid or val, else a share of 0.1.
        test: A split's name. By default the split called test, if there is one and it has labels.
        unlabelled: A split's name, whose examples are trained on beside those of train, without labels (-100): for a
            recipe that learns from a teacher, where examples have one label each.
        problem_type: What labels are, where their type misleads: whole numbers and texts are classes, floats are
            regression, lists are several labels at once.
        delimiter: Separates the labels of one text where a text carries several, as in "sports|politics".
        max_length: Tokens an example is cut to. By default the most the model takes, at most 512 (a document: 1024).
        packing: For causal-lm: join documents into full blocks. If false, each document is an example.
        block_size: For causal-lm with packing: tokens in a block. By default the most the model takes, at most 1024.
        sample_by: For path text: what one document is. A paragraph ends with an empty line.
        max_seconds: For sounds: what they are cut to. By default nothing but what the model's processor does.
        train_size: Train on this many examples only, drawn evenly over the classes. For one seed the smaller draws
            are part of the larger.
        seed: Of the share held out and of the examples drawn.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: DataFiles | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None
    train: str = "train"
    validation: str | float | None = None
    test: str | None = None
    unlabelled: str | None = None
    problem_type: ProblemType | None = None
    delimiter: str | None = None
    max_length: int | None = None
    packing: bool = True
    block_size: int | None = None
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    max_seconds: float | None = None
    train_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        roles = {role for roles in ROLES.values() for role in roles}
        for role in self.columns or {}:
            if role not in roles:
                raise ConfigurationError(f"data.columns: '{role}' is no role. {nearest(role, roles)}")
        if isinstance(self.validation, (int, float)) and not 0 <= self.validation < 1:
            raise ConfigurationError(
                f"data.validation = {self.validation}: expected a split's name, or a share of train below 1."
            )
        for name, least in (("max_length", 2), ("block_size", 2), ("train_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigurationError(f"data.{name} = {value}: expected {least} or more.")
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise ConfigurationError(f"data.max_seconds = {self.max_seconds}: expected more than 0.")
        if self.delimiter == "":
            raise ConfigurationError("data.delimiter is empty: expected what stands between two labels, such as '|'.")

    def load(self, *, task: str, base_dir: str | Path = ".") -> DatasetDict:
        """Read the splits ``train``, ``validation``, ``test`` and ``unlabelled`` (all but the first where there are
        any), each with one column for each role the task reads.

        Args:
            task: A name in `TASKS`.
            base_dir: What relative paths start from; by default the working directory.

        Raises:
            ConfigurationError: A file, split or column is not there (the nearest is named), or reading failed.
        """
        from datasets import DatasetDict

        find_task(task)
        if self.unlabelled is not None and "label" not in ROLES[task]:
            raise ConfigurationError(f"data.unlabelled: {task} does not read it, only tasks of one label each do.")
        raw = self._read(base_dir)
        splits = {
            split: self._with_roles(raw[name], name, roles_of(split, task), task, base_dir)
            for split, name in self._split_names(raw).items()
        }
        if "validation" not in splits and self.validation != 0:
            splits["train"], splits["validation"] = self._hold_out(splits["train"])
        return DatasetDict({split: splits[split] for split in SPLITS if split in splits})

    def load_unlabelled(self, *, task: str, base_dir: str | Path = ".") -> DatasetDict:
        """Read ``train`` without its labels, as the split ``unlabelled``, and ``test`` where that has labels.

        Args:
            task: See :meth:`load`.
            base_dir: See :meth:`load`.

        Raises:
            ConfigurationError: See :meth:`load`.
        """
        from datasets import DatasetDict

        find_task(task)
        raw = self._read(base_dir)
        names = self._split_names(raw)
        splits = {
            "unlabelled": self._with_roles(
                raw[names["train"]], names["train"], roles_of("unlabelled", task), task, base_dir
            )
        }
        needed = [(self.columns or {}).get(role, role) for role in roles_of("test", task) if role not in OPTIONAL]
        test = names.get("test")
        if test is not None and (self.test is not None or set(needed) <= set(raw[test].column_names)):
            splits["test"] = self._with_roles(raw[test], test, roles_of("test", task), task, base_dir)
        return DatasetDict(splits)

    def prepare(self, raw: Mapping[str, Dataset], processor: Any, *, task: str) -> PreparedData:
        """Check, draw and encode what `load` gave, or any splits whose columns are named by role.

        Texts are tokenised here; images and sounds stay files, which are decoded whenever a row is read.

        Args:
            raw: ``train`` and, where there are any, ``validation``, ``test`` and ``unlabelled``.
            processor: The model's: a tokenizer, whose ``model_max_length`` is the most a row may have, an image
                processor, or a feature extractor.
            task: A name in `TASKS`.

        Raises:
            ConfigurationError: A text is missing, the first image or sound cannot be read, labels are unusable (see
                `read_labels`), a length is more than the model takes, or there are fewer than ``train_size`` examples.
        """
        from datasets import concatenate_datasets

        collator = find_task(task).collator(processor)
        length = self._length(processor, task)
        splits, notes = checked_splits(raw, task=task), []
        if self.test is None and "test" in splits and is_withheld(splits["test"]):
            del splits["test"]
            notes.append("note: the labels of test are withheld, so it is left out")
        labelled = {split: rows for split, rows in splits.items() if split != "unlabelled"}
        labels = self._read_labels(labelled, task)
        if "unlabelled" in splits and task != "causal-lm":
            if labels is None or labels.problem_type != "single_label_classification":
                raise ConfigurationError(
                    "data: unlabelled examples need labelled ones with one class each beside them."
                )
        splits["train"] = self._draw(splits["train"])
        if labels and labels.problem_type:
            notes += unseen_labels(labelled | {"train": splits["train"]}, labels)

        if "unlabelled" in splits:
            roles = [role for role in roles_of("unlabelled", task) if role in splits["unlabelled"].column_names]
            splits["unlabelled"] = splits["unlabelled"].select_columns(roles)
        if find_task(task).reads == "text":
            prepared, summaries, reader = *self._tokenised(splits, processor, task, labels, length), None
        else:
            prepared, summaries, reader = self._files(splits, processor, task, labels)
            notes += [note] if (note := reader.note(prepared["train"][0][reader.name])) else []
        train = concatenate_datasets([prepared[split] for split in ("train", "unlabelled") if split in prepared])
        rows = {**prepared, "train": train}
        if reader is not None:
            rows = {split: each.with_transform(reader) for split, each in rows.items()}
        return PreparedData(
            train=rows["train"],
            validation=rows.get("validation"),
            test=rows.get("test"),
            label_names=labels.names if labels else [],
            problem_type=labels.problem_type if labels else None,
            collator=collator,
            length=length,
            summaries=summaries,
            notes=notes,
            pairs="text_pair" in splits["train"].column_names,
        )

    def _tokenised(
        self,
        splits: Mapping[str, Dataset],
        tokenizer: PreTrainedTokenizerBase,
        task: str,
        labels: Labels | None,
        length: int,
    ) -> tuple[dict[str, Dataset], dict[str, SplitSummary]]:
        function, settings = self._tokeniser(tokenizer, task, labels)
        trained_on = {text for split in ("train", "unlabelled") if split in splits for text in texts_of(splits[split])}
        prepared, summaries = {}, {}
        for split, rows in splits.items():
            prepared[split], counts = tokens.tokenise(
                rows, function, name=split, settings={"tokenizer": tokenizer, "length": length, **settings}
            )
            texts = texts_of(rows)
            summaries[split] = SplitSummary(
                examples=len(rows),
                characters=sum(len(part) for text in texts for part in text),
                seen_in_train=sum(text in trained_on for text in texts) if split in ("validation", "test") else 0,
                **counts,
            )
        return prepared, summaries

    def _files(
        self, splits: Mapping[str, Dataset], processor: Any, task: str, labels: Labels | None
    ) -> tuple[dict[str, Dataset], dict[str, SplitSummary], media.Reader]:
        role = find_task(task).reads
        sounds = role == "audio"
        reader = media.SoundReader(processor, self.max_seconds) if sounds else media.ImageReader(processor)
        prepared = {
            split: media.with_inputs(rows, split=split, role=role, name=reader.name, labels=labels)
            for split, rows in splits.items()
        }
        summaries = {split: SplitSummary(examples=len(rows), rows=len(rows)) for split, rows in splits.items()}
        return prepared, summaries, reader

    def _read(self, base_dir: str | Path) -> DatasetDict:
        return read_dataset(
            self.path,
            base_dir=Path(base_dir).expanduser(),
            data_dir=self.data_dir,
            data_files=self.data_files,
            name=self.name,
            revision=self.revision,
            **({"sample_by": self.sample_by} if self.path == "text" else {}),
        )

    def _split_names(self, raw: DatasetDict) -> dict[str, str]:
        """What they call each of our splits, where it is one of theirs."""
        names = {"train": self.train}
        if isinstance(self.validation, str):
            names["validation"] = self.validation
        elif self.validation is None:
            names.update(("validation", name) for name in reversed(VALIDATION_NAMES) if name in raw)
        if self.test is not None or "test" in raw:
            names["test"] = self.test or "test"
        if self.unlabelled is not None:
            names["unlabelled"] = self.unlabelled
        for split, name in names.items():
            if name not in raw:
                raise ConfigurationError(f"data.{split}: there is no split '{name}'. {nearest(name, raw)}")
            if split != "train" and name == self.train:
                raise ConfigurationError(f"data.{split} = '{name}': that is the split to train on.")
        return names

    def _with_roles(self, rows: Dataset, split: str, roles: Sequence[str], task: str, base_dir: str | Path) -> Dataset:
        """Only the columns of these ``roles``, named by role; paths of files start from ``data_dir``."""
        columns = self.columns or {}
        for role in columns:
            if role not in ROLES[task]:
                raise ConfigurationError(f"data.columns: {task} has no '{role}'. {nearest(role, ROLES[task])}")
        sources = {}
        for role in roles:
            source = columns.get(role, role)
            if source in rows.column_names:
                sources[source] = role
            elif role in columns or role not in OPTIONAL:
                raise ConfigurationError(
                    f"data.columns: '{split}' has no column '{source}' to be the {role}. "
                    f"{nearest(source, rows.column_names)}"
                )
        rows, reads = rows.select_columns(list(sources)).rename_columns(sources), find_task(task).reads
        if reads == "text":
            return rows
        return media.under(rows, reads, Path(base_dir).expanduser() / Path(self.data_dir or "").expanduser())

    def _hold_out(self, rows: Dataset) -> tuple[Dataset, Dataset]:
        """What is left to train on, and what is held out."""
        share = VALIDATION_SHARE if self.validation is None else float(self.validation)
        kept, held_out = hold_out(self._classes(rows), share=share, seed=self.seed)
        if not kept or not held_out:
            raise ConfigurationError(
                f"data.validation = {share}: that share of {len(rows)} examples is nothing or all. Name a split to "
                "validate on, set 0 for none, or divide the text more finely (data.sample_by)."
            )
        return rows.select(kept), rows.select(held_out)

    def _draw(self, rows: Dataset) -> Dataset:
        """The ``train_size`` examples to train on."""
        if self.train_size is None:
            return rows
        if self.train_size > len(rows):
            raise ConfigurationError(f"data.train_size = {self.train_size}: 'train' has only {len(rows)} examples.")
        return rows.select(draw_few(self._classes(rows), count=self.train_size, seed=self.seed))

    def _classes(self, rows: Dataset) -> Sequence[Any]:
        """The class of each row; the same for all where a row has not exactly one."""
        if "label" in rows.column_names:
            kind = self.problem_type or infer_problem_type(rows, delimiter=self.delimiter)
            if kind == "single_label_classification":
                return rows["label"][:]
        return [0] * len(rows)

    def _length(self, processor: Any, task: str) -> int:
        """Tokens that a row is cut to or packed into; 0 where it has none."""
        reads = find_task(task).reads
        for option, reader in (("max_length", "text"), ("block_size", "text"), ("max_seconds", "audio")):
            if getattr(self, option) is not None and reads != reader:
                raise ConfigurationError(f"data.{option}: {task} does not read it, only tasks on {reader} do.")
        if reads != "text":
            return 0
        packs = task == "causal-lm" and self.packing
        name, other = ("block_size", "max_length") if packs else ("max_length", "block_size")
        if getattr(self, other) is not None:
            raise ConfigurationError(
                f"data.{other}: {task}{' with packing' if packs else ''} does not read it. Did you mean data.{name}?"
            )
        requested, most = getattr(self, name), processor.model_max_length
        if requested is not None and requested > most:
            raise ConfigurationError(f"data.{name} = {requested}: the model takes at most {most} tokens.")
        return requested or min(DEFAULT_LENGTH[task], most)

    def _read_labels(self, splits: Mapping[str, Dataset], task: str) -> Labels | None:
        if "label" in ROLES[task]:
            return read_labels(splits, problem_type=self.problem_type, delimiter=self.delimiter)
        return read_tags(splits) if task == "token-classification" else None

    def _tokeniser(
        self, tokenizer: PreTrainedTokenizerBase, task: str, labels: Labels | None
    ) -> tuple[Callable[..., tokens.Columns], dict[str, Any]]:
        """The function for ``task``, and its settings beyond tokenizer and length."""
        if task == "causal-lm":
            return tokens.blocks if self.packing else tokens.documents, {}
        if task == "sequence-classification":
            return tokens.sequences, {"labels": labels}
        if not tokenizer.is_fast:
            raise ConfigurationError(
                f"model: {task} needs a fast tokenizer; {type(tokenizer).__name__} cannot tell whose a piece is."
            )
        return tokens.tagged_words, {"labels": labels}
