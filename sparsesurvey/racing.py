"""Who reaches a loss first: runs of one task with their own kernels, and what a step can gain at most."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import pandas as pd
from transformers import MistralConfig

from sparsesurvey.data import Language, stdlib
from sparsesurvey.experiments import train_all
from sparsesurvey.job import Job
from sparsesurvey.linear import MLP
from sparsesurvey.mistral import flops
from sparsesurvey.pretraining import best_kernel, wide
from sparsesurvey.recipe import Recipe
from sparsesurvey.recipes.static import Static
from sparsesurvey.records import Measurement
from sparsesurvey.structure import PRODUCTS, Structure
from sparsesurvey.structures import Block
from sparsesurvey.tables import unnumbered
from sparsesurvey.train import TrainConfig

CONFIG = TrainConfig(steps=200, batch=4, seq=128, lr=3e-4, warmup=20, eval_every=20, eval_batches=16, checkpoint_every=200)


def races(language: Language) -> list[Job]:
    """Runs for one thread of a CPU, a few minutes in all, each with its best kernel: dense, and blocks in a wide MLP.

    Of the sparser one also a run of twice the steps, which is about as long as the dense one; and dense and the sparser one at
    other learning rates, so that the dense model races at its best. They are to be trained one at a time, on a machine that does nothing else:
    their seconds are what counts.
    """
    def job(structure: Structure | None, steps: int = CONFIG.steps, rate: float = CONFIG.lr) -> Job:
        recipe = Static() if structure else Recipe()
        config = TrainConfig(**{**vars(CONFIG), "lr": rate, "steps": steps, "eval_every": steps // 10, "checkpoint_every": steps})
        return Job(structure, 0, language, wide(language), config, recipe, best_kernel(structure, recipe, "cpu"), chapter="races")

    tenth = Block(64, 64, 0.1)
    each = (None, CONFIG.steps), (Block(64, 64, 0.25), CONFIG.steps), (tenth, CONFIG.steps), (tenth, 2 * CONFIG.steps)
    return [*(job(*one) for one in each), job(None, rate=1e-3), job(tenth, rate=1e-3), job(None, rate=1e-4)]


def race(record: str = "") -> list[Measurement]:
    """Train the races that are not recorded yet, on the sources of Python's standard library; their losses."""
    return train_all(races(stdlib()), record, workers=1, reuse=True)


def step_bounds(structures: Iterable[Structure], shape: MistralConfig, seq: int) -> pd.DataFrame:
    """What is left of the arithmetic of the MLP's three products, and how much faster a training step can be at most.

    The rest of the step stays as it is, so that the bound is 1 / (1 - a + a s) with the MLP's share a of the arithmetic and the
    mean s of what tensor cores must still do of the three products (``Structure.facts``), for sequences of ``seq`` tokens.
    """
    parts = flops(shape, seq, training=True)
    mlp = sum(parts[name] for name in MLP) / sum(parts.values())
    lines = []
    for structure in structures:
        left = [structure.facts().share(product) for product in PRODUCTS]
        known = None not in left
        weight = shape.intermediate_size, shape.hidden_size
        lines.append({
            "structure": str(structure), "stored": f"{structure.nnz(weight) / prod(weight):.0%}",
            **{name: f"{part:.0%}" if part is not None else "not known" for name, part in zip(("forward", "input gradient", "weight gradient"), left)},
            "step at most": f"{1 / (1 - mlp + mlp * sum(left) / 3):.2f} x" if known else "not known"})
    return unnumbered(pd.DataFrame(lines))
