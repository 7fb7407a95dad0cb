"""Masks that drop and grow: by hand on a 4 x 4 weight, then what must hold of every structure and in training."""

import pytest
import torch

from sparsesurvey.data import markov
from sparsesurvey.diagnose import EXPLORED
from sparsesurvey.linear import SparseLinear, sparse_layers, sparsify
from sparsesurvey.mistral import build
from sparsesurvey.packed import PackedLinear
from sparsesurvey.recipes import SET, PruneAndGrow, RigL
from sparsesurvey.recipes.growing import grows, regrown, stays
from sparsesurvey.structure import Pattern
from sparsesurvey.structures import (
    NM, VNM, Balanced, Block, Diagonal, Neurons, TileWise, Transposable, Unstructured, all_structures,
)
from sparsesurvey.train import TrainConfig, train

MASK = torch.tensor([[1, 1, 0, 0],
                     [1, 1, 0, 0],
                     [0, 0, 1, 1],
                     [0, 0, 1, 1]]).bool()
SIZE = torch.tensor([[9.0, 1.0, 0.0, 0.0],
                     [2.0, 8.0, 0.0, 0.0],
                     [0.0, 0.0, 7.0, 6.0],
                     [0.0, 0.0, 5.0, 4.0]])
GRADIENT = torch.tensor([[1.0, 99.0, 2.0, 8.0],
                         [98.0, 1.0, 3.0, 4.0],
                         [9.0, 5.0, 1.0, 1.0],
                         [6.0, 7.0, 1.0, 97.0]])
ABLE = [variant for kind in all_structures().values() for variant in kind.variants()
        if isinstance(variant, Pattern) and grows(variant)]


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer_of(structure, recipe, weight=SIZE, mask=MASK):
    layer = SparseLinear(weight, structure, recipe)
    layer.mask.copy_(mask)
    layer.weight.data.copy_(weight * mask)
    return layer


def step_of(layer, step, steps, gradient, state=None):
    """What a training does around an optimizer step that leaves the weight alone."""
    layer.prepare(step - 1, steps)
    layer.weight.grad = gradient.clone()
    layer.edit_grad()
    layer.update(step, steps, {} if state is None else state)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- by hand --------------------------------------------------------------------------------------------------------

def test_drop_and_grow_by_hand():
    """A quarter of 8 goes, the 1 and the 2; the 9 and the 8 grow, though what was dropped has a gradient of 99 and 98."""
    found = regrown(MASK, SIZE, Unstructured(0.5), 0.25, GRADIENT)
    assert found.int().tolist() == [[1, 0, 0, 1],
                                    [0, 1, 0, 0],
                                    [1, 0, 1, 1],
                                    [0, 0, 1, 1]]


def test_rigl_by_hand():
    layer = layer_of(Unstructured(0.5), RigL(fraction=0.5, every=1, until=1.0))
    state = {"step": torch.tensor(5.0), "exp_avg": torch.ones(4, 4), "exp_avg_sq": torch.full((4, 4), 2.0)}
    step_of(layer, 1, 2, GRADIENT, state)  # in the middle of the cosine: half of the fraction, two of eight
    assert layer.weight.grad.equal(GRADIENT * MASK)  # the optimizer saw the gradient of what was kept
    assert layer.mask.int().tolist() == [[1, 0, 0, 1], [0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 1, 1]]
    assert layer.weight.tolist() == [[9, 0, 0, 0], [0, 8, 0, 0], [0, 0, 7, 6], [0, 0, 5, 4]]  # the new ones are zero
    kept = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    assert torch.equal(state["exp_avg"], kept) and torch.equal(state["exp_avg_sq"], 2 * kept) and state["step"] == 5
    assert not hasattr(layer, "dense_grad")


def test_it_changes_when_it_should():
    layer = layer_of(Unstructured(0.5), RigL(every=4, until=0.75))
    moved = []
    for step in range(1, 21):
        before = layer.mask.clone()
        step_of(layer, step, 20, GRADIENT.roll(step))
        layer.weight.data += SIZE.roll(step) * layer.mask
        if not torch.equal(before, layer.mask):
            moved.append(step)
        assert Unstructured(0.5).holds(layer.mask) and layer.mask.sum() == 8
    assert set(moved) <= {4, 8, 12} and 4 in moved
    recipe = RigL()
    assert [step for step in range(401) if recipe.due(step, 400)] == [0, 100, 200, 300]
    assert [recipe.drop(step, 400) for step in (0, 150, 300)] == pytest.approx([0.3, 0.15, 0.0])


def test_without_others_to_grow_the_largest_of_the_dropped_stay():
    """15 of 16 are kept, half shall go: only one other can grow, so that only the smallest goes."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[3, 3] = False
    weight = torch.arange(1.0, 17.0).view(4, 4)
    layer = layer_of(Unstructured(15 / 16), RigL(fraction=1.0, every=1, until=1.0), weight, mask)
    state = {"exp_avg": torch.ones(4, 4)}
    step_of(layer, 1, 2, torch.ones(4, 4), state)
    assert not layer.mask[0, 0] and layer.mask.sum() == 15
    assert layer.weight.flatten().tolist() == [0.0, *range(2, 16), 0.0]  # what stayed was never reset
    assert state["exp_avg"].flatten().tolist() == [0.0, *[1.0] * 14, 0.0]


def test_blocks_by_hand():
    """By norm the block of ten 1s is the least, though that of a single 4 has the smaller sum."""
    weight, mask = torch.zeros(4, 16), torch.ones(4, 16, dtype=torch.bool)
    weight[:2, :5], weight[2, 0], weight[0, 8:12] = 1.0, 4.0, 9.0
    mask[2:, 8:] = False  # three of the four blocks of 2 x 8 are kept
    gradient = torch.zeros(4, 16)
    gradient[2, 9] = 0.1
    structure = Block(2, 8, 0.75)
    layer = layer_of(structure, RigL(fraction=0.67, every=1, until=1.0), weight, mask)
    step_of(layer, 1, 2, gradient)
    blocks = layer.mask.view(2, 2, 2, 8).any(3).any(1)
    assert blocks.tolist() == [[False, True], [True, True]] and structure.holds(layer.mask)
    assert layer.weight[2, 0] == 4 and not layer.weight[2:, 8:].any()


def test_set_draws():
    """The same draw for the same layer and step, another for another; what is dropped is RigL's choice."""
    found = []
    for seed, step in [(1, 1), (1, 1), (1, 3), (2, 1)]:
        layer = SparseLinear(SIZE, Unstructured(0.5), SET(fraction=0.5, every=1, until=1.0), seed=seed)
        layer.mask.copy_(MASK)
        layer.weight.data.copy_(SIZE)
        step_of(layer, step, 2 * step, GRADIENT)
        assert not layer.mask[0, 1] and not layer.mask[1, 0] and layer.mask.sum() == 8
        assert not hasattr(layer, "dense_grad")
        found.append(layer.mask.clone())
    assert torch.equal(found[0], found[1]) and not all(torch.equal(found[0], other) for other in found[2:])


# ---- the ramp -------------------------------------------------------------------------------------------------------

def test_ramp_by_hand():
    recipe, structure = PruneAndGrow(every=10, ramp=0.5), Unstructured(0.2)
    assert [step for step in range(1, 101) if recipe.due(step, 100)] == [10, 20, 30, 40, 50, 60, 70]
    densities = [recipe.target(structure, step, 100).density for step in (10, 20, 30, 40, 50, 60)]
    assert densities == pytest.approx([0.2 + 0.8 * left**3 for left in (0.8, 0.6, 0.4, 0.2, 0, 0)])
    assert recipe.target(structure, 50, 100) is structure
    assert PruneAndGrow(ramp=0.5).due(16, 33) and not PruneAndGrow(ramp=0.5).due(15, 33)  # it ends, whatever ``every`` is


def test_prune_and_grow_ends_in_its_structure():
    structure, weight = Block(4, 4, 0.25), random(32, 32) - 0.5
    layer = SparseLinear(weight, structure, PruneAndGrow(every=5, ramp=0.5))
    assert layer.density == 1 and torch.equal(layer.weight, weight)  # dense, as it is
    densities, grown = [], False
    for step in range(1, 41):
        before = layer.mask.clone()
        step_of(layer, step, 40, random(32, 32, seed=step))
        layer.weight.data += 0.1 * random(32, 32, seed=100 + step) * layer.mask
        densities.append(layer.density)
        grown = grown or bool((layer.mask & ~before).any())
    assert densities == sorted(densities, reverse=True) and densities[4] < 1 and densities[18] > 0.25
    assert densities[19:] == [0.25] * 21 and structure.holds(layer.mask) and grown


# ---- every structure ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", ABLE, ids=str)
def test_units_stay_drop_and_grow(structure):
    shape = [side * max(8, -(-128 // side)) for side in structure.tile]
    mask, size, growth = structure.mask(random(*shape)), random(*shape, seed=1), random(*shape, seed=2)
    for fraction in (0.3, 0.05, 0.0):
        stay = stays(mask, size, structure, fraction)
        after = regrown(mask, size, structure, fraction, growth)
        assert structure.holds(after) and after.sum() == mask.sum()
        assert torch.equal(stay, stay & after)
        if structure.density <= 0.5:  # room for all that is dropped
            assert torch.equal(mask & after, stay)
    assert torch.equal(after, mask)  # nothing dropped, nothing grown


def test_which_structures_grow():
    kinds = {type(structure) for structure in ABLE}
    assert {Unstructured, Block, Diagonal, Neurons, Balanced, TileWise} <= kinds
    for structure in (NM(2, 4), VNM(16, 2, 8), Transposable(2, 4), TileWise(16, 0.5)):
        for recipe in (RigL(), SET(), PruneAndGrow()):
            with pytest.raises(ValueError, match=f"recipe {recipe} needs a structure that keeps or drops units one by one"):
                SparseLinear(torch.rand(32, 32), structure, recipe)


@pytest.mark.parametrize("make, match", [
    (lambda: RigL(fraction=1.5), "fraction must be a number from 0 to 1, got 1.5"),
    (lambda: SET(every=0), "every must be an integer of at least 1, got 0"),
    (lambda: RigL(until=-1.0), "until must be a number from 0 to 1, got -1.0"),
    (lambda: PruneAndGrow(ramp=0.9), "ramp must be at most until, 0.75, got 0.9"),
])
def test_bad_constants(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_a_mask_that_moves_is_not_packed():
    with pytest.raises(ValueError, match="mask never changes"):
        PackedLinear(SparseLinear(torch.rand(32, 32), Block(8, 8, 0.5), RigL()), "reference")


# ---- in training ----------------------------------------------------------------------------------------------------

def test_growing_explores():
    """More weights were in some mask than are kept; with Muon too, whose update is dense, only the kept live."""
    language = markov(length=1 << 13, valid=1 << 11)
    for recipe, optimizer in [(RigL(every=3), "adamw"), (SET(every=3), "muon"), (PruneAndGrow(every=3), "adamw")]:
        model = sparsify(build("markov"), Unstructured(0.1), recipe)
        config = TrainConfig(16, batch=4, seq=16, lr=3e-3, warmup=2, eval_every=16, eval_batches=2, optimizer=optimizer)
        history = train(model, language, config, progress=False)
        assert history.valid[-1][1] < history.valid[0][1]
        (_, explored), = history.trace[EXPLORED]
        assert explored > 0.11
        for layer in sparse_layers(model).values():
            assert Unstructured(0.1).holds(layer.mask) and not layer.weight[~layer.mask].any()
