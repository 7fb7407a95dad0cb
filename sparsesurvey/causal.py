"""Attention that is causal by itself: no mask is made, whatever compiles the model.

transformers leaves the mask out where every token may see all before it, and so lets torch take its flash kernels. While
torch.compile traces, up to torch 2.13, it makes one all the same, ``[batch, 1, seq, seq]``, with which those kernels do not run
(transformers.masking_utils, ``_ignore_causal_mask_sdpa``). Training never pads, so the mask never says anything.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "sdpa_causal"


def no_mask(*_: Any, **__: Any) -> None:
    """The mask: none. ``sdpa_attention_forward`` is causal without one."""


AttentionInterface.register(NAME, sdpa_attention_forward)
AttentionMaskInterface.register(NAME, no_mask)


def without_mask(model: nn.Module) -> nn.Module:
    """Let a model of transformers, in place, multiply without a mask; return it. For whole sequences, not for padded ones.

    ValueError where it attends otherwise than by ``sdpa``, or to a window.
    """
    kind, window = model.config._attn_implementation, getattr(model.config, "sliding_window", None)
    if kind not in ("sdpa", NAME) or window is not None:
        raise ValueError(f"model must attend by sdpa and without a window, got {kind} and {window}")
    model.set_attn_implementation(NAME)
    return model
