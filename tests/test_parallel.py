"""A run on several processes is the run on one: same losses, same masks, one file."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsesurvey import checkpoint, parallel
from sparsesurvey.data import markov
from sparsesurvey.linear import sparsify
from sparsesurvey.mistral import build
from sparsesurvey.recipes import Static
from sparsesurvey.structures import NM
from sparsesurvey.train import TrainConfig, train

SHORT = TrainConfig(steps=12, batch=4, seq=16, warmup=2, eval_every=6, eval_batches=2, checkpoint_every=5)
SCRIPT = f"""
import json, os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_parallel import SHORT, language, model
from sparsesurvey import parallel
from sparsesurvey.train import train
parallel.start("cpu")
try:
    history = train(model(), language(), SHORT, sys.argv[1], progress=False)
    said = [history.train, history.valid]
except ValueError as error:
    said = str(error)
Path(sys.argv[1], f"said-{{os.environ['RANK']}}.json").write_text(json.dumps(said))
"""


def language():
    return markov(length=1 << 14, valid=1 << 12)


def model():
    return sparsify(build("markov"), NM(2, 4), Static())


def torchrun(folder, processes, script=SCRIPT):
    """What each process said."""
    file = folder / "script.py"
    file.write_text(script)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(file),
                           str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(processes)]


def test_two_processes_have_the_losses_of_one(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = model()
    expected = train(alone, language(), SHORT, progress=False)
    first, second = torchrun(tmp_path, 2)
    assert first == second
    assert first[0] == pytest.approx(expected.train, rel=1e-5)
    assert [loss for _, loss in first[1]] == pytest.approx([loss for _, loss in expected.valid], rel=1e-5)
    again = model()
    assert checkpoint.load_model(tmp_path / "checkpoint.safetensors", again)["step"] == SHORT.steps
    for one, two in zip(alone.parameters(), again.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)
    torch.set_num_threads(threads)


def test_a_batch_that_the_processes_do_not_divide(tmp_path):
    said = torchrun(tmp_path, 2, SCRIPT.replace("SHORT, sys", "__import__('dataclasses').replace(SHORT, batch=5), sys"))
    assert said == ["batch must be a multiple of the 2 processes, got 5"] * 2


def test_alone_nothing_is_summed():
    assert parallel.world() == (0, 1) and parallel.first()
    assert parallel.total(1.5, 2) == [1.5, 2] and parallel.agreed(True) and not parallel.agreed(False)
    layer = torch.nn.Linear(2, 2)
    layer.weight.grad = torch.ones(2, 2)
    parallel.average_gradients(layer.parameters())
    assert torch.equal(layer.weight.grad, torch.ones(2, 2)) and parallel.start("cpu") == "cpu"


def test_sequences_in_pieces_have_the_gradient_of_all():
    whole, pieces = model(), model()
    one = train(whole, language(), SHORT, progress=False)
    two = train(pieces, language(), replace(SHORT, micro=1, chunk=10), progress=False)
    assert two.train == pytest.approx(one.train, rel=1e-5)
