"""Divergences against formulas written out in float64."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional

from hf_transfer.errors import ConfigurationError
from hf_transfer.functional import (
    bernoulli_divergence,
    divergence,
    sampled_divergence,
    temperature_factor,
    top_k_divergence,
)

KINDS = ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "logit_mse"]


def logits(*shape, seed=0, scale=1.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(student, teacher, kind, temperature, beta=0.5):
    """From the probabilities, token by token."""
    values = []
    for s, t in zip(student.flatten(0, -2).tolist(), teacher.flatten(0, -2).tolist(), strict=True):
        q = [math.exp(x / temperature) for x in s]
        p = [math.exp(x / temperature) for x in t]
        q, p = [x / sum(q) for x in q], [x / sum(p) for x in p]
        m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]

        def kl(a, b):
            return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

        values.append(
            {
                "forward_kl": lambda: kl(p, q),  # noqa: B023
                "reverse_kl": lambda: kl(q, p),  # noqa: B023
                "jensen_shannon": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),  # noqa: B023
                "total_variation": lambda: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,  # noqa: B023
                "logit_mse": lambda: sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s),  # noqa: B023
            }[kind]()
        )
    return torch.tensor(values, dtype=torch.float64).view(student.shape[:-1])


def stored(teacher, k, temperature=1.0):
    """What is kept of a teacher's top k."""
    log_p = (teacher / temperature).log_softmax(-1)
    values, ids = log_p.topk(k)
    return ids, values, log_p.scatter(-1, ids, -math.inf).logsumexp(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_the_formulas(kind, temperature):
    student, teacher = logits(2, 3, 11), logits(2, 3, 11, seed=1, scale=2)
    found = divergence(student, teacher, kind=kind, temperature=temperature, beta=0.3)
    torch.testing.assert_close(found, naive(student, teacher, kind, temperature, 0.3), rtol=1e-10, atol=1e-12)
    for_check = [student[:, 0].requires_grad_(), teacher[:, 0].requires_grad_()]
    assert gradcheck(lambda s, t: divergence(s, t, kind=kind, temperature=temperature, beta=0.3), for_check)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_computed_in_float32(kind):
    student, teacher = logits(4, 50).bfloat16(), logits(4, 50, seed=1).bfloat16()
    found = divergence(student, teacher, kind=kind, temperature=2.0)
    assert found.dtype == torch.float32
    reference = naive(student.double(), teacher.double(), kind, 2.0)
    torch.testing.assert_close(found.double(), reference, rtol=1e-5, atol=1e-6)


def test_the_ends_of_the_jensen_shannon_divergence():
    student, teacher = logits(5, 9, scale=2), logits(5, 9, seed=1, scale=2)
    small = 1e-6
    low = divergence(student, teacher, kind="jensen_shannon", beta=small) / small
    high = divergence(student, teacher, kind="jensen_shannon", beta=1 - small) / small
    torch.testing.assert_close(low, divergence(student, teacher, kind="forward_kl"), rtol=1e-3, atol=0)
    torch.testing.assert_close(high, divergence(student, teacher, kind="reverse_kl"), rtol=1e-3, atol=0)
    half, swapped = (divergence(a, b, kind="jensen_shannon") for a, b in ((student, teacher), (teacher, student)))
    torch.testing.assert_close(half, swapped)
    assert half.max() < math.log(2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_factor_keeps_the_gradients_size(kind):
    student, teacher = logits(16, 200, scale=0.5), logits(16, 200, seed=1, scale=0.5)
    with_factor, without = [], []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        leaf = student.clone().requires_grad_()
        divergence(leaf, teacher, kind=kind, temperature=temperature).sum().backward()
        without.append(float(leaf.grad.norm()))
        with_factor.append(without[-1] * temperature_factor(kind, temperature))
    assert max(with_factor) / min(with_factor) < 2
    least_fall = {"total_variation": 6, "logit_mse": 0}.get(kind, 50)
    assert without[0] / without[-1] > least_fall


@pytest.mark.parametrize("kind", KINDS)
def test_independent_labels_are_two_way_divergences(kind):
    student, teacher = logits(3, 4, scale=2), logits(3, 4, seed=1, scale=2)
    found = bernoulli_divergence(student, teacher, kind=kind, temperature=2.0, beta=0.3)
    if kind == "logit_mse":
        expected = (student - teacher).square().mean(-1)
    else:
        p, q = (teacher / 2).sigmoid(), (student / 2).sigmoid()
        both = [torch.stack([x, 1 - x], -1).log() for x in (q, p)]
        expected = naive(*both, kind, 1.0, 0.3).mean(-1)
    torch.testing.assert_close(found, expected)
    certain = torch.where(teacher > 0, 60.0, -60.0).double()
    entropy_free = functional.binary_cross_entropy_with_logits(student, (certain > 0).double(), reduction="none")
    torch.testing.assert_close(bernoulli_divergence(student, certain), entropy_free.mean(-1))


def test_top_k_is_the_divergence_once_the_tail_is_one_token():
    student, teacher = logits(6, 30, scale=2), logits(6, 30, seed=1, scale=2)
    ids, log_p, tail = stored(teacher, 5, 2.0)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    coarse = [torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1).log() for x in (q, p)]
    found = top_k_divergence(student, ids, log_p, tail, temperature=2.0)
    torch.testing.assert_close(found, naive(*coarse, "forward_kl", 1.0))
    assert gradcheck(lambda s: top_k_divergence(s, ids, log_p, tail, temperature=2.0), [student.requires_grad_()])


def test_top_k_grows_into_the_full_divergence():
    student, teacher = logits(20, 64, scale=3), logits(20, 64, seed=1, scale=3)
    full = divergence(student, teacher, temperature=2.0)
    values = torch.stack(
        [top_k_divergence(student, *stored(teacher, k, 2.0), temperature=2.0) for k in (1, 4, 16, 32, 63, 64)]
    )
    assert (values >= 0).all()
    assert (values.diff(dim=0) >= -1e-12).all()
    torch.testing.assert_close(values[-1], full)
    equal = top_k_divergence(teacher.float(), *stored(teacher.float(), 7))
    assert (equal >= 0).all()
    assert equal.max() < 1e-6


def test_the_tail_keeps_its_digits_where_the_top_holds_nearly_everything():
    student = logits(3, 40)
    student[:, :4] += 40  # the other 36 hold about 1e-16
    teacher = logits(3, 40, seed=1)
    teacher[:, :4] += 3
    kept = stored(teacher, 4)
    leaf = student.float().requires_grad_()
    found = top_k_divergence(leaf, *(part if part.dtype == torch.int64 else part.float() for part in kept))
    found.sum().backward()
    exact = student.clone().requires_grad_()
    expected = top_k_divergence(exact, *kept)
    expected.sum().backward()
    assert expected.min() > 1  # the tail is what the value is made of
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_a_teacher_with_no_tail_and_probabilities_rounded_in_storage():
    student, teacher = logits(4, 10), logits(4, 10, seed=1)
    ids, log_p, _ = stored(teacher, 3)
    none = torch.full((4,), -math.inf, dtype=torch.float64)
    alone = log_p.softmax(-1)
    expected = (alone * (alone.log() - student.log_softmax(-1).gather(-1, ids))).sum(-1)
    torch.testing.assert_close(top_k_divergence(student, ids, log_p, none), expected)
    ids, log_p, tail = stored(teacher, 10)
    rounded = top_k_divergence(teacher, ids, log_p.half() - 0.01, tail)
    assert (rounded >= 0).all()
    assert rounded.max() < 1e-6


def test_samples_are_unbiased_in_value_and_gradient():
    student, teacher = logits(25), logits(25, seed=1, scale=2)
    log_p = (teacher / 2).log_softmax(-1)
    draws, rows = 12, 20_000
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(log_p.exp(), draws * rows, replacement=True, generator=generator).view(rows, draws)
    weights = torch.full((rows, draws), 1 / draws, dtype=torch.float64)
    entropy = -(log_p.exp() * log_p).sum().expand(rows)
    copies = student.expand(rows, -1).clone().requires_grad_()
    found = sampled_divergence(copies, ids, weights, entropy, temperature=2.0)
    found.sum().backward()
    exact = student.clone().requires_grad_()
    expected = divergence(exact, teacher, temperature=2.0)
    expected.backward()
    errors = (found.mean() - expected).abs() / (found.std() / rows**0.5)
    assert errors < 4
    gradient_errors = (copies.grad.mean(0) - exact.grad).abs() / (copies.grad.std(0) / rows**0.5)
    assert gradient_errors.max() < 4
    few = [part[:2] for part in (ids, weights, entropy)]
    assert gradcheck(lambda s: sampled_divergence(s, *few, temperature=2.0), [logits(2, 25).requires_grad_()])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "forward_lk"}, "Did you mean 'forward_kl'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"kind": "jensen_shannon", "beta": 1.0}, "beta is 1.0"),
        ({"teacher_logits": torch.zeros(2, 5)}, r"\(2, 4\), the teacher's \(2, 5\)"),
    ],
)
def test_what_cannot_be_computed_is_named(change, message):
    with pytest.raises(ConfigurationError, match=message):
        divergence(**{"student_logits": torch.zeros(2, 4), "teacher_logits": torch.zeros(2, 4), **change})
