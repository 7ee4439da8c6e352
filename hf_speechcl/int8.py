"""Linear layers in 8-bit integers, for inference on a CPU.

`torch.ao.quantization.quantize_dynamic` is deprecated and scales a whole batch by its largest value, so that a clip's
transcript would depend on the clips beside it. Here every frame has a scale of its own.
"""

import torch
from torch import nn

SMALLEST = 64  # inputs and outputs of a layer that is worth it


class Int8Linear(nn.Module):
    """A linear layer whose product is of 8-bit integers: weights with a scale per output, inputs with one per frame.

    Args:
        linear: the layer that it stands for.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(1e-12) / 127
        self.register_buffer("integers", (weight / scale[:, None]).round().to(torch.int8).t().contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    @property
    def weight(self) -> torch.Tensor:
        """(out_features, in_features) float32, for models that compute with a layer's weights themselves."""
        return self.integers.t() * self.scale[:, None]

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(..., in_features) float32 → (..., out_features) float32."""
        rows = inputs.reshape(-1, inputs.shape[-1])
        scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        product = torch._int_mm((rows / scale).round_().to(torch.int8), self.integers)
        outputs = (product * scale).mul_(self.scale)
        if self.bias is not None:
            outputs += self.bias
        return outputs.view(*inputs.shape[:-1], -1)


def quantize_linear(model: nn.Module) -> None:
    """Put an `Int8Linear` in the place of every linear layer of a float32 model on a CPU, but for very small ones.

    Raises:
        ValueError: this processor's products of 8-bit integers overflow.
    """
    most = torch.full((SMALLEST, SMALLEST), 127, dtype=torch.int8)
    if (torch._int_mm(most, -most) != -SMALLEST * 127**2).any():
        raise ValueError("dtype int8: the products of this processor overflow; use float32 or bfloat16")
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and min(child.in_features, child.out_features) >= SMALLEST:
                setattr(parent, name, Int8Linear(child))
