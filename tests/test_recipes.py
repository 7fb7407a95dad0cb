"""The contract of every recipe: it trains what it supports, refuses the rest, resumes, compiles, and ends as it says.

A new recipe is found by itself (``all_recipes``, each with its ``variants``). Two class attributes say what is not so by
default: ``ends``, what the layers are at the end, by default "sparse", both mask and ``dense()`` of the structure; "permuted",
the mask alone; anything else is in words, "dense" say, and neither. And ``plain = False`` where no plain linear layer does
what the layer does (its activations are changed as well), so that ``densify`` cannot be exact.
"""

from copy import deepcopy
from dataclasses import replace
from functools import lru_cache

import pytest
import torch

from sparsesurvey.data import batch, markov, windows
from sparsesurvey.linear import densify, sparse_layers, sparsify
from sparsesurvey.mistral import build, config
from sparsesurvey.recipe import Recipe, spelled
from sparsesurvey.recipes import FST, STE, DenseLast, Gradual, MaskDecay, VenomActivations, all_recipes
from sparsesurvey.structure import Pattern
from sparsesurvey.structures import NM, Transposable, Unstructured, all_structures
from sparsesurvey.train import TrainConfig, loss_of, train

COMPOSED = [DenseLast(FST()), DenseLast(VenomActivations())]  # as their papers end
RECIPES = [recipe for kind in all_recipes().values() for recipe in kind.variants()] + COMPOSED
DEFAULTS = [kind.variants()[0] for kind in all_recipes().values()]
TINY = TrainConfig(steps=2, batch=2, seq=8, warmup=1, eval_every=2, eval_batches=1)
SHAPES = ((192, 64), (64, 192))
COLUMNS = {"forward", "input gradient", "output gradient", "edit", "mask"}


def fits(structure):
    divides = all(size % step == 0 for shape in SHAPES for size, step in zip(shape, structure.tile))
    return divides and structure.nnz((192, 64)) > 0  # 10 % of three large blocks is none


VARIANTS = [[variant for variant in kind.variants() if fits(variant)] for kind in all_structures().values()
            if issubclass(kind, Pattern)]
STRUCTURES = [variants[0] for variants in VARIANTS]
OTHERS = [variant for variants in VARIANTS for variant in variants[1:]]


def ends(recipe):
    return getattr(recipe, "ends", "dense" if type(recipe) is Recipe else "sparse")


def serves(recipe, structure):
    try:
        recipe.check(structure)
    except ValueError:
        return False
    return True


def served(recipe):
    """A structure that the recipe can serve."""
    return next(structure for structure in (NM(2, 4), Transposable(2, 4), *STRUCTURES) if serves(recipe, structure))


@lru_cache
def one_layer(seed):
    shape = config("markov")
    shape.num_hidden_layers = 1
    return build(shape, seed)


def model(structure, recipe, seed=0):
    return sparsify(deepcopy(one_layer(seed)), structure, recipe, seed=seed)


@pytest.fixture(scope="module")
def language():
    return markov(length=1 << 14, valid=1 << 12)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_end(trained, structure, recipe):
    for layer in sparse_layers(trained).values():
        assert layer.dense().isfinite().all()
        assert ends(recipe) not in ("sparse", "permuted") or structure.holds(layer.mask)
        assert ends(recipe) != "sparse" or structure.holds(layer.dense() != 0)


def finite(history):
    return all(torch.tensor([*history.train, *(loss for _, loss in history.valid)]).isfinite())


# ---- every recipe, every structure ----------------------------------------------------------------------------------

@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize("recipe", DEFAULTS, ids=str)
def test_it_trains_what_it_serves_and_refuses_the_rest(language, recipe, structure):
    if not serves(recipe, structure):
        with pytest.raises(ValueError) as refused:
            model(structure, recipe)
        assert str(recipe) in str(refused.value) and str(structure) in str(refused.value)
        return
    trained = model(structure, recipe)
    assert finite(train(trained, language, TINY, progress=False))
    check_end(trained, structure, recipe)


@pytest.mark.parametrize("structure", OTHERS, ids=str)
@pytest.mark.parametrize("recipe", [STE(), Gradual(every=1)], ids=str)
def test_all_variants_of_structures(language, recipe, structure):
    if serves(recipe, structure):
        trained = model(structure, recipe)
        assert finite(train(trained, language, TINY, progress=False))
        check_end(trained, structure, recipe)


def test_every_structure_is_served_by_some_recipe():
    for structure in STRUCTURES + OTHERS:
        assert sum(serves(recipe, structure) for recipe in DEFAULTS) >= 5, structure


# ---- every recipe on one structure ---------------------------------------------------------------------

@pytest.mark.parametrize("recipe", DEFAULTS, ids=str)
def test_loss_falls(language, recipe):
    settings = TrainConfig(steps=60, batch=8, seq=16, warmup=5, eval_every=60, eval_batches=4)
    trained = model(served(recipe), recipe)
    history = train(trained, language, settings, progress=False)
    (_, before), (_, after) = history.valid
    assert language.entropy < after < before - 0.1
    check_end(trained, served(recipe), recipe)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("recipe", DEFAULTS + COMPOSED, ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(language, tmp_path, monkeypatch, recipe):
    settings = TrainConfig(steps=8, batch=4, seq=8, warmup=1, eval_every=4, eval_batches=1, checkpoint_every=3)
    make = lambda seed=0: model(served(recipe), recipe, seed)
    whole = make()
    expected = train(whole, language, settings, progress=False)

    def stop_at_7(array, step, *rest):
        if step == 7:
            raise Stopped
        return batch(array, step, *rest)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("sparsesurvey.train.batch", stop_at_7)
        train(make(), language, settings, tmp_path, progress=False)
    again = make(seed=7)  # other weights and masks: all that counts is in the checkpoint
    history = train(again, language, settings, tmp_path, progress=False)
    one, two = again.state_dict(), whole.state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert (history.train, history.valid) == (expected.train, expected.valid)


@pytest.mark.parametrize("recipe", DEFAULTS, ids=str)
def test_muon(language, recipe):
    """Its state has no second moment, and its update is dense."""
    trained = model(served(recipe), recipe)
    settings = replace(TINY, optimizer="muon")
    if type(recipe).__name__ == "STEP":
        with pytest.raises(ValueError, match="recipe step needs AdamW, .*must be 'adamw', got one .* momentum_buffer"):
            train(trained, language, settings, progress=False)
        return
    assert finite(train(trained, language, settings, progress=False))
    check_end(trained, served(recipe), recipe)


def prepared(recipe):
    made = model(served(recipe), recipe)
    for layer in sparse_layers(made).values():
        layer.prepare(0, 10)
    return made


def gradients(made, loss):
    made.zero_grad(set_to_none=True)
    extra = [cost for layer in sparse_layers(made).values() if (cost := layer.penalty()) is not None]
    sum(extra, loss).backward()
    return [loss.detach(), *(p.grad for p in made.parameters() if p.grad is not None)]


def same(one, two):
    assert len(one) == len(two) > 1
    for here, there in zip(one, two):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recipe", DEFAULTS + COMPOSED, ids=str)
def test_its_products_compile_to_one_graph(recipe):
    torch._dynamo.reset()
    made, x = prepared(recipe), torch.randn(2, 8, 64)
    mlp, found = made.base_model.layers[0].mlp, []
    for run in (mlp, torch.compile(mlp, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        found.append(gradients(made, run(x).square().mean()))
    same(*found)


@pytest.mark.parametrize("recipe", [DenseLast(), MaskDecay()], ids=str)
def test_the_decoder_compiles_to_one_graph(language, recipe):
    torch._dynamo.reset()
    made = prepared(recipe)
    tokens = batch(language.train, 0, 2, 8)
    same(*(gradients(made, loss_of(made, *tokens, trunk=trunk))
           for trunk in (made.base_model, torch.compile(made.base_model, backend="aot_eager", fullgraph=True))))


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_dense_is_the_plain_layer(language, recipe):
    trained = model(served(recipe), recipe)
    train(trained, language, replace(TINY, steps=10, eval_every=10), progress=False)
    reloaded = model(served(recipe), recipe, seed=3)
    reloaded.load_state_dict(trained.state_dict())  # never prepared: what it does must follow from what it keeps
    x, _ = windows(language.valid, 2, 16)
    with torch.no_grad():
        logits = trained.eval()(x).logits
        plain, again = (densify(made).eval()(x).logits for made in (trained, reloaded))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
    if getattr(recipe, "plain", True):
        torch.testing.assert_close(plain, logits, rtol=1e-4, atol=1e-5)


# ---- names ----------------------------------------------------------------------------------------------------------

def test_names():
    assert len({str(recipe) for recipe in RECIPES}) == len({spelled(recipe) for recipe in RECIPES}) == len(RECIPES)
    for recipe in RECIPES:
        assert eval(spelled(recipe), dict(all_recipes())) == recipe
        assert hash(recipe) == hash(replace(recipe)) and "\n" not in str(recipe)
    assert str(DenseLast()) == "sr-ste, dense last"


@pytest.mark.parametrize("name, kind", list(all_recipes().items())[1:])
def test_it_is_described(name, kind):
    assert kind.__doc__ and kind.__module__.startswith("sparsesurvey.recipes.")
    if name != "Static":
        assert kind.table.keys() == COLUMNS and all(kind.table.values())
    assert ends(kind()) in ("sparse", "dense", "adapted", "permuted", "sparse in part")
