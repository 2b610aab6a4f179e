"""The one dropout of the project."""

import torch
from torch import Tensor, nn

_STEPS = 2**16


class Dropout(nn.Dropout):
    """`nn.Dropout`, drawn on a CPU from 16 random bits per element, which takes a third of its time.

    There the probability is rounded to a multiple of 2^-16, and what is kept is scaled by that.
    """

    def forward(self, x: Tensor) -> Tensor:
        dropped = round(self.p * _STEPS)
        if not self.training or x.device.type != "cpu" or not 0 < dropped < _STEPS:
            return super().forward(x)
        words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), device=x.device)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = (bits >= dropped - _STEPS // 2).to(x.dtype)
        return x * kept.mul_(_STEPS / (_STEPS - dropped))
