"""Vocabularies that agree up to their ends; positions at which two tokenizers have read the same text."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer
from tokenizers.models import Unigram, WordLevel
from transformers import PreTrainedTokenizerFast

from hf_transfer.errors import ConfigurationError
from hf_transfer.vocabularies import aligned_positions, shared_vocabulary
from tests.tokenizers_of import byte_level, pairs_by_text, sentence_piece, word_piece

PIECES = [
    "the ",
    "cat",
    " ",
    "é",
    "e\u0301",
    "🎉",
    "👨\u200d👩\u200d👧",
    "日本",
    "\n",
    "th",
    ", ",
    "ñandú ",
    "Hello",
    "  ",
]


def word_level(words: list[str], **options) -> PreTrainedTokenizerFast:
    model = WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token=words[0], **options)


def random_texts(count: int, pieces: list[str]) -> list[str]:
    generator = random.Random(0)
    return ["".join(generator.choices(pieces, k=generator.randint(1, 12))) for _ in range(count)]


def align(student, teacher, text: str) -> list[tuple[int, int]]:
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    ours, theirs = student(text, **options), teacher(text, **options)
    return aligned_positions(
        text,
        ours["offset_mapping"],
        theirs["offset_mapping"],
        student_special=ours["special_tokens_mask"],
        teacher_special=theirs["special_tokens_mask"],
    )


class TestSharedVocabulary:
    def test_all_of_the_same(self):
        tokenizer = sentence_piece()
        assert shared_vocabulary(tokenizer, tokenizer) == len(tokenizer) == 349

    def test_tokens_added_at_one_end_are_not_shared(self):
        student, teacher = word_level(["?", "a", "b"]), word_level(["?", "a", "b"])
        teacher.add_tokens(["<call>"])
        teacher.add_special_tokens({"pad_token": "<pad>"})
        assert shared_vocabulary(student, teacher) == 3
        assert shared_vocabulary(teacher, student) == 3

    def test_other_tokens_at_both_ends_differ(self):
        student, teacher = word_level(["?", "a"]), word_level(["?", "a"])
        student.add_special_tokens({"pad_token": "<pad>"})
        teacher.add_tokens(["<call>"])
        with pytest.raises(ConfigurationError, match=r"1 of the 3 .*\(id 2: student '<pad>', teacher '<call>'\)"):
            shared_vocabulary(student, teacher)

    def test_an_id_that_one_leaves_unused_differs(self):
        model = WordLevel({"?": 0, "b": 2}, unk_token="?")
        student = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="?")
        with pytest.raises(ConfigurationError, match="id 1: student None, teacher 'a'"):
            shared_vocabulary(student, word_level(["?", "a", "b"]))

    def test_the_error_names_the_first_few_and_says_what_to_do(self):
        words = [f"w{index}" for index in range(9)]
        with pytest.raises(ConfigurationError) as error:
            shared_vocabulary(word_level(["?", *words]), word_level(["?", *reversed(words)]))
        message = str(error.value)
        assert "8 of the 10" in message
        assert "id 1: student 'w0', teacher 'w8'" in message
        assert message.count("student 'w") == 5
        assert "CrossTokenizerDistillation" in message


class TestAlignedPositions:
    @pytest.mark.parametrize(
        ("student", "teacher"),
        [
            (sentence_piece, byte_level),
            (byte_level, sentence_piece),
            (sentence_piece, lambda: byte_level(use_regex=False, size=520)),
            (lambda: byte_level(size=270), lambda: byte_level(use_regex=False, size=520)),
        ],
        ids=["sentencepiece-bytes", "bytes-sentencepiece", "sentencepiece-across words", "bytes-across words"],
    )
    def test_equal_to_the_texts_of_prefixes(self, student, teacher):
        student, teacher = student(), teacher()
        found = 0
        for text in random_texts(200, PIECES):
            pairs = align(student, teacher, text)
            assert pairs == pairs_by_text(student, teacher, text), text
            found += len(pairs)
        assert found > 200

    def test_offsets_of_a_whole_run_of_bytes_lose_pairs_and_misplace_none(self):
        student, teacher = sentence_piece(model=Unigram), byte_level()
        lost = 0
        for text in random_texts(200, PIECES):
            pairs, expected = align(student, teacher, text), pairs_by_text(student, teacher, text)
            assert set(pairs) <= set(expected), text
            lost += len(expected) - len(pairs)
        assert lost

    def test_inside_a_character_nothing_is_aligned(self):
        student, teacher = byte_level(size=257), sentence_piece()
        text = "a🎉b"
        assert student.convert_ids_to_tokens(student(text)["input_ids"]) == ["a", "ð", "Ł", "İ", "ī", "b"]
        assert len(teacher(text)["input_ids"]) >= 7
        read = [position for position, _ in align(student, teacher, text)]
        assert read == [0, 4, 5]  # after a, after the whole emoji, at the end

    def test_a_token_that_ends_inside_a_character_is_passed_over(self):
        """'x' and half of a character; the other half; 'y'."""
        student, teacher = [(0, 2), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 3)]
        none = [0, 0, 0]
        assert aligned_positions("xéy", student, teacher, student_special=none, teacher_special=none) == [
            (1, 1),
            (2, 2),
        ]

    @pytest.mark.parametrize(
        ("offsets", "expected"),
        [
            ([(0, 2), (2, 6)], [(0, 0), (1, 1)]),  # "▁you"
            ([(0, 2), (2, 3), (3, 6)], [(0, 0), (2, 1)]),  # "▁", "you"
            ([(0, 2), (3, 6)], [(0, 0), (1, 1)]),  # blanks dropped, or offsets trimmed
            ([(0, 2), (3, 3), (3, 6)], [(0, 0), (2, 1)]),  # a blank of trimmed offsets
        ],
    )
    def test_conventions_for_a_blank(self, offsets, expected):
        found = aligned_positions(
            "hi you", offsets, [(0, 2), (2, 6)], student_special=[0] * len(offsets), teacher_special=[0, 0]
        )
        assert found == expected

    def test_a_tokenizer_that_drops_blanks(self):
        student, teacher = word_piece(), byte_level()
        text = " the cat"
        assert student.convert_ids_to_tokens(student(text)["input_ids"]) == ["[CLS]", "the", "cat", "[SEP]"]
        assert teacher.convert_ids_to_tokens(teacher(text)["input_ids"]) == ["Ġthe", "Ġcat"]
        assert align(student, teacher, text) == [(1, 0), (2, 1)]

    def test_a_dropped_accent_is_not_told_apart(self):
        """BERT reads "e" and its accent as "e": it has read as far as neither the position before nor after it."""
        student, teacher = word_piece(), byte_level(size=257)
        text = "e\u0301t"
        assert student.convert_ids_to_tokens(student(text)["input_ids"])[1] == "e"
        assert teacher.convert_ids_to_tokens(teacher(text)["input_ids"]) == ["e", "Ì", "ģ", "t"]
        assert align(student, teacher, text) == [(2, 3)]
        assert align(student, teacher, "e\u0301") == []

    def test_added_tokens_read_nothing(self):
        text = "ab"
        found = aligned_positions(
            text,
            [(0, 0), (0, 0), (0, 2), (0, 0)],
            [(0, 0), (0, 1), (1, 2)],
            student_special=[1, 1, 0, 1],
            teacher_special=[1, 0, 0],
        )
        assert found == [(1, 0), (2, 2)]  # the second opening token predicts the text; its last token, what follows

    def test_a_special_token_written_in_the_text_is_text(self):
        student, teacher = byte_level(), sentence_piece()
        pairs = align(student, teacher, "cat<|end|>cat")
        tokens = student.convert_ids_to_tokens(student("cat<|end|>cat")["input_ids"])
        end = tokens.index("<|end|>")
        assert end in [position for position, _ in pairs]
        assert end - 1 in [position for position, _ in pairs]

    def test_no_text_no_pairs(self):
        none: list[tuple[int, int]] = []
        assert aligned_positions("", [(0, 0)], none, student_special=[1], teacher_special=[]) == []
