"""How well a model predicts a text: the two protocols of WikiText-2, and bits per byte of any text.

The published perplexities of pruned models are of *windows*: the text as one stream of tokens is cut into pieces of
2048, each is read from its start, the rest that fills no window is dropped, and the perplexity is exp of the mean loss
(the protocol of GPTQ, SparseGPT and Wanda). It is a number per token: models with different tokenizers, or windows of
different length, do not compare. *Per word* and *per byte* do: every token of the text is predicted, and the sum is
divided by what was in the text before any tokenizer saw it.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsesurvey.corpus import SEPARATOR, load_tokenizer

WINDOW = 2048  # tokens, of the protocol in the papers on pruning
CHUNK = 1 << 22  # logits whose loss is taken at once


@dataclass(frozen=True)
class TextLoss:
    """What a model lost on a text: ``nats`` in all, over ``tokens`` predictions; the text had ``words`` and ``bytes``."""

    nats: float
    tokens: int
    words: int | None = None
    bytes: int | None = None

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Per token."""
        return exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """exp of the nats per word, ends of lines counted as words (Merity et al. 2016)."""
        return exp(self.nats / self._known("words"))

    @property
    def bits_per_byte(self) -> float:
        return self.nats / log(2) / self._known("bytes")

    def _known(self, name: str) -> int:
        if getattr(self, name) is None:
            raise ValueError(f"{name} is not known: only stream_loss, which predicts all of a text, counts them")
        return getattr(self, name)


def read(path: str | Path) -> str:
    """The text of a UTF-8 file, .xz or plain, line ends as they are. ValueError or FileNotFoundError names the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"text {path} does not exist")
    opened = lzma.open if path.suffix == ".xz" else open
    try:
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            return file.read()
    except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
        raise ValueError(f"text {path} cannot be read as UTF-8: {error}") from error


def wikitext(text: str) -> str:
    """The text of a WikiText file as papers on pruning tokenise it: its lines, the blank ones emptied, joined by two line ends.

    They take the data set's rows, one a line with its line end, and join them so; most of the blank lines are theirs.

    >>> wikitext(" = Title = \\n \\n Words . \\n")
    ' = Title = \\n\\n\\n\\n\\n Words . \\n'
    """
    return "\n\n".join(line if line.strip() else "" for line in text.splitlines(keepends=True))


def words(text: str) -> int:
    """Words as the WikiText papers count them: what white space separates, and one for the end of each line.

    >>> words("The cat\\n sat .\\n")
    6
    """
    return len(text.split()) + text.count("\n")


def encode(text: str, tokenizer: Any = None) -> Tensor:
    """Token ids ``[tokens]`` (int64), without any special token before or after.

    Args:
        tokenizer: None for UTF-8 bytes, the path of a JSON of the package ``tokenizers``, or a tokenizer of transformers.
    """
    if not text:
        raise ValueError("text must not be empty")
    if tokenizer is None:
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    if isinstance(tokenizer, str | Path):
        return torch.tensor(load_tokenizer(tokenizer)[0].encode(text, add_special_tokens=False).ids)
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False))


def windows_loss(model: nn.Module, ids: Tensor, window: int = WINDOW, batch: int = 1, progress: bool = False) -> TextLoss:
    """The loss over windows of ``window`` tokens side by side, the rest dropped: the published WikiText-2 protocol.

    The first token of a window is only read, the others are predicted. ``batch`` windows are read at once.

    Raises:
        ValueError: a text shorter than a window, a token that the model does not know, a window longer than the model
            can read, a loss that is no number.
    """
    _check(model, ids, window)
    count = len(ids) // window
    if count < 1:
        raise ValueError(f"text must have at least one window of {window} tokens, got {len(ids)}: give a shorter window")
    rows = ids[: count * window].view(count, window)
    parts = (rows[start:start + batch] for start in range(0, count, batch))
    nats = sum(_nats(model, part, 1) for part in tqdm(parts, "windows", -(-count // batch), disable=not progress))
    return TextLoss(_finite(nats), count * (window - 1))


def stream_loss(model: nn.Module, text: str, tokenizer: Any = None, window: int = WINDOW, context: int | None = None,
                start: int | None = None, progress: bool = False) -> TextLoss:
    """The loss over the whole text, every token predicted once, with its words and bytes: for numbers that compare.

    Args:
        window: tokens that the model reads at once.
        context: of them, how many are read again from before, only for context; by default half. 0 is cheapest.
        start: the id of a token that is read before the text, so that its first token is predicted as well. By default
            that of ``<|endoftext|>`` for a tokenizer file, zero for bytes (as in ``corpus``), and the tokenizer's own
            start or end token for one of transformers.
    """
    context = window // 2 if context is None else context
    if isinstance(context, bool) or not isinstance(context, int) or not 0 <= context < window - 1:
        raise ValueError(f"context must be an integer of at least 0 and below window - 1 = {window - 1}, got {context!r}")
    ids = torch.cat([torch.tensor([_start(tokenizer) if start is None else start]), encode(text, tokenizer)])
    _check(model, ids, window)
    pieces = list(_pieces(len(ids), window, context))
    nats = sum(_nats(model, ids[None, begin:end], new) for begin, new, end in tqdm(pieces, "text", disable=not progress))
    return TextLoss(_finite(nats), len(ids) - 1, words(text), len(text.encode()))


def evaluate_text(model: nn.Module, text: str, tokenizer: Any = None, window: int = WINDOW, progress: bool = False) -> dict[str, float]:
    """Perplexity by both protocols and bits per byte of a WikiText file's text, by name."""
    published = windows_loss(model, encode(wikitext(text), tokenizer), window, progress=progress)
    whole = stream_loss(model, text, tokenizer, window, progress=progress)
    return {f"perplexity, windows of {window}": published.perplexity, "perplexity per word": whole.word_perplexity,
            "bits per byte": whole.bits_per_byte}


def _pieces(size: int, window: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(begin, places from there on that are predicted, end): each token but the first is predicted once."""
    done = 1
    while done < size:
        begin = 0 if done == 1 else max(0, done - 1 - context)
        end = min(size, begin + window)
        yield begin, done - begin, end
        done = end


def _start(tokenizer: Any) -> int:
    if tokenizer is None:
        return 0
    if isinstance(tokenizer, str | Path):
        return load_tokenizer(tokenizer)[1]
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return getattr(tokenizer, name)
    raise ValueError(f"start must be given: the tokenizer has neither a start nor an end token, nor {SEPARATOR}")


def _check(model: nn.Module, ids: Tensor, window: int) -> None:
    if isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(f"window must be an integer of at least 2, got {window!r}")
    config = getattr(model, "config", None)
    most, vocab = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    if most is not None and window > most:
        raise ValueError(f"window must be at most the model's {most} positions, got {window}")
    if vocab is not None and int(ids.max()) >= vocab:
        raise ValueError(f"text has the token {int(ids.max())}, but the model knows {vocab}: is it of another tokenizer?")


@torch.no_grad()
def _nats(model: nn.Module, rows: Tensor, new: int) -> float:
    """Sum of the losses ``[windows, window]`` at the places from ``new`` on."""
    training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        rows = rows.to(device)
        logits = model(input_ids=rows, use_cache=False).logits[:, new - 1:-1].flatten(0, 1)
        targets = rows[:, new:].flatten()
        step = max(1, CHUNK // logits.shape[1])
        parts = zip(logits.split(step), targets.split(step))
        return sum(nn.functional.cross_entropy(part.float(), goal, reduction="sum").double().item() for part, goal in parts)
    finally:
        model.train(training)


def _finite(nats: float) -> float:
    if not nats < float("inf"):
        raise ValueError(f"the loss must be a number, got {nats}: the model's weights or activations hold NaN or infinity")
    return float(nats)
