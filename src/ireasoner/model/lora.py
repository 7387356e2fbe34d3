"""LoRA for half-precision backbones whose small updates are not lost in rounding.

PEFT rounds a layer's output to the backbone's dtype before it adds the adapter's part, and the sum once more. In
bfloat16, what an adapter adds is then gone where it is below about 0.3 % of the output, however precise the adapter is.
Here the backbone's product, its bias and the adapter's part are summed in float32 and rounded once. The rounding error
then has nothing to do with the adapter: small updates come through on average, as they would in float32.

Shape suffixes: T positions, I and O the inputs and outputs of a layer, R the rank of LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor
from torch.nn.functional import linear

from ireasoner.model.quantization import dense

HALF = (torch.bfloat16, torch.float16)


def product_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """The matrix product of [T, I] and [I, O] of one dtype, in float32: nothing is rounded to bfloat16 in between."""
    if x.is_cuda and x.dtype in HALF:
        return torch.mm(x, weight, out_dtype=torch.float32)
    return x.float() @ weight.float()


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor | None]:
    """What `linear_in_float32` returns, and x Aᵀ."""
    x_TI, down_TR = x.flatten(0, -2), None
    weight, scale_O = dense(weight, x.dtype)
    if weight.dtype == torch.float32:  # in one call: with few rows, calls take longer than sums
        result_TO = linear(x_TI, weight)
    else:
        result_TO = product_in_float32(x_TI.to(weight.dtype), weight.T)
    if scale_O is not None:
        result_TO *= scale_O
    if bias is not None:
        result_TO += bias
    if a is not None and b is not None:
        down_TR = linear(x_TI.float(), a)
        result_TO.addmm_(down_TR, b.T, alpha=scaling)
    return result_TO.view(*x.shape[:-1], -1), down_TR


class _Linear(torch.autograd.Function):
    """x Wᵀ + b + s · (x Aᵀ) Bᵀ in float32, for a frozen W and b, with or without A and B.

    For the backward pass only x is kept, as it is, and x Aᵀ. PEFT keeps a copy of x in float32 for each layer, although
    several layers share one x (queries, keys and values do). A quantised W is brought to full size once more.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scaling: float
    ) -> Tensor:
        result, down_TR = _product(x, weight, bias, a, b, scaling)
        ctx.save_for_backward(x, weight, a, b, down_TR)
        ctx.scaling = scaling
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, down_TR = ctx.saved_tensors
        of_x, _, _, of_a, of_b, _ = ctx.needs_input_grad
        grad_TO = grads[0].flatten(0, -2)
        grad_x = grad_a = grad_b = grad_down_TR = None
        if a is not None:
            grad_down_TR = ctx.scaling * (grad_TO @ b)
        # The gradient for x comes last: it is as large as x in float32, and needs the room that others have left.
        if of_a and grad_down_TR is not None:
            grad_a = grad_down_TR.T @ x.flatten(0, -2).float()
        if of_b:
            grad_b = ctx.scaling * (grad_TO.T @ down_TR)
        if of_x:
            weight, scale_O = dense(weight, x.dtype)
            if scale_O is not None:
                grad_TO = grad_TO * scale_O
            grad_x_TI = product_in_float32(grad_TO.to(weight.dtype), weight)
            if a is not None and grad_down_TR is not None:
                grad_x_TI.addmm_(grad_down_TR, a)
            grad_x = grad_x_TI.to(x.dtype).view_as(x)
        return grad_x, None, None, grad_a, grad_b, None


def linear_in_float32(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """A frozen linear layer with LoRA, summed in float32.

    Args:
        x: [..., I], in the dtype of the weight or in float32.
        weight: [O, I], in any dtype or quantised; gets no gradient.
        bias: [O]; gets no gradient.
        a: LoRA's matrix A, [R, I], in float32; None: no LoRA.
        b: LoRA's matrix B, [O, R], in float32.
        scaling: LoRA's alpha / rank.

    Returns:
        [..., O], in float32.
    """
    if not torch.is_grad_enabled():
        return _product(x, weight, bias, a, b, scaling)[0]
    result: Any = _Linear.apply(x, weight, bias, a, b, scaling)
    return result


class Float32SumLinear(lora.Linear):
    """PEFT's LoRA layer with its sum in float32, for a linear layer in half precision or in float32 itself, where it is
    the same sum in fewer operations: decoding and updates of the tiny model on a CPU take 5 to 10 % less time.

    With the adapters disabled it rounds in the same way, so that an adapter that adds nothing changes nothing.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self.get_base_layer()
        a: Any = None
        b: Any = None
        scaling = 1.0
        if not self.disable_adapters:
            (name,) = self.active_adapters
            a, b, scaling = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        return linear_in_float32(x, layer.weight, layer.bias, a, b, scaling).to(x.dtype)


class QuantisedLinear(torch.nn.Linear):
    """A quantised layer of bitsandbytes' that has no LoRA, computed as those that have."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        torch.nn.Module.__init__(self)  # nothing is drawn
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return linear_in_float32(x, self.weight, self.bias).to(x.dtype)
