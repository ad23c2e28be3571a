"""Texts tokenised twice, for a student and for a teacher whose tokenizer is another one."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_transfer.data.tokens import document_end
from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.vocabularies import aligned_positions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TEACHER_COLUMNS = ("teacher_input_ids", "aligned_student", "aligned_teacher")
TEACHER_MASK = "teacher_attention_mask"
_STUDENT_COLUMNS = ("input_ids", "attention_mask", "labels")
NO_POSITION = -1  # fills up the aligned columns


def add_teacher_tokens(
    rows: Dataset,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
) -> Dataset:
    """Tokenise the column ``text`` for both models and find where their predictions compare.

    A row of the result holds the student's ``input_ids``, ``attention_mask`` and ``labels`` (a document as the
    tokenizer marks it, or closed by its end-of-text token, cut to ``max_length``), and the teacher's columns:
    ``teacher_input_ids``, and the matching positions ``aligned_student`` and ``aligned_teacher`` (see
    `aligned_positions`), of which the student's always has a next token to predict. Each document is aligned before it
    is cut, and the teacher reads no further than the last position that is compared; a cut on either side hence loses
    pairs and misplaces none. Documents with nothing to predict are left out.

    Args:
        rows: The raw texts.
        student_tokenizer: A fast tokenizer.
        teacher_tokenizer: A fast tokenizer; its own ``model_max_length`` bounds what the teacher reads.
        max_length: Tokens a student's row is cut to.

    Raises:
        ConfigurationError: There is no column ``text``, a tokenizer is not fast, ``max_length`` is below 2 or more
            than the student takes, or no text is long enough to learn from.
    """
    from datasets import Features, List, Value

    if "text" not in rows.column_names:
        raise ConfigurationError(f"data: there is no column 'text'. {nearest('text', rows.column_names)}")
    for side, tokenizer in (("student", student_tokenizer), ("teacher", teacher_tokenizer)):
        if not tokenizer.is_fast:
            raise ConfigurationError(
                f"{side}_tokenizer: {type(tokenizer).__name__} cannot tell which characters a token stands for. "
                "Expected a fast tokenizer."
            )
    most = student_tokenizer.model_max_length
    if not 2 <= max_length <= most:
        raise ConfigurationError(f"max_length = {max_length}: expected 2 to {most}, the most the student takes.")
    done = rows.map(
        _twice,
        batched=True,
        features=Features({name: List(Value("int32")) for name in (*_STUDENT_COLUMNS, *TEACHER_COLUMNS)}),
        remove_columns=rows.column_names,
        fn_kwargs={"student": student_tokenizer, "teacher": teacher_tokenizer, "length": max_length},
        desc="Tokenising twice",
    )
    if not len(done):
        raise ConfigurationError("data: no text is long enough to learn from.")
    return done


@dataclass
class TeacherCollator:
    """Pads the teacher's columns beside a collator that makes the student's batch.

    ``teacher_input_ids`` are padded on the right with a ``teacher_attention_mask``, the aligned columns with -1. Where
    ``base`` pads on the left, the student's positions move along with its tokens. Rows without the teacher's columns
    (an evaluation set) are left to ``base``.

    Args:
        base: The student's collator; one row stays one row.
        teacher_pad_token_id: What fills up the teacher's rows; masked, hence any id of its vocabulary.

    Raises:
        ConfigurationError: ``base`` joins rows, which leaves no position where it was.
    """

    base: Callable[[list[dict[str, Any]]], MutableMapping[str, Any]]
    teacher_pad_token_id: int = 0

    def __call__(self, rows: list[dict[str, Any]]) -> MutableMapping[str, Any]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        batch = self.base([{name: row[name] for name in row if name not in TEACHER_COLUMNS} for row in rows])
        if TEACHER_COLUMNS[0] not in rows[0]:
            return batch
        if len(batch["input_ids"]) != len(rows):
            raise ConfigurationError(
                f"TeacherCollator: {type(self.base).__name__} made {len(batch['input_ids'])} rows of {len(rows)}. "
                "Expected a collator that pads, such as DataCollatorForTokenClassification."
            )
        ids, ours, theirs = (
            [torch.as_tensor(row[name], dtype=torch.long) for row in rows] for name in TEACHER_COLUMNS
        )
        if "attention_mask" in batch:
            first = batch["attention_mask"].argmax(dim=1)  # not 0 where padding is on the left
            ours = [positions + start for positions, start in zip(ours, first, strict=True)]
        batch[TEACHER_COLUMNS[0]] = pad_sequence(ids, batch_first=True, padding_value=self.teacher_pad_token_id)
        batch[TEACHER_MASK] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        for name, positions in zip(TEACHER_COLUMNS[1:], (ours, theirs), strict=True):
            batch[name] = pad_sequence(positions, batch_first=True, padding_value=NO_POSITION)
        return batch


def _twice(
    batch: dict[str, list[str]], *, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, length: int
) -> dict[str, list[list[int]]]:
    texts = [text for text in batch["text"] if text.strip()]
    columns: dict[str, list[list[int]]] = {name: [] for name in (*_STUDENT_COLUMNS, *TEACHER_COLUMNS)}
    if not texts:
        return columns
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True, "verbose": False}
    ours, theirs = student(texts, **options), teacher(texts, **options)
    end = document_end(student)
    for index, text in enumerate(texts):
        ids, teacher_ids = (ours["input_ids"][index] + end)[:length], theirs["input_ids"][index]
        if len(ids) < 2 or not teacher_ids:
            continue
        pairs = [
            (position, other)
            for position, other in aligned_positions(
                text,
                ours["offset_mapping"][index],
                theirs["offset_mapping"][index],
                student_special=ours["special_tokens_mask"][index],
                teacher_special=theirs["special_tokens_mask"][index],
            )
            if position < len(ids) - 1 and other < teacher.model_max_length
        ]
        read = pairs[-1][1] + 1 if pairs else 1
        values = (
            ids,
            [1] * len(ids),
            ids,
            teacher_ids[:read],
            [position for position, _ in pairs],
            [other for _, other in pairs],
        )
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns
