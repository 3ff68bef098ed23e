"""The divergence as a training loss: differentiable, masked, in chunks. Knows no trainer.

Token-level forward KL(teacher || student), as in knowledge distillation (Hinton et al. 2015,
arXiv:1503.02531), so that a student keeps what the teacher does on benign tokens.
"""

from typing import Any

import torch
from torch import Tensor

from heretic_kl.kl.terms import (
    block_divergence,
    block_elements,
    distribution,
    require_temperature,
    row_blocks,
    working,
    working_dtype,
)


def kl_divergence_loss(
    student_logits: Tensor,  # (B, T, V) raw, any floating dtype, gradients flow here only
    teacher_logits: Tensor,  # (B, T, V) raw, same device
    attention_mask: Tensor | None = None,  # (B, T) bool or 0/1, 1 at real tokens
    loss_mask: Tensor | None = None,  # (B, T) bool or 0/1, 1 at tokens to keep (not prompts)
    temperature: float = 1.0,
) -> Tensor:
    """Return T^2 times KL(teacher || student), in nats per kept token, differentiable.

    Both masks are aligned with *tokens*, as `labels != -100` is; the causal shift is done
    here. The logits at `t` predict the token at `t + 1`, so they count if token `t + 1` is
    kept by `loss_mask` and both it and token `t` are real. The last position predicts nothing
    and never counts, nor does the first token. Logits that do not count are never read.

    The sum over kept tokens is divided by their number, over the whole batch at once: a long
    sequence counts for more than a short one. The factor T^2 keeps the size of gradients
    independent of the temperature.

    The gradient with respect to the kept logits is `T (softmax(s / T) - softmax(t / T)) /
    kept`, computed block by block in the backward pass: until then only the kept rows are held,
    and no probabilities. It cannot be differentiated twice.

    Returns:
        A scalar, float32 (float64 if the student's logits are). Never negative, exactly 0 if
        both agree, and exactly 0 with zero gradients if no token is kept. NaN logits give NaN,
        so that a gradient scaler can skip the step.

    Raises:
        ValueError: Shapes, devices or options do not fit; both shapes are named.
    """
    require_temperature(temperature)
    _require_logits(student_logits, teacher_logits)
    shape = student_logits.shape[:2]
    real = _token_mask(attention_mask, "attention_mask", shape, student_logits.device)
    keep = _token_mask(loss_mask, "loss_mask", shape, student_logits.device)
    counts = real[:, :-1] & real[:, 1:] & keep[:, 1:]  # (B, T - 1), of the logits at t
    student = student_logits[:, :-1][counts]
    teacher = teacher_logits.detach()[:, :-1][counts]
    loss: Tensor = _MeanKL.apply(student, teacher, temperature)  # type: ignore[no-untyped-call]
    return loss


class _MeanKL(torch.autograd.Function):
    """T^2 times the mean over rows of KL(teacher || student), with its gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return the loss of (rows, V) logits; 0 for no rows."""
        ctx.save_for_backward(student, teacher)
        ctx.temperature = temperature
        rows, width = student.shape
        total = student.new_zeros((), dtype=_result_dtype(student))
        dtype = working_dtype(teacher.dtype, student.dtype)
        for block in row_blocks(rows, width, block_elements(student.device)):
            first = distribution(teacher[block], dtype, temperature)
            second = distribution(student[block], dtype, temperature)
            divergence = block_divergence(first, second, "forward_kl").values.sum()
            total = total + divergence.to(device=total.device, dtype=total.dtype)
        return total * (temperature * temperature / max(1, rows))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None]:
        """Return the gradient with respect to the student's rows."""
        student, teacher = ctx.saved_tensors
        rows, width = student.shape
        factor = gradients[0] * (ctx.temperature / max(1, rows))
        result = torch.empty_like(student)
        dtype = working_dtype(teacher.dtype, student.dtype)
        for block in row_blocks(rows, width, block_elements(student.device)):
            first = working(teacher[block], dtype, ctx.temperature)
            second = working(student[block], dtype, ctx.temperature)
            difference = second.softmax(dim=-1) - first.softmax(dim=-1)
            scale = factor.to(device=difference.device, dtype=difference.dtype)
            result[block] = (difference * scale).to(result)
        return result, None, None


def _result_dtype(student: Tensor) -> torch.dtype:
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def _require_logits(student: Tensor, teacher: Tensor) -> None:
    """Raise `ValueError` unless both are (B, T, V) alike."""
    if student.shape != teacher.shape or student.dim() != 3:
        raise ValueError(
            f"student_logits and teacher_logits must both be (B, T, V), got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"student_logits and teacher_logits must be on one device, got "
            f"{student.device} and {teacher.device}"
        )
    if not (student.is_floating_point() and teacher.is_floating_point()):
        raise ValueError(f"logits must be floating point, got {student.dtype} and {teacher.dtype}")


def _token_mask(mask: Tensor | None, name: str, shape: torch.Size, device: torch.device) -> Tensor:
    """Return a (B, T) bool mask on `device`, all True if there is none."""
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if mask.shape != shape:
        raise ValueError(
            f"{name} must be (B, T) = {tuple(shape)} to fit the logits, got {tuple(mask.shape)}"
        )
    return mask.to(device=device, dtype=torch.bool)
