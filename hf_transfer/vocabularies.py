"""Whether two tokenizers speak of the same tokens, and where they agree on a text if they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hf_transfer.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SHOWN = 5


def shared_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> int:
    """How many leading token ids, special and added ones included, mean the same to both tokenizers.

    Models of one family pad the same vocabulary to different numbers of rows (Qwen2.5: 151,936 and 152,064), or add
    tokens at its end. Logits of both can then be compared id by id after slicing to this number.

    Returns:
        The length of the shorter vocabulary, of which every id was compared.

    Raises:
        ConfigurationError: An id means one token here and another, or none, there.
    """
    ours, theirs = _tokens(student), _tokens(teacher)
    shared = min(len(ours), len(theirs))
    differing = [number for number in range(shared) if ours[number] != theirs[number]]
    if differing:
        examples = "; ".join(
            f"id {number}: student {ours[number]!r}, teacher {theirs[number]!r}" for number in differing[:_SHOWN]
        )
        more = "; ..." if len(differing) > _SHOWN else ""
        raise ConfigurationError(
            f"The student's and the teacher's tokenizer differ in {len(differing):,} of the {shared:,} token ids that "
            f"both have ({examples}{more}), so their logits cannot be compared id by id. Expected the same tokens, up "
            "to more at the end of one. Did you mean CrossTokenizerDistillation?"
        )
    return shared


def aligned_positions(
    text: str,
    student_offsets: Sequence[tuple[int, int]],
    teacher_offsets: Sequence[tuple[int, int]],
    *,
    student_special: Sequence[int],
    teacher_special: Sequence[int],
) -> list[tuple[int, int]]:
    """Where two tokenizations of one text have read the same of it: pairs of positions whose predictions compare.

    Position ``t`` predicts token ``t + 1``. It has a match if it has read ``text[:c]``, whole characters, and some
    position of the other side has too; what then follows may be cut differently. Details:

    - Byte-level tokenizers give the bytes of one character the same offsets: between them nothing is aligned.
    - A blank may open the next token ("▁world"), be a token of its own, or be dropped ("hello", "world"); in each case
      the position before it has read up to the blank. Of positions that read equally far, the first one counts.
    - Where a tokenizer drops something that is not blank, such as an accent, what it has read is not told: no match.
    - What the tokenizer adds around the text reads nothing. A tokenizer that opens with no token has no position that
      predicts the text's first; the position of the text's last token has read all of it and predicts what follows.

    Cut the result, not the text, where rows are truncated: offsets do not say that a character's last bytes are gone.
    An unknown token counts as having read what it stands for.

    Args:
        text: What was tokenised.
        student_offsets: ``(start, end)`` in characters of each token (``offset_mapping`` of a fast tokenizer).
        teacher_offsets: The same of the teacher.
        student_special: For each token 1 if the tokenizer added it (``special_tokens_mask``), else 0.
        teacher_special: The same of the teacher.

    Returns:
        Pairs of (student, teacher) positions, both strictly increasing.

    Example:
        >>> # "hi you" as <s> hi ▁you and as h i ▁ you
        >>> aligned_positions(
        ...     "hi you", [(0, 0), (0, 2), (2, 6)], [(0, 1), (1, 2), (2, 3), (3, 6)],
        ...     student_special=[1, 0, 0], teacher_special=[0, 0, 0, 0],
        ... )
        [(1, 1), (2, 3)]
    """
    ours = _read_by(text, student_offsets, student_special)
    theirs = _read_by(text, teacher_offsets, teacher_special)
    return [(position, theirs[read]) for read, position in ours.items() if read in theirs]


def _tokens(tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    """Token by id; ``None`` where an id is not used."""
    vocabulary = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        tokens[number] = token
    return tokens


def _read_by(text: str, offsets: Sequence[tuple[int, int]], special: Sequence[int]) -> dict[int, int]:
    """Number of characters read -> the first position that has read them, in whole, and predicts what follows."""
    spans = [(token, *span) for token, span in enumerate(offsets) if not special[token]]
    if not spans:
        return {}
    positions: dict[int, int] = {}
    read = 0
    for token, start, end in [*spans, (spans[-1][0] + 1, len(text), len(text))]:
        if token > 0 and start >= read and not text[read:start].strip():
            positions.setdefault(read, token - 1)
        read = max(read, end)
    return positions


def token_count(model: PreTrainedModel) -> int | None:
    """How many tokens the model can read; ``None`` where it reads no tokens."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except (NotImplementedError, AttributeError):
        return None


def within_vocabulary(batch: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    """``batch`` for a model of ``count`` tokens: padding that it has no embedding for becomes token 0.

    Raises:
        ConfigurationError: A token that is no padding lies beyond.
    """
    ids = batch.get("input_ids")
    if count is None or ids is None or not (beyond := ids >= count).any():
        return dict(batch)
    mask = batch.get("attention_mask")
    real = beyond if mask is None else beyond & mask.bool()
    if real.any():
        raise ConfigurationError(
            f"teacher: the batch holds the token {int(ids[real][0])}, but the teacher has {count:,} tokens only. "
            "Expected texts of tokens that both know."
        )
    return {**batch, "input_ids": ids.masked_fill(beyond, 0)}
