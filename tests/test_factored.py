"""Training a structure without a mask: the layer's products, a model of such layers, and runs that are recorded."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from sparsesurvey import checkpoint, experiments, job
from sparsesurvey.data import markov
from sparsesurvey.experiments import loss_curves, pruned_loss, trained
from sparsesurvey.factored import FactoredLinear, factorise
from sparsesurvey.job import SOURCE, Job
from sparsesurvey.linear import SparseLinear, densify, densities, sparse_layers
from sparsesurvey.measure import code_of, live
from sparsesurvey.mistral import build
from sparsesurvey.recipes import Recipe, Static
from sparsesurvey.structure import PRODUCTS, Unavailable
from sparsesurvey.structures import NM, Block, LowRank, LowRankSparse, Monarch, QuantisedNM, Unstructured
from sparsesurvey.train import TrainConfig, train

CONFIG = TrainConfig(steps=6, batch=4, seq=16, warmup=2, eval_every=3, eval_batches=2, checkpoint_every=3)
STRUCTURES = [Monarch(4), Monarch(4, 3), LowRank(0.25), LowRankSparse(0.2, Unstructured(0.05)), LowRankSparse(0.1, NM(2, 4)),
              LowRankSparse(0.25, Block(4, 4, 0.25))]
CASES = [(structure, kernel) for structure in STRUCTURES
         for kernel in sorted(set.intersection(*(set(structure.kernels(product)) for product in PRODUCTS)))]

every_structure = pytest.mark.parametrize("structure", STRUCTURES, ids=str)


@pytest.fixture(scope="module")
def language():
    return markov(length=1 << 14, valid=1 << 12)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSESURVEY_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SPARSESURVEY_ROWS", str(tmp_path / "rows"))
    return tmp_path


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---- one layer


@pytest.mark.parametrize("structure, kernel", CASES, ids=[f"{structure} {kernel}" for structure, kernel in CASES])
def test_gradients_are_those_of_autograd_through_unpack(structure, kernel):
    layer = FactoredLinear(random(24, 40), structure, bias=random(24, seed=1), kernel=kernel)
    x, dy = random(2, 5, 40, seed=2).requires_grad_(), random(2, 5, 24, seed=3)
    try:
        got = torch.autograd.grad(layer(x), [x, layer.values, layer.bias], dy)
    except Unavailable as reason:
        pytest.skip(str(reason))
    values = layer.values.detach().clone().requires_grad_()
    weight = structure.unpack(layer.packed._replace(values=values))
    y = x @ weight.T + layer.bias
    want = torch.autograd.grad(y, [x, values, layer.bias], dy)
    torch.testing.assert_close(layer(x), y)
    for one, other in zip(got, want):
        torch.testing.assert_close(one, other)


@every_structure
def test_start_has_the_norm_of_the_weight_and_the_direction_of_its_projection(structure):
    weight = random(32, 64)
    near = structure.project(weight)
    start = FactoredLinear(weight, structure).dense()
    torch.testing.assert_close(start.norm(), weight.norm())
    torch.testing.assert_close(start, near * (weight.norm() / near.norm()))


@every_structure
def test_outputs_begin_with_the_variance_of_the_dense_layer(structure):
    weight, x = random(256, 256) / 16, random(2000, 256, seed=1)
    assert FactoredLinear(weight, structure)(x).var().item() == pytest.approx((x @ weight.T).var().item(), rel=0.1)


@every_structure
def test_only_what_is_stored_is_a_parameter(structure):
    layer = FactoredLinear(random(32, 64, dtype=torch.float32), structure)
    assert [name for name, _ in layer.named_parameters()] == ["values"]
    assert layer.values.numel() == structure.nnz((32, 64))
    assert layer.density == structure.nnz((32, 64)) / (32 * 64)
    assert not any(buffer.is_floating_point() for buffer in layer.buffers())
    assert str(structure) in repr(layer)


def test_the_places_of_the_sparse_part_are_buffers():
    layer = FactoredLinear(random(32, 64), LowRankSparse(0.2, Unstructured(0.05)))
    assert sorted(layer.state_dict()) == ["inner_columns", "inner_row_pointers", "values"]


@every_structure
def test_state_dict_round_trip(structure):
    layer, other = FactoredLinear(random(32, 64), structure), FactoredLinear(random(32, 64, seed=1), structure)
    x = random(3, 64, seed=2)
    assert not torch.allclose(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@every_structure
def test_a_step_of_the_optimizer_is_seen(structure):
    layer = FactoredLinear(random(32, 64, dtype=torch.float32), structure)
    x = random(3, 64, seed=1, dtype=torch.float32)
    layer(x)  # a plan is kept
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    layer(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer(x), x @ layer.dense().T)


def test_zero_weights_start_at_zero():
    assert not FactoredLinear(torch.zeros(32, 64), Monarch(4)).dense().any()


@every_structure
def test_under_autocast_it_takes_and_gives_bfloat16(structure):
    layer = FactoredLinear(random(32, 64, dtype=torch.float32), structure)
    x = random(3, 64, seed=1, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and x.grad.dtype == layer.values.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), x @ layer.dense().T, atol=0.3, rtol=0)


# ---- what it refuses


@dataclass(frozen=True)
class Apart(LowRank):
    """Not a structure of the survey: its input gradient has another weight."""

    def backward_weight(self, packed):
        return 2 * self.unpack(packed)


@pytest.mark.parametrize("structure, message", [
    (NM(2, 4), "one without a mask, got 2:4: SparseLinear trains it"),
    (QuantisedNM(2, 4), "must store floating-point values to be trained, but int4 2:4 stores torch.uint8"),
    (Apart(0.25), "one weight for both directions, but low-rank 25% prunes them apart: that needs a recipe with two masks"),
    (Monarch(3), "monarch 3 needs a shape whose"),
], ids=str)
def test_what_cannot_be_trained_is_refused(structure, message, language):
    with pytest.raises(ValueError, match=message):
        FactoredLinear(random(32, 64), structure)
    if not isinstance(structure, NM):
        with pytest.raises(ValueError, match=f"gate_proj cannot be factored: .*{message}"):
            factorise(build("markov"), structure)
        with pytest.raises(ValueError, match=message):
            loss_curves([structure], (0,), language, config=CONFIG, workers=1, progress=False)


def test_kernels_must_have_all_three_products():
    with pytest.raises(ValueError, match="kernel must be one of bmm, reference, which .* monarch 4; got 'masked'"):
        FactoredLinear(random(32, 64), Monarch(4), kernel="masked")
    with pytest.raises(ValueError, match="weight must be finite"):
        FactoredLinear(torch.full((32, 64), float("nan")), Monarch(4))
    with pytest.raises(ValueError, match="modules must name linear layers of the model, got nothing"):
        factorise(build("markov"), Monarch(4), ["nothing"])


# ---- a model


def test_factorise_replaces_the_mlp_and_densify_puts_plain_layers_back():
    model = build("markov")
    before = copy.deepcopy(model)
    factorise(model, Monarch(4, 3))
    layers = sparse_layers(model)
    assert len(layers) == 6 and all(isinstance(layer, FactoredLinear) for layer in layers.values())
    assert set(densities(model).values()) == {0.25}
    again = factorise(copy.deepcopy(before), Monarch(4, 3))
    assert all(torch.equal(layer.values, sparse_layers(again)[name].values) for name, layer in layers.items())
    x = torch.arange(20)[None] % 32
    want = model(input_ids=x).logits
    densify(model)
    assert not sparse_layers(model) and type(model.model.layers[0].mlp.gate_proj) is nn.Linear
    torch.testing.assert_close(model(input_ids=x).logits, want)


def test_every_layer_is_checked_before_any_is_replaced():
    model = nn.ModuleDict({"gate_proj": nn.Linear(64, 64), "up_proj": nn.Linear(63, 64)})
    with pytest.raises(ValueError, match="up_proj cannot be factored"):
        factorise(model, Monarch(4))
    assert type(model["gate_proj"]) is nn.Linear and model["gate_proj"].bias is not None


@every_structure
def test_a_model_learns(structure, language):
    model = factorise(build("markov"), structure)
    history = train(model, language, replace(CONFIG, steps=40, eval_every=20), progress=False)
    (_, first), *_, (_, last) = history.valid
    assert last < first - 0.1
    if not structure.exact:
        return
    for layer in sparse_layers(model).values():
        torch.testing.assert_close(structure.project(layer.dense()), layer.dense(), rtol=0, atol=1e-4)


def test_training_with_the_kernel_is_training_with_the_reference(language):
    ends = [train(factorise(build("markov"), Monarch(4, 3), kernel=kernel), language, CONFIG, progress=False).valid[-1][1]
            for kernel in ("reference", "bmm")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)


@pytest.mark.parametrize("structure", [Monarch(4, 3), LowRankSparse(0.2, Unstructured(0.05))], ids=str)
def test_an_interrupted_run_ends_as_if_it_had_not_been(structure, language, tmp_path):
    whole = factorise(build("markov"), structure)
    want = train(whole, language, CONFIG, progress=False)

    class Killed(RuntimeError):
        pass

    half, seen = factorise(build("markov"), structure), []

    def kill(*_):
        seen.append(1)
        if len(seen) > 4 * 2:  # each of the 3 steps before the checkpoint and one more; validation goes through as well
            raise Killed

    half.model.layers[0].mlp.gate_proj.register_forward_hook(kill)
    with pytest.raises(Killed):
        train(half, language, CONFIG, tmp_path, progress=False)
    assert checkpoint.load(tmp_path / "checkpoint.safetensors")[1]["step"] == 3
    again = factorise(build("markov"), structure)
    got = train(again, language, CONFIG, tmp_path, progress=False)
    assert got.train == want.train and got.valid == want.valid
    assert all(torch.equal(one, other) for one, other in zip(again.state_dict().values(), whole.state_dict().values()))


def test_muon_needs_matrices():
    with pytest.raises(ValueError, match="optimizer muon needs matrices"):
        train(factorise(build("markov"), Monarch(4)), markov(length=1 << 12, valid=1 << 10), replace(CONFIG, optimizer="muon"))


# ---- runs


def curves(structures, language, **options):
    return loss_curves(structures, (0,), language, config=CONFIG, workers=1, progress=False, **options)


def test_rows_say_what_was_trained_and_are_not_trained_again(language, folders, monkeypatch):
    structure = Monarch(4, 3)
    rows = curves([structure], language)
    assert [(row.structure, row.method, row.at["step"], row.stale) for row in rows] == [
        ("monarch 4 rank 3", "factored", step, False) for step in (0, 3, 6)]
    assert {row.source for row in rows} == {f"{SOURCE},sparsesurvey.factored,sparsesurvey.structures.monarch"}
    monkeypatch.setattr(experiments, "train", lambda *_, **__: pytest.fail("trained again"))
    assert curves([structure], language) == rows
    monkeypatch.setattr(job, "shipped", lambda chapter: live(chapter))
    assert curves([structure], language, record=str(folders / "elsewhere"), reuse=True) == rows


def test_trained_model_is_plain_and_a_member(language, folders):
    model = trained(Monarch(4, 3), language=language, config=CONFIG)
    weight = model.model.layers[0].mlp.gate_proj.weight.detach()
    assert not sparse_layers(model)
    torch.testing.assert_close(Monarch(4, 3).project(weight), weight, rtol=0, atol=1e-5)


def test_dense_models_are_pruned_to_it(language, folders):
    row = pruned_loss(LowRank(0.5), language=language, config=CONFIG)
    assert (row.structure, row.method, row.at["density"]) == ("low-rank 50%", "magnitude, one shot", 0.5)


def test_masked_runs_have_the_code_that_they_had(language):
    """Rows of patterns stay what they are, whatever becomes of factored layers."""
    pattern, factored = (Job(structure, 0, language, "markov", CONFIG, Static()) for structure in (NM(2, 4), Monarch(4)))
    dense = Job(None, 0, language, "markov", CONFIG, Recipe())
    assert dense.source == SOURCE and pattern.source == f"{SOURCE},sparsesurvey.recipes.static"
    assert dense.code == code_of(SOURCE) and pattern.code == code_of(pattern.source)
    assert pattern.method == "static" and type(pattern.start().model.layers[0].mlp.gate_proj) is SparseLinear
    assert factored.code != pattern.code and factored.code == code_of(factored.source)
    assert replace(factored, code="0" * 12).code == "0" * 12


def test_other_recipes_are_refused(language):
    with pytest.raises(ValueError, match=r"recipe must be Static\(\) for monarch 4, which has no mask; got static, lr / density"):
        curves([Monarch(4)], language, recipe=Static(scale_lr=True))
