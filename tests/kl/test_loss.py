"""The divergence as a training loss."""

import math

import pytest
import torch
from torch import Tensor

from heretic_kl.kl import forward_kl, kl_divergence_loss, terms

GENERATOR = torch.Generator().manual_seed(7)
STUDENT = torch.randn(2, 5, 11, generator=GENERATOR, dtype=torch.float64)
TEACHER = torch.randn(2, 5, 11, generator=GENERATOR, dtype=torch.float64)
ATTENTION = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
KEEP = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 0, 1, 1]])
# Logits at t count if token t + 1 is kept and real and token t is real.
COUNTED = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 1, 0, 0]]).bool()


def by_autograd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_p = (teacher / temperature).log_softmax(-1)
    log_q = (student / temperature).log_softmax(-1)
    rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    return rows.mean() * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_value_and_gradient_against_autograd(temperature):
    student = STUDENT.clone().requires_grad_()
    loss = kl_divergence_loss(student, TEACHER, ATTENTION, KEEP, temperature)
    (found,) = torch.autograd.grad(loss, student)
    expected_loss = by_autograd(student[COUNTED], TEACHER[COUNTED], temperature)
    (expected,) = torch.autograd.grad(expected_loss, student)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not found[~COUNTED].any()
    plain = forward_kl(reference=TEACHER, candidate=STUDENT, mask=COUNTED, temperature=temperature)
    torch.testing.assert_close(loss.detach(), plain * temperature**2)


def test_gradcheck_and_blocks(monkeypatch):
    student = STUDENT.clone().requires_grad_()
    monkeypatch.setitem(terms.BLOCK_ELEMENTS, "cpu", 25)
    assert torch.autograd.gradcheck(
        lambda s: 3.0 * kl_divergence_loss(s, TEACHER, ATTENTION, KEEP, 2.0), student
    )


def test_without_masks_all_but_the_last_position_count():
    loss = kl_divergence_loss(STUDENT, TEACHER)
    plain = forward_kl(reference=TEACHER[:, :-1], candidate=STUDENT[:, :-1])
    torch.testing.assert_close(loss, plain)
    assert torch.equal(kl_divergence_loss(STUDENT, TEACHER, torch.ones(2, 5)), loss)


def test_what_does_not_count_is_never_read():
    clean = kl_divergence_loss(STUDENT, TEACHER, ATTENTION, KEEP)
    student, teacher = STUDENT.clone(), TEACHER.clone()
    student[~COUNTED], teacher[~COUNTED] = math.nan, math.inf
    student.requires_grad_()
    loss = kl_divergence_loss(student, teacher, ATTENTION, KEEP)
    loss.backward()
    assert torch.equal(loss.detach(), clean)
    assert student.grad is not None and bool(torch.isfinite(student.grad).all())


def test_nothing_kept_is_exactly_nought_with_gradients():
    student = (STUDENT * math.nan).requires_grad_()
    loss = kl_divergence_loss(student, TEACHER, ATTENTION, torch.zeros(2, 5))
    assert loss.item() == 0.0 and loss.requires_grad
    loss.backward()
    assert student.grad is not None and not student.grad.any()
    short = torch.zeros(2, 1, 4, requires_grad=True)
    assert kl_divergence_loss(short, torch.zeros(2, 1, 4)).item() == 0.0


def test_agreement_is_exactly_nought():
    student = STUDENT.float().requires_grad_()
    loss = kl_divergence_loss(student, student.detach().clone(), temperature=2.0)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and not student.grad.any()


def test_the_teacher_gets_no_gradient():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    kl_divergence_loss(student, teacher).backward()
    assert student.grad is not None and teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    student = STUDENT.to(dtype).requires_grad_()
    loss = kl_divergence_loss(student, TEACHER.to(dtype), ATTENTION, KEEP, 2.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None and student.grad.dtype == dtype
    exact = kl_divergence_loss(student.double(), TEACHER.to(dtype).double(), ATTENTION, KEEP, 2.0)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-7)


def test_temperature_squared_keeps_the_size_of_gradients():
    sizes = []
    for temperature in (1.0, 8.0, 64.0):
        student = (0.1 * STUDENT).requires_grad_()
        kl_divergence_loss(student, 0.1 * TEACHER, temperature=temperature).backward()
        assert student.grad is not None
        sizes.append(float(student.grad.norm()))
    assert max(sizes) < 1.2 * min(sizes)


def test_descending_the_loss_reaches_the_teacher():
    student = STUDENT.clone().requires_grad_()
    first = kl_divergence_loss(student, TEACHER).item()
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        loss = kl_divergence_loss(student, TEACHER)
        loss.backward()
        optimizer.step()
    assert 0.0 <= loss.item() < 1e-2 * first


def test_nan_and_excluded_tokens_reach_the_caller_as_values():
    broken = STUDENT.clone()
    broken[0, 0, 0] = math.nan
    assert math.isnan(kl_divergence_loss(broken, TEACHER).item())
    broken[0, 0, 0] = -math.inf
    assert kl_divergence_loss(broken, TEACHER).item() == math.inf
    teacher = TEACHER.clone()
    teacher[0, 0, 0] = -math.inf
    broken.requires_grad_()
    loss = kl_divergence_loss(broken, teacher)
    loss.backward()
    assert math.isfinite(loss.item())
    assert broken.grad is not None and bool(torch.isfinite(broken.grad).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((STUDENT, TEACHER[:, :4]), r"\(2, 5, 11\) and \(2, 4, 11\)"),
        ((STUDENT[0], TEACHER[0]), r"must both be \(B, T, V\)"),
        ((STUDENT, TEACHER.long()), "floating point"),
        ((STUDENT, TEACHER, ATTENTION[:, :4]), r"attention_mask must be .*\(2, 5\).*\(2, 4\)"),
        ((STUDENT, TEACHER, None, KEEP[:1]), r"loss_mask must be .*\(2, 5\).*\(1, 5\)"),
        ((STUDENT, TEACHER, None, None, 0.0), "temperature must be positive"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kl_divergence_loss(*arguments)
