"""The closed loop of Qi et al. (2021), as we read its abstract: the smallest device and pattern that meet two constraints.

Devices are rooflines. How long a pattern takes on one and how good the pruned model is are functions that the caller
hands in: a bound or a measurement, a loss or an accuracy.

>>> small, large = (Roofline(name, flops, 1e12, "made up") for name, flops in (("small", 1e9), ("large", 1e10)))
>>> seconds = lambda device, density: density * 1e9 / device.flops_per_second
>>> pick([large, small], [0.5, 0.1], seconds, lambda density: density, most_seconds=0.2, least_accuracy=0.4)
Pick(device='large', pattern=0.5, seconds=0.05, accuracy=0.5)
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from sparsesurvey.roofline import Roofline
from sparsesurvey.structure import Shape, Structure


class Pick(NamedTuple):
    device: str
    pattern: Any
    seconds: float
    accuracy: float


def pick(devices: Iterable[Roofline], grid: Iterable[Any], seconds: Callable[[Roofline, Any], float],
         accuracy: Callable[[Any], float], most_seconds: float, least_accuracy: float) -> Pick | None:
    """The first device, by rising peak arithmetic, on which some pattern is fast and good enough; None if there is none.

    Of its patterns the sparsest that will do, by ``density`` (a number is its own). Loosening a constraint never picks a
    larger device: whatever met the constraints still does. A pattern's accuracy is asked for at most once.
    """
    patterns = sorted(grid, key=lambda pattern: getattr(pattern, "density", pattern))
    known: dict[int, float] = {}
    for device in sorted(devices, key=lambda device: (device.flops_per_second, device.bytes_per_second)):
        for number, pattern in enumerate(patterns):
            time = seconds(device, pattern)
            if time > most_seconds:
                continue
            if number not in known:
                known[number] = accuracy(pattern)
            if known[number] >= least_accuracy:
                return Pick(device.machine, pattern, time, known[number])
    return None


def bound(device: Roofline, structure: Structure, shapes: Iterable[Shape], tokens: int, itemsize: int = 2) -> float:
    """Seconds below which the products of a model's layers cannot get on a device that skips every zero."""
    return sum(device.bound(structure.cost(shape, tokens, itemsize)) for shape in shapes)


# Illustrations, not measurements: one multiplication and addition a DSP slice and cycle at 200 MHz, which is our
# assumption, and the nominal rate of the memory that such a board has. Only the numbers of slices are published ones.
CYCLES = 200e6
FPGAS = tuple(
    Roofline(name, 2 * slices * CYCLES, memory,
             f"illustrative: {slices} DSP slices at an assumed 200 MHz, {memory / 1e9:g} GB/s assumed")
    for name, slices, memory in (("Zynq XC7Z020", 220, 4.2e9), ("Zynq UltraScale+ ZU5EV", 1248, 19.2e9),
                                 ("Virtex UltraScale+ VU9P", 6840, 76.8e9))
)
