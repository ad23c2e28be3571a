"""The kernel that the fused loss is on a GPU, against the same loss by autograd in float64."""

import os
from importlib.util import find_spec

import pytest
import torch

from hf_transfer.linear_blocks import Terms, autograd_block
from hf_transfer.linear_loss import TeacherHead, linear_distillation_loss

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or not (torch.cuda.is_available() or INTERPRETED),
    reason="needs Triton and a CUDA GPU (or Triton and TRITON_INTERPRET=1)",
)
needs_cuda = pytest.mark.skipif(
    find_spec("triton") is None or not torch.cuda.is_available(), reason="needs Triton and a CUDA GPU"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 5000  # two blocks of the kernel and a part of a third


def terms(temperature, **changes):
    return Terms(
        **{
            "task_weight": 0.4,
            "teacher_weight": 0.7,
            "temperature": temperature,
            "kind": "forward_kl",
            "beta": 0.5,
            "differentiate": True,
            **changes,
        }
    )


def evaluated(terms, logits, labels, target):
    """What the kernel makes of logits before the temperature: values, and what it left in place of the logits."""
    from hf_transfer.linear_kernels import triton_block

    logits, target = (None if x is None else (x / terms.temperature).to(DEVICE) for x in (logits, target))
    values = triton_block(terms, logits, labels.to(DEVICE), target)
    assert (values.unit == 1).all()
    return values.cross_entropy.cpu().double(), values.divergence.cpu().double(), logits.cpu().double()


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [TOKENS, TOKENS - 1500, 300])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])  # powers of two: dividing by them rounds nothing
def test_values_and_gradients(temperature, shared, dtype):
    generator = torch.Generator().manual_seed(0)
    student = (4 * torch.randn(6, TOKENS, generator=generator)).to(dtype)
    teacher = (4 * torch.randn(6, shared, generator=generator)).to(dtype)
    labels = torch.randint(0, TOKENS, (6, 1), generator=generator)
    expected_gradient = student.double()
    expected = autograd_block(terms(temperature), expected_gradient, labels, teacher.double())
    cross_entropy, divergence, gradient = evaluated(terms(temperature), student, labels, teacher)
    torch.testing.assert_close(cross_entropy, expected.cross_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(divergence, expected.divergence, rtol=1e-5, atol=1e-5)
    error = (gradient - expected_gradient).norm() / expected_gradient.norm()
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]


@needs_triton
def test_cross_entropy_alone_and_logits_hundreds_apart():
    generator = torch.Generator().manual_seed(0)
    logits = 200 * torch.randn(6, TOKENS, generator=generator)
    labels = logits.argsort(-1)[:, [-2]]
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels.squeeze(1), reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), exact)
    cross_entropy, divergence, gradient = evaluated(terms(2.0, task_weight=1.0), logits, labels, None)
    torch.testing.assert_close(cross_entropy.squeeze(1), expected, rtol=1e-5, atol=1e-4)
    assert not divergence.any()
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@needs_triton
def test_tokens_that_the_teacher_has_not_may_be_far_above_those_it_has():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(6, TOKENS, generator=generator), torch.randn(6, 3000, generator=generator)
    student[:, 3000:] += 300
    labels = torch.randint(0, TOKENS, (6, 1), generator=generator)
    expected_gradient = student.double()
    expected = autograd_block(terms(2.0), expected_gradient, labels, teacher.double())
    cross_entropy, divergence, gradient = evaluated(terms(2.0), student, labels, teacher)
    torch.testing.assert_close(cross_entropy, expected.cross_entropy, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(divergence, expected.divergence, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-6)


@needs_triton
def test_tokens_that_both_rule_out_cost_nothing_and_values_alone_leave_the_logits():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, TOKENS, generator=generator) for _ in range(2))
    labels = torch.zeros(4, 1, dtype=torch.long)
    student[:, 10:40] = teacher[:, 10:40] = -torch.inf
    kept = [i for i in range(TOKENS) if not 10 <= i < 40]
    found = evaluated(terms(2.0), student, labels, teacher)
    expected = evaluated(terms(2.0), student[:, kept].contiguous(), labels, teacher[:, kept].contiguous())
    torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-5)
    assert not found[2][:, 10:40].any()
    torch.testing.assert_close(found[2][:, kept], expected[2], rtol=1e-5, atol=1e-8)
    *values, left = evaluated(terms(2.0, differentiate=False), student, labels, teacher)
    assert torch.equal(torch.stack(values), torch.stack(found[:2]))
    assert torch.equal(left, student.double() / 2)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher_tokens", [None, TOKENS, TOKENS - 64, TOKENS + 64])
def test_the_whole_loss_on_a_gpu(teacher_tokens, dtype, caplog):
    generator = torch.Generator().manual_seed(0)

    def parts(*shapes):
        return [torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in shapes]

    student = parts((700, 32), (TOKENS, 32), (TOKENS,))
    teacher = None
    if teacher_tokens:
        teacher = TeacherHead(*parts((700, 48), (teacher_tokens, 48), (teacher_tokens,)))
    labels = torch.randint(0, TOKENS, (700,), generator=generator).to(DEVICE)
    labels[::7] = -100

    def differentiated(device, dtype):
        leaves = [part.to(device, dtype, copy=True).requires_grad_() for part in student]
        head = teacher and TeacherHead(*(part.to(device, dtype) for part in teacher))
        found = linear_distillation_loss(
            leaves[0], leaves[1], labels.to(device), head, bias=leaves[2], task_weight=0.3, chunk_size=256
        )
        found.loss.backward()
        return [value.detach().cpu().double() for value in found], [leaf.grad.cpu().double() for leaf in leaves]

    values, gradients = differentiated(DEVICE, dtype)
    expected_values, expected_gradients = differentiated("cpu", torch.float64)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(values, expected_values, rtol=tolerance, atol=tolerance)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert (gradient - expected).norm() < tolerance * expected.norm()
    assert not caplog.records


@needs_cuda
def test_what_has_no_kernel_is_said_once(caplog):
    from hf_transfer.linear_loss import _say_once

    _say_once.cache_clear()
    hidden, weight = torch.randn(8, 4, device=DEVICE), torch.randn(50, 4, device=DEVICE)
    teacher = TeacherHead(hidden, weight.flip(0))
    for _ in range(2):
        linear_distillation_loss(hidden, weight, torch.zeros(8, device=DEVICE).long(), teacher, kind="reverse_kl")
    assert [record.message for record in caplog.records] == [
        "The loss runs in some twenty operations on the GPU, not as one kernel: there is none for 'reverse_kl'."
    ]
