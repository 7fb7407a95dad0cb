"""Recipes whose mask follows the weight, by cases that can be verified by hand and by the numbers that are known."""

from dataclasses import dataclass
from math import exp, inf

import pytest
import torch

from sparsesurvey.data import markov
from sparsesurvey.linear import SparseLinear, densify, sparse_layers, sparsify
from sparsesurvey.mistral import build
from sparsesurvey.optim import AdamW
from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes import (
    FST, PADST, SRSTE, SSTE, STE, STEP, DenseLast, Gradual, Inheritance, MaskDecay, SLoPe, Static, StructureDecay,
)
from sparsesurvey.recipes.s_ste import soft_threshold
from sparsesurvey.scores import magnitude
from sparsesurvey.structures import NM, TVW, Block, Diagonal, Transposable, Unstructured
from sparsesurvey.train import TrainConfig, train

ROW = torch.tensor([[3.0, -1.0, 2.0, 0.5]])


def layer(recipe, weight=ROW, structure=NM(2, 4), **options):
    return SparseLinear(weight.clone(), structure, recipe, **options)


def step(made, done, steps, weight=None, state=None):
    """As ``train`` does: prepared, the weight changed by an optimizer, then updated; ``done`` steps are over."""
    made.prepare(done - 1, steps)
    if weight is not None:
        made.weight.data.copy_(weight)
    made.update(done, steps, {} if state is None else state)
    made.prepare(done, steps)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- STE and SR-STE -------------------------------------------------------------------------------------------------

def test_ste_masks_the_forward_product_and_dx_and_leaves_dw_whole():
    made = layer(STE())
    x, dy = torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True), torch.tensor([[10.0]])
    y = made(x)
    y.backward(dy)
    assert y.item() == 3 * 1 + 2 * 3
    assert x.grad.tolist() == [[30, 0, 20, 0]]
    made.edit_grad()
    assert made.weight.grad.tolist() == [[10, 20, 30, 40]]


def test_ste_follows_the_weights_until_it_freezes():
    made = layer(STE(every=2, freeze=0.5))
    other = torch.tensor([[0.0, 5.0, 0.0, 6.0]])
    step(made, 1, 8, other)
    assert made.mask.tolist() == [[True, False, True, False]]  # not every step
    step(made, 2, 8)
    assert made.mask.tolist() == [[False, True, False, True]]
    step(made, 4, 8, ROW)
    step(made, 6, 8, other)
    assert made.mask.tolist() == [[True, False, True, False]]  # half of the steps are over


def test_ste_ranks_by_any_score():
    made = layer(STE(score=lambda weight, inputs: -weight.abs()))
    assert made.mask.tolist() == [[False, True, False, True]]
    assert str(STE(score=magnitude)) == "ste, score magnitude"


def test_sr_ste_adds_to_the_gradient_what_the_mask_leaves_out():
    made = layer(SRSTE(decay=0.1))
    made.weight.grad = torch.ones(1, 4)
    made.edit_grad()
    torch.testing.assert_close(made.weight.grad, torch.tensor([[1.0, 1 - 0.1, 1.0, 1 + 0.05]]))
    step(made, 1, 10)
    assert torch.equal(made.weight.detach(), ROW)


def test_sr_ste_on_the_weight_takes_off_rate_times_decay():
    made = layer(SRSTE(decay=0.1, on="weight"))
    made.weight.grad = torch.ones(1, 4)
    made.edit_grad()
    assert torch.equal(made.weight.grad, torch.ones(1, 4))
    made.rate = 0.5
    step(made, 1, 10)
    torch.testing.assert_close(made.weight.detach(), torch.tensor([[3.0, -0.95, 2.0, 0.475]]))


def test_sr_ste_with_sgd_is_the_published_step():
    """One step of W - rate (g + decay (1 - m) W) in float64, for random numbers."""
    weight, x, dy = random(8, 16).double(), random(5, 16, seed=1).double(), random(5, 8, seed=2).double()
    made = layer(SRSTE(decay=0.3), weight)
    made(x).backward(dy)
    made.edit_grad()
    torch.optim.SGD([made.weight], 0.1).step()
    mask = NM(2, 4).mask(weight.abs())
    expected = weight - 0.1 * (dy.T @ x + 0.3 * torch.where(mask, 0, weight))
    torch.testing.assert_close(made.weight.detach(), expected)


# ---- S-STE ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n, m, weight, expected", [
    (2, 4, [0.1, 1, 1, 2], [0, 0, 0, 1]),  # a tie of the second and the third: one is left
    (2, 4, [-3, 1, 2, 0.5], [-2, 0, 1, 0]),
    (1, 4, [-3, 1, 2, 0.5], [-1, 0, 0, 0]),
    (3, 4, [-3, 1, 2, 0.5], [-2.5, 0.5, 1.5, 0]),
    (4, 4, [-3, 1, 2, 0.5], [-3, 1, 2, 0.5]),
    (2, 4, [1, 1, 1, 1], [0, 0, 0, 0]),
    (2, 3, [5, -4, 1, 0, 0, 2], [4, -3, 0, 0, 0, 2]),
])
def test_soft_threshold(n, m, weight, expected):
    assert soft_threshold(torch.tensor([weight], dtype=torch.float32), n, m).tolist() == [expected]


def test_s_ste_on_gaussian_weights():
    weight = random(512, 512)
    made = layer(SSTE(), weight)
    assert made.scale.item() == pytest.approx(1.483, abs=0.005)
    error = lambda other: ((other - weight).square().sum() / weight.square().sum()).item()
    assert error(made.dense()) == pytest.approx(0.257, abs=0.003)
    assert error(weight * NM(2, 4).mask(weight.abs())) == pytest.approx(0.132, abs=0.003)
    soft, scale = soft_threshold(weight, 2, 4), made.scale.item()
    assert error(scale * soft) < min(error((scale + off) * soft) for off in (-0.01, 0.01))  # that of least squares


def test_s_ste_is_continuous_where_hard_masks_jump():
    """Over a tie: the weight moves by 2 eps, the hard mask's by 1, the soft one's by no more than 2 eps each entry."""
    for eps in (1e-2, 1e-4):
        one, two = (torch.tensor([[0.1, 1 + sign * eps, 1 - sign * eps, 2.0]]) for sign in (1, -1))
        soft = (soft_threshold(one, 2, 4) - soft_threshold(two, 2, 4)).abs().max()
        hard = (one * NM(2, 4).mask(one.abs()) - two * NM(2, 4).mask(two.abs())).abs().max()
        assert soft <= 2.001 * eps and hard >= 1


@pytest.mark.parametrize("structure", [NM(2, 4), NM(1, 4), NM(3, 5), NM(2, 8), NM(4, 4)], ids=str)
def test_s_ste_of_any_groups(structure):
    made = layer(SSTE(), random(6, 40), structure)
    scale = made.scale.clone()
    step(made, 1, 10, random(6, 40, seed=1))
    assert torch.equal(made.scale, scale)  # it does not follow
    assert structure.holds(made.mask) and torch.equal(made.dense() != 0, made.mask)
    torch.testing.assert_close(made.dense(), scale * soft_threshold(made.weight.detach(), structure.n, structure.m))


@pytest.mark.parametrize("exact", [False, True])
def test_s_ste_draws_its_weight_gradient_without_bias(exact):
    made = layer(SSTE(exact=exact), random(3, 8))
    x, dy = random(8, 8, seed=1), random(8, 3, seed=2)
    torch.manual_seed(0)
    draws = []
    for _ in range(600):
        made.weight.grad = None
        made(x).backward(dy)
        draws.append(made.weight.grad)
    draws = torch.stack(draws).double()
    error = (draws.mean(0) - (dy.T @ x).double()) / (draws.std(0) / len(draws) ** 0.5)
    assert draws.std(0).min() > 0.1 and error.abs().max() < 4


def test_s_ste_needs_fours_of_tokens():
    with pytest.raises(ValueError, match="tokens .*multiple of 4.* 6"):
        layer(SSTE())(random(6, 4)).sum().backward()
    layer(SSTE(mvue=False))(random(6, 4)).sum().backward()


def test_s_ste_of_nothing():
    assert layer(SSTE(), torch.zeros(2, 8)).dense().tolist() == [[0] * 8] * 2


# ---- mask decay -----------------------------------------------------------------------------------------------------

def test_linear_decay():
    values = [MaskDecay(warmup=0.2, tune=0.3).value(at, 10) for at in range(11)]
    assert values == pytest.approx([1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0, 0, 0, 0]) and values[7:] == [0] * 4


def test_exponential_decay():
    values = [MaskDecay("exponential", warmup=0.2, tune=0.3).value(at, 10) for at in range(11)]
    assert values[:7] == pytest.approx([1, 1, *(exp(-at) for at in range(5))]) and values[7:] == [0] * 4


@pytest.mark.parametrize("recipe", [MaskDecay(), MaskDecay("exponential"), MaskDecay(warmup=0, tune=0)], ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 320])
def test_decay_falls_to_exactly_nothing(recipe, steps):
    values = [recipe.value(at, steps) for at in range(steps + 1)]
    assert values[0] == 1 and values[-1] == 0 and all(later <= earlier for earlier, later in zip(values, values[1:]))


def test_decayed_weight():
    made = layer(MaskDecay(warmup=0, tune=0))
    assert torch.equal(made.dense(), ROW)
    made.prepare(5, 10)
    assert made.dense().tolist() == [[3, -0.5, 2, 0.25]]
    x = torch.ones(1, 4, requires_grad=True)
    made(x).sum().backward()
    assert x.grad.tolist() == [[3, -0.5, 2, 0.25]] and made.weight.grad.tolist() == [[1, 1, 1, 1]]
    made.prepare(10, 10)
    assert made.dense().tolist() == [[3, 0, 2, 0]]


# ---- structure decay ------------------------------------------------------------------------------------------------

def test_structure_decays_in_equal_frames():
    made = layer(StructureDecay(tune=0), random(4, 16), NM(1, 16))
    kept = [made.mask[0].sum().item()]
    for done in range(1, 11):
        step(made, done, 10)
        kept.append(made.mask[0].sum().item())
    assert kept == [15, 15, 8, 8, 4, 4, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("recipe, structure, inputs, expected", [
    (StructureDecay(), NM(2, 4), 16, ["3:4", "2:4"]), (StructureDecay(), NM(3, 4), 16, ["3:4"]),
    (StructureDecay(), NM(3, 5), 15, ["4:5", "3:5"]), (StructureDecay(), NM(4, 4), 16, ["4:4"]),
    (StructureDecay("geometric"), NM(1, 8), 64, ["8:64", "4:32", "2:16", "1:8"]),
    (StructureDecay("geometric"), NM(2, 4), 24, ["4:8", "2:4"]),  # 16 and 32 do not divide 24
    (StructureDecay("geometric"), NM(2, 16), 128, ["8:64", "4:32", "2:16"]),
    (Inheritance(), NM(1, 16), 16, ["8:16", "4:16", "2:16", "1:16"]), (Inheritance(), NM(2, 4), 16, ["2:4"]),
])
def test_chains(recipe, structure, inputs, expected):
    assert [str(frame) for frame in recipe.frames(structure, inputs)] == expected


def test_every_frame_holds_and_a_dense_start():
    recipe, weight = StructureDecay("geometric", warmup=0.2, tune=0.0), random(4, 64)
    made, seen = layer(recipe, weight, NM(2, 8)), []
    for done in range(1, 11):
        assert made.mask.all() == (done <= 2)
        step(made, done, 10, random(4, 64, seed=done))
        frame = recipe.now(NM(2, 8), 64, done, 10)
        assert made.mask.all() if frame is None else frame.holds(made.mask)
        seen.append(str(frame))
    assert seen == ["None", "16:64", "16:64", "8:32", "8:32", "4:16", "4:16", "2:8", "2:8", "2:8"]


def test_inheritance_decays_and_starts_from_the_dense_weights():
    made = layer(Inheritance(decay=0.1), random(2, 8), NM(1, 8))
    assert made.mask.sum(1).tolist() == [4, 4]
    made.weight.grad = torch.zeros(2, 8)
    made.edit_grad()
    torch.testing.assert_close(made.weight.grad, 0.1 * made.weight.detach() * ~made.mask)
    step(made, 5, 9)
    assert made.mask.sum(1).tolist() == [2, 2] and (made.weight != 0).all()  # what is masked is not lost


# ---- dense last -----------------------------------------------------------------------------------------------------

def test_every_hook_is_handed_on():
    hooks = {name for name, thing in vars(Recipe).items() if callable(thing) and not name.startswith("_")} - {"variants"}
    assert hooks <= vars(DenseLast).keys()


@dataclass(frozen=True)
class Spy(Recipe):
    """Counts down beside the weight: what an inner recipe is told of the time."""

    def begin(self, layer):
        layer.register_buffer("told", torch.zeros(2, 2, dtype=torch.int64))

    def prepare(self, layer, step, steps):
        layer.told[0] = torch.tensor([step, steps])

    def update(self, layer, step, steps, state):
        layer.told[1] = torch.tensor([step, steps])


def test_the_inner_recipe_lives_in_the_sparse_phase():
    made = layer(DenseLast(Spy(), sparse=0.6))
    told = []
    for done in range(1, 6):
        step(made, done, 5)
        told.append(made.told.tolist())
    assert told == [[[1, 3], [1, 3]], [[2, 3], [2, 3]], *[[[3, 3], [3, 3]]] * 3]


def test_dense_last():
    made = layer(DenseLast(SRSTE(decay=0.1), sparse=0.5))
    step(made, 1, 4)
    assert made.dense().tolist() == [[3, 0, 2, 0]] and made.density == 0.5
    step(made, 2, 4)
    assert torch.equal(made.dense(), ROW) and made.density == 1
    made.weight.grad = torch.ones(1, 4)
    made.edit_grad()
    assert torch.equal(made.weight.grad, torch.ones(1, 4))  # no decay
    step(made, 3, 4, 2 * ROW)
    assert torch.equal(made(torch.eye(4)).detach().T, 2 * ROW) and made.density == 1


def test_dense_last_turns_off_the_draws():
    made = layer(DenseLast(FST(), sparse=0.5), random(8, 8), Transposable(2, 4))
    x, dy = random(8, 8, seed=1), random(8, 8, seed=2)
    made.prepare(0, 4)
    made(x).backward(dy)
    assert not torch.allclose(made.weight.grad, dy.T @ x, rtol=0.01)
    made.prepare(2, 4)
    made.weight.grad = None
    made(x).backward(dy)
    torch.testing.assert_close(made.weight.grad, dy.T @ x)


def test_dense_last_never_without_a_dense_phase():
    made = layer(DenseLast(STE(), sparse=1.0))
    step(made, 4, 4)
    assert made.dense().tolist() == [[3, 0, 2, 0]] and made.density == 0.5


@pytest.mark.parametrize("inner", [SLoPe(lazy=0.5), Static(scale_lr=True), SSTE()], ids=str)
def test_dense_last_of_others(inner):
    """Adapters live on in the dense phase; sparse pre-training with dense fine-tuning regrows what was zero."""
    trained = sparsify(build("markov"), NM(2, 4), DenseLast(inner, 0.7))
    settings = TrainConfig(steps=10, batch=2, seq=8, warmup=1, eval_every=10, eval_batches=1)
    train(trained, markov(length=1 << 12, valid=1 << 10), settings, progress=False)
    assert all((made.dense() != 0).all() for made in sparse_layers(trained).values())
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        logits = trained.eval()(tokens).logits
        torch.testing.assert_close(densify(trained)(tokens).logits, logits, rtol=1e-4, atol=1e-5)


# ---- gradual pruning ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", [Unstructured(0.25), Block(4, 4, 0.25), Diagonal(0.25)], ids=str)
def test_density_falls_along_the_cubic_curve(structure):
    made = layer(Gradual(every=2, after=0.25, until=0.75), random(16, 16), structure)
    assert made.density == 1
    kept, before = [], made.mask.clone()
    for done in range(1, 17):
        step(made, done, 16, made.weight.detach() + 0.1 * random(16, 16, seed=done) * made.mask)
        assert torch.equal(made.weight != 0, made.mask) and not (made.mask & ~before).any()  # what is gone stays away
        before = made.mask.clone()
        kept.append(made.density)
    cubic = [1 - 0.75 * (1 - (1 - (at - 4) / 8) ** 3) for at in (4, 6, 8, 10, 12)]
    coarse = 1 / 16 if structure != Unstructured(0.25) else 1 / 256
    assert kept[3:12:2] == pytest.approx(cubic, abs=0.501 * coarse)
    assert kept[:5] == [1] * 5 and kept[11:] == [0.25] * 5 and structure.holds(made.mask)


def test_gradual_gives_what_is_pruned_no_gradient():
    made = layer(Gradual(after=0, until=0), structure=Unstructured(0.5))
    step(made, 1, 1)
    made.weight.grad = torch.ones(1, 4)
    made.edit_grad()
    assert made.weight.grad.tolist() == [[1, 0, 1, 0]] and made.weight.tolist() == [[3, 0, 2, 0]]


# ---- STEP -----------------------------------------------------------------------------------------------------------

def test_adamw_with_a_frozen_second_moment_by_hand():
    """In float64: three steps of AdamW, then three with v and its bias correction as they were."""
    weight, gradients = random(3, 4).double(), random(6, 3, 4, seed=1).double()
    rate, first, second, eps, decay = 0.1, 0.9, 0.95, 1e-8, 0.2
    p = torch.nn.Parameter(weight.clone())
    optimizer = AdamW([{"params": [p], "lr": rate, "weight_decay": decay}], betas=(first, second), eps=eps, fused=True)
    w, m, v = weight.clone(), torch.zeros(3, 4).double(), torch.zeros(3, 4).double()
    for count, gradient in enumerate(gradients, start=1):
        optimizer.param_groups[0]["frozen"] = count > 3
        p.grad = gradient.clone()
        optimizer.step()
        m = first * m + (1 - first) * gradient
        if count <= 3:
            v = second * v + (1 - second) * gradient**2
        w = w * (1 - rate * decay)
        w = w - rate * (m / (1 - first**count)) / ((v / (1 - second ** min(count, 3))).sqrt() + eps)
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], v, rtol=1e-12, atol=1e-12)


def moment(value):
    return {"exp_avg_sq": torch.full((1, 4), float(value))}


def test_step_switches_when_the_moment_is_steady():
    """|v_t - v_(t-1)| is 8, 4, 2, 1, 0, 0: over a window of two the mean is below 1 after the fifth step."""
    made = layer(STEP(window=2, eps=1.0, earliest=0.1, latest=0.9))
    for done, value in enumerate([8, 12, 14, 15, 15, 15], start=1):
        assert made.density == 1 and not made.recipe.freezes_variance(made)
        step(made, done, 10, state=moment(value))
        if made.switched:
            break
    assert made.switched == 5 and made.recipe.freezes_variance(made)
    assert made.dense().tolist() == [[3, 0, 2, 0]]
    step(made, 6, 10, torch.tensor([[0.0, 5.0, 0.0, 6.0]]), moment(15))
    assert made.dense().tolist() == [[0, 5, 0, 6]]  # and learns masks from then on


@pytest.mark.parametrize("eps, expected", [(0.0, 5), (1e9, 2)])
def test_step_switches_between_a_tenth_and_half_of_the_steps(eps, expected):
    made = layer(STEP(eps=eps))
    for done in range(1, 11):
        step(made, done, 10, state=moment(done))
    assert made.switched == expected


def test_step_freezes_the_moment_in_training():
    seen = []

    @dataclass(frozen=True)
    class Watched(STEP):
        def update(self, layer, step, steps, state):
            seen.append(state["exp_avg_sq"].clone())
            super().update(layer, step, steps, state)

    trained = sparsify(build("markov"), NM(2, 4), Watched(eps=0.0), ["gate_proj"])
    settings = TrainConfig(steps=8, batch=2, seq=8, warmup=1, eval_every=8, eval_batches=1)
    train(trained, markov(length=1 << 12, valid=1 << 10), settings, progress=False)
    of_one = seen[::2]  # two layers
    moved = [not torch.equal(one, two) for one, two in zip(of_one, of_one[1:])]
    assert moved == [True] * 3 + [False] * 4
    for made in sparse_layers(trained).values():
        assert made.switched == 4 and NM(2, 4).holds(made.dense() != 0)


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, message", [
    (lambda: STE(every=0), "every must be an integer of at least 1, got 0"),
    (lambda: STE(every=2.0), "every must be an integer of at least 1, got 2.0"),
    (lambda: STE(freeze=1.5), "freeze must be a number from 0 to 1, got 1.5"),
    (lambda: SRSTE(decay=-1), "decay must be a number of at least 0, got -1"),
    (lambda: SRSTE(decay=inf), "decay must be a number of at least 0, got inf"),
    (lambda: SRSTE(on="mask"), "on must be one of gradient, weight, got 'mask'"),
    (lambda: SSTE(mvue=False, exact=True), "exact must be False without mvue, got True"),
    (lambda: MaskDecay("cosine"), "form must be one of linear, exponential, got 'cosine'"),
    (lambda: MaskDecay(warmup=0.6, tune=0.4), r"warmup \+ tune must be below 1, the share of all steps, got 0.6 \+ 0.4"),
    (lambda: StructureDecay("densify"), "chain must be one of stepwise, geometric, inherit, got 'densify'"),
    (lambda: DenseLast(sparse=0), "sparse must be a share of the steps above 0"),
    (lambda: DenseLast(sparse=2), "sparse must be a number from 0 to 1, got 2"),
    (lambda: DenseLast(DenseLast()), "recipe must be a recipe that does not end dense, got DenseLast"),
    (lambda: DenseLast("sr-ste"), "recipe must be a recipe that does not end dense, got 'sr-ste'"),
    (lambda: DenseLast(PADST()), "recipe must leave the order of x alone, .* got pa-dst"),
    (lambda: Gradual(after=0.8, until=0.5), "after must be at most until, 0.5, got 0.8"),
    (lambda: STEP(window=0), "window must be an integer of at least 1, got 0"),
    (lambda: STEP(earliest=0.5, latest=0.2), "latest must be a number from 0.5 to 1, got 0.2"),
])
def test_bad_constants(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("recipe, structure, message", [
    (SSTE(), Block(1, 4, 0.5), "recipe s-ste needs n:m along the inputs, such as .*, got block 1x4 50%"),
    (SSTE(), NM(2, 4, "out"), "recipe s-ste needs n:m along the inputs, .*, got 2:4 out"),
    (StructureDecay(), Transposable(2, 4), "recipe structure decay stepwise needs n:m along the inputs, .*, got transposable"),
    (StructureDecay("geometric"), NM(1, 64), "recipe structure decay geometric needs groups of at most 32, .*, got 1:64"),
    (DenseLast(SSTE()), Block(1, 4, 0.5), "recipe s-ste needs n:m along the inputs"),
    (Gradual(), TVW(16, 0.25), "recipe gradual needs a structure with a density to set, up to 1, .*, got TW 16 25% 2:4"),
    (Gradual(), NM(2, 4), "recipe gradual needs a structure with a density to set, .*, got 2:4"),
])
def test_what_cannot_be_served(recipe, structure, message):
    with pytest.raises(ValueError, match=message):
        recipe.check(structure)


def test_constants_are_in_the_name():
    assert [str(recipe) for recipe in (
        STE(every=10, freeze=1.0), SRSTE(decay=6e-5), SSTE(exact=True), MaskDecay("exponential", warmup=0.0),
        StructureDecay("geometric", 2e-4), Inheritance(), DenseLast(SRSTE(), 0.5), Gradual(100), STEP(), STEP(decay=2e-4),
    )] == ["ste, every 10, freeze 1", "sr-ste, decay 6e-05", "s-ste, exact mvue", "mask decay exponential, warmup 0",
           "structure decay geometric, decay 0.0002", "inheritance", "sr-ste, dense last after 50%", "gradual, every 100",
           "step", "step, decay 0.0002"]
