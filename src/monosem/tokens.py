"""Documents -> contexts of fixed length in which every token remembers its document and its position there.

A document is a stripped text; its name is the hash of that text, so a text that occurs twice is one document.
The same hash decides whether a document is held out: neither the seed nor the order of files can move a
document from one side to the other.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import itertools
import json
import logging
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from monosem import resources
from monosem.artifacts import sha256_file

log = logging.getLogger("monosem")

SAE_PROBES_TEXT = "sae-probes-text"
PYTHON_DOCSTRINGS = "python-docstrings"

SAE_PROBES_STEMS = (
    # The sets of long documents, each text once (labels are never read). Left out: names, headlines, sentences and
    # snippets too short for a context of 64 tokens (they stay for probing), and sets that only repeat these texts
    # (112, 142-147, 161-163; C and HTML code would outweigh the prose).
    "45_context_ans",  # stories and blog posts, each with a question about it
    "48_cm_correct",  # first-person stories of everyday conflicts
    "49_cm_isshort",  # more of them
    "94_ai_gen",  # student essays, written by people and by models
    "98_cancer_cat",  # biomedical papers
    "100_news_fake",  # news articles and opinion pieces
    "101_disease_class",  # medical abstracts
    "103_it_tick",  # tickets of an IT help desk
    "111_yelp_data",  # reviews of places
    "157_amazon_5star",  # reviews of products
    "159_code_Python",  # source code: Python, with some C and HTML
)

_STORIES_STEM = "45_context_ans"
"""Each of its 560 stories comes about seven times, with another question at the end. Only the first is read: otherwise
the same story would be on both sides of the split."""
_STORY_CHARS = 200
"""Texts of that set which begin with the same characters, this many, tell the same story."""

SUFFIXES = (".txt", ".jsonl", ".parquet", ".csv", ".csv.zst")

SEPARATOR_POSITION = -1
"""Position, within its document, of the separator token that follows the document."""

_MIN_DOCSTRING_CHARS = 200
_SHUFFLE_BUFFER = 10_000
_TOKENIZE_BATCH = 256
_CHUNK_BYTES = 1 << 18


class Contexts(NamedTuple):
    """Token `tokens[i, j]` is number `positions[i, j]` of the document `document_hashes[documents[i, j]]`.

    The separator after a document belongs to that document and has position SEPARATOR_POSITION.
    """

    tokens: Int[Tensor, "n ctx"]
    documents: Int[Tensor, "n ctx"]
    positions: Int[Tensor, "n ctx"]
    document_hashes: list[str]


def contexts(
    corpus: str,
    tokenizer: Any,
    *,
    context_length: int,
    n_contexts: int,
    held_out: bool,
    held_out_fraction: float,
    seed: int,
) -> Contexts:
    """The first `n_contexts` contexts of one split of the corpus (int32).

    Successive documents are joined by one separator token (the tokenizer's eos, else bos, else sep), with no other
    special token, and cut every `context_length` tokens. `ValueError` when the split has fewer tokens than that takes.
    """
    wanted = n_contexts * context_length
    separator = separator_token(tokenizer)
    split = (d for d in ordered_documents(corpus, seed) if is_held_out(document_hash(d), held_out_fraction) == held_out)
    pieces: list[np.ndarray] = []
    hashes: list[str] = []
    n_tokens = 0
    for batch in _batched(split):
        for document, ids in zip(batch, token_ids(tokenizer, batch), strict=True):
            pieces.append(_addressed(ids, len(hashes), separator))
            hashes.append(document_hash(document))
            n_tokens += len(ids) + 1
            if n_tokens >= wanted:
                break
        if n_tokens >= wanted:
            break
    if n_tokens < wanted:
        name, remedy = (
            ("held-out", "held_out_fraction up or n_tokens_held_out") if held_out else ("training", "n_tokens")
        )
        raise ValueError(
            f"corpus {corpus} has {n_tokens:,} {name} tokens, but {n_contexts:,} contexts of {context_length} need "
            f"{wanted:,}; give a larger corpus or turn {remedy} down"
        )
    packed = np.concatenate(pieces, axis=1)[:, :wanted].reshape(3, n_contexts, context_length)
    tokens, documents_, positions = (torch.from_numpy(np.ascontiguousarray(a)) for a in packed)
    return Contexts(tokens, documents_, positions, hashes)


def documents(corpus: str) -> Iterator[str]:
    """Every document of the corpus once, stripped, none empty, in the order it is stored.

    `corpus` is `sae-probes-text`, `python-docstrings`, `hf:NAME[:CONFIG[:SPLIT]]`, or a local .txt (one document),
    .jsonl, .parquet, .csv, .csv.zst (column `text`), or a folder of them. `ValueError` when it cannot be read.
    """
    return _distinct(_read(corpus, seed=0))


def ordered_documents(corpus: str, seed: int) -> Iterator[str]:
    """`documents` in an order drawn from the seed, so that any prefix is a mixture of the whole.

    Files are read whole and sorted by hash(seed, document). A stream (the hub, the docstrings) keeps its own order
    but for a bounded shuffle, because it may be too long to be read to its end.
    """
    found = _distinct(_read(corpus, seed))
    if _is_stream(corpus):
        yield from found
    else:
        yield from sorted(found, key=lambda document: _seeded_hash(seed, document_hash(document)))


def document_hash(document: str) -> str:
    """The document's name: the first 128 bits of its sha256, in hex."""
    return hashlib.sha256(document.encode()).hexdigest()[:32]


def is_held_out(document: str, held_out_fraction: float) -> bool:
    """Whether the document of this hash is held out: its hash, read as a number in [0, 1), is below the fraction."""
    return int(document[:16], 16) / 2**64 < held_out_fraction


def separator_token(tokenizer: Any) -> int:
    """The token put after every document: eos, else bos, else sep (BERT's); `ValueError` when there is none of them."""
    for token in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.sep_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has no eos, bos or sep token to separate documents; set its eos_token")


def corpus_hash(corpus: str) -> str:
    """What identifies the corpus in a manifest: a hash of its files, or the commit of a hub dataset."""
    if corpus.startswith("hf:"):
        name, config, split = _hub_parts(corpus)
        return _sha256_lines([name, str(config), split, _hub_commit(name)])
    if corpus == PYTHON_DOCSTRINGS:
        return _sha256_lines([f"{name} {path.stat().st_size}" for name, path in sorted(_python_sources())])
    paths = _sae_probes_files() if corpus == SAE_PROBES_TEXT else _corpus_files(Path(corpus))
    rule = [f"one text a story of {_STORIES_STEM}"] if corpus == SAE_PROBES_TEXT else []
    return _sha256_lines([*rule, *(f"{path.name} {sha256_file(path)}" for path in paths)])


def is_local(corpus: str) -> bool:
    """Whether the corpus is a file or folder of the user's, which may change under its name."""
    return not _is_stream(corpus) and corpus != SAE_PROBES_TEXT


def _is_stream(corpus: str) -> bool:
    return corpus.startswith("hf:") or corpus == PYTHON_DOCSTRINGS


def _addressed(ids: list[int], document: int, separator: int) -> np.ndarray:
    """[3, len(ids) + 1]: tokens, document, positions, with the separator at the end."""
    rows = np.empty((3, len(ids) + 1), dtype=np.int32)
    rows[0, :-1], rows[0, -1] = ids, separator
    rows[1] = document
    rows[2, :-1], rows[2, -1] = np.arange(len(ids)), SEPARATOR_POSITION
    return rows


def token_ids(tokenizer: Any, batch: Iterable[str]) -> list[list[int]]:
    """The tokens of each text, without special ones."""
    # split_special_tokens: "<|endoftext|>" written in a document is text, not a control token.
    # verbose=False: documents longer than the subject's window are expected here, they are cut afterwards.
    return tokenizer(
        list(batch),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _batched(items: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, _TOKENIZE_BATCH)):
        yield batch


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[bytes] = set()
    for text in texts:
        # A lone surrogate (half of a broken escape in JSON) is no character and no tokenizer takes it.
        document = text.strip().encode("utf-8", "replace").decode()
        digest = hashlib.sha256(document.encode()).digest()[:16]
        if document and digest not in seen:
            seen.add(digest)
            yield document


def _seeded_hash(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def _sha256_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read(corpus: str, seed: int) -> Iterator[str]:
    """The raw texts of the corpus; `ValueError` when there is none."""
    if corpus.startswith("hf:"):
        texts = _hub_texts(corpus, seed)
    elif corpus == PYTHON_DOCSTRINGS:
        texts = _docstrings(seed)
    elif corpus == SAE_PROBES_TEXT:
        texts = itertools.chain.from_iterable(_sae_probes_texts(path) for path in _sae_probes_files())
    else:
        texts = itertools.chain.from_iterable(_file_texts(path) for path in _corpus_files(Path(corpus)))
    empty = True
    for text in texts:
        empty = empty and not text.strip()
        yield text
    if empty:
        raise ValueError(f"corpus {corpus} has no text; give files with at least one document that is not empty")


def _corpus_files(path: Path) -> list[Path]:
    """The file itself, or every readable file below the folder, sorted."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        found = [p for p in files if p.name.lower().endswith(SUFFIXES)]
        if len(found) < len(files):
            log.info(
                "corpus %s: %d files that are not %s are left out", path, len(files) - len(found), ", ".join(SUFFIXES)
            )
        if not found:
            raise ValueError(
                f"corpus folder {path} has no {', '.join(SUFFIXES)} file; put the text there in one of these"
            )
        return found
    if not path.exists():
        raise ValueError(
            f"corpus {path} does not exist; give a file, a folder, hf:DATASET, {SAE_PROBES_TEXT} or {PYTHON_DOCSTRINGS}"
        )
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(f"corpus {path} is of unknown type; give a {', '.join(SUFFIXES)} file or a folder of them")
    return [path]


def _sae_probes_files() -> list[Path]:
    folder = resources.fetch(SAE_PROBES_TEXT)
    present = {path.name.removesuffix(".csv.zst"): path for path in folder.rglob("*.csv.zst")}
    if missing := [stem for stem in SAE_PROBES_STEMS if stem not in present]:
        raise ValueError(f"{folder} lacks {', '.join(missing)} of corpus {SAE_PROBES_TEXT}; delete it to fetch it anew")
    return [present[stem] for stem in SAE_PROBES_STEMS]


def _sae_probes_texts(path: Path) -> Iterator[str]:
    """The prompts of one set; of `_STORIES_STEM` one for each story."""
    texts = _csv_texts(path, "prompt")
    if path.name.startswith(_STORIES_STEM):
        stories: dict[str, str] = {}
        for text in texts:
            stories.setdefault(text.strip()[:_STORY_CHARS], text)
        texts = iter(stories.values())
    return texts


def _file_texts(path: Path) -> Iterator[str]:
    readers: dict[str, Callable[[Path], Iterator[str]]] = {
        ".txt": _txt_texts,
        ".jsonl": _jsonl_texts,
        ".parquet": _parquet_texts,
        ".csv": _csv_texts,
        ".csv.zst": _csv_texts,
    }
    suffix = next(s for s in SUFFIXES if path.name.lower().endswith(s))
    try:
        yield from readers[suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it to UTF-8") from None
    except OSError as error:
        raise ValueError(
            f"{path} cannot be read ({error.strerror or error}); check that it is whole and yours"
        ) from None


def _txt_texts(path: Path) -> Iterator[str]:
    yield path.read_text("utf-8")


def _jsonl_texts(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error.msg}); give one object a line") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} is a JSON {type(row).__name__}; give one object a line")
            yield _text_of(row, "text", f"{path} line {number}")


def _parquet_texts(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow; pip install pyarrow, or convert it to .jsonl") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _text_of(dict.fromkeys(file.schema_arrow.names, ""), "text", str(path))
            for batch in file.iter_batches(columns=["text"]):
                for text in batch.column(0).to_pylist():
                    yield _text_of({"text": text}, "text", str(path))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]}); restore it") from None


def csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a .csv or .csv.zst file by column, each with the line it ends on; `ValueError` when it is not CSV."""
    with open(path, "rb") as file:
        source = _decompressed(file, path) if path.name.lower().endswith(".zst") else file
        with io.TextIOWrapper(source, "utf-8-sig", newline="") as lines:  # -sig: spreadsheets write a BOM
            yield from csv_rows_of(lines, str(path))


def csv_rows_of(lines: Iterable[str], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """As `csv_rows`, of an open file; `where` is what messages call it."""
    reader = csv.DictReader(lines)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{where} line {reader.line_num} is not CSV ({error}); convert the file to .jsonl") from None


def _csv_texts(path: Path, column: str = "text") -> Iterator[str]:
    for line, row in csv_rows(path):
        yield _text_of(row, column, f"{path} line {line}")


def _decompressed(file: io.BufferedReader, path: Path) -> io.BufferedReader:
    return io.BufferedReader(_Chunks(_zstd_chunks(file, path)), _CHUNK_BYTES)


def _zstd_chunks(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    """The decompressed bytes. zstandard's own reader takes a cut file for a short one, so frames are counted here."""
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"reading {path} needs zstandard; pip install zstandard, or decompress it") from None
    frame, chunk = None, file.read(_CHUNK_BYTES)
    try:
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
            chunk = chunk or file.read(_CHUNK_BYTES)
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is not a whole zstd file ({error}); restore it") from None
    if frame is not None:
        raise ValueError(f"{path} is not a whole zstd file (it ends within a frame); restore it")


class _Chunks(io.RawIOBase):
    """Successive bytes as a file."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks = chunks
        self.rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.rest = memoryview(chunk)
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise ValueError(
            f"{where} has no {column!r} column but {', '.join(map(str, row)) or 'none'}; rename the one with the text"
        )
    if not isinstance(row[column], str):
        raise ValueError(f"{where} has {type(row[column]).__name__} in {column!r}; every document must be text")
    return row[column]


def _python_sources() -> Iterator[tuple[str, Path]]:
    """Every Python file of the standard library and of the installed packages, with its path below its root."""
    for root in sorted({Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}):
        for folder, subfolders, files in os.walk(root):
            subfolders[:] = sorted(
                set(subfolders) - {"site-packages", "dist-packages"}
            )  # roots of their own, or not ours
            for path in (Path(folder, file) for file in sorted(files) if file.endswith(".py")):
                yield path.relative_to(root).as_posix(), path


def _docstrings(seed: int) -> Iterator[str]:
    """Docstrings of this machine's Python packages: they differ between machines, so never for a reported number.

    A stream of files in the order of hash(seed, path); files that are not valid Python are left out.
    """
    sources = sorted(_python_sources(), key=lambda source: _seeded_hash(seed, source[0]))
    for _, path in sources:
        try:
            with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError, RecursionError) as error:
            log.debug("%s has no docstrings to read: %s", path, error)
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                if len(docstring) >= _MIN_DOCSTRING_CHARS:
                    yield docstring


def _hub_parts(corpus: str) -> tuple[str, str | None, str]:
    name, _, rest = corpus.removeprefix("hf:").partition(":")
    config, _, split = rest.partition(":")
    if not name:
        raise ValueError(f"corpus {corpus} names no dataset; write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    return name, config or None, split or "train"


def _hub_commit(name: str) -> str:
    try:
        from huggingface_hub import HfApi

        return str(HfApi().dataset_info(name).sha)
    except Exception as error:  # the hub's client raises many kinds; all mean that the dataset is out of reach
        raise _hub_error(name, error) from None


def _hub_texts(corpus: str, seed: int) -> Iterator[str]:
    for row in hub_rows(corpus, seed):
        yield _text_of(row, "text", corpus)


def hub_rows(corpus: str, seed: int) -> Iterator[dict[str, Any]]:
    """The rows of `hf:NAME[:CONFIG[:SPLIT]]` by column, in an order drawn from the seed."""
    name, config, split = _hub_parts(corpus)
    try:
        import datasets
    except ImportError:
        raise ValueError(f"corpus {corpus} needs datasets; pip install datasets, or give a local file") from None
    commit = _hub_commit(name)
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True, revision=commit)
        yield from stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    except Exception as error:  # as above
        raise _hub_error(name, error) from None


def _hub_error(name: str, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"cannot read dataset {name} from the hub ({reason}); check its name and the network, or give a local file"
    )
