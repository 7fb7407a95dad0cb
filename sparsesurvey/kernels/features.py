"""Activations feature-major, ``[in, tokens]``: an input is contiguous along the tokens, so that inputs can be gathered."""

from torch import Tensor

ROUND = 16  # tokens to a multiple of which rows are filled up: Triton then knows them to be aligned


def feature_major(x: Tensor) -> tuple[Tensor, bool]:
    """``x`` ``[tokens, in]`` as aligned rows ``[in, tokens filled up with zeros]``, and whether it was that already."""
    if x.stride(0) == 1 and not (len(x) % ROUND or x.stride(1) % ROUND or x.data_ptr() % 16 or x.stride(1) < len(x)):
        return x.T, True
    tokens = -(-len(x) // ROUND) * ROUND
    rows = x.new_empty(x.shape[1], tokens)
    rows[:, : len(x)].copy_(x.T)
    rows[:, len(x):].zero_()
    return rows, False
