"""CUDA graphs: launches that are recorded once and replayed as one, so that what is timed is the GPU's work."""

from collections.abc import Callable

import torch

from sparsesurvey.structure import Unavailable

WARM_UP = 3  # calls before a capture: what compiles, searches or allocates must have done so


def graphed(call: Callable[[], object], device: torch.device, times: int = 1) -> Callable[[], None]:
    """A function that replays ``times`` calls; Unavailable where they cannot be captured (they wait, say, for the GPU)."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device), torch.cuda.graph(graph):
            for _ in range(times):
                call()
    except RuntimeError as error:
        raise Unavailable(f"needs a kernel that a CUDA graph can hold: {str(error).splitlines()[0]}") from None

    def replay() -> None:
        graph.replay()

    replay.call = call  # a graph knows its operands by address: they must live as long as it does
    return replay
