"""Training runs that a reader watches: loss curves that are drawn again while they fall."""

from __future__ import annotations

import matplotlib.pyplot as plt
from IPython.display import DisplayHandle, display

from sparsesurvey import figures
from sparsesurvey.records import Measurement


class Falling:
    """Handed to ``experiments.loss_curves(..., watch=Falling(floor))``: one figure, drawn anew with the rows so far.

    In JupyterLab it changes while the cell runs; on a page it is as it was at the end. ``floor`` as in ``figures.curves``.
    """

    def __init__(self, floor: float | None = None) -> None:
        self.floor = floor
        self.handle: DisplayHandle | None = None
        self.seen = -1

    def __call__(self, rows: list[Measurement]) -> None:
        if len(rows) == self.seen:
            return
        self.seen = len(rows)
        ax = figures.curves([row for row in rows if row.at["step"]], self.floor)
        figure = ax.figure
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)
        plt.close(figure)
