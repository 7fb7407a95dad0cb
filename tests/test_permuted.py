"""Permuted patterns: the order and its inverse, the products behind a gather, and what orders do to a stack of layers."""

import math

import pytest
import torch

from sparsesurvey.structure import stored_bytes
from sparsesurvey.structures import NM, VNM, Block, Dense, Permuted
from sparsesurvey.structures.permuted import columns, inverse, random_order, reached, shuffle

EVEN_ODD = (0, 2, 4, 6, 1, 3, 5, 7)


def draw(*size, seed=0):
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- the pattern


@pytest.mark.parametrize("mask, plain, permuted", [
    ([1, 1, 1, 0, 0, 0, 0, 0], False, True),  # even 0 and 2, odd 1
    ([1, 0, 1, 0, 1, 0, 0, 0], True, False),  # three even ones
    ([1, 1, 0, 0, 1, 1, 0, 0], True, True),
])
def test_the_definition_by_hand(mask, plain, permuted):
    mask = torch.tensor([mask]).bool()
    assert NM(2, 4).holds(mask) == plain
    assert Permuted(NM(2, 4), EVEN_ODD).holds(mask) == permuted


@pytest.mark.parametrize("structure", Permuted.variants(), ids=str)
def test_the_mask_is_the_inner_one_in_order(structure):
    rows, cols = structure.tile
    scores = draw(2 * rows, 2 * cols).abs()
    order = columns(structure.order, 2 * cols, scores.device)
    mask = structure.mask(scores)
    assert torch.equal(mask[:, order], structure.inner.mask(scores[:, order]))
    assert torch.equal(structure.restored(structure.ordered(scores)), scores)


def test_the_identity_changes_nothing():
    scores = draw(8, 64).abs()
    for inner in (NM(2, 4), VNM(4, 2, 8), Block(4, 8, 0.25)):
        assert torch.equal(Permuted(inner, tuple(range(8))).mask(scores), inner.mask(scores))


def test_an_order_within_groups_changes_nothing():
    """Only who shares a group matters: swapping two inputs of a group is the same 2:4."""
    scores = draw(8, 64).abs()
    assert torch.equal(Permuted(NM(2, 4), (1, 0, 3, 2)).mask(scores), NM(2, 4).mask(scores))


def test_one_order_of_all_inputs_is_the_general_case():
    order = random_order(48, seed=3)
    structure = Permuted(NM(2, 4), order)
    scores = draw(5, 48).abs()
    assert torch.equal(structure.mask(scores)[:, list(order)], NM(2, 4).mask(scores[:, list(order)]))
    with pytest.raises(ValueError, match="in is a multiple of 48, got .5, 64."):
        structure.mask(draw(5, 64))


def test_the_tile_has_whole_windows_and_whole_tiles():
    assert Permuted(NM(2, 8), tuple(range(12))).tile == (1, 24)
    assert Permuted(VNM(16, 2, 8), shuffle(32, 8)).tile == (16, 32)


def test_orders():
    assert shuffle(16, 4)[:8] == (0, 4, 8, 12, 1, 5, 9, 13)
    assert Permuted().order == shuffle(16, 4)
    assert sorted(random_order(100)) == list(range(100)) != list(random_order(100))
    assert random_order(10, 1) == random_order(10, 1) != random_order(10, 2)
    for order in (shuffle(24, 4), random_order(17)):
        assert [order[place] for place in inverse(order)] == list(range(len(order)))
    with pytest.raises(ValueError, match="width must divide window, got 3 and 8"):
        shuffle(8, 3)
    for bad in ((0, 4), (8, 0), (8, 9), (True, 1), (8.0, 4)):
        with pytest.raises(ValueError, match="(window|width) must be"):
            shuffle(*bad)


@pytest.mark.parametrize("order", [(), [0, 1], (0, 2), (1, 2), (0, 0), (0, 1.0), (False, True), (0, 1, 2, -1), range(4), "01"])
def test_what_is_no_order_is_refused(order):
    with pytest.raises(ValueError, match="^order must be a tuple of the numbers from 0 up, each once"):
        Permuted(NM(2, 4), order)


def test_names_tell_orders_apart():
    names = {str(Permuted(inner, random_order(8, seed))) for inner in (NM(2, 4), Dense()) for seed in range(500)}
    assert len(names) == 2 * len({random_order(8, seed) for seed in range(500)})
    assert str(Permuted()).startswith("permuted 2:4 16#")


# ---- stored and multiplied


def test_the_order_is_what_it_costs_more():
    for inner, window, itemsize in ((NM(2, 4), 16, 1), (NM(2, 4), 256, 1), (NM(2, 4), 512, 2), (Block(16, 16, 0.25), 64, 1)):
        weight, structure = draw(64, 1024), Permuted(inner, random_order(window))
        packed = structure.pack(weight * structure.mask(weight.abs()))
        alone = inner.pack(weight * inner.mask(weight.abs()))
        assert stored_bytes(packed) - stored_bytes(alone) == window * itemsize
        assert structure.index_bits((64, 1024)) - inner.index_bits((64, 1024)) == 8 * window * itemsize


def test_sp_of_x_is_s_of_x_in_order():
    """S P x == S x[perm], and the same for both gradients, for with the kernels of the inner structure."""
    structure = Permuted(Block(8, 8, 0.25), random_order(64))
    weight, x, dy = draw(32, 128), draw(5, 128, seed=1), draw(5, 32, seed=2)
    weight = weight * structure.mask(weight.abs())
    order = columns(structure.order, 128, weight.device)
    matrix = torch.eye(128, dtype=torch.float64)[order]  # P: row i has its one in column order[i]
    torch.testing.assert_close(weight[:, order] @ matrix, weight)
    packed = structure.pack(weight)
    inner = weight[:, order]
    assert set(structure.kernels()) == set(structure.inner.kernels())
    for name in ("reference", "gather"):
        torch.testing.assert_close(structure.kernels()[name](packed)(x), x[:, order] @ inner.T)
        torch.testing.assert_close(structure.kernels("spmmt")[name](packed)(dy), (dy @ inner) @ matrix)


@pytest.mark.parametrize("change, what", [
    (lambda packed: {"order": packed.order.flip(0)}, "packed.order must be the order of permuted 2:4"),
    (lambda packed: {"order": packed.order[:8]}, "packed.order must be torch.uint8 .16."),
    (lambda packed: {"values": packed.values[:1]}, "packed.values must be"),
    (lambda packed: {"shape": (4, 32)}, "packed.inner must be of shape .4, 32., got .2, 32."),
    (lambda packed: {"shape": (2, 8)}, "needs a shape whose in is a multiple of 16"),
])
def test_corrupt_operands(change, what):
    weight = draw(2, 32)
    packed = Permuted().pack(weight * Permuted().mask(weight))
    with pytest.raises(ValueError, match=what):
        Permuted().unpack(packed._replace(**change(packed)))


# ---- a stack of layers


def block_diagonal(size, block):
    return torch.block_diag(*torch.ones(size // block, block, block)).bool()


@pytest.mark.parametrize("size, block", [(64, 8), (64, 16), (60, 6)])
def test_orders_let_a_stack_of_layers_reach_everything(size, block):
    """PA-DST's theory: blocks alone stay at block / size for ever; behind orders all is reached by ceil(size / block) layers."""
    alone = block_diagonal(size, block)
    depth = math.ceil(size / block)
    assert reached([alone] * depth) == pytest.approx([block / size] * depth)
    shares = reached([alone[:, list(random_order(size, seed))] for seed in range(depth)])
    assert shares[-1] == 1 and shares == sorted(shares) and shares[0] == pytest.approx(block / size)


def test_the_perfect_shuffle_is_as_fast_as_can_be():
    """One input reaches at most block^layers outputs: 8 * 8 = 64 after two."""
    mask = Permuted(Dense(), shuffle(64, 8)).ordered(block_diagonal(64, 8))
    assert reached([mask, mask]) == [1 / 8, 1]


def test_orders_lower_the_loss_of_a_stack_of_blocks():
    """Three linear layers of 4 blocks learn to reverse 32 features; without orders most targets are out of reach."""
    final = [trained(orders) for orders in (None, [list(random_order(32, seed)) for seed in range(3)])]
    assert final[1] < 0.5 * final[0]


def trained(orders, steps=150):
    mask = block_diagonal(32, 8).double()
    layers = [(draw(32, 32, seed=layer) / 3 * mask).requires_grad_() for layer in range(3)]
    descent = torch.optim.Adam(layers, lr=0.01)
    for step in range(steps):
        x = draw(64, 32, seed=step)
        y = x
        for layer, weight in enumerate(layers):
            y = (y if orders is None else y[:, orders[layer]]) @ (weight * mask).T
        loss = (y - x.flip(1)).square().mean()
        descent.zero_grad()
        loss.backward()
        descent.step()
    return loss.item()
