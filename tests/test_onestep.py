"""One step of one layer, looked at: what the picture shows is what the hooks gave."""

import torch

from sparsesurvey import onestep
from sparsesurvey.recipes import BDWP, SRSTE, STE, Recipe, Static, all_recipes
from sparsesurvey.structures import NM


def test_a_step_by_hand():
    weight, x, dy = onestep.example()
    mask = NM(2, 4).mask(weight.abs())
    done = onestep.one_step(NM(2, 4), STE(), weight, x, dy)
    assert torch.equal(done.forward, weight * mask) and torch.equal(done.backward, done.forward)
    assert torch.equal(done.output_grad, dy)
    torch.testing.assert_close(done.edited, dy.T @ x)
    assert torch.equal(done.before, mask) and torch.equal(done.mask, NM(2, 4).mask((weight - 0.05 * dy.T @ x).abs()))


def test_what_recipes_change():
    weight, x, dy = onestep.example()
    step = lambda recipe: onestep.one_step(NM(2, 4), recipe, weight, x, dy)
    dense, static, decayed, both = step(Recipe()), step(Static()), step(SRSTE(decay=0.1)), step(BDWP())
    assert torch.equal(dense.forward, weight) and dense.mask.all()
    assert not static.edited[~static.mask].any() and torch.equal(static.mask, static.before)
    torch.testing.assert_close(decayed.edited, dy.T @ x + 0.1 * ~decayed.before * weight)
    assert not torch.equal(both.forward, both.backward)


def test_picture_and_table():
    weight, x, dy = onestep.example()
    figure = onestep.draw({"2:4, ste": onestep.one_step(NM(2, 4), STE(), weight, x, dy)})
    assert len(figure.axes) == len(onestep.COLUMNS)
    table = onestep.hooks(all_recipes().values())
    assert list(table.columns) == list(onestep.HOOKS.values()) and table.loc["dense"].tolist()[0] == "W"
    assert table.loc["Static"].tolist()[0] == "W * m" and not table.isna().any().any()
