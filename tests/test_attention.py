"""Two-level masks: literal tiles, round trips, and what happens when the inner level is not read."""

import pytest
import torch

from sparsesurvey.attention import (
    EMPTY, FULL, PART, attend, blockwise, causal, ignored_bitmaps, sliding_window, two_level, whole,
)

RANDOM = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) > 0.5


@pytest.mark.parametrize("mask", [causal(64), sliding_window(64, 5), blockwise(64, 16), RANDOM, RANDOM & False, RANDOM | True],
                         ids=["causal", "window", "blocks", "random", "nothing", "everything"])
def test_round_trip(mask):
    for tile, inner in (16, 8), (32, 4), (8, 8):
        assert torch.equal(whole(two_level(mask, tile, inner)), mask)


def test_kinds_of_a_causal_mask():
    stored = two_level(causal(192), 64)
    assert stored.kind.tolist() == [[PART, EMPTY, EMPTY], [FULL, PART, EMPTY], [FULL, FULL, PART]]
    assert stored.bitmaps.shape == (3, 64) and torch.equal(stored.bitmaps[0], stored.bitmaps[2])


def test_attention_equals_a_masked_softmax():
    q, k, v = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for mask in causal(64), sliding_window(64, 5), blockwise(64, 16):
        right = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]
        torch.testing.assert_close(attend(q, k, v, two_level(mask, 16)), right)


def test_a_query_that_sees_nothing_gets_zeros():
    q, k, v = torch.randn(3, 16, 4, generator=torch.Generator().manual_seed(1))
    mask = causal(16)
    mask[3] = False
    result = attend(q, k, v, two_level(mask, 8))
    assert result.isfinite().all() and not result[3].any() and result[4].any()


def test_ignoring_the_bitmaps_is_right_for_whole_tiles_only():
    frame = ignored_bitmaps()
    assert (frame["error, bitmaps read"] < 1e-12).all()
    assert frame.loc["block by block", "error, bitmaps ignored"] < 1e-12
    assert (frame.loc[["causal", "sliding window"], "error, bitmaps ignored"] > 0.1).all()
    assert frame.loc["block by block", "partial tiles"] == 0


@pytest.mark.parametrize("mask, tile, inner, message", [
    (causal(64).float(), 64, 8, "mask must be a boolean matrix"), (causal(60), 64, 8, "divide into tiles of 64"),
    (causal(64), 12, 8, "these into 8"), (causal(64), 64, 16, "inner must be an integer from 1 to 8"),
    (causal(64), 4, 8, "tile must be an integer of at least 8"),
])
def test_masks_that_do_not_divide_are_refused(mask, tile, inner, message):
    with pytest.raises(ValueError, match=message):
        two_level(mask, tile, inner)
