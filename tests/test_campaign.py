"""The campaign: what it measures first, that nothing is lost when it is stopped, and what it says at the end."""

import gc
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch

from sparsesurvey import benchmark, campaign, cuda, gated, measure, nvml, targets
from sparsesurvey.benchmark import BrokenDevice, products
from sparsesurvey.machine import PACKAGE, Machine
from sparsesurvey.measure import Measurement
from sparsesurvey.structure import Unavailable
from sparsesurvey.structures import NM, Block, Dense, Unstructured, all_structures
from sparsesurvey.targets import Case

CARD = replace(Machine.current(), device="cuda", name="NVIDIA H200")


# ---- the order of things


def test_the_targets_come_first_and_everything_once(monkeypatch):
    for name in campaign.BUILT:
        monkeypatch.delenv(f"SPARSESURVEY_{name.upper()}", raising=False)
    queue = campaign.cases()
    aimed = [case for target in targets.targets() for case in target.cases]
    assert queue[:len(dict.fromkeys(aimed))] == list(dict.fromkeys(aimed)) and len(queue) == len(set(queue))
    assert len({case.key for case in queue}) == len(queue), "two cases with the same rows"
    assert {case.dtype for case in queue} == {"bfloat16", "float16", "float32"}
    assert next(case for case in queue if case.dtype != "bfloat16") not in queue[:len(queue) // 4]
    assert {case.shape for case in queue} >= {(14336, 4096), (4096, 14336), (3072, 768), (768, 3072), (16384, 16384)}
    assert {case.tokens for case in queue} >= {1, 16, 8192, 32768} and {"spmm", "spmmt", "sddmm", "mlp"} == {case.product for case in queue}
    assert all(case.graph and case.flushed for case in aimed if case.tokens <= 16)


def test_whoever_has_a_kernel_for_a_gpu_is_in_the_grid():
    able = {type(item).__name__ for kind in all_structures().values() for item in kind.variants() if campaign.worth(item)}
    assert {"Block", "NM", "Unstructured"} <= able
    found = {type(case.structure).__name__ for case in campaign.cases()}
    assert found <= able | {"Dense"} and len(found) >= len(able) - 2, able - found  # but at densities that are looked at


def test_kernels_of_a_cpu_are_left_out():
    assert campaign.kernels(Case(Block(64, 64, 0.1), (4096, 4096), 8)) == ["stk", "torch_bsr", "torch_bsr_searched", "triton"]
    some = set(campaign.kernels(Case(Unstructured(0.1), (64, 64), 8)))
    assert {"cupy_csr", "macko", "spinfer", "sputnik", "torch_csr"} <= some and not some & {"scipy_csr", "tiled_csr", "reference"}
    assert set(campaign.kernels(Case(NM(2, 4), (64, 64), 8))) >= {"cusparselt", "cusparselt_searched", "cutlass"}
    one = campaign.kernels(Case(Block(64, 64, 0.1), (4096, 4096), 8), skip=["block 64x64 10% spmm triton"])
    assert one == ["stk", "torch_bsr", "torch_bsr_searched"]
    assert "stk" not in campaign.kernels(Case(Block(64, 64, 0.1), (4096, 4096), 8), skip=["stk"])


def test_peers_that_are_built_come_after_the_targets_in_their_own_dtype(monkeypatch):
    for name in campaign.BUILT:
        monkeypatch.delenv(f"SPARSESURVEY_{name.upper()}", raising=False)
    aimed = [case for target in targets.targets() for case in target.cases]
    assert not campaign.rivals(aimed)
    monkeypatch.setenv("SPARSESURVEY_SPINFER", "libspinfer.so")
    found = campaign.rivals(aimed)
    assert {type(case.structure) for case in found} == {Unstructured} and {case.dtype for case in found} == {"float16"}
    assert {(case.shape, case.tokens) for case in found} >= {(targets.GATE, 1), (targets.DOWN, 16)}
    monkeypatch.setenv("SPARSESURVEY_SPATHA", "libspatha.so")
    assert {str(case.structure) for case in campaign.rivals(aimed)} >= {"64:2:8", "64:2:16", "unstructured 10%"}


def test_a_peer_that_breaks_the_device_is_left_out_altogether(monkeypatch):
    made = campaign.Campaign("cpu", "", 1e9)
    for kernel, label in (("stk", "stk"), ("triton", "block 64x64 10% spmm triton")):
        def dead(case, timed):
            raise BrokenDevice(kernel, "gone")

        monkeypatch.setattr(made, "measure", dead)
        with pytest.raises(BrokenDevice) as broken:
            made.try_case(Case(Block(64, 64, 0.1), (4096, 4096), 8), True)
        assert broken.value.label == label


def test_pace_is_learnt_from_the_last_cases():
    pace, case = campaign.Pace(), Case(Block(64, 64, 0.1), (4096, 4096), 8192)
    first = pace.expected(case, 3)
    pace.learn(case, 3, 0.001)  # it was recorded already
    assert pace.expected(case, 3) == first and pace.expected(replace(case, tokens=32768), 3) > first
    pace.learn(case, 3, 10 * pace.model(case, 3))
    assert pace.expected(case, 3) == pytest.approx(10 * pace.model(case, 3))


# ---- the targets


def row(structure, method, speedup, at, **changes):
    made = Measurement.now("speedup", "x", speedup, structure=structure, method=method, at={**at, "threads": 1},
                           source="sparsesurvey.structures.block", machine=CARD)
    return replace(made, **changes)


def verdict(rows, start):
    return next(item for item in targets.verdicts(rows) if item.what.startswith(start))


def test_verdicts_are_the_worst_case_over_the_best_dense():
    tenth = Block(128, 128, 0.1)
    cases = [Case(tenth, shape, 8192) for shape in (targets.GATE, targets.DOWN)]
    what = "block 128, 7B, 8192 tokens, 90% sparse"
    assert verdict([], what).word == "not measured"
    rows = [row(tenth, "triton", 7.0, cases[0].settings), row(tenth, "gather", 99.0, cases[0].settings)]
    assert verdict(rows, what)[2:4] == (7.0, 1) and verdict(rows, what).word == "met so far"
    rows += [row(tenth, "triton", 6.6, cases[1].settings), row(tenth, "dense cublaslt", 1.25, cases[1].settings)]
    assert verdict(rows, what).value == pytest.approx(5.28) and verdict(rows, what).word == "not met"
    rows += [row(tenth, "triton", 8.0, cases[1].settings, date="2999-01-01T00:00:00Z")]
    assert verdict(rows, what).value == pytest.approx(6.4) and verdict(rows, what).word == "met"
    assert verdict([replace(item, code="0" * 12) for item in rows], what).word == "not measured", "stale rows do not count"
    rows += [row(tenth, "torch_bsr", 2.0, cases[0].settings), row(tenth, "torch_bsr_searched", 4.0, cases[0].settings)]
    assert verdict(rows, "blocks over torch").value == 1.75
    rows += [row(tenth, "triton", 3.5, {**cases[0].settings, "product": "sddmm"})]
    assert verdict(rows, "gradients").value == 0.5
    assert "not met (1 of 4)" in targets.table(targets.verdicts(rows))


def test_fused_dense_is_the_baseline_of_the_fused_mlp():
    case = next(case for target in targets.targets() for case in target.cases if case.product == "mlp")
    rows = [row(case.structure, "triton", 5.0, case.settings), row(case.structure, "dense triton", 1.25, case.settings)]
    assert verdict(rows, "fused SwiGLU").value == 4.0 and verdict(rows, "fused SwiGLU").word == "met"


# ---- how it measures


def test_errors_alone_and_then_times(tmp_path):
    given = {"record": str(tmp_path), "rounds": 3, "min_seconds": 1e-4}
    errors = products(Dense(), (16, 32), 8, "dense", timed=False, **given)
    assert [item.metric for item in errors.rows] == ["relative error"] and {"cublaslt", "torch_compile"} <= set(errors.unavailable)
    times = products(Dense(), (16, 32), 8, "dense", **given)
    assert [item.metric for item in times.rows] == ["time", "relative error", "time", "speedup"]
    assert times.rows[1] == errors.rows[0]


def test_dense_rivals_are_timed_in_the_same_rounds(tmp_path):
    block = Block(16, 16, 0.5)
    against = {"dense again": lambda weight: Dense().spmm_torch(Dense().pack(weight)), "dense late": lambda weight: missing()}
    found = products(block, (32, 64), 8, "block", record=str(tmp_path), kernels=["gather"], against=against, rounds=3, min_seconds=1e-4)
    assert [item.method for item in found.rows if item.metric == "speedup"] == ["gather", "dense again"]
    assert found.unavailable == {"dense late": "needs what is not here"}


def missing():
    raise Unavailable("needs what is not here")


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path):
    against = {"dense wrong": lambda weight: lambda x: x @ weight.T * 1.1, "dense bad": lambda weight: 1 / 0}
    given = {"record": str(tmp_path), "against": against, "rounds": 3, "min_seconds": 1e-4}
    found = products(Dense(), (16, 32), 8, "dense", forgiving=True, **given)
    assert set(found.failed) == {"dense wrong", "dense bad"} and "WrongProduct" in found.failed["dense wrong"]
    assert [item.method for item in found.rows if item.metric == "speedup"] == ["torch"]
    with pytest.raises(benchmark.WrongProduct):
        products(Dense(), (32, 32), 8, "dense", **given)


def test_the_end_of_the_time_is_not_forgiven(tmp_path):
    def late(weight):
        raise campaign.OutOfTime

    with pytest.raises(campaign.OutOfTime):
        products(Dense(), (16, 32), 8, "dense", record=str(tmp_path), forgiving=True, against={"dense late": late})


def test_a_cpu_has_no_graphs_and_counts_no_joules(tmp_path):
    with pytest.raises(ValueError, match="graph is for device='cuda'"):
        products(Dense(), (16, 32), 8, "dense", record=str(tmp_path), graph=True)
    assert nvml.spent(torch.device("cpu")) is None and nvml.energy(lambda: None, torch.device("cpu")) is None
    found = products(Dense(), (16, 32), 8, "dense", record=str(tmp_path), energy=0.1, rounds=3, min_seconds=1e-4)
    assert "energy" not in {item.metric for item in found.rows}


def test_energy_is_the_counters_difference_over_the_calls(monkeypatch):
    counter, calls = iter([5.0, 5.0, 37.0]), []
    monkeypatch.setattr(nvml, "spent", lambda device: next(counter))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    used = nvml.energy(lambda: calls.append(1), torch.device("cuda"), seconds=1e-9)
    assert used == 32.0 / (len(calls) - 1)


def test_the_mlp_needs_a_fused_kernel():
    with pytest.raises(ValueError, match="structure must have a fused kernel"):
        gated.mlp(NM(2, 4), (64, 64), 8, "x")


def test_the_mlp_without_a_gpu_says_what_it_needs(tmp_path):
    pytest.importorskip("triton", reason="needs triton")
    found = gated.mlp(Block(32, 32, 0.25), (128, 64), 8, "x", full=Block(32, 32, 1.0), dtype="bfloat16", record=str(tmp_path))
    assert set(found.unavailable) == {"triton", "triton unfused", "triton whole", "dense triton"} and not found.rows


class Nothing:
    """Stands in for streams, graphs and what enters them."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def __getattr__(self, name):
        return lambda *_: None


def test_a_graph_keeps_what_it_replays(monkeypatch):
    """It knows its operands by address: were they freed, a replay would read what others wrote there."""
    for name in ("Stream", "stream", "device", "graph", "CUDAGraph", "current_stream", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, Nothing)
    weight = torch.ones(3)
    held = weakref.ref(weight)
    replay = cuda.graphed(partial(torch.neg, weight), torch.device("cuda"))
    del weight
    gc.collect()
    assert held() is not None
    replay()
    del replay
    assert held() is None


# ---- the command


@pytest.mark.parametrize("arguments, said", [
    (["--minutes", "0"], "--minutes must be a number above 0"),
    (["--device", "tpu"], "device must be cpu, cuda"),
    (["--device", "cpu"], "on a CPU there is --dry-run"),
    (["--dry-run", "--record", str(PACKAGE / "recorded")], "give its rows another folder"),
])
def test_bad_arguments(capsys, monkeypatch, arguments, said):
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", ""))
    with pytest.raises(SystemExit):
        campaign.main(arguments)
    assert said in capsys.readouterr().err


def test_a_kernel_that_breaks_the_device_is_left_out_by_a_new_process(monkeypatch, capsys):
    called = []

    def broken(given, start):
        error = BrokenDevice("triton", "an illegal memory access\nwas encountered")
        error.label = "block 64x64 10% spmm triton"
        raise error

    monkeypatch.setattr(campaign, "work", broken)
    monkeypatch.setattr(os, "execv", lambda program, command: called.append(command))
    monkeypatch.setattr(measure, "check_device", torch.device)
    campaign.main(["--minutes", "5", "--record", "rows"])
    assert called[0][-2:] == ["--skip", "block 64x64 10% spmm triton"] and "--record" in called[0]
    assert 4.9 < float(called[0][called[0].index("--minutes") + 1]) <= 5
    assert "an illegal memory access; going on without" in capsys.readouterr().out


def test_a_device_that_breaks_while_it_is_timed_costs_the_case(monkeypatch):
    made = campaign.Campaign("cpu", "", 1e9)
    case = Case(Block(64, 64, 0.1), (4096, 4096), 8)
    monkeypatch.setattr(made, "measure", lambda case, timed: 1 / 0)
    made.try_case(case, True)
    assert "ZeroDivisionError" in made.problems[str(case)]

    def dead(kernel, device):
        raise BrokenDevice(kernel, "gone")

    monkeypatch.setattr(benchmark, "check_alive", dead)
    with pytest.raises(BrokenDevice) as broken:
        made.try_case(case, True)
    assert broken.value.label == str(case)
    monkeypatch.setattr(made, "skip", (str(case),))
    made.go_through([case], "again")  # is left out


def test_a_case_that_no_longer_fits_is_left_for_the_next_time(monkeypatch):
    made = campaign.Campaign("cpu", "", time.monotonic() + 1)
    tried = []
    monkeypatch.setattr(made, "try_case", lambda case, timed: tried.append(case))
    made.go_through([Case(Block(64, 64, 0.1), (4096, 4096), 8192)], "how fast?")
    assert not tried and made.too_long


def test_time_that_is_over_interrupts_a_case():
    with pytest.raises(campaign.OutOfTime), campaign.timed_out(0.05):
        time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def rehearse(folder, minutes):
    command = [sys.executable, "-m", "sparsesurvey.campaign", "--dry-run", "--minutes", str(minutes), "--record", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def recorded(folder):
    return [line for path in folder.glob("*/*.jsonl") for line in path.read_text().splitlines()]


def test_dry_run_from_end_to_end_stopped_and_resumed(tmp_path):
    """Ctrl-C after the first times; the second run skips what is there and stops by itself."""
    pytest.importorskip("triton", reason="needs triton")
    first = rehearse(tmp_path, 5)
    until = time.monotonic() + 240
    while time.monotonic() < until and not any('"speedup"' in line for line in recorded(tmp_path)):
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    try:
        out, err = first.communicate(timeout=60)
    except subprocess.TimeoutExpired:  # Python drops a Ctrl-C that comes while it runs a destructor: press it again
        first.send_signal(signal.SIGINT)
        out, err = first.communicate(timeout=300)
    assert first.returncode == 0 and "Stopped; what was measured is recorded" in out, out + err[-3000:]
    kept = recorded(tmp_path)
    assert kept and "not measured (0 of 2)" in out
    second = rehearse(tmp_path, 0.25)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0 and "The time is over" in out and "FAILED" not in out, out + err[-3000:]
    rows = recorded(tmp_path)
    assert set(kept) <= set(rows)
    found = measure.live("dry-run", tmp_path)
    assert len({item.key for item in found}) == len(found) and {item.metric for item in found} == {"relative error", "time", "speedup"}
    assert {item.method for item in found} >= {"dense", "triton", "dense triton"} and not measure.live("gpu", tmp_path)
