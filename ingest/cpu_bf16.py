"""Fast bfloat16 linear layers on CPUs without bfloat16 instructions.

There torch multiplies bfloat16 matrices without its fast kernels: Gemma 3 270M runs at 80 tokens/s on 2 AVX2 cores,
with the layers below at 420 to 500. Both operands are widened to float32: a product of two bfloat16 numbers is exact
there, sums are kept in float32, and the result is rounded to bfloat16 once. That is the arithmetic of a bfloat16
matrix unit, up to the order of the sums.
"""

import torch
from torch import nn
from torch.nn import functional


class WidenedLinear(nn.Module):
    """A linear layer from bfloat16 to bfloat16 that multiplies and sums in float32.

    Holds the weight as float32, 4 bytes a number in place of 2.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().float())
        # nn.Linear's annotation leaves out that it may have none.
        bias: torch.Tensor | None = linear.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` @ weight.T + bias; bfloat16 [..., d_in] to bfloat16 [..., d_out]."""
        return functional.linear(x.float(), self.weight, self.bias).to(x.dtype)


def has_fast_bf16() -> bool:
    """Return whether torch has fast bfloat16 matrix kernels on this CPU."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:
        # A torch built without oneDNN.
        return False


def widen_linears(root: nn.Module) -> int:
    """Replace every bfloat16 ``nn.Linear`` below ``root`` by a ``WidenedLinear``; return how many there were."""
    n_replaced = 0
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16:
                setattr(parent, name, WidenedLinear(child))
                n_replaced += 1
    return n_replaced
