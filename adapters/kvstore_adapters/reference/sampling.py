"""From logits to a token: greedy, or seeded by request and position so that batching cannot change
the draw.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample(logits: Tensor, temperature: float, seed: int, position: int) -> int:
    """A token of the float32 `logits [vocab]`; the most likely one at temperature 0."""
    if temperature > 0:
        generator = torch.Generator().manual_seed((seed << 24) ^ position)
        uniform = torch.rand(logits.shape, generator=generator).clamp_min(1e-20)
        # The Gumbel-max trick: argmax(logits / t + noise) is a draw from softmax(logits / t).
        logits = logits.cpu() / temperature - (-uniform.log()).log()
    return int(logits.argmax())
