"""The fused loss against logits, divergence and cross-entropy in float64, gradients included."""

import math
from collections import Counter

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hf_transfer.errors import ConfigurationError
from hf_transfer.functional import divergence, sampled_divergence, temperature_factor, top_k_divergence
from hf_transfer.linear_loss import LinearLoss, TeacherHead, linear_distillation_loss
from hf_transfer.targets import Samples, TopK

ROWS, WIDTH, TEACHER_WIDTH, TOKENS = 23, 6, 9, 41
KINDS = ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "logit_mse"]


class Case:
    """A student's head and labels, some of them masked, and a teacher in every form it can come in."""

    def __init__(self, *, dtype=torch.float64, teacher_tokens=TOKENS, scale=1.0, temperature=2.0, rows=ROWS):
        self.generator = torch.Generator().manual_seed(0)
        self.hidden, self.weight, self.bias = (
            scale * self.normal(*shape).to(dtype) for shape in ((rows, WIDTH), (TOKENS, WIDTH), (TOKENS,))
        )
        self.labels = torch.randint(0, TOKENS, (rows,), generator=self.generator)
        self.labels[::4] = -100
        shapes = (rows, TEACHER_WIDTH), (teacher_tokens, TEACHER_WIDTH), (teacher_tokens,)
        self.head = TeacherHead(*(self.normal(*shape).to(dtype) for shape in shapes))
        self.temperature = temperature

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    @property
    def log_probabilities(self):
        logits = functional.linear(*self.head).double()[:, :TOKENS]
        return (logits / self.temperature).log_softmax(-1)

    def top_k(self, k):
        values, ids = self.log_probabilities.topk(k)
        tail = self.log_probabilities.scatter(-1, ids, -math.inf).logsumexp(-1)
        return TopK(ids, values, tail)

    def samples(self, draws):
        p = self.log_probabilities.exp()
        ids = torch.multinomial(p, draws, replacement=True, generator=self.generator)
        weights = torch.rand(ids.shape, generator=self.generator, dtype=torch.float64)
        return Samples(ids, weights, torch.special.entr(p).sum(-1))

    def parts(self, dtype=None):
        return [part.detach().clone().to(dtype or part.dtype).requires_grad_() for part in self.student]

    @property
    def student(self):
        return self.hidden, self.weight, self.bias

    def divergences(self, logits, teacher, **options):
        if isinstance(teacher, TopK):
            return top_k_divergence(logits, *teacher, temperature=self.temperature)
        if isinstance(teacher, Samples):
            return sampled_divergence(logits, *teacher, temperature=self.temperature)
        teacher_logits = functional.linear(*(part.double() for part in teacher))
        shared = min(TOKENS, teacher_logits.shape[-1])
        return divergence(logits[:, :shared], teacher_logits[:, :shared], temperature=self.temperature, **options)

    def reference(self, teacher, parts, *, task_weight=1.0, teacher_weight=1.0, normalizer=None, **options):
        """With all logits, in float64."""
        kept = self.labels != -100
        hidden, weight, bias = parts
        logits = functional.linear(hidden.double(), weight.double(), bias.double())
        normalizer = normalizer or kept.sum()
        cross_entropy = functional.cross_entropy(logits, self.labels, reduction="sum") / normalizer
        soft = torch.zeros(())
        if teacher is not None:
            factor = temperature_factor(options.get("kind", "forward_kl"), self.temperature)
            soft = factor * self.divergences(logits, teacher, **options)[kept].sum() / normalizer
        return LinearLoss(task_weight * cross_entropy + teacher_weight * soft, cross_entropy, soft)

    def check(self, teacher, *, chunk_size=5, rtol=1e-9, atol=1e-12, **options):
        """Values and gradients of the fused loss are the reference's; returns the gradients."""
        parts, exact = self.parts(), self.parts(torch.float64)
        found = linear_distillation_loss(
            parts[0],
            parts[1],
            self.labels,
            teacher,
            bias=parts[2],
            temperature=self.temperature,
            chunk_size=chunk_size,
            **options,
        )
        expected = self.reference(teacher, exact, **options)
        for value, reference in zip(found, expected, strict=True):
            torch.testing.assert_close(value.double(), reference.double(), rtol=rtol, atol=atol)
        found.loss.backward()
        expected.loss.backward()
        for part, reference in zip(parts, exact, strict=True):
            assert part.grad.dtype == part.dtype
            size = reference.grad.abs().max().clamp(min=1e-30)
            torch.testing.assert_close(
                part.grad.double() / size, reference.grad / size, rtol=rtol, atol=max(atol, rtol)
            )
        assert not parts[0].grad[self.labels == -100].any()
        return [part.grad for part in parts]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence_from_a_head(kind, temperature):
    case = Case(temperature=temperature)
    case.check(case.head, kind=kind, beta=0.3, task_weight=0.4, teacher_weight=0.7)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("teacher_tokens", [TOKENS - 7, TOKENS + 7])
def test_vocabularies_of_different_length_are_compared_on_what_they_share(teacher_tokens, kind):
    case = Case(teacher_tokens=teacher_tokens)
    case.check(case.head, kind=kind)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("k", [1, 8, TOKENS])
def test_a_stored_top_k(k, temperature):
    case = Case(temperature=temperature)
    case.check(case.top_k(k), task_weight=0.4, teacher_weight=0.7)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_stored_samples(temperature):
    case = Case(temperature=temperature)
    case.check(case.samples(7), task_weight=0.4, teacher_weight=0.7)


@pytest.mark.parametrize("form", ["head", "top_k", "samples"])
def test_a_task_that_weighs_nothing_and_a_teacher_that_weighs_nothing(form):
    case = Case()
    teacher = {"head": case.head, "top_k": case.top_k(8), "samples": case.samples(7)}[form]
    case.check(teacher, task_weight=0.0, teacher_weight=2.0)
    case.check(teacher, task_weight=2.0, teacher_weight=0.0)
    assert not any(gradient.any() for gradient in case.check(teacher, task_weight=0.0, teacher_weight=0.0))


def test_cross_entropy_alone():
    case = Case()
    case.check(None, task_weight=0.3)


@pytest.mark.parametrize("chunk_size", [1, 4, 17, 1000])
def test_the_size_of_a_chunk_changes_nothing(chunk_size, monkeypatch):
    monkeypatch.setattr("hf_transfer.linear_loss._CACHED", 3 * TOKENS)  # blocks of 3 rows, the last one short
    case = Case()
    case.check(case.head, chunk_size=chunk_size)
    case.check(case.top_k(8), chunk_size=chunk_size)
    case.check(case.head, chunk_size=chunk_size, kind="jensen_shannon")


@pytest.mark.parametrize("normalizer", [7.0, torch.tensor(7)])
def test_the_normalizer_is_the_callers(normalizer):
    case = Case()
    case.check(case.head, normalizer=normalizer)


def test_labels_that_are_all_masked_cost_nothing():
    case = Case()
    case.labels[:] = -100
    hidden, weight, _ = case.parts()
    found = linear_distillation_loss(hidden, weight, case.labels, case.head)
    found.loss.backward()
    assert [float(value) for value in found] == [0, 0, 0]
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_masked_rows_are_not_read():
    case = Case(dtype=torch.float32)
    case.hidden[case.labels == -100] = math.nan
    case.head.hidden[case.labels == -100] = math.nan
    hidden, weight, bias = case.parts()
    found = linear_distillation_loss(hidden, weight, case.labels, case.head, bias=bias)
    found.loss.backward()
    assert found.loss.isfinite()
    assert weight.grad.isfinite().all()
    assert not hidden.grad[case.labels == -100].any()


@pytest.mark.parametrize("scale", [1.0, 12.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_float32_and_logits_hundreds_apart(temperature, scale):
    case = Case(dtype=torch.float32, scale=scale, temperature=temperature)
    case.check(case.head, rtol=2e-5, atol=2e-5)
    case.check(case.top_k(8), rtol=2e-5, atol=2e-5)
    case.check(None, rtol=2e-5, atol=2e-5)


def test_a_student_whose_tail_is_tiny_where_the_teachers_is_not():
    case = Case(dtype=torch.float32)
    case.bias[case.top_k(8).ids[1]] += 50  # at T = 2 some e^-25 is left to the tail of row 1
    case.check(case.top_k(8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("form", ["head", "top_k", "none", "jensen_shannon"])
def test_bfloat16_is_close_and_gradients_have_their_weights_type(form, autocast):
    case = Case(dtype=torch.float32 if autocast else torch.bfloat16, rows=200)
    teacher = {"top_k": case.top_k(8), "none": None}.get(form, case.head)
    kind = "jensen_shannon" if form == "jensen_shannon" else "forward_kl"
    parts, exact = case.parts(), case.parts(torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        hidden, weight, bias = parts
        found = linear_distillation_loss(hidden, weight, case.labels, teacher, bias=bias, kind=kind, chunk_size=16)
    expected = case.reference(teacher, exact, kind=kind)
    found.loss.backward()
    expected.loss.backward()
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss.double(), expected.loss, rtol=0.01, atol=0)
    for part, reference in zip(parts, exact, strict=True):
        assert part.grad.dtype == part.dtype
        assert (part.grad - reference.grad).norm() < 0.02 * reference.grad.norm()


def test_a_tied_weight_gets_both_its_gradients():
    case = Case()
    tokens = torch.randint(0, TOKENS, (ROWS,), generator=case.generator)
    gradients = []
    for fused in (True, False):
        _, weight, bias = case.parts()
        hidden = functional.embedding(tokens, weight).tanh()
        if fused:
            loss = linear_distillation_loss(hidden, weight, case.labels, case.head, bias=bias, chunk_size=5).loss
        else:
            loss = case.reference(case.head, (hidden, weight, bias)).loss
        gradients.append(torch.autograd.grad(3 * loss, (weight, bias)))
    torch.testing.assert_close(*gradients)


class Operations(TorchDispatchMode):
    """Counts the operations below autograd, and remembers the largest tensor one returned."""

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__] += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result

    @property
    def products(self):
        return self.names["addmm_"] + self.names["addmm"] + self.names["mm"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_all_tokens_and_the_vocabulary(kind):
    case = Case(rows=400)
    hidden, weight, bias = case.parts()
    with Operations() as operations:
        linear_distillation_loss(
            hidden, weight, case.labels, case.head, bias=bias, kind=kind, chunk_size=20
        ).loss.backward()
    assert operations.largest == max(20 * TOKENS, 400 * WIDTH)


def test_what_needs_no_gradient_costs_nothing():
    case = Case(rows=20)
    hidden, weight, bias = case.parts()
    chunks, forward = 3, 2  # of 15 labels; the student's logits and the teacher's

    def products(*parts):
        with Operations() as operations:
            loss = linear_distillation_loss(*parts[:2], case.labels, case.head, bias=parts[2], chunk_size=5).loss
        return loss, operations.products / chunks

    with torch.no_grad():
        loss, count = products(hidden, weight, bias)
    assert not loss.requires_grad
    assert count == forward
    assert products(hidden.detach(), weight.detach(), bias.detach())[1] == forward
    assert products(hidden, weight.detach(), bias.detach())[1] == forward + 1
    assert products(hidden, weight, bias)[1] == forward + 3
    loss, _ = products(hidden, weight.detach(), None)
    loss.backward()
    assert weight.grad is None
    assert hidden.grad is not None


def test_the_gradient_is_handed_over_once():
    case = Case()
    hidden, weight, _ = case.parts()
    loss = linear_distillation_loss(hidden, weight, case.labels, case.head).loss
    function = loss.grad_fn
    pointer = function.gradients[1].data_ptr()
    loss.backward(retain_graph=True)
    assert weight.grad.data_ptr() == pointer
    with pytest.raises(RuntimeError, match="handed over|hands its gradients over"):
        loss.backward()
    again = linear_distillation_loss(hidden, weight, case.labels, case.head).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(again, hidden, create_graph=True)


def test_only_the_loss_is_differentiable():
    case = Case()
    hidden, weight, _ = case.parts()
    found = linear_distillation_loss(hidden, weight, case.labels, case.head)
    assert found.loss.requires_grad
    assert not found.cross_entropy.requires_grad
    assert not found.divergence.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, r"'hidden' has the shape \(23, 6\): expected \(3, 6\)"),
        ({"bias": torch.zeros(3)}, r"'bias' has the shape \(3,\): expected \(41,\)"),
        ({"labels": torch.full((ROWS,), TOKENS)}, "'labels' holds the token 41: expected 0 to 40"),
        ({"kind": "kl"}, "'kl' is no divergence"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"teacher": Case().head._replace(hidden=torch.zeros(3, 9))}, r"'teacher.hidden' has the shape \(3, 9\)"),
        ({"teacher": Case().top_k(3), "kind": "reverse_kl"}, "stored teacher has no 'reverse_kl'"),
        ({"teacher": Case().top_k(3)._replace(tail_log_probability=torch.zeros(3))}, "tail_log_probability"),
        (
            {"teacher": Case(teacher_tokens=90).samples(4)._replace(ids=torch.full((ROWS, 4), 80))},
            "holds the token 80",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    case = Case()
    given = {"hidden": case.hidden, "weight": case.weight, "labels": case.labels, "teacher": case.head}
    with pytest.raises(ConfigurationError, match=message):
        linear_distillation_loss(**{**given, **change})
