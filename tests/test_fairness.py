"""The tables by which a reader sees that a comparison is fair."""

import pytest

from sparsesurvey.experiments import preset
from sparsesurvey.fairness import by_rate, densities, with_rate
from sparsesurvey.measure import Machine, Measurement
from sparsesurvey.structures import NM, Block


def test_densities_are_those_of_each_layer():
    frame = densities([NM(2, 4), Block(64, 64, 0.5)])
    assert list(frame.columns) == [f"{layer}.{name}" for layer in (0, 1) for name in ("gate_proj", "up_proj", "down_proj")]
    assert (frame.loc["2:4"] == 0.5).all()
    assert (frame.loc["block 64x64 50%"] == 0.6667).all()  # two of three blocks are the nearest to a half


def test_rates_are_multiplied():
    plan = with_rate(preset("quick"), 3)
    assert plan["config"].lr == pytest.approx(0.03) and plan["config"].muon_lr == pytest.approx(0.06)
    assert plan["seeds"] == preset("quick")["seeds"]


def test_losses_stand_by_rate():
    def row(structure, rate, seed, step, value):
        method = "dense" if structure == "dense" else "static"
        return Measurement.now("validation loss", "nats/token", value, structure=structure, method=method,
                               at={"step": step, "seed": seed, "lr": rate}, source="sparsesurvey.structure", machine=Machine.current("cpu"))

    slow = [row("dense", 0.01, seed, step, 9.0 if step == 0 else 2.0 + seed) for seed in (0, 1) for step in (0, 5)]
    fast = [row("dense", 0.03, 0, 5, 1.0), row("2:4", 0.03, 0, 5, 1.5)]
    frame = by_rate([slow, fast])
    assert frame.loc["dense"].tolist() == [2.5, 1.0] and frame.loc["2:4", "rate 0.03"] == 1.5
    assert frame.isna().loc["2:4", "rate 0.01"]
