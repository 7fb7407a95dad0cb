"""What the chapter on GPUs says, with rows of a GPU and without."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest

from sparsesurvey import campaign, gpu, targets
from sparsesurvey.machine import Machine
from sparsesurvey.measure import Measurement
from sparsesurvey.roofline import H200
from sparsesurvey.structures import NM, Block, Dense, all_structures

CARD = replace(Machine.current(), device="cuda", name="NVIDIA H200")
TENTH = Block(128, 128, 0.1)


def row(metric, unit, value, method="triton", structure=TENTH, source="sparsesurvey.structures.block", **at):
    settings = {"out": 4096, "in": 14336, "tokens": 8192, "dtype": "bfloat16", "product": "spmm", "cache": "warm", **at}
    return Measurement.now(metric, unit, value, structure=structure, method=method, at=settings, source=source, machine=CARD)


def calibration():
    values = {"copy bandwidth": ("B/s", 5e12), "matmul rate": ("FLOP/s", 8e14), "launch time": ("s", 2e-6)}
    return [Measurement.now(name, unit, value, structure="dense", method="torch", at={"threads": 1}, source="sparsesurvey.probes",
                            machine=CARD) for name, (unit, value) in values.items()]


ROWS = [row("relative error", "1", 2e-3), row("time", "s", 2e-4), row("speedup", "x", 6.5), row("energy", "J", 0.12),
        row("time", "s", 1.3e-3, "dense"), row("time", "s", 1.2e-3, "dense cublaslt")]


def test_bounds_are_those_of_the_roofline():
    frame = gpu.bounds([TENTH, NM(2, 4)], (4096, 14336), [1, 8192], H200)
    assert list(frame.columns) == ["1 token", "8192 tokens"] and frame.loc["2:4", "8192 tokens"] == pytest.approx(2.0)
    assert frame.loc[str(TENTH), "8192 tokens"] == pytest.approx(H200.over_dense(TENTH, (4096, 14336), 8192))


def test_fusing_saves_the_hidden_activations():
    """162M, 32768 tokens, by hand at density 1: 3 x 154.6 GFLOP at 989 TFLOP/s, and 604 MB for the activation."""
    frame = gpu.fusion((3072, 768), 32768, [1.0, 0.1], H200)
    products = 3 * 2 * 32768 * 3072 * 768 / 989e12 * 1e6
    assert frame.loc["100% kept", "whole"] == pytest.approx(products)
    assert frame.loc["100% kept", "apart"] == pytest.approx(products + 32768 * 3 * 3072 * 2 / 4.8e12 * 1e6)
    tenth = frame.loc["10% kept"]
    assert tenth["whole"] < tenth["first half"] < tenth["apart"]


def test_one_kernel_pays_where_there_are_few_weights():
    """Blocks of 128, a tenth of 144, by hand: for 64 tokens the piece of x and three blocks; the hidden activations are 201 MB."""
    frame = gpu.one_kernel((3072, 768), 32768, [0.1, 0.05], H200)
    tenth = frame.loc["10% kept"]
    assert tenth["one kernel"] == pytest.approx(512 * 14.4 * (64 * 128 + 3 * 128 * 128) * 2 / 5.5e12 * 1e6, rel=1e-4)
    down = (round(0.1 * 3072 * 768) + 32768 * (3072 + 768)) * 2 / 4.8e12
    first = 256 * 14.4 * (128 * 128 + 2 * 128 * 128) * 2 / 5.5e12
    assert tenth["two kernels"] == pytest.approx((first + down) * 1e6, rel=1e-4)
    assert tenth["times faster"] < 1 < frame.loc["5% kept", "times faster"]


def test_higher_pieces_use_an_activation_more_often():
    frame = gpu.reuse([16, 128])
    assert list(frame["L2"]) == ["82.8 TFLOP/s", "469 TFLOP/s"] and list(frame["breaks even at"]) == ["90% sparse", "41% sparse"]


def test_a_kernel_never_ran_until_a_row_of_a_gpu_says_so():
    empty = gpu.kernels(all_structures(), [])
    assert "Block" in empty.index and "Dense" not in empty.index
    assert empty.loc["Block", "forward"] == "triton: never run on a GPU"
    here = replace(ROWS[0], machine=Machine.current())
    assert gpu.kernels(all_structures(), [here]).equals(empty), "a CPU's interpreter is no GPU"
    seen = gpu.kernels(all_structures(), ROWS)
    assert seen.loc["Block", "forward"].startswith("triton: right on NVIDIA H200 2") and seen.loc["Block", "weight gradient"].endswith(gpu.NEVER)
    stale = gpu.kernels(all_structures(), [replace(ROWS[0], code="0" * 12)])
    assert stale.loc["Block", "forward"].endswith(", stale")


def test_targets_of_each_machine():
    assert set(gpu.aims([])[""]) == {"not measured"} and "machine" not in gpu.aims([])
    both = gpu.aims([*ROWS, *(replace(item, machine=replace(CARD, name="NVIDIA H100")) for item in ROWS)])
    assert set(both["machine"]) == {"NVIDIA H200", "NVIDIA H100"} and len(both) == 2 * len(targets.targets())
    line = both[both["target"].str.startswith("block 128, 7B, 8192 tokens, 90%")].iloc[0]
    assert line["measured"] == "6.50" and line[""] == "met so far"


def test_the_plan_counts_every_case():
    queue = campaign.cases()
    assert gpu.plan(queue, targets.targets())["cases"].sum() == len(queue)


def test_rates_by_hand():
    """10 % of 4096 x 14336 in blocks of 128: 358 of 3584 blocks; 8192 tokens in 0.2 ms."""
    frame = gpu.efficiency(ROWS, [TENTH], gpu.rooflines(calibration()))
    triton, dense, rival = (frame[frame["kernel"] == name].iloc[0] for name in ("triton", "dense", "dense cublaslt"))
    useful = 2 * 8192 * 358 * 128**2 / 2e-4
    assert triton["useful"] == f"{useful / 1e12:.0f} TFLOP/s" and triton["as dense"] == f"{2 * 8192 * 4096 * 14336 / 2e-4 / 1e15:.3g} PFLOP/s"
    assert triton["over dense"] == "6.5 x" and triton["energy"] == "120 mJ" and triton["of the bound"] == f"{useful / 8e14:.0%}"
    assert dense["useful"] == dense["as dense"] == "740 TFLOP/s" and rival["over dense"] == ""
    assert len(gpu.efficiency([], [TENTH], {})) == 0


def test_break_even_lies_between_the_densities_around_it():
    """Twice as fast at a tenth, half as fast at 40 %: on a log scale 1 is midway, at a fifth. At equal ends it is not known."""
    rows = [row("speedup", "x", gain, structure=Block(128, 128, density)) for density, gain in ((0.1, 2.0), (0.4, 0.5))]
    known = [Block(128, 128, 0.1), Block(128, 128, 0.4)]
    frame = gpu.break_even([*rows, *(replace(item, metric="time") for item in rows)], known)
    assert list(frame["kernel"]) == ["triton"] and list(frame["breaks even at"]) == ["20% kept"]
    assert gpu.break_even(rows[:1], known)["breaks even at"].iloc[0] == "above 10% kept"
    assert gpu.break_even(rows[1:], known)["breaks even at"].iloc[0] == "below 40% kept"


def test_pictures_with_rows_and_without():
    assert not gpu.draw_roofline([], [TENTH], {}).axes[0].lines, "nothing is drawn without a calibration"
    figure = gpu.draw_roofline(ROWS, [TENTH, Dense()], gpu.rooflines(calibration()))
    assert len(figure.axes) == 1 and "NVIDIA H200" in figure.axes[0].get_title()
    assert len(figure.axes[0].lines) == 4, "three kernels and the roof"
    plt.close("all")


def test_what_a_page_times_live():
    assert gpu.worth_timing(TENTH, "cpu") == ["gather", "torch_bsr"] and gpu.worth_timing(TENTH, "cuda") == ["torch_bsr", "triton"]


def test_a_roof_needs_all_three_probes():
    assert gpu.rooflines(calibration()[:2]) == {} and set(gpu.rooflines(calibration())) == {"nvidia-h200"}
