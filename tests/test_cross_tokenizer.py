"""Distillation across tokenizers: the distance, the spans, the rows, the objective, and two real models."""

from __future__ import annotations

import gzip
import json
import re
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForTokenClassification

from hf_transfer.data.teacher_tokens import TeacherCollator, add_teacher_tokens
from hf_transfer.errors import ConfigurationError
from hf_transfer.objectives import CrossTokenizerDistillation, cross_tokenizer
from hf_transfer.objectives.cross_tokenizer import span_log_probabilities, universal_logit_distance
from hf_transfer.training.trainer import TransferTrainer
from hf_transfer.vocabularies import shared_vocabulary
from tests.test_vocabularies import PIECES, random_texts
from tests.tiny import arguments, collate, teacher_rows, tiny_bert, tiny_llama
from tests.tokenizers_of import byte_level, pairs_by_text, sentence_piece

SHARED = Path(__file__).parents[2] / "shared" / "data"
datasets.disable_progress_bars()


def naive_distance(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Of one position, in float64: sorted lists, zeros at the end of the shorter one."""
    p, q = (sorted((row.double() / temperature).softmax(0).tolist(), reverse=True) for row in (student, teacher))
    size = max(len(p), len(q))
    p, q = p + [0.0] * (size - len(p)), q + [0.0] * (size - len(q))
    return sum(abs(one - other) for one, other in zip(p, q, strict=True))


def random_logits(rows: int, vocabulary: int, seed: int, **options) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), **options)


class TestUniversalLogitDistance:
    @pytest.mark.parametrize(("ours", "theirs"), [(7, 7), (5, 9), (9, 5)])
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    def test_equals_the_naive_sum(self, ours, theirs, temperature):
        student, teacher = random_logits(6, ours, 0), random_logits(6, theirs, 1)
        expected = [naive_distance(*rows, temperature) for rows in zip(student, teacher, strict=True)]
        found = universal_logit_distance(student, teacher, temperature=temperature)
        torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)

    def test_a_permutation_is_no_distance(self):
        logits = random_logits(3, 8, 0)
        assert universal_logit_distance(logits, logits[:, torch.randperm(8)]).abs().max() < 1e-6

    def test_closed_forms(self):
        certain, uniform = torch.tensor([[0.0, 1e4, 0.0, 0.0]]), torch.zeros(1, 10)
        assert universal_logit_distance(certain, uniform).item() == pytest.approx(2 * (1 - 1 / 10))
        assert universal_logit_distance(uniform, certain).item() == pytest.approx(2 * (1 - 1 / 10))
        assert universal_logit_distance(torch.zeros(1, 4), uniform).item() == pytest.approx(2 * (1 - 4 / 10))

    @pytest.mark.parametrize(("ours", "theirs"), [(6, 6), (4, 7), (7, 4)])
    def test_gradient(self, ours, theirs):
        student = random_logits(3, ours, 0, dtype=torch.float64).requires_grad_()
        teacher = random_logits(3, theirs, 1, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: universal_logit_distance(x, teacher, temperature=1.7), student)

    def test_some_rows_at_a_time_give_the_same(self, monkeypatch):
        student, teacher = random_logits(7, 5, 0).requires_grad_(), random_logits(7, 6, 1)
        whole = universal_logit_distance(student, teacher)
        (gradient,) = torch.autograd.grad(whole.square().sum(), student)
        monkeypatch.setattr(cross_tokenizer, "_SORTED_AT_ONCE", 12)
        pieces = universal_logit_distance(student, teacher)
        assert torch.equal(whole, pieces)
        assert torch.equal(gradient, torch.autograd.grad(pieces.square().sum(), student)[0])

    def test_half_precision_is_sorted_in_single(self):
        student, teacher = random_logits(4, 300, 0).bfloat16().requires_grad_(), random_logits(4, 300, 1).bfloat16()
        distance = universal_logit_distance(student, teacher)
        assert torch.equal(distance, universal_logit_distance(student.float(), teacher.float()))
        assert torch.autograd.grad(distance.sum(), student)[0].dtype == torch.bfloat16

    def test_no_rows(self):
        student = torch.zeros(0, 4, requires_grad=True)
        universal_logit_distance(student, torch.zeros(0, 6)).sum().backward()
        assert student.grad.shape == (0, 4)


def test_span_log_probabilities():
    """Against the product of each token's conditional probability."""
    logits = random_logits(2 * 6, 5, 0).view(2, 6, 5)
    ids = torch.randint(5, (2, 6), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[0, 2, 3, 5], [1, 4, -1, -1]])
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for row, bounds in enumerate(([0, 2, 3, 5], [1, 4])):
        for span, (start, end) in enumerate(pairwise(bounds)):
            for token in range(start + 1, end + 1):
                expected[row, span] += logits[row, token - 1].double().log_softmax(0)[ids[row, token]]
    found = span_log_probabilities(logits, ids, positions)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


class TestRows:
    def test_pairs_are_those_of_the_whole_text_that_fit(self):
        student, teacher = sentence_piece(), byte_level()
        texts = [text for text in random_texts(40, PIECES) if text.strip()]
        for length in (4, 9, 512):
            rows = add_teacher_tokens(Dataset.from_dict({"text": texts}), student, teacher, max_length=length)
            assert len(rows) == len(texts)
            for text, row in zip(texts, rows, strict=True):
                size = min(length, len(student(text)["input_ids"]))
                pairs = [pair for pair in pairs_by_text(student, teacher, text) if pair[0] < size - 1]
                assert list(zip(row["aligned_student"], row["aligned_teacher"], strict=True)) == pairs
                assert row["input_ids"] == row["labels"] == student(text)["input_ids"][:size]
                read = pairs[-1][1] + 1 if pairs else 1
                assert row["teacher_input_ids"] == teacher(text)["input_ids"][:read]

    def test_the_teacher_reads_no_more_than_it_can(self):
        student, teacher = byte_level(), sentence_piece(max_length=5)
        text = "the cat sat on the mat"
        (row,) = add_teacher_tokens(Dataset.from_dict({"text": [text]}), student, teacher, max_length=64)
        expected = [pair for pair in pairs_by_text(student, teacher, text) if pair[1] < 5]
        assert expected
        assert list(zip(row["aligned_student"], row["aligned_teacher"], strict=True)) == expected
        assert len(row["teacher_input_ids"]) <= 5

    def test_the_end_of_a_document_is_taught(self):
        """GPT-2's tokenizer marks no document: <|end|> closes it, and the position before it has a match."""
        student, teacher = byte_level(), sentence_piece()
        (row,) = add_teacher_tokens(Dataset.from_dict({"text": ["the cat"]}), student, teacher, max_length=64)
        assert row["input_ids"][-1] == student.eos_token_id
        assert row["aligned_student"][-1] == len(row["input_ids"]) - 2
        assert row["aligned_teacher"][-1] == len(teacher("the cat")["input_ids"]) - 1

    def test_blank_texts_and_other_columns_are_left_out(self):
        rows = Dataset.from_dict({"text": [" ", "the cat", ""], "topic": [1, 2, 3]})
        done = add_teacher_tokens(rows, sentence_piece(), byte_level(), max_length=8)
        assert len(done) == 1
        assert "topic" not in done.column_names

    @pytest.mark.parametrize(
        ("rows", "length", "message"),
        [
            ({"txt": ["a"]}, 8, "no column 'text'. Did you mean 'txt'?"),
            ({"text": ["a"]}, 1, "max_length = 1: expected 2 to 512"),
            ({"text": ["a"]}, 513, "max_length = 513: expected 2 to 512"),
            ({"text": [" "]}, 8, "no text is long enough"),
        ],
    )
    def test_errors(self, rows, length, message):
        with pytest.raises(ConfigurationError) as error:
            add_teacher_tokens(Dataset.from_dict(rows), sentence_piece(), byte_level(), max_length=length)
        assert message in str(error.value)

    def test_a_slow_tokenizer_is_refused(self):
        slow = SimpleNamespace(is_fast=False)
        with pytest.raises(ConfigurationError, match="teacher_tokenizer: SimpleNamespace cannot tell"):
            add_teacher_tokens(Dataset.from_dict({"text": ["a"]}), byte_level(), slow, max_length=8)


def two_rows(padding_side: str = "right", **options) -> tuple[list[dict], TeacherCollator]:
    student = sentence_piece(padding_side=padding_side)
    texts = ["the cat sat on the mat 🎉", "hello"]
    rows = add_teacher_tokens(Dataset.from_dict({"text": texts}), student, byte_level(), max_length=64)
    return rows.to_list(), TeacherCollator(DataCollatorForTokenClassification(student), **options)


class TestCollator:
    def test_pads_the_teacher_beside_the_student(self):
        rows, collator = two_rows(teacher_pad_token_id=7)
        batch = collator(rows)
        for index, row in enumerate(rows):
            ids, mask = batch["teacher_input_ids"][index], batch["teacher_attention_mask"][index]
            assert ids[mask == 1].tolist() == row["teacher_input_ids"]
            assert set(ids[mask == 0].tolist()) <= {7}
            for name in ("aligned_student", "aligned_teacher"):
                positions = batch[name][index]
                assert positions[positions >= 0].tolist() == row[name]
        assert batch["teacher_attention_mask"].min() == 0

    def test_positions_move_with_tokens_that_are_padded_on_the_left(self):
        rows, collator = two_rows("left")
        batch = collator(rows)
        for index, row in enumerate(rows):
            positions = batch["aligned_student"][index]
            found = batch["input_ids"][index, positions[positions >= 0]].tolist()
            assert found == [row["input_ids"][position] for position in row["aligned_student"]]

    def test_rows_without_a_teacher_are_left_alone(self):
        _, collator = two_rows()
        assert set(collator([{"input_ids": [1, 2], "labels": [1, 2]}])) == {"input_ids", "attention_mask", "labels"}

    def test_a_collator_that_joins_rows_is_refused(self):
        rows, _ = two_rows()
        join = TeacherCollator(lambda rows: {"input_ids": torch.zeros(1, 9)})
        with pytest.raises(ConfigurationError, match="function made 1 rows of 2. Expected a collator that pads"):
            join(rows)


def tiny_teacher(**options):
    return tiny_llama(seed=5, layers=1, vocab_size=90, **options)


def naive_term(student, teacher, rows, *, span_weight: float = 0.0, temperature: float = 1.0) -> float:
    """Row by row, without padding, position by position."""
    total = 0.0
    for row in rows:
        ours, theirs = (
            model(input_ids=torch.tensor([ids])).logits[0].detach().double()
            for model, ids in ((student, row["input_ids"]), (teacher, row["teacher_input_ids"]))
        )
        labels, pairs = row["labels"], list(zip(row["aligned_student"], row["aligned_teacher"], strict=True))
        distances = [naive_distance(ours[i], theirs[j], temperature) for i, j in pairs if labels[i + 1] != -100]
        total += sum(distances) / max(1, len(distances))
        divergences = []
        for (i, j), (i_end, j_end) in pairwise(pairs):
            if -100 not in labels[i + 1 : i_end + 1]:
                p = q = torch.ones((), dtype=torch.float64)
                for token in range(i + 1, i_end + 1):
                    p = p * ours[token - 1].softmax(0)[row["input_ids"][token]]
                for token in range(j + 1, j_end + 1):
                    q = q * theirs[token - 1].softmax(0)[row["teacher_input_ids"][token]]
                divergences.append((q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).item())
        total += span_weight * sum(divergences) / max(1, len(divergences))
    return total / len(rows)


class TestObjective:
    @pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"span_weight": 0.7}], ids=str)
    def test_equals_the_naive_term(self, options):
        """The rows have masked labels (a prompt), and some have no aligned position."""
        rows, student, teacher = teacher_rows(8).to_list(), tiny_llama(), tiny_teacher()
        assert any(not row["aligned_student"] for row in rows)
        objective = CrossTokenizerDistillation(teacher, **options)
        batch = TeacherCollator(collate)(rows)
        outputs = student(batch["input_ids"], batch["attention_mask"])
        found = objective(student, batch, outputs, 0.0)
        assert found.item() == pytest.approx(naive_term(student, teacher, rows, **options), rel=1e-5)
        found.backward()
        assert all(parameter.grad is not None for parameter in student.parameters())

    def test_is_the_same_however_the_student_is_padded(self):
        terms = []
        for side in ("right", "left"):
            rows, collator = two_rows(side)
            batch = collator(rows)
            student, teacher = tiny_llama(vocab_size=349), tiny_llama(seed=5, vocab_size=380)
            outputs = student(batch["input_ids"], batch["attention_mask"])
            objective = CrossTokenizerDistillation(teacher, span_weight=1.0)
            terms.append(objective(student, batch, outputs, 0.0).item())
        assert terms[0] == pytest.approx(terms[1], rel=1e-4)

    def test_a_learnt_prompt_before_the_tokens_shifts_nothing(self):
        batch = TeacherCollator(collate)(teacher_rows(4).to_list())
        student, objective = tiny_llama(), CrossTokenizerDistillation(tiny_teacher(), span_weight=1.0)
        logits = student(batch["input_ids"], batch["attention_mask"]).logits
        prompted = torch.cat([torch.randn(4, 3, logits.shape[2]), logits], dim=1)
        plain, shifted = (objective(student, batch, SimpleNamespace(logits=each), 0.0) for each in (logits, prompted))
        assert torch.equal(plain, shifted)

    def test_rows_without_a_pair_count_as_nothing(self):
        rows = [row | {"aligned_student": [], "aligned_teacher": []} for row in teacher_rows(3).to_list()]
        batch = TeacherCollator(collate)(rows)
        student, objective = tiny_llama(), CrossTokenizerDistillation(tiny_teacher(), span_weight=1.0)
        term = objective(student, batch, student(batch["input_ids"], batch["attention_mask"]), 0.0)
        assert term.item() == 0.0

    def test_the_teacher_is_frozen_and_no_part_of_the_objective(self):
        teacher = tiny_teacher().train()
        objective = CrossTokenizerDistillation(teacher).train().to(torch.float64)
        assert objective.teacher is teacher
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        assert teacher.dtype == torch.float32
        assert not list(objective.parameters())
        assert not objective.state_dict()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"teacher": tiny_bert()}, "expected a causal language model as teacher, found BertForSequence"),
            ({"temperature": 0.0}, "'temperature' must be positive, found 0.0"),
            ({"span_weight": -1.0}, "'span_weight' must be 0 or more, found -1.0"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(ConfigurationError, match=message):
            CrossTokenizerDistillation(**({"teacher": tiny_teacher()} | options))

    def test_a_batch_without_the_teachers_columns_is_refused(self):
        objective = CrossTokenizerDistillation(tiny_teacher())
        with pytest.raises(ConfigurationError, match="no 'teacher_input_ids'. Make the rows with add_teacher_tokens"):
            objective(tiny_llama(), {"labels": torch.zeros(1, 2)}, SimpleNamespace(logits=torch.zeros(1, 2, 3)), 0.0)

    def test_a_student_that_is_no_language_model_is_refused(self):
        batch = TeacherCollator(collate)(teacher_rows(2).to_list())
        objective = CrossTokenizerDistillation(tiny_teacher())
        with pytest.raises(ConfigurationError, match=r"found \(2, 3\). Load it with AutoModelForCausalLM"):
            objective(tiny_bert(), batch, SimpleNamespace(logits=torch.zeros(2, 3)), 0.0)


needs_models = pytest.mark.skipif(not SHARED.is_dir(), reason="the real models are not there: ../shared/data/models")
STUDENT, TEACHER = "babyllama-byte361-1M", "stories260K"  # characters and bytes, taught by a BPE of 512 tokens


@pytest.fixture(scope="module")
def real_tokenizers():
    return [AutoTokenizer.from_pretrained(SHARED / "models" / name) for name in (STUDENT, TEACHER)]


def stories(count: int, characters: int) -> list[str]:
    with gzip.open(SHARED / "corpora" / "tinystories_5k.jsonl.gz", "rt") as lines:
        return [json.loads(line)["text"][:characters] for line in islice(lines, count)]


@needs_models
def test_real_tokenizers_are_aligned_as_the_texts_of_prefixes_are(real_tokenizers):
    texts = stories(10, 400) + random_texts(60, PIECES)
    texts = [re.sub(" +", " ", text) for text in texts if text.strip()]  # both read several blanks as one
    rows = add_teacher_tokens(Dataset.from_dict({"text": texts}), *real_tokenizers, max_length=256)
    found = 0
    for text, row in zip(texts, rows, strict=True):
        pairs = [pair for pair in pairs_by_text(*real_tokenizers, text) if pair[0] < len(row["input_ids"]) - 1]
        assert list(zip(row["aligned_student"], row["aligned_teacher"], strict=True)) == pairs, text
        found += len(pairs)
    assert found > 1000


@needs_models
def test_real_tokenizers_are_told_apart(real_tokenizers):
    with pytest.raises(ConfigurationError, match=r"102 of the 361 .*id 259: student '▁', teacher '▁t'"):
        shared_vocabulary(*real_tokenizers)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, real_tokenizers):
    """Distance and loss per token on held-out text, before and after 16 steps under several objectives."""
    rows = add_teacher_tokens(Dataset.from_dict({"text": stories(48, 60)}), *real_tokenizers, max_length=64)
    collator = TeacherCollator(DataCollatorForTokenClassification(real_tokenizers[0]))
    held_out = collator(rows.select(range(32, 48)).to_list())
    teacher = AutoModelForCausalLM.from_pretrained(SHARED / "models" / TEACHER, dtype=torch.float32)
    distance = CrossTokenizerDistillation(teacher)

    def measured(student) -> tuple[float, float]:
        with torch.no_grad():
            outputs = student.eval()(held_out["input_ids"], held_out["attention_mask"], labels=held_out["labels"])
            return distance(student, held_out, outputs, 1.0).item(), outputs.loss.item()

    results = {}
    for name, task_weight, options in (("both", 1.0, {}), ("pure", 0.0, {}), ("spans", 0.0, {"span_weight": 1.0})):
        student = AutoModelForCausalLM.from_pretrained(SHARED / "models" / STUDENT, dtype=torch.float32)
        results["before"] = measured(student)
        trainer = TransferTrainer(
            student,
            arguments(tmp_path_factory.mktemp(name), num_train_epochs=4, learning_rate=1e-4),
            objectives=[CrossTokenizerDistillation(teacher, **options)],
            task_weight=task_weight,
            train_dataset=rows.select(range(32)),
            data_collator=collator,
        )
        trainer.train()
        results[name] = measured(student)
    return results


@needs_models
def test_a_few_steps_lower_the_distance_on_other_text(taught):
    assert taught["both"][0] < 0.95 * taught["before"][0]
    assert taught["pure"][0] < taught["before"][0]


@needs_models
def test_only_with_spans_does_the_teacher_alone_say_which_token(taught):
    """Sorted probabilities are indifferent to which token they are of: with no task loss the student forgets more."""
    before, pure, spans = (taught[name][1] for name in ("before", "pure", "spans"))
    assert pure - before > 2 * (spans - before)
