"""Is a comparison of training runs fair? Achieved densities, and learning rates beside the one that all have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from sparsesurvey.linear import densities as counted
from sparsesurvey.linear import sparsify
from sparsesurvey.mistral import build
from sparsesurvey.recipes.static import Static
from sparsesurvey.records import Measurement
from sparsesurvey.structure import Pattern
from sparsesurvey.tables import called


def densities(structures: Iterable[Pattern], model: str = "markov") -> pd.DataFrame:
    """The density of every layer of a model under each structure, counted in a random mask: one line a structure."""
    found = {str(structure): counted(sparsify(build(model), structure, Static())) for structure in structures}
    return pd.DataFrame(found).T.rename(columns=lambda name: name.removeprefix("model.layers.").replace(".mlp", "")).round(4)


def with_rate(plan: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """A plan of ``experiments.preset`` with ``factor`` times its learning rates."""
    config = plan["config"]
    return {**plan, "config": replace(config, lr=config.lr * factor, muon_lr=config.muon_lr * factor)}


def by_rate(curves: Iterable[Sequence[Measurement]]) -> pd.DataFrame:
    """The last loss of each run's kind at each learning rate, the mean over its seeds; rows of ``loss_curves``, a rate each."""
    lines: dict[str, dict[str, float]] = {}
    for rows in curves:
        last = max(row.at["step"] for row in rows)
        for name in dict.fromkeys(map(called, rows)):
            mine = [row.value for row in rows if called(row) == name and row.at["step"] == last]
            lines.setdefault(name, {})[f"rate {rows[0].at['lr']:.2g}"] = sum(mine) / len(mine)
    return pd.DataFrame(lines).T.round(4)
