"""Every kind of corpus becomes the tokens it should, and what is none is refused by name and byte."""

import json
import lzma
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from sparsesurvey import corpus as reading
from sparsesurvey.corpus import SEPARATOR, Hub, tokens
from sparsesurvey.data import Language, batch, markov, stdlib, text, windows

DOCUMENTS = ["Title\n\nA first paragraph.\nAnd ünïcödé, 中文.", "Second\n\n\n  indented\nend"]
PLAIN = "".join(f"{document}\n{SEPARATOR}\n" for document in DOCUMENTS)
WANTED = b"".join(document.encode() + b"\0" for document in DOCUMENTS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSESURVEY_TOKENS", str(tmp_path / "tokens"))
    return tmp_path / "tokens"


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(DOCUMENTS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False))
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return path


# ---- kinds of corpora ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["c.txt", "c.txt.xz", "c.jsonl", "c.jsonl.xz"])
def test_kinds_of_files(tmp_path, name):
    rows = "".join(json.dumps({"id": 1, "text": document}) + "\n\n" for document in DOCUMENTS)
    found = tokens(write(tmp_path / name, rows if "jsonl" in name else PLAIN), progress=False)
    assert found.dtype == np.uint8 and isinstance(found, np.memmap)
    assert found.tobytes() == WANTED


def test_file_without_separators_is_one_document(tmp_path):
    assert tokens(write(tmp_path / "c.txt", "one\ntwo\n"), progress=False).tobytes() == b"one\ntwo\n\0"
    assert tokens(write(tmp_path / "d.txt", "no line end"), progress=False).tobytes() == b"no line end\0"


def test_several_files_follow_each_other(tmp_path):
    paths = [write(tmp_path / "a.txt", "one"), str(write(tmp_path / "b.txt.xz", "two"))]
    assert tokens(paths, progress=False).tobytes() == b"one\0two\0"
    assert tokens(paths[::-1], progress=False).tobytes() == b"two\0one\0"


def test_tokenizer(tmp_path, tokenizer):
    path = write(tmp_path / "c.txt", PLAIN)
    loaded, separator = reading.load_tokenizer(tokenizer)
    expected = [token for document in DOCUMENTS for token in [*loaded.encode(document).ids, separator]]
    found = tokens(path, tokenizer, progress=False)
    assert found.dtype == np.uint16 and found.tolist() == expected
    language = text(path, path, tokenizer, progress=False)
    assert language.vocab == loaded.get_vocab_size()
    assert language.bytes_per_token == pytest.approx(len(WANTED) / len(expected))


def test_long_documents_are_cut_where_tokens_do_not_join(tmp_path, tokenizer, monkeypatch):
    lines = ["word " * 9, "", "  two  spaces", "end.", "", "", "更多 text", "tab\tstop"] * 40
    path = write(tmp_path / "c.txt", "\n".join(lines))
    loaded, separator = reading.load_tokenizer(tokenizer)
    expected = loaded.encode("\n".join(lines)).ids + [separator]
    monkeypatch.setattr(reading, "PIECE", 100)
    assert len(list(reading._pieces(path, False))) > 20
    assert tokens(path, tokenizer, progress=False).tolist() == expected


def test_data_set_of_the_hub(monkeypatch):
    fake = types.ModuleType("datasets")
    fake.load_dataset = lambda name, config, split: [{"text": document} for document in DOCUMENTS]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert tokens(Hub("some/set"), progress=False).tobytes() == WANTED
    with pytest.raises(ValueError, match="data set some/set has no column 'body'; it has text"):
        tokens(Hub("some/set", key="body"), progress=False)


# ---- the cache ------------------------------------------------------------------------------------------------------

def test_cache_is_used_and_follows_the_content(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "c.txt", "one")
    tokens(path, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "_write", lambda *_: pytest.fail("tokenised again"))
        tokens(path, progress=False)
        path.touch()
        tokens(path, progress=False)
    assert tokens(write(path, "two"), progress=False).tobytes() == b"two\0"
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", None])
def test_damaged_cache_is_made_again(tmp_path, cache, damage):
    path = write(tmp_path / "c.txt", PLAIN)
    tokens(path, progress=False)
    [file] = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-5] if damage is None else damage)
    assert tokens(path, progress=False).tobytes() == WANTED


def test_killed_writer_leaves_no_cache(tmp_path, cache):
    path = write(tmp_path / "c.txt", PLAIN)
    script = ("import os, signal, sys; from sparsesurvey import corpus\n"
              "header = corpus._header\n"
              "def late(file, dtype, count):\n"
              "    if count: file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
              "    return header(file, dtype, count)\n"
              "corpus._header = late; corpus.tokens(sys.argv[1], progress=False)")
    done = subprocess.run([sys.executable, "-c", script, str(path)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode < 0
    assert not list(cache.glob("*.npy")) and list(cache.iterdir())
    assert tokens(path, progress=False).tobytes() == WANTED


def test_failed_corpus_leaves_nothing(tmp_path, cache):
    with pytest.raises(ValueError):
        tokens(write(tmp_path / "c.txt", b"good\n" * 10 + b"\xff"), progress=False)
    assert not list(cache.iterdir())


# ---- bad input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, content, message", [
    ("c.txt", "", "c.txt is empty: it has no text"),
    ("c.txt", f" \n{SEPARATOR}\n\n", "c.txt is empty: it has no text"),
    ("c.txt.xz", "", "c.txt.xz is empty"),
    ("c.txt", b"fine\nbad \xff\n", r"c.txt is not UTF-8 at byte 9 of its text \(0xff"),
    ("c.txt.xz", "é".encode("latin-1"), r"c.txt.xz is not UTF-8 at byte 0"),
    ("c.jsonl", '{"text": "a"}\n{"text"', "c.jsonl, line 2 is no JSON"),
    ("c.jsonl", '{"body": "a"}', 'c.jsonl, line 1 must be an object with "text"'),
    ("c.csv", "a,b", r"c.csv must end in one of .txt, .txt.xz, .jsonl"),
])
def test_bad_corpus(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        tokens(write(tmp_path / name, content), progress=False)


def test_damaged_xz(tmp_path):
    path = write(tmp_path / "c.txt.xz", PLAIN * 50)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="c.txt.xz is no complete xz file"):
        tokens(path, progress=False)
    path.write_bytes(b"not xz at all")
    with pytest.raises(ValueError, match="c.txt.xz is no complete xz file"):
        tokens(path, progress=False)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.txt does not exist"):
        tokens(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match="tokenizer .*none.json does not exist"):
        tokens(write(tmp_path / "c.txt", "a"), tmp_path / "none.json")
    with pytest.raises(ValueError, match="got no path"):
        tokens([])


def test_bad_tokenizer(tmp_path, tokenizer):
    path = write(tmp_path / "c.txt", "a")
    with pytest.raises(ValueError, match="bad.json is no JSON file of the package tokenizers"):
        tokens(path, write(tmp_path / "bad.json", "{}"))
    content = tokenizer.read_text().replace(SEPARATOR, "<|other|>")
    with pytest.raises(ValueError, match=r"has no token <\|endoftext\|>"):
        tokens(path, write(tmp_path / "other.json", content))


def test_hub_without_the_package_or_the_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="needs the package datasets, which is not installed"):
        tokens(Hub("some/set"))

    def unreachable(*_, **__):
        raise ConnectionError("no route")

    fake = types.ModuleType("datasets")
    fake.load_dataset = unreachable
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(ValueError, match="could not be loaded: ConnectionError: no route"):
        tokens(Hub("some/set"))


# ---- languages ------------------------------------------------------------------------------------------------------

def test_markov_entropy_is_that_of_its_law():
    """The exact conditional entropy against the loss of the true model on the tokens themselves."""
    language = markov()
    rng = np.random.default_rng(0)
    law = rng.gamma(0.1, size=(32 * 32, 32)) + 1e-9
    law /= law.sum(1, keepdims=True)
    for tokens_ in (language.train, language.valid):
        x = tokens_.astype(np.int64)
        loss = -np.log(law[x[:-2] * 32 + x[1:-1], x[2:]]).mean()
        assert loss == pytest.approx(language.entropy, abs=0.01)
    assert language.entropy == pytest.approx(1.7468, abs=1e-4)
    assert language.entropy < np.log(32)


def test_markov_is_reproducible():
    first, again, other = (markov(8, length=5000, valid=500, seed=seed) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    assert first.name != markov(length=10, valid=10).name == "markov"
    assert len(first.train) == 5000 and first.train.max() < 8
    assert not np.array_equal(first.train[:500], first.valid)
    with pytest.raises(ValueError, match="vocab must be an integer of at least 2, got 1"):
        markov(1)


def test_stdlib_is_bytes_of_source():
    language = stdlib()
    assert len(language.train) > 4_000_000 and len(language.valid) > 100_000
    assert language.vocab == 256 and language.bits_per_byte(np.log(2)) == pytest.approx(1)
    assert b"import " in language.train[:100_000].tobytes()
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" in language.name
    assert stdlib().digest == language.digest


def test_language_by_path(tmp_path):
    path = write(tmp_path / "novel.train.txt", PLAIN)
    language = text(path, write(tmp_path / "novel.valid.txt", "held out"), progress=False)
    assert language.name == "novel bytes" and language.vocab == 256 and language.bytes_per_token == 1
    assert language.digest == reading.fingerprint(path)
    assert language.valid.tobytes() == b"held out\0"


def test_memory_mapped_language_travels_as_a_path(tmp_path):
    path = write(tmp_path / "c.txt", "word " * 100_000)
    language = text(path, path, progress=False)
    sent = pickle.dumps(language)
    assert len(sent) < 2000
    again = pickle.loads(sent)
    assert np.array_equal(again.train, language.train) and again.name == language.name


# ---- batches --------------------------------------------------------------------------------------------------------

LINE = Language("line", np.arange(1000, dtype=np.uint16), np.arange(200, dtype=np.uint16), 1000, "0" * 64)


def test_batches_depend_on_seed_and_step_alone():
    x, y = batch(LINE.train, 3, 4, 16, seed=1)
    assert x.shape == y.shape == (4, 16) and x.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x, batch(LINE.train, 3, 4, 16, seed=1)[0])
    assert not torch.equal(x, batch(LINE.train, 4, 4, 16, seed=1)[0])
    assert not torch.equal(x, batch(LINE.train, 3, 4, 16, seed=2)[0])


def test_windows_are_spread_and_fixed():
    x, y = windows(LINE.valid, 5, 16)
    assert x.shape == (5, 16) and torch.equal(y, x + 1)
    assert x[0, 0] == 0 and y[-1, -1] == 199
    assert (x[:, 0].diff() >= 16).all()
    assert len(windows(LINE.valid, 1000, 16)[0]) == 12  # no more than fit side by side


def test_too_short():
    with pytest.raises(ValueError, match="corpus must have at least 65 tokens for one batch of 4 x 16, got 50"):
        batch(LINE.train[:50], 0, 4, 16)
    with pytest.raises(ValueError, match="validation corpus must have at least 17 tokens, got 16"):
        windows(LINE.valid[:16], 4, 16)
