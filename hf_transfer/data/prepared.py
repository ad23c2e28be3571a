"""Data ready to train on, with an account of what was lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_transfer.tasks import ProblemType

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class SplitSummary:
    """What encoding did to one split; of images and sounds there is no more to tell than how many.

    Args:
        examples: Rows of the raw data (documents, for language modelling).
        rows: Rows of the tokenised data (blocks, for a packed language model).
        kept: Tokens kept, the tokenizer's special ones included; tagged words, for token classification.
        lost: Tokens (or words) cut off.
        truncated: Rows that lost any.
        characters: Characters of the raw texts.
        seen_in_train: Examples that also occur in ``train``, word for word; 0 for ``train`` itself.
    """

    examples: int
    rows: int
    kept: int = 0
    lost: int = 0
    truncated: int = 0
    characters: int = 0
    seen_in_train: int = 0

    @property
    def characters_per_token(self) -> float:
        """What `bits_per_character` needs to compare language models across tokenizers."""
        return self.characters / (self.kept + self.lost)


@dataclass(frozen=True)
class PreparedData:
    """Encoded splits and all a model and a Trainer must know of them.

    Args:
        train: A ``Dataset`` of model inputs and ``labels``, nothing else; examples without a label come last, labelled
            -100. Of two domains, ``DomainPairs`` of such.
        validation: The same, or ``None`` where nothing was held out.
        test: The same, or ``None`` where there is no test split.
        label_names: In the order of their ids; empty for regression and language modelling.
        problem_type: Of classification, otherwise ``None``.
        collator: Pads a batch to its longest row.
        length: The number of tokens that rows were cut to or packed into; 0 for images and sounds.
        summaries: What happened to each split.
        notes: What the reader of a result should know of the data.
        pairs: Whether an example is two texts.
    """

    train: Any
    validation: Dataset | None
    test: Dataset | None
    label_names: list[str]
    problem_type: ProblemType | None
    collator: Callable[[list[dict[str, Any]]], Mapping[str, Any]]
    length: int
    summaries: dict[str, SplitSummary]
    notes: list[str]
    pairs: bool = False

    def report(self) -> list[str]:
        """One line for each split, then the notes: what a run prints before it trains."""
        lines = []
        for split, summary in self.summaries.items():
            rows = "" if summary.rows == summary.examples else f" in {summary.rows:,} rows"
            tokens = f", {summary.kept:,} tokens" if summary.kept else ""
            line = f"{split}: {summary.examples:,} examples{rows}{tokens}"
            if summary.lost:
                share = summary.lost / (summary.kept + summary.lost)
                line += f"; {summary.truncated:,} lost {summary.lost:,} more ({share:.1%}) at length {self.length}"
            lines.append(line)
            if summary.seen_in_train:
                lines.append(
                    f"warning: {summary.seen_in_train:,} of {summary.examples:,} {split} examples occur in train too, "
                    "which flatters the score"
                )
        return [*lines, *self.notes]
