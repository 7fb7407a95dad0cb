"""Benchmarks check before they time, skip what is recorded and say why a kernel did not run; no latency is asserted."""

from dataclasses import dataclass, replace

import pytest
import torch

from sparsesurvey import benchmark, measure
from sparsesurvey.benchmark import H200, Roofline, WrongProduct, calibrate, noise, products
from sparsesurvey.probes import copy_run, last_cache_bytes, launch_run, matmul_run
from sparsesurvey.structure import Cost, Structure, Unavailable
from sparsesurvey.structures.dense import Dense
from sparsesurvey.tables import amount, table

QUICK = {"rounds": 3, "min_seconds": 1e-4}
CALLS = {"right": 0}


@dataclass(frozen=True)
class Sample(Dense):
    """Dense, with kernels that are right, wrong in several ways, or not to be had here."""

    def __str__(self):
        return "sample"

    def spmm_right(self, packed):
        CALLS["right"] += 1
        return lambda x: x @ packed.values.T

    def spmm_missing(self, packed):
        raise Unavailable("needs CUDA, compute capability >= 8.0")

    def spmm_late(self, packed):
        def run(x):
            raise Unavailable("needs more than 3 tokens")
        return run

    def spmm_wrong(self, packed):
        return lambda x: x @ (packed.values * 1.001).T

    def spmm_nan(self, packed):
        return lambda x: (x @ packed.values.T) * float("nan")

    def spmm_narrow(self, packed):
        return lambda x: (x @ packed.values.T)[:, 1:]

    def spmm_half(self, packed):
        return lambda x: (x @ packed.values.T).half()


@dataclass(frozen=True)
class Halved(Structure):
    """No pattern: the weights are halved on their way into storage."""

    def __str__(self):
        return "halved"

    def pack(self, weight):
        return Dense().pack(weight)

    def unpack(self, packed):
        return packed.values

    def nnz(self, shape):
        return shape[0] * shape[1]

    def index_bits(self, shape):
        return 0

    def spmm_torch(self, packed):
        return Dense().spmm_torch(packed)


def test_products_measures_every_kernel(tmp_path):
    found = products(Sample(), (16, 32), 8, "block", record=str(tmp_path), kernels=["torch", "right"], **QUICK)
    names = [(row.method, row.metric) for row in found.rows]
    assert names == [("dense", "time"), *((name, metric) for name in ("torch", "right")
                                          for metric in ("relative error", "time", "speedup"))]
    for row in found.rows:
        assert row.at == {"out": 16, "in": 32, "tokens": 8, "dtype": "float32", "threads": 1, "product": "spmm"}
        assert row.structure == "sample" and row.source == __name__ and not row.stale
        assert row.machine.threads == 1 and row.value > 0 or row.metric == "relative error" and row.value < 1e-6
    assert set(found.rows) == set(measure.live("block", tmp_path))


def test_what_is_recorded_is_not_measured_again(tmp_path, monkeypatch):
    first = products(Sample(), (16, 32), 8, "block", record=str(tmp_path), kernels=["right"], **QUICK)
    calls = CALLS["right"]
    monkeypatch.setattr(measure, "compare", None)
    again = products(Sample(), (16, 32), 8, "block", record=str(tmp_path), kernels=["right"], **QUICK)
    assert again.rows == first.rows and CALLS["right"] == calls
    monkeypatch.undo()
    more = products(Sample(), (16, 32), 8, "block", record=str(tmp_path), kernels=["right", "torch"], **QUICK)
    assert [row for row in more.rows if row.method in ("right", "dense")] == first.rows and len(more.rows) == 7
    other = products(Sample(), (16, 32), 4, "block", record=str(tmp_path), kernels=["right"], **QUICK)
    assert len(other.rows) == 4 and CALLS["right"] == calls + 1
    monkeypatch.setattr(measure, "code_of", lambda source, **device: "f" * 12)  # the code has changed since
    changed = products(Sample(), (16, 32), 8, "block", record=str(tmp_path), kernels=["right"], **QUICK)
    assert CALLS["right"] == calls + 2 and {row.code for row in changed.rows} == {"f" * 12}


def test_interrupted_benchmark_is_completed(tmp_path, monkeypatch):
    written, record = [], measure.record

    def killed(row, *where):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(row)
        return record(row, *where)

    monkeypatch.setattr(measure, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        products(Sample(), (16, 32), 8, "block", record=str(tmp_path), kernels=["torch", "right"], **QUICK)
    monkeypatch.undo()
    found = products(Sample(), (16, 32), 8, "block", record=str(tmp_path), kernels=["torch", "right"], **QUICK)
    assert len(found.rows) == 7 == len(measure.live("block", tmp_path)) and set(written) <= set(found.rows)


def test_unavailable_kernels_give_their_reason(tmp_path):
    kernels = ["right", "missing", "late"]
    found = products(Sample(), (16, 32), 2, "block", record=str(tmp_path), kernels=kernels, **QUICK)
    assert found.unavailable == {"missing": "needs CUDA, compute capability >= 8.0", "late": "needs more than 3 tokens"}
    assert {row.method for row in found.rows} == {"dense", "right"}
    shown = found.table("speedup")
    assert list(shown["method"]) == ["right", "missing", "late"]
    assert shown["speedup"].iloc[1] == "not here: needs CUDA, compute capability >= 8.0"
    none = products(Sample(), (16, 32), 3, "block", record=str(tmp_path), kernels=["missing"], **QUICK)
    assert none.rows == [] and list(none.unavailable) == ["missing"]


@pytest.mark.parametrize("kernel", ["wrong", "nan", "narrow", "half"])
def test_wrong_product_is_never_timed(tmp_path, monkeypatch, kernel):
    monkeypatch.setattr(measure, "compare", None)
    with pytest.raises(WrongProduct, match=f"kernel {kernel}"):
        products(Sample(), (16, 32), 8, "block", record=str(tmp_path), kernels=["right", kernel], **QUICK)
    assert measure.live(folder=tmp_path) == []


@pytest.mark.parametrize("product", ["spmm", "spmmt", "sddmm"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_product_and_dtype(tmp_path, product, dtype):
    found = products(Dense(), (16, 32), 8, "dense", record=str(tmp_path), product=product, dtype=dtype, **QUICK)
    assert [row.metric for row in found.rows] == ["time", "relative error", "time", "speedup"]
    assert {row.at["dtype"] for row in found.rows} == {dtype}


def test_what_is_no_pattern(tmp_path):
    assert len(products(Halved(), (16, 32), 8, "low", record=str(tmp_path), **QUICK).rows) == 4


def test_reference_is_timed_only_if_asked_for(tmp_path):
    asked = products(Dense(), (16, 32), 8, "dense", record=str(tmp_path), kernels=["reference"], **QUICK)
    assert {row.method for row in asked.rows} == {"dense", "reference"}
    usual = products(Dense(), (16, 32), 8, "dense", record=str(tmp_path), **QUICK)
    assert {row.method for row in usual.rows} == {"dense", "torch"}


def test_threads_are_restored(tmp_path):
    before = torch.get_num_threads()
    found = products(Dense(), (16, 32), 8, "dense", record=str(tmp_path), threads=before + 1, **QUICK)
    assert torch.get_num_threads() == before and found.rows[0].machine.threads == before + 1
    with pytest.raises(WrongProduct):
        products(Sample(), (16, 32), 8, "x", record=str(tmp_path), threads=before + 1, kernels=["wrong"])
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("changes, named", [
    ({"structure": "block"}, "structure"),
    ({"shape": (16,)}, "shape"),
    ({"shape": (16, 0)}, "in must be"),
    ({"tokens": 0}, "tokens"),
    ({"tokens": 2.5}, "tokens"),
    ({"dtype": "int8"}, "dtype must be one of float64"),
    ({"threads": 0}, "threads"),
    ({"product": "mm"}, "product must be one of spmm"),
    ({"device": "gpu"}, "device"),
    ({"kernels": ["cusparse"]}, "got 'cusparse'"),
    ({"rounds": 1}, "rounds"),
    ({"chapter": "../up"}, "chapter"),
    ({"flush_l2": True}, "flush_l2"),
])
def test_products_bad_input(tmp_path, changes, named):
    given = {"structure": Dense(), "shape": (16, 32), "tokens": 8, "chapter": "dense", "record": str(tmp_path), **QUICK}
    with pytest.raises(ValueError, match=named):
        products(**{**given, **changes})


def test_noise_is_dense_against_itself():
    seen = noise((16, 32), 8, **QUICK)
    assert list(seen) == ["dense", "dense again"] and len(seen["dense again"].ratios) == 3
    assert set(seen["dense"].ratios) == {1.0} and seen["dense again"].speedup_spread >= 0
    with pytest.raises(ValueError, match="tokens"):
        noise((16, 32), 0)


# ---- the machine's limits ------------------------------------------------------------------------------------------

def test_probes_do_the_work_they_count():
    cpu = torch.device("cpu")
    for run, work in (copy_run(4096, cpu), matmul_run(8, torch.float32, cpu), launch_run(cpu)):
        assert run() is not None and work > 0
    assert copy_run(4096, cpu)[1] == 8192 and matmul_run(8, torch.float32, cpu)[1] == 1024
    assert last_cache_bytes(cpu) >= 0


@pytest.fixture
def small(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(benchmark, "_probes", lambda device: {
        "near": ("copy bandwidth", {"bytes": 2**13, "level": "cache"}, lambda: copy_run(2**12, cpu)),
        "far": ("copy bandwidth", {"bytes": 2**17, "level": "memory"}, lambda: copy_run(2**16, cpu)),
        "matmul rate": ("matmul rate", {"side": 64, "dtype": "float32"}, lambda: matmul_run(64, torch.float32, cpu)),
        "launch time": ("launch time", {}, lambda: launch_run(cpu)),
    })


def test_calibrate(tmp_path, monkeypatch, small):
    rows = calibrate(record=str(tmp_path), rounds=3, min_seconds=1e-4)
    assert [(row.metric, row.unit) for row in rows] == [
        ("copy bandwidth", "B/s"), ("copy bandwidth", "B/s"), ("matmul rate", "FLOP/s"), ("launch time", "s")]
    assert all(0 < row.low <= row.value <= row.high and row.source == "sparsesurvey.probes" for row in rows)
    monkeypatch.setattr(measure, "compare", None)
    assert calibrate(record=str(tmp_path)) == rows
    roof = Roofline.measured(rows)
    assert roof.flops_per_second == rows[2].high and roof.floor == rows[3].low
    assert roof.bytes_per_second == max(rows[0].high, rows[1].high) and "float32" in roof.source
    with pytest.raises(ValueError, match="no row of matmul rate"):
        Roofline.measured(rows[:2] + rows[3:])
    with pytest.raises(ValueError, match="calibrate"):
        Roofline.measured([*rows[1:], replace(rows[0], machine=replace(rows[0].machine, cores=99))])
    with pytest.raises(ValueError, match="threads"):
        calibrate(threads=0)


def test_roofline():
    roof = Roofline("machine", 100.0, 10.0, "made up", floor=0.5)
    dense, sparse = Cost(1000, 10, 10), Cost(100, 40, 10)
    assert roof.ridge == 10 and roof.bound(dense) == 10 and roof.bound(sparse) == 5 and roof.speedup(sparse, dense) == 2
    assert roof.bound(Cost(1, 0, 1)) == 0.5
    assert "quoted" in H200.source and H200.bound(Dense().cost((4096, 14336), 8192)) == pytest.approx(973e-6, rel=1e-2)
    for changes in ({"flops_per_second": 0}, {"bytes_per_second": float("nan")}, {"floor": -1}, {"source": ""}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            replace(roof, **changes)


# ---- the table -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("given, text", [
    ((0.0123, "s"), "12.3 ms"), ((4.5e-6, "s", 4e-6, 5e-6), "4.5 us (4 to 5)"), ((2.0, "s"), "2 s"),
    ((3e-12, "s"), "0.003 ns"), ((0.0, "s"), "0 ns"), ((999.7e-3, "s", 0.99, 1.01), "1000 ms (990 to 1010)"),
    ((1.234, "x", 1.2, 1.3), "1.23 x (1.2 to 1.3)"), ((1234.0, "x"), "1234 x"), ((790e12, "FLOP/s"), "790 TFLOP/s"),
    ((0.125, "fraction"), "12.5 %"), ((0.001, "fraction"), "0.1 %"), ((3e9, "B/s"), "3 GB/s"), ((1e-7, "1"), "1e-07"),
    ((1.5 * 2**20, "B"), "1.5 MiB"), ((2.5, "nats/token"), "2.5000 nats/token"),
])
def test_amounts_are_human(given, text):
    assert amount(*given) == text


def test_table(tmp_path):
    rows = [*products(Dense(), (16, 32), 8, "dense", record=str(tmp_path), **QUICK).rows,
            *products(Dense(), (32, 32), 8, "dense", record=str(tmp_path), **QUICK).rows]
    shown = table(rows)
    columns = ["structure", "method", "metric", "out", "value", "measured"]
    assert list(shown.columns) == columns and len(shown) == 8 and shown.attrs["tokens"] == 8
    assert all("live" in text and "stale" not in text and str(rows[0].machine) in text for text in shown["measured"])
    assert table([replace(rows[0], code="0" * 12)])["measured"].iloc[0].endswith("stale")
    assert list(table(rows, "time").columns) == ["structure", "method", "out", "time", "measured"]
    assert len(table(rows, "speedup")) == 2 and list(table([]).columns)[0] == "structure"
