"""2:4 compressed anew in every step: the training of masked products, with the library's product emulated on a CPU."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from sparsesurvey.compressed import RECIPES, CompressedLinear, can_compress, compress_layers, in_columns
from sparsesurvey.data import markov
from sparsesurvey.job import Job
from sparsesurvey.kernels import semi_structured
from sparsesurvey.linear import sparse_layers, sparsify
from sparsesurvey.mistral import build, config
from sparsesurvey.recipes import FST, SSTE, STE, STEP, DenseLast, SLoPe, Static, all_recipes
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import NM, Block, Transposable
from sparsesurvey.train import TrainConfig, train

CONFIG = TrainConfig(steps=3, batch=2, seq=16, warmup=1, eval_every=3, eval_batches=1)
STRUCTURES = NM(2, 4), NM(1, 4), Transposable(2, 4)


def serves(structure, recipe):
    try:
        recipe.check(structure)
    except ValueError:
        return False
    return True


def variants(structure):
    """Of every recipe that serves it, and of 1:4 the first alone."""
    for kind in all_recipes().values():
        for recipe in kind.variants()[:1 if structure == NM(1, 4) else None]:
            if can_compress(structure, recipe) and serves(structure, recipe):
                yield structure, recipe


CASES = [case for structure in STRUCTURES for case in variants(structure)]


@pytest.fixture(scope="module")
def language():
    return markov(length=1 << 14, valid=1 << 12)


@pytest.fixture
def products(monkeypatch):
    """What the library multiplied: it is a dense product here, of a weight that it could have compressed."""
    seen = []

    def product(x, weight):
        kept = (weight != 0).view(len(weight), -1, 4).sum(-1)
        assert kept.max() <= 2 and weight.shape[1] == x.shape[1], "the library would have dropped weights"
        seen.append(tuple(weight.shape))
        return x @ weight.T

    monkeypatch.setattr(semi_structured, "fresh_product", product)
    return seen


def model(structure, recipe):
    shape = config("markov")
    shape.num_hidden_layers = 1
    return sparsify(build(shape), structure, recipe)


def test_every_recipe_is_here_with_every_structure():
    assert {type(recipe) for _, recipe in CASES} == set(RECIPES) and {structure for structure, _ in CASES} == set(STRUCTURES)


@pytest.mark.parametrize("structure, recipe", CASES, ids=lambda value: str(value))
def test_it_trains_as_masked_products_do(structure, recipe, language, products):
    masked = model(structure, recipe)
    compressed = compress_layers(deepcopy(masked))
    assert {type(layer) for layer in sparse_layers(compressed).values()} == {CompressedLinear}
    one, other = (train(each, language, CONFIG, progress=False) for each in (masked, compressed))
    torch.testing.assert_close(torch.tensor(one.valid), torch.tensor(other.valid), rtol=1e-5, atol=0)
    for name, weight in masked.state_dict().items():
        torch.testing.assert_close(weight, compressed.state_dict()[name])
    shapes = {(192, 64), (64, 192)}  # a layer's own, and transposed those of the other
    forward = 3 * 3 + 2 * 3  # three steps of three layers, and two evaluations
    assert set(products) == shapes and len(products) == forward + (3 * 3 if in_columns(structure, recipe) else 0)


def test_it_is_compiled_whole(products):
    torch.compiler.reset()
    layer = compress_layers(sparsify(torch.nn.ModuleDict({"up_proj": torch.nn.Linear(32, 16)}), NM(2, 4), SSTE(mvue=False)))["up_proj"]
    step = torch.compile(lambda x: layer(x * 2).sin(), fullgraph=True, backend="aot_eager")
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    grads = []
    for run in (step, lambda x: layer(x * 2).sin()):
        inputs = x.clone().requires_grad_()
        run(inputs).sum().backward()
        grads.append((inputs.grad, layer.weight.grad.clone()))
        layer.weight.grad = None
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_a_job_takes_it(language):
    job = Job(NM(2, 4), 0, language, "markov", CONFIG, STE(), "cusparselt")
    assert job.compressed and {type(layer) for layer in sparse_layers(job.start()).values()} == {CompressedLinear}
    assert job.method == "ste, cusparselt" and "sparsesurvey.compressed" in job.source
    assert job.code != replace(job, kernel="masked", code="").code
    assert not Job(Transposable(2, 4), 0, language, "markov", CONFIG, Static(), "cusparselt").compressed, "values alone are enough"


@pytest.mark.parametrize("structure, recipe", [(NM(2, 4), STEP()), (NM(2, 4), DenseLast(STE())), (NM(3, 4), STE()), (NM(2, 4, "out"), STE()),
                                               (Block(16, 16, 0.5), STE()), (Transposable(2, 4), DenseLast(FST()))], ids=str)
def test_what_is_not_2_4_all_the_time_is_refused(structure, recipe):
    made = model(structure, recipe)
    with pytest.raises(ValueError, match=r"kernel 'cusparselt' needs at most 2 of every 4 weights along the inputs in every step"):
        compress_layers(made)
    assert not any(isinstance(layer, CompressedLinear) for layer in sparse_layers(made).values())
    with pytest.raises(ValueError, match="model must have SparseLinear layers"):
        compress_layers(torch.nn.Linear(4, 4))


def test_without_a_gpu_it_says_so():
    layer = compress_layers(model(NM(2, 4), SLoPe()))
    with pytest.raises(Unavailable, match="needs a CUDA device"):
        layer(torch.zeros(1, 4, dtype=torch.long))
