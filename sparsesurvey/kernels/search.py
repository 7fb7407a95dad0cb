"""How long a call takes on a GPU, for who chooses among a library's ways to compute the same."""

from collections.abc import Callable

import torch

REPEATS = 5


def seconds(run: Callable[[], object]) -> float:
    """Time of one call, by the GPU's clock; infinite for what needs more shared memory or registers than there are."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    try:
        run()
        start.record()
        for _ in range(REPEATS):
            run()
        end.record()
    except Exception as error:  # Triton's OutOfResources, which is no RuntimeError
        if type(error).__name__ not in ("OutOfResources", "PTXASError", "CompilationError"):
            raise
        return float("inf")
    end.synchronize()
    return start.elapsed_time(end) / REPEATS
