"""A corpus -> its documents: which files, which column, what is passed over, and where long documents are cut.

A document is a text, a chat (messages of roles), or token ids. Its name is a hash of what it says, however its file is
written, so what occurs twice is one document; the same hash decides the side of the split it is on (`tokens`).

Long documents are cut into parts, each a document of its own: so the text in hand is bounded, and a corpus of one book
has documents for both sides of the split.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import logging
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from monosem import resources, textfiles
from monosem.artifacts import sha256_file
from monosem.textfiles import tidied

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

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Of a corpus's files; all but the last two may be packed (`textfiles.PACKED`)."""

Kind = Literal["text", "chat", "token ids"]

CUT = 1 << 16
"""Characters of a document above which it is cut."""
FINE_CUT, FEW_DOCUMENTS = 1 << 11, 32
"""Where a corpus has fewer documents than that, they are cut finer, or one side of the split might have none."""

_PAIR = ("prompt", "completion")
_BOTH = "+".join(_PAIR)
COLUMNS = ("text", "messages", "conversations", _BOTH, "input_ids", "tokens")
"""Which is taken where none is named: the first that has something. The pair is one text, or one chat."""
_LISTS = ("messages", "conversations", "input_ids", "tokens")
_CHARS_PER_ID = 4
_LONG_EXCHANGE = 4
_ROLES = {"human": "user", "gpt": "assistant"}
"""What ShareGPT calls them."""
_ENDS = ("\n\n", "\n", ". ", "! ", "? ", "\u3002", " ")
"""Where a text is cut: at the last of the first of these in the second half of what may stay."""
_TEXT_CHUNK = 1 << 19
_BATCH_BYTES = 1 << 22

_MIN_DOCSTRING_CHARS = 200
_SHUFFLE_BUFFER = 10_000


class Document(NamedTuple):
    """What a document says: a text; the messages of a chat as JSON; token ids with spaces between."""

    content: str
    kind: Kind = "text"

    @property
    def name(self) -> str:
        """The first 128 bits of a sha256, in hex: of the text, or of another kind's name, a line end and content."""
        said = self.content if self.kind == "text" else f"{self.kind}\n{self.content}"
        return hashlib.sha256(said.encode()).hexdigest()[:32]


class Reader:
    """Reads a corpus; once it is read, `column` and `kind` say what was taken, and `skipped` what was passed over."""

    def __init__(self, corpus: str, text_column: str | None = None) -> None:
        self.corpus, self.text_column = corpus, text_column
        self.column: str | None = None
        self.kind: str | None = None
        self.n_rows = 0
        self.skipped: Counter[str] = Counter()
        self.reason = ""
        """Why the chat template refused a chat, the last that it did."""
        self._lacking = ""
        self._has_columns = False

    def documents(self, seed: int, cut: int | None = None) -> Iterator[Document]:
        """Every document in stored order, none empty, cut to so many characters; those that occur twice, twice.

        `seed` draws the order of a stream. `ValueError` when the corpus cannot be read or has no document.
        """
        if self.text_column is not None and self.corpus in (SAE_PROBES_TEXT, PYTHON_DOCSTRINGS):
            raise ValueError(f"text_column is {self.text_column!r}, but {self.corpus} has no columns; leave it out")
        self.column, self.kind, self.n_rows, self.skipped = self.text_column, None, 0, Counter()
        for document in self._read(seed, cut):
            self.kind = document.kind if self.kind in (None, document.kind) else "mixed"
            yield document
        if self.text_column is not None and not self._has_columns:
            raise ValueError(
                f"text_column is {self.text_column!r}, but corpus {self.corpus} has .txt files alone; leave it out"
            )
        if self.kind is None:
            raise ValueError(f"corpus {self.corpus} has no text{self._why()}")
        if self.skipped:
            log.info("corpus %s: of %d rows skipped %s", self.corpus, self.n_rows, self._counts())

    def facts(self) -> dict[str, Any]:
        """What a manifest says about the reading."""
        return {"column": self.column, "kind": self.kind, "n_rows": self.n_rows, "skipped": dict(self.skipped)}

    def skip(self, why: str) -> None:
        self.skipped[why] += 1

    def _why(self) -> str:
        if self._lacking and set(self.skipped) == {"without the column"}:
            return f": {self._lacking}; say which column has it (text_column)"
        if set(self.skipped) - {"empty"}:
            return f": of {self.n_rows:,} rows {self._counts()}; give rows with text, messages or token ids"
        return "; give files with at least one document that is not empty"

    def _counts(self) -> str:
        return ", ".join(f"{n:,} {why}" for why, n in sorted(self.skipped.items()))

    def _read(self, seed: int, cut: int | None) -> Iterator[Document]:
        if self.corpus.startswith("hf:"):
            yield from self._of_rows(((f"{self.corpus}", row) for row in hub_rows(self.corpus, seed)), cut)
        elif self.corpus == PYTHON_DOCSTRINGS:
            yield from self._of_rows((("docstring", text) for text in _docstrings(seed)), cut)
        elif self.corpus == SAE_PROBES_TEXT:
            texts = itertools.chain.from_iterable(_sae_probes_texts(path) for path in _sae_probes_files())
            for text in texts:  # a fixed corpus: nothing of it is tidied or cut
                self.n_rows += 1
                if document := text.strip():
                    yield Document(document)
        else:
            for path in corpus_files(self.corpus):
                if textfiles.kind_of(path, SUFFIXES) == ".txt":
                    yield from self._of_text(path, cut)
                else:
                    yield from self._of_rows(_rows(path, self._wanted()), cut)

    def _wanted(self) -> tuple[str, ...]:
        """The columns that a row may be taken from."""
        wanted = COLUMNS if self.column is None else (self.column,)
        return tuple(name for column in wanted for name in _names(column))

    def _of_text(self, path: Path, cut: int | None) -> Iterator[Document]:
        self.n_rows += 1
        with textfiles.opened(path) as file:
            pieces = [file.read()] if cut is None else iter(lambda: file.read(_TEXT_CHUNK), "")
            document = None
            for text in text_parts(map(tidied, pieces), cut):
                yield (document := Document(text))
        if document is None:
            self.skip("empty")

    def _of_rows(self, rows: Iterable[tuple[str, Any]], cut: int | None) -> Iterator[Document]:
        for place, row in rows:
            self.n_rows += 1
            self._has_columns = True
            why = self._passed_over(row, place)
            document = None if why else document_of(row if isinstance(row, str) else _cell(row, str(self.column)))
            if why or document is None or not document.content:
                self.skip(why or ("not text" if document is None else "empty"))
            else:
                yield from parts(document, cut)

    def _passed_over(self, row: Any, place: str) -> str:
        """Why a row has nothing to be a document of, or an empty string; chooses the column where none is chosen."""
        if isinstance(row, str) and self.text_column is None:
            return ""
        if not isinstance(row, dict):
            return "not text"
        there = [name for name in ([self.column] if self.column else COLUMNS) if _has(row, name)]
        if not there:
            self._lacking = self._lacking or (
                f"{place} has no column {self.column or COLUMNS[0]!r} but {', '.join(map(str, row)) or 'none'}"
            )
            return "without the column"
        cells = {name: _cell(row, name) for name in there}
        if all(value is None for value in cells.values()):
            return "null"
        if self.column is None:
            self.column = next((name for name, value in cells.items() if document_of(value) is not None), None)
        return "" if self.column else "not text"


def _names(column: str) -> tuple[str, ...]:
    return _PAIR if column == _BOTH else (column,)


def _has(row: dict[str, Any], column: str) -> bool:
    return all(name in row for name in _names(column))


def _cell(row: dict[str, Any], column: str) -> Any:
    """What a row has in a column, or in both of the pair, joined; None when it has nothing there."""
    if column in _LISTS and isinstance(row[column], str):
        return _listed(row[column])
    if column != _BOTH:
        return row[column]
    prompt, completion = (row[name] for name in _PAIR)
    return prompt + completion if type(prompt) is type(completion) and isinstance(prompt, str | list) else None


def _listed(written: str) -> Any:
    """The list that a cell holds as JSON, as tables without types have it; else the cell."""
    try:
        found = json.loads(written) if written.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, list) else written


def document_of(value: Any) -> Document | None:
    """The document that a cell holds, its content empty when there is nothing in it; None when it is none of a kind."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None
    if isinstance(value, str):
        return Document(tidied(value).strip())
    if not isinstance(value, list):
        return None
    if all(isinstance(token, int) and not isinstance(token, bool) for token in value):
        return Document(" ".join(map(str, value)), "token ids")
    messages = [_message(message) for message in value]
    if any(message is None for message in messages):
        return None
    if not any(message["content"] for message in messages if message):
        return Document("", "chat")
    return _chat(messages)


def _chat(messages: Sequence[Any]) -> Document:
    return Document(tidied(json.dumps(messages, ensure_ascii=False, sort_keys=True)), "chat")


def _message(given: Any) -> dict[str, Any] | None:
    """A message as chat templates take it: role, content (a string), and what else it has; None when it is none."""
    if not isinstance(given, dict):
        return None
    given = {name: value for name, value in given.items() if value is not None}
    role, content = given.pop("role", None), given.pop("content", None)
    if role is None:
        role, content = given.pop("from", None), given.pop("value", content)
    if isinstance(content, list):  # of parts, as chats with pictures have it
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
    elif content is None and given:
        content = ""  # a message that only calls a tool
    if not isinstance(role, str) or not isinstance(content, str):
        return None
    return {**given, "role": _ROLES.get(role, role), "content": tidied(content)}


def parts(document: Document, cut: int | None) -> Iterator[Document]:
    """The document, or where it is longer than `cut` characters its parts, in order."""
    if cut is None or len(document.content) <= cut:
        yield document
    elif document.kind == "text":
        for text in text_parts([document.content], cut):
            yield Document(text)
    elif document.kind == "token ids":
        ids = document.content.split(" ")
        each = max(1, cut // _CHARS_PER_ID)
        for start in range(0, len(ids), each):
            yield Document(" ".join(ids[start : start + each]), "token ids")
    else:
        yield from _chat_parts(json.loads(document.content), cut)


def _chat_parts(messages: list[dict[str, Any]], cut: int) -> Iterator[Document]:
    """Chats that begin where the user speaks, of whole exchanges, so far as these are not several times too long (an
    agent at work); what is too long of one message is text.
    """
    group: list[dict[str, Any]] = []
    said = 0
    for message in messages:
        first, *more = list(text_parts([message["content"]], cut)) or [""]
        beside = {name: value for name, value in message.items() if name not in ("role", "content")}  # calls of tools
        size = len(first) + (len(json.dumps(beside)) if beside else 0)
        most = cut if message["role"] == "user" else _LONG_EXCHANGE * cut
        if said + size > most and any(m["role"] != "system" for m in group):
            yield _chat(group)
            group, said = [], 0
        said += size
        group.append({**message, "content": first})
        for text in more:
            yield Document(text)
    yield _chat(group)


def text_parts(pieces: Iterable[str], cut: int | None) -> Iterator[str]:
    """The text that comes in pieces, in stripped parts of at most `cut` characters (None: whole).

    A part ends with a paragraph, else a line, a sentence, a word. Where it ends does not depend on the pieces.
    """
    rest = ""
    for piece in pieces:
        rest += piece
        start, filled = 0, len(rest.rstrip())
        while cut is not None:
            while start < filled and rest[start].isspace():
                start += 1
            if filled - start <= cut:
                break
            stop = start + _cut_point(rest[start : start + cut])
            yield rest[start:stop].rstrip()
            start = stop
        rest = rest[start : filled + (cut or len(rest))]  # of the space that follows, no more than bounded
    if last := rest.strip():
        yield last


def _cut_point(text: str) -> int:
    """Behind the last end of a paragraph in the second half, else of a line, a sentence, a word; else all of it."""
    for end in _ENDS:
        found = text.rfind(end, len(text) // 2)
        if found >= 0:
            return found + len(end)
    return len(text)


def corpus_files(corpus: str) -> list[Path]:
    """The file itself, or every readable file below the folder, sorted; `ValueError` when there is none."""
    path = Path(corpus).expanduser()
    kinds = ", ".join(SUFFIXES)
    if path.is_dir():
        if any(textfiles.is_ours(path / name) for name in ("manifest.json", "plan.json")):
            raise ValueError(f"corpus folder {path} was made by monosem; give a folder with text")
        found = textfiles.listed(path, SUFFIXES, apart=[resources.cache_folder()])
        if not found:
            raise ValueError(f"corpus folder {path} has no {kinds} file; put the text there in one of these")
        return found
    if not path.exists():
        raise ValueError(
            f"corpus {path} does not exist; give a file, a folder, hf:DATASET, {SAE_PROBES_TEXT} or {PYTHON_DOCSTRINGS}"
        )
    textfiles.require_file(path)
    if textfiles.kind_of(path, SUFFIXES) is None:
        packed = ", ".join(textfiles.PACKED)
        raise ValueError(
            f"corpus {path} is of unknown type; give a {kinds} file (perhaps packed: {packed}) or a folder of them"
        )
    return [path]


def is_local(corpus: str) -> bool:
    """Whether the corpus is a file or folder of the user's, which may change under its name."""
    return not is_stream(corpus) and corpus != SAE_PROBES_TEXT


def is_stream(corpus: str) -> bool:
    """Whether it may be too long to be read to its end."""
    return corpus.startswith("hf:") or corpus == PYTHON_DOCSTRINGS


def corpus_hash(corpus: str) -> str:
    """What identifies the corpus in a manifest: a hash of its files, or the commit of a hub dataset."""
    if corpus.startswith("hf:"):
        name, config, split = _hub_parts(corpus)
        return _sha256_lines([name, str(config), split, _hub_commit(name)])
    if corpus == PYTHON_DOCSTRINGS:
        return _sha256_lines([f"{name} {path.stat().st_size}" for name, path in sorted(_python_sources())])
    paths = _sae_probes_files() if corpus == SAE_PROBES_TEXT else corpus_files(corpus)
    rule = [f"one text a story of {_STORIES_STEM}"] if corpus == SAE_PROBES_TEXT else []
    return _sha256_lines([*rule, *(f"{path.name} {sha256_file(path)}" for path in paths)])


def seeded_hash(seed: int, name: str) -> bytes:
    """What orders names by a seed."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


def _sha256_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def _rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The rows of a file that is not .txt, each with its place; of a table with types only the columns wanted."""
    kind = textfiles.kind_of(path, SUFFIXES)
    if kind in (".parquet", ".arrow"):
        yield from _arrow_rows(path, wanted, kind)
    elif kind in (".jsonl", ".ndjson"):
        for number, value in textfiles.json_lines(path):
            yield f"{path} line {number}", value
    elif kind == ".json":
        for number, value in textfiles.json_values(path):
            yield f"{path} value {number}", value
    else:
        for number, row in textfiles.csv_rows(path):
            yield f"{path} line {number}", row


def _arrow_rows(path: Path, wanted: Sequence[str], kind: str) -> Iterator[tuple[str, Any]]:
    textfiles.require_file(path)
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"reading {path} needs pyarrow; pip install pyarrow, or convert it to .jsonl") from None
    try:
        with open(path, "rb") as file:
            batches = _parquet_batches(file, wanted) if kind == ".parquet" else _arrow_batches(file, wanted)
            number = 0
            for batch in batches:
                columns = {name: batch.column(name) for name in batch.schema.names}
                for i in range(batch.num_rows):
                    number += 1
                    row = {name: column[i].as_py() if name in wanted else None for name, column in columns.items()}
                    yield f"{path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ValueError(f"{path} is not a readable {kind[1:]} file ({reason}); restore it") from None


def _parquet_batches(file: IO[bytes], wanted: Sequence[str]) -> Iterator[Any]:
    """Record batches of a few MiB, whatever the size of the row groups; all columns where none is wanted."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, buffer_size=_BATCH_BYTES, pre_buffer=False) as table:
        names = table.schema_arrow.names
        columns = [name for name in names if name in wanted] or names
        groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
        largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
        n_rows = min(4096, max(1, _BATCH_BYTES // max(1, largest)))
        yield from table.iter_batches(batch_size=n_rows, columns=columns, use_threads=False)


def _arrow_batches(file: IO[bytes], wanted: Sequence[str]) -> Iterator[Any]:
    """Record batches of an Arrow file, or of a stream, as `datasets` saves them."""
    import pyarrow

    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    with pyarrow.ipc.open_file(file) if is_file else pyarrow.ipc.open_stream(file) as reader:
        whole = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else iter(reader)
        for batch in whole:
            columns = [name for name in batch.schema.names if name in wanted]
            yield batch.select(columns) if columns else batch


def _sae_probes_files() -> list[Path]:
    folder = resources.fetch(SAE_PROBES_TEXT)
    present = {path.name.removesuffix(".csv.zst"): path for path in folder.rglob("*.csv.zst")}
    if missing := [stem for stem in SAE_PROBES_STEMS if stem not in present]:
        raise ValueError(f"{folder} lacks {', '.join(missing)} of corpus {SAE_PROBES_TEXT}; delete it to fetch it anew")
    return [present[stem] for stem in SAE_PROBES_STEMS]


def _sae_probes_texts(path: Path) -> Iterator[str]:
    """The prompts of one set; of `_STORIES_STEM` one for each story."""
    texts = (row["prompt"] for _, row in textfiles.csv_rows(path))
    if path.name.startswith(_STORIES_STEM):
        stories: dict[str, str] = {}
        for text in texts:
            stories.setdefault(text.strip()[:_STORY_CHARS], text)
        return iter(stories.values())
    return texts


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
    sources = sorted(_python_sources(), key=lambda source: seeded_hash(seed, source[0]))
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
