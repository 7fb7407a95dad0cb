"""Reading a corpus: files or a data set of the Hugging Face hub, into a memory-mapped array of tokens.

Text streams through in pieces of about a megabyte, so a corpus may be larger than memory. Documents are separated by
a line that is exactly ``<|endoftext|>`` (``.txt``, ``.txt.xz``) or stand one in a line as ``{"text": ...}``
(``.jsonl``). To a byte tokenizer the separator is one zero byte.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

SEPARATOR = "<|endoftext|>"
PIECE = 1 << 20  # bytes
SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub: ``Hub("Salesforce/wikitext", "wikitext-2-raw-v1", "validation")``."""

    name: str
    config: str | None = None
    split: str = "train"
    key: str = "text"


Corpus = str | Path | Hub | Sequence[str | Path]


def tokens(corpus: Corpus, tokenizer: str | Path | None = None, cache: str | Path | None = None,
           progress: bool = True) -> np.memmap:
    """The tokens of a corpus as a read-only memory-mapped array, made once and kept in ``cache``.

    Args:
        corpus: a path to a .txt, .txt.xz, .jsonl or .jsonl.xz file, several of them, or a ``Hub`` data set.
        tokenizer: None for UTF-8 bytes, or the path of a JSON of the package ``tokenizers``, which must know the
            token ``<|endoftext|>``.
        cache: a folder; by default ``$SPARSESURVEY_TOKENS``, or one in the user's cache. A file there is named by the
            content of corpus and tokenizer, and appears complete or not at all.

    Returns:
        uint8 for bytes; uint16, or uint32 for more than 65,536 tokens.

    Raises:
        ValueError: an unknown suffix, a corpus that is empty, not UTF-8, damaged or without the expected fields, a
            tokenizer that cannot be used, a data set that cannot be reached.
        FileNotFoundError: no such file.
    """
    encode, vocab = _encoder(tokenizer)
    dtype = np.uint8 if vocab <= 1 << 8 else np.uint16 if vocab <= 1 << 16 else np.uint32
    key = hashlib.sha256(f"1 {fingerprint(corpus)} {_tokenizer_key(tokenizer)}".encode()).hexdigest()[:16]
    path = Path(cache or os.environ.get("SPARSESURVEY_TOKENS") or _user_cache() / "tokens") / f"{key}.npy"
    array = _load(path, dtype)
    if array is None:
        _write(path, encode, _pieces(corpus, progress), dtype, corpus)
        array = _load(path, dtype)
    return array


def vocabulary(tokenizer: str | Path | None) -> int:
    """How many tokens there are: 256 for bytes."""
    return 256 if tokenizer is None else load_tokenizer(tokenizer)[0].get_vocab_size()


@lru_cache(maxsize=8)
def load_tokenizer(path: str | Path) -> tuple[Any, int]:
    """The tokenizer of a JSON file, and its id of the document separator."""
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise FileNotFoundError(f"tokenizer {path} does not exist; allowed: None for bytes, or a tokenizers JSON file")
    try:
        loaded = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"tokenizer {path} is no JSON file of the package tokenizers: {error}") from error
    separator = loaded.token_to_id(SEPARATOR)
    if separator is None:
        raise ValueError(f"tokenizer {path} has no token {SEPARATOR}, which must stand between documents")
    return loaded, separator


def fingerprint(corpus: Corpus) -> str:
    """SHA-256 of a corpus: of its file as it is, or, of several files, of their SHA-256 sums."""
    if isinstance(corpus, Hub):
        return hashlib.sha256(f"{corpus!r} {getattr(_dataset(corpus), '_fingerprint', '')}".encode()).hexdigest()
    sums = [_file_sum(path) for path in _paths(corpus)]
    return sums[0] if len(sums) == 1 else hashlib.sha256(" ".join(sums).encode()).hexdigest()


def _file_sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tokenizer_key(tokenizer: str | Path | None) -> str:
    return "bytes" if tokenizer is None else _file_sum(Path(tokenizer))


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsesurvey"


def _paths(corpus: Corpus) -> list[Path]:
    """The files of a corpus, checked to exist and to be of a kind that can be read."""
    paths = [Path(corpus)] if isinstance(corpus, str | Path) else [Path(path) for path in corpus]
    if not paths:
        raise ValueError("corpus must be a path, several paths or a Hub data set, got no path")
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"corpus {path} must end in one of {', '.join(SUFFIXES)}; a data set is Hub(name)")
        if not path.is_file():
            raise FileNotFoundError(f"corpus {path} does not exist")
    return paths


def _encoder(tokenizer: str | Path | None) -> tuple[Callable[[list[tuple[str, bool]]], Iterator[Any]], int]:
    """A function from pieces to arrays of token ids, and the size of the vocabulary."""
    if tokenizer is None:
        return lambda pieces: (np.frombuffer(text.encode() + b"\0" * ends, np.uint8) for text, ends in pieces), 256
    loaded, separator = load_tokenizer(tokenizer)

    def encode(pieces: list[tuple[str, bool]]) -> Iterator[list[int]]:
        texts = [text for text, _ in pieces]
        for done, (_, ends) in zip(loaded.encode_batch(texts, add_special_tokens=False), pieces):
            yield done.ids + [separator] * ends

    return encode, loaded.get_vocab_size()


def _write(path: Path, encode: Callable, pieces: Iterator[tuple[str, bool]], dtype: type, corpus: Corpus) -> None:
    """Stream tokens into ``path`` as .npy: under a name of this process first, then renamed, so never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    count, text_seen = 0, False
    try:
        with temporary.open("wb") as file:
            start = _header(file, dtype, 0)
            for group in _groups(pieces):
                text_seen = text_seen or any(text.strip() for text, _ in group)
                for ids in encode(group):
                    array = np.asarray(ids, dtype)
                    file.write(array.tobytes())
                    count += len(array)
            if not text_seen:
                raise ValueError(f"corpus {_names(corpus)} is empty: it has no text")
            if _header(file, dtype, count) != start:
                raise RuntimeError("the header of the token file changed its size")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _header(file: IO[bytes], dtype: type, count: int) -> int:
    """Write the .npy header at the start (numpy leaves room in it for the length to grow); return where it ends."""
    file.seek(0)
    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, about)
    return file.tell()


def _load(path: Path, dtype: type) -> np.memmap | None:
    """The cached tokens, or None where there are none or the file is not what it should be."""
    try:
        array = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):
        return None
    return array if array.dtype == dtype and array.ndim == 1 and len(array) else None


def _names(corpus: Corpus) -> str:
    return repr(corpus) if isinstance(corpus, Hub) else ", ".join(str(path) for path in _paths(corpus))


def _groups(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces in lists of about ``PIECE`` characters: tokenizers work on several at once."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece[0])
        if size >= PIECE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _pieces(corpus: Corpus, progress: bool) -> Iterator[tuple[str, bool]]:
    """(text, does a document end with it) in order."""
    if isinstance(corpus, Hub):
        for row in tqdm(_dataset(corpus), desc=f"tokens of {corpus.name}", disable=not progress):
            if corpus.key not in row:
                raise ValueError(f"data set {corpus.name} has no column {corpus.key!r}; it has {', '.join(row)}")
            yield row[corpus.key], True
        return
    paths = _paths(corpus)
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokens", disable=not progress) as bar:
        for path in paths:
            with _lines(path, bar) as lines:
                yield from (_json_documents if ".jsonl" in path.suffixes else _text_documents)(path, lines)


@contextmanager
def _lines(path: Path, bar: tqdm) -> Iterator[Iterator[str]]:
    """The decoded lines of a file; ValueError names the file and the byte where it is not UTF-8 or damaged."""
    with path.open("rb") as raw:
        file = lzma.LZMAFile(raw) if path.suffix == ".xz" else raw

        def lines() -> Iterator[str]:
            offset, told = 0, 0
            for line in file:
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    where = offset + error.start
                    raise ValueError(f"corpus {path} is not UTF-8 at byte {where} of its text "
                                     f"(0x{line[error.start]:02x}, {error.reason}); only UTF-8 is read") from error
                offset += len(line)
                if raw.tell() - told > PIECE:
                    bar.update(raw.tell() - told)
                    told = raw.tell()
            bar.update(raw.tell() - told)

        try:
            yield lines()
        except (lzma.LZMAError, EOFError) as error:
            raise ValueError(f"corpus {path} is no complete xz file: {error}") from error


def _text_documents(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Documents, each before a separator line; a long one in pieces, cut where no tokenizer joins what is cut apart.

    The line end right before a separator is not the document's.

    Such a place is the end of a line with text in it before a line that starts with text: runs of white space stay
    whole, which is what the usual byte-level tokenizers split at.
    """
    held: list[str] = []
    size = 0
    for line in lines:
        if line.rstrip("\r\n") == SEPARATOR:
            yield "".join(held).removesuffix("\n"), True
            held, size = [], 0
            continue
        if size >= PIECE and held[-1].strip() and not line[:1].isspace():
            yield "".join(held), False
            held, size = [], 0
        held.append(line)
        size += len(line)
    if held:
        yield "".join(held), True


def _json_documents(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"corpus {path}, line {number} is no JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f'corpus {path}, line {number} must be an object with "text": "...", got {line[:60]!r}')
        yield row["text"], True


def _dataset(corpus: Hub) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{corpus} needs the package datasets, which is not installed; "
                         f"install it, or give a path ending in {', '.join(SUFFIXES)}") from error
    try:
        return datasets.load_dataset(corpus.name, corpus.config, split=corpus.split)
    except Exception as error:  # no network, no such set, no such split: the package has an exception for each
        raise ValueError(f"{corpus} could not be loaded: {type(error).__name__}: {error}") from error
