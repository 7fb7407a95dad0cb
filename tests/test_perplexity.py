"""Perplexity by the protocols of WikiText-2, against sums done by hand."""

import lzma
from math import exp, log
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsesurvey.mistral import build
from sparsesurvey.perplexity import TextLoss, encode, evaluate_text, read, stream_loss, wikitext, windows_loss, words

TEXT = "\n = Cats = \n \n A cat sat on the mat , and the cat was warm . \n It slept . \n" * 8


@pytest.fixture(scope="module")
def model():
    return build("bytes").eval()


class Uniform(nn.Module):
    """Every token is as likely as any other."""

    def __init__(self, vocab=256, value=0.0):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab, max_position_embeddings=64)
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.value.expand(*input_ids.shape, self.config.vocab_size))


def test_a_model_that_knows_nothing():
    lost = stream_loss(Uniform(), TEXT, window=16)
    assert lost.perplexity == pytest.approx(256)
    assert lost.bits_per_byte == pytest.approx(8)
    assert lost.tokens == lost.bytes == len(TEXT)
    assert lost.word_perplexity == pytest.approx(exp(len(TEXT) * log(256) / lost.words), rel=1e-6)


def test_windows_are_the_mean_over_whole_windows(model):
    ids = encode(TEXT)[:150]
    with torch.no_grad():
        logits = model(input_ids=ids[:128].view(2, 64)).logits
    losses = [nn.functional.cross_entropy(logits[row, :-1], ids[64 * row + 1:64 * row + 64]).item() for row in (0, 1)]
    lost = windows_loss(model, ids, 64)
    assert lost.tokens == 2 * 63
    assert lost.perplexity == pytest.approx(exp(sum(losses) / 2), rel=1e-6)
    assert windows_loss(model, ids, 64, batch=2).nats == pytest.approx(lost.nats, rel=1e-6)


@pytest.mark.parametrize("window, context", [(32, 0), (32, 16), (17, 3), (2048, 1024)])
def test_the_stream_predicts_every_token_once(model, window, context):
    """Against one forward pass a token."""
    text = TEXT[:90]
    ids = torch.cat([torch.zeros(1, dtype=torch.long), encode(text)])
    total, begin, end = 0.0, 0, min(window, len(ids))
    with torch.no_grad():
        for place in range(1, len(ids)):
            if place >= end:
                begin = place - 1 - context
                end = min(len(ids), begin + window)
            total -= model(input_ids=ids[None, begin:place]).logits[0, -1].log_softmax(0)[ids[place]].item()
    assert stream_loss(model, text, window=window, context=context).nats == pytest.approx(total, rel=1e-5)


def test_words_and_rows_of_wikitext():
    assert words(" = Title = \n \n Words . \n") == 3 + 2 + 3
    rows = ["", " = Cats = \n", "", " A cat . \n"]  # as the data set holds the file below
    assert wikitext("\n = Cats = \n \n A cat . \n") == "\n\n".join(rows)


def test_the_words_of_wikitext_2():
    path = Path(__file__).parents[2] / "shared" / "corpus" / "wikitext-2.test.txt.xz"
    if not path.is_file():
        pytest.skip("WikiText-2 is not on this machine")
    assert words(read(path)) == 245_569


def test_all_three_numbers_of_a_file(model, tmp_path):
    path = tmp_path / "text.txt.xz"
    path.write_bytes(lzma.compress(TEXT.encode()))
    found = evaluate_text(model, read(path), window=64)
    assert list(found) == ["perplexity, windows of 64", "perplexity per word", "bits per byte"]
    assert 7 < found["bits per byte"] < 9 and found["perplexity, windows of 64"] > 100


def test_the_mode_of_the_model_stays(model):
    for training in (True, False):
        model.train(training)
        windows_loss(model, encode(TEXT), 64)
        assert model.training is training


def test_a_transformers_like_tokenizer_and_its_start():
    class Letters:
        bos_token_id = 7

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [ord(letter) % 32 for letter in text]

    assert encode("ab", Letters()).tolist() == [1, 2]
    assert stream_loss(Uniform(32), "ab" * 9, Letters(), window=8).perplexity == pytest.approx(32)
    with pytest.raises(ValueError, match="start must be given"):
        stream_loss(Uniform(32), "ab", SimpleNamespace(encode=Letters().encode), window=8)


@pytest.mark.parametrize("call, message", [
    (lambda: windows_loss(Uniform(), encode("short"), 32), "at least one window of 32 tokens, got 5"),
    (lambda: windows_loss(Uniform(), encode(TEXT), 128), "at most the model's 64 positions, got 128"),
    (lambda: windows_loss(Uniform(), encode(TEXT), 1), "window must be"),
    (lambda: windows_loss(Uniform(50), encode(TEXT), 16), "another tokenizer"),
    (lambda: windows_loss(Uniform(value=float("nan")), encode(TEXT), 16), "loss must be a number"),
    (lambda: stream_loss(Uniform(), TEXT, window=16, context=15), "context must be"),
    (lambda: stream_loss(Uniform(), ""), "must not be empty"),
    (lambda: TextLoss(1.0, 1).bits_per_byte, "bytes is not known"),
    (lambda: TextLoss(1.0, 1).word_perplexity, "words is not known"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read(tmp_path / "nowhere.txt")
    for name, content in (("a.txt", b"\xff\xfe"), ("a.xz", b"no xz")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)
