"""A corpus in, batches of tokens out.

A ``Language`` is two arrays of tokens, to train on and to validate on. ``markov`` and ``stdlib`` need no file and no
network; ``text`` reads a corpus of your own, by path or from the Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsesurvey.corpus import Corpus, fingerprint, load_tokenizer, tokens, vocabulary

__all__ = ["Language", "batch", "markov", "stdlib", "text", "tokens", "windows"]


@dataclass(frozen=True, eq=False)
class Language:
    """Tokens to train and to validate on, as one-dimensional arrays of unsigned integers below ``vocab``.

    ``entropy`` is the least loss that any model can have, in nats per token, where that is known. ``digest`` is a
    SHA-256 that tells what was learnt. ``bytes_per_token`` turns nats per token into bits per byte; None where
    tokens stand for no bytes.
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    vocab: int
    digest: str
    entropy: float | None = None
    bytes_per_token: float | None = None

    def bits_per_byte(self, nats: float) -> float | None:
        """A loss in nats per token as bits per byte of text, which does not depend on the tokenizer."""
        return None if self.bytes_per_token is None else nats / float(np.log(2)) / self.bytes_per_token

    def __getstate__(self) -> dict:
        """A memory-mapped array travels to another process as its file, not as its content."""
        state = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("train", "valid"):
            array = state[name]
            if isinstance(array, np.memmap) and array.filename:
                state[name] = (str(array.filename), str(array.dtype), array.offset, array.size)
        return state

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            if isinstance(value, tuple):
                path, dtype, offset, size = value
                value = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(size,))
            object.__setattr__(self, name, value)


def text(train: Corpus, valid: Corpus, tokenizer: str | Path | None = None, name: str | None = None,
         cache: str | Path | None = None, progress: bool = True) -> Language:
    """A language from a corpus: see ``tokens`` for what ``train``, ``valid``, ``tokenizer`` and ``cache`` may be."""
    train_tokens, valid_tokens = (tokens(corpus, tokenizer, cache, progress) for corpus in (train, valid))
    if name is None:
        first = train[0] if isinstance(train, Sequence) and not isinstance(train, str) else train
        name = Path(getattr(first, "name", first)).name.split(".")[0] + (" bytes" if tokenizer is None else "")
    size = 1.0 if tokenizer is None else _bytes_per_token(valid_tokens, tokenizer)
    return Language(name, train_tokens, valid_tokens, vocabulary(tokenizer), fingerprint(train), bytes_per_token=size)


def _bytes_per_token(ids: np.ndarray, tokenizer: str | Path) -> float:
    """Bytes of text per token: a document separator counts as the one byte that it is to a byte tokenizer."""
    decode, separator = load_tokenizer(tokenizer)
    size = int((ids == separator).sum())
    for start in range(0, len(ids), 1 << 16):
        size += len(decode.decode(ids[start:start + (1 << 16)].tolist()).encode())
    return size / len(ids)


def markov(vocab: int = 32, alpha: float = 0.1, length: int = 1 << 20, valid: int = 1 << 17, seed: int = 0) -> Language:
    """Symbols of an order-2 Markov chain: the next one depends on the last two, by a law drawn from Dirichlet(alpha).

    The least possible loss is known: the conditional entropy, the mean over contexts, weighted by how often the
    chain is in them, of the entropy of their law. A model that has learnt pairs only is well above it.

    Args:
        vocab: symbols; there are vocab**2 contexts. length, valid: tokens to train and to validate on.
    """
    for key, value, least in (("vocab", vocab, 2), ("length", length, 1), ("valid", valid, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key} must be an integer of at least {least}, got {value!r}")
    rng = np.random.default_rng(seed)
    law = rng.gamma(alpha, size=(vocab * vocab, vocab)) + 1e-9
    law /= law.sum(1, keepdims=True)
    train = _chain(law, length, np.random.default_rng([seed, 1]))
    held = _chain(law, valid, np.random.default_rng([seed, 2]))
    name = "markov" if (vocab, alpha, seed) == (32, 0.1, 0) else f"markov {vocab} {alpha:g} {seed}"
    return Language(name, train, held, vocab, _digest(train, held), entropy=_entropy(law, vocab))


def _chain(law: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """``length`` tokens of one chain. It is one, not several laid end to end: a joint is a surprise of many nats."""
    vocab = law.shape[1]
    cumulative = law.cumsum(1)
    cumulative[:, -1] = 1.0
    rows = cumulative.tolist()
    before, last = rng.integers(0, vocab, 2).tolist()
    chain = []
    for draw in rng.random(length + 100).tolist():
        before, last = last, bisect_right(rows[before * vocab + last], draw)
        chain.append(last)
    return np.array(chain[100:], np.uint8 if vocab <= 256 else np.uint16)  # the first 100 are not typical yet


def _entropy(law: np.ndarray, vocab: int) -> float:
    """Conditional entropy in nats: power iteration for how often each context (a, b) occurs, b then followed by c."""
    often = np.full((vocab, vocab), 1 / vocab**2)
    step = law.reshape(vocab, vocab, vocab)
    for _ in range(1000):
        following = np.einsum("ab,abc->bc", often, step)
        change = np.abs(following - often).sum()
        often = following
        if change < 1e-13:
            break
    return float(-(often.reshape(-1, 1) * law * np.log(law)).sum())


def stdlib() -> Language:
    """The Python standard library's own source files as bytes: 10 MB of text that is on every machine.

    A file is for validation if the first byte of its name's MD5 is below 13 (5 %). Tests and files that are mostly
    tables are left out. The library differs between Python versions, hence so does the text: the name says which
    version it is, ``digest`` what exactly it was.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "lib2to3"}
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder)
        if skip.isdisjoint(name.parts[:-1]):
            content = path.read_bytes()
            if content[:4000].count(b"0x") <= 80:
                held = hashlib.md5(name.as_posix().encode(), usedforsecurity=False).digest()[0] < 13
                parts[held].append(content + b"\0")
    if not parts[True] or not parts[False]:
        raise ValueError(f"the Python at {folder} has no standard library sources: use text() or markov()")
    train, valid = (np.frombuffer(b"".join(parts[held]), np.uint8) for held in (False, True))
    name = "stdlib {}.{} bytes".format(*sys.version_info)
    return Language(name, train, valid, 256, _digest(train, valid), bytes_per_token=1.0)


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def batch(array: np.ndarray, step: int, size: int, seq: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[size, seq]`` (int64) of training step ``step``: random places in ``array``.

    The places depend on ``(seed, step)`` alone, so every structure sees the same batches, and a resumed run goes on
    where it stopped. ValueError if the array is shorter than one batch.
    """
    if len(array) < size * seq + 1:
        raise ValueError(f"corpus must have at least {size * seq + 1} tokens for one batch of {size} x {seq}, "
                         f"got {len(array)}")
    starts = np.random.default_rng([seed, step]).integers(0, len(array) - seq, size)
    return _pairs(array, starts, seq)


def windows(array: np.ndarray, count: int, seq: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets ``[count, seq]`` at fixed places, evenly spread over ``array``: what validation looks at.

    Fewer than ``count`` where the array is too short for that many side by side; ValueError where it has not one.
    """
    fit = (len(array) - 1) // seq
    if fit < 1:
        raise ValueError(f"validation corpus must have at least {seq + 1} tokens, got {len(array)}")
    starts = np.linspace(0, len(array) - seq - 1, min(count, fit)).astype(np.int64)
    return _pairs(array, starts, seq)


def _pairs(array: np.ndarray, starts: np.ndarray, seq: int) -> tuple[Tensor, Tensor]:
    rows = torch.from_numpy(np.asarray(array[starts[:, None] + np.arange(seq + 1)]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
