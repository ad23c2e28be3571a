"""The ``data:`` section of a recipe: which texts to load, how to split them, and how to tokenise them for a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_transfer.data.labels import Labels, read_labels, read_tags
from hf_transfer.data.prepared import PreparedData, SplitSummary
from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.tasks import ProblemType, find_task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase

FILE_FORMATS = ("json", "csv", "parquet", "text", "arrow")
VALIDATION_NAMES = ("validation", "dev", "valid", "val")
ROLES = {  # what each task reads; a text pair is optional
    "sequence-classification": ("text", "text_pair", "label"),
    "token-classification": ("tokens", "tags"),
    "causal-lm": ("text",),
}
UNLIMITED = 10**6  # a tokenizer that knows no maximum says 1e30
LONGEST_DEFAULT = {"sequence-classification": 512, "token-classification": 512, "causal-lm": 1024}


@dataclass(frozen=True)
class TextData:
    """Texts for one task, found by `datasets.load_dataset` under its own argument names.

    Args:
        path: A Hub id, a folder, or a file format: json (also for .jsonl), csv (also for .tsv), parquet, text, arrow.
        name: The configuration of a Hub data set that has several.
        data_dir: A folder of data files, for a file format.
        data_files: A file, a list of files, or files for each split; patterns with * work, .gz files too.
        revision: Branch, tag or commit of a Hub data set.
        columns: Which of their columns plays which role: text, text_pair, label; tokens, tags. A role left out is read
            from the column of its own name.
        train: The split to train on.
        validation: A split's name, or the share of ``train`` to hold out (by label, seeded); 0 for none. By default the
            split called validation, dev, valid or val, else a share of 0.1.
        test: A split's name. By default the split called test, if there is one with labels.
        problem_type: What labels are, where inferring it from their type would be wrong: whole numbers are classes, floats
            regression, lists several labels at once.
        delimiter: Separates the labels of one text where a text carries several ("sports|politics").
        max_length: Tokens an example is cut to. By default the most the model takes, at most 512.
        packing: Language modelling: join documents into full blocks; if false, each is an example of up to ``max_length``.
        block_size: Language modelling: tokens in a block. By default the most the model takes, at most 1024.
        sample_by: For path text: what a document is. A paragraph ends with an empty line.
        train_size: Train on this many examples only, drawn evenly over the classes; for one seed the smaller draws are
            part of the larger.
        seed: Of the split held out and of the examples drawn.
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None
    train: str = "train"
    validation: str | float | None = None
    test: str | None = None
    problem_type: ProblemType | None = None
    delimiter: str | None = None
    max_length: int | None = None
    packing: bool = True
    block_size: int | None = None
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    train_size: int | None = None
    seed: int = 0
