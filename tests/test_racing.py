"""Races to a loss, and what a training step can gain at most."""

import pytest

from sparsesurvey.data import stdlib
from sparsesurvey.mistral import config, flops
from sparsesurvey.racing import races, step_bounds
from sparsesurvey.structures import NM, Block, Transposable


def test_a_step_gains_by_the_share_of_the_mlp():
    """By hand: 57.7 % of the 162M model's arithmetic is in its MLPs."""
    shape = config("162m")
    parts = flops(shape, 1024, training=True)
    share = sum(parts[name] for name in ("gate_proj", "up_proj", "down_proj")) / sum(parts.values())
    assert share == pytest.approx(0.577, abs=5e-4)
    frame = step_bounds([Block(128, 128, 0.1), NM(2, 4), Transposable(2, 4)], shape, 1024).set_index("structure")
    bounds = [1 / (1 - share * saved) for saved in (0.9, 0.5 / 3, 1 / 3)]
    assert frame["step at most"].tolist() == [f"{bound:.2f} x" for bound in bounds] == ["2.08 x", "1.11 x", "1.24 x"]


def test_races_are_one_task_with_real_kernels():
    jobs = races(stdlib())
    names = ["dense", "block 64x64 25%", "block 64x64 10%", "block 64x64 10%"]
    assert [job.name for job in jobs] == [*names, "dense", "block 64x64 10%", "dense"]
    assert [job.kernel for job in jobs] == ["masked", "gather", "gather", "gather", "masked", "gather", "masked"]
    assert len({(job.at()["model"], job.at()["corpus"], job.chapter) for job in jobs}) == 1
    assert [job.config.steps for job in jobs] == [200, 200, 200, 400, 200, 200, 200]
    assert {job.config.lr for job in jobs if job.name == "dense"} == {1e-4, 3e-4, 1e-3}, "the dense model races at its best"
