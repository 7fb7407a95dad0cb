"""Other fresh weights than those of ``mistral.build``: some results depend on what a model started from."""

from __future__ import annotations

import torch
from torch import nn

OURS, TRANSFORMERS = "ours", "transformers"
WAYS = (OURS, TRANSFORMERS)


def initialise(model: nn.Module, way: str = OURS, seed: int = 0) -> nn.Module:
    """Draw the weights of a model of transformers anew, in place, and hand it back; the same ones for the same seed.

    Args:
        way: "ours" leaves the weights as ``mistral.build`` made them, scaled by the width. "transformers" draws them as that
            library does: every matrix and embedding normal with std ``initializer_range``, 0.02 unless the configuration says
            otherwise, at any width and depth; norms are one.

    Raises:
        ValueError: another way.
    """
    if way not in WAYS:
        raise ValueError(f"initial must be one of {', '.join(WAYS)}, got {way!r}")
    if way == TRANSFORMERS:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():  # a tied head is the embedding and comes once
                if weight.dim() == 2:
                    weight.normal_(std=model.config.initializer_range, generator=generator)
    return model
