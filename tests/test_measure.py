"""Runs are timed in pairs, on the machine that is named. No test asserts a latency."""

import gc
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsesurvey import measure
from sparsesurvey.machine import Machine
from sparsesurvey.measure import Timing, check_device, compare

MACHINE = Machine.current()


# ---- the machine -----------------------------------------------------------------------------------------------------

def test_machine_here():
    here = Machine.current()
    assert here.device == "cpu" and here.threads == torch.get_num_threads() and here.torch == torch.__version__
    assert Machine.from_dict(json.loads(json.dumps(here.to_dict()))) == here
    text = json.dumps(here.to_dict())
    assert os.uname().nodename not in here.to_dict().values() and str(Path.home()) not in text
    assert here.slug == here.slug.lower() and "/" not in here.slug and " " not in here.slug


def test_slug():
    assert replace(MACHINE, name="Intel(R) Xeon(R) Processor", cores=2).slug == "intel-xeon-processor-2-cores"
    assert replace(MACHINE, name="AMD EPYC 7713", cores=1).slug == "amd-epyc-7713-1-core"
    assert replace(MACHINE, device="cuda", name="NVIDIA H200").slug == "nvidia-h200"
    assert replace(MACHINE, device="cuda", name="../../x y").slug == "x-y"


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cpu:0", "mps", None, 3])
def test_unknown_device(device):
    with pytest.raises(ValueError, match="device must be cpu, cuda"):
        check_device(device)


def test_device():
    assert check_device("cpu") == torch.device("cpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            check_device("cuda")
        with pytest.raises(ValueError, match="no GPU"):
            Machine.current("cuda:0")


# ---- timing ----------------------------------------------------------------------------------------------------------

def test_compare_pairs_every_round():
    calls = {"one": 0, "two": 0}

    def run(name):
        calls[name] += 1
        return sum(range(2000))

    seen = compare({name: lambda name=name: run(name) for name in calls}, "one", rounds=5, min_seconds=1e-3)
    assert list(seen) == ["one", "two"]
    for name, timing in seen.items():
        assert len(timing.samples) == len(timing.ratios) == 5 and calls[name] >= 5 and min(timing.samples) > 0
        assert timing.low <= timing.seconds <= timing.high and timing.spread >= 0 and timing.speedup_spread >= 0
        assert timing.speedup_low <= timing.speedup <= timing.speedup_high
    assert set(seen["one"].ratios) == {1.0}
    assert seen["two"].ratios == tuple(a / b for a, b in zip(seen["one"].samples, seen["two"].samples))


def test_a_sample_lasts_min_seconds():
    calls = 0

    def run():
        nonlocal calls
        calls += 1

    compare({"nothing": run}, "nothing", rounds=3, min_seconds=1e-3)
    assert calls > 300


def test_gc_is_restored_even_after_an_error():
    def fail():
        assert not gc.isenabled()
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        compare({"fail": fail}, "fail")
    assert gc.isenabled()


def test_timing_is_median_and_percentiles():
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0), (1.0, 1.0, 2.0, 1.0, 1.0))
    assert timing.seconds == 3.0 and timing.low == pytest.approx(1.8) and timing.high == pytest.approx(23.2)
    assert timing.speedup == 1.0 and timing.speedup_high == pytest.approx(1.2)


@pytest.mark.parametrize("changes, named", [
    ({"runs": {}}, "runs is empty"),
    ({"runs": {"a": 3}}, "runs\\['a'\\]"),
    ({"baseline": "b"}, "baseline must be one of 'a', got 'b'"),
    ({"rounds": 2}, "rounds"),
    ({"rounds": 3.0}, "rounds"),
    ({"min_seconds": 0}, "min_seconds"),
    ({"min_seconds": float("nan")}, "min_seconds"),
    ({"device": "gpu"}, "device"),
    ({"flush_l2": True}, "flush_l2"),
])
def test_compare_bad_input(changes, named):
    with pytest.raises(ValueError, match=named):
        compare(**{"runs": {"a": int}, "baseline": "a", **changes})


class FakeEvent:
    """A GPU's clock that ticks one millisecond a call of the run and ten a flush, read in order of the queue."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = FakeEvent.now

    def elapsed_time(self, other):
        return other.time - self.time


@pytest.mark.parametrize("flushed", [False, True])
def test_a_gpu_is_timed_by_its_own_clock(monkeypatch, flushed):
    tick = lambda by: setattr(FakeEvent, "now", FakeEvent.now + by)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda where: nullcontext())
    monkeypatch.setattr(measure, "check_device", torch.device)
    monkeypatch.setattr(measure, "_cache_filler", lambda where: lambda: tick(10))
    runs = {"slow": lambda: tick(4), "fast": lambda: tick(1)}
    seen = compare(runs, "slow", rounds=3, device="cuda", flush_l2=flushed)
    assert set(seen["slow"].samples) == {4e-3} and set(seen["fast"].samples) == {1e-3} and seen["fast"].speedup == 4


def test_package_is_imported_without_triton_or_cupy():
    script = "import sys, sparsesurvey.measure as m; m.Machine.current(); print({'triton', 'cupy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    plain = subprocess.run([sys.executable, "-c", "import sys, torch; print({'triton', 'cupy'} & set(sys.modules))"],
                           capture_output=True, text=True, check=True)
    assert done.stdout == plain.stdout
