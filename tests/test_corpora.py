"""What a document is: whichever column, file and length it comes in, it is named by what it says."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from monosem.corpora import CUT, FEW_DOCUMENTS, FINE_CUT, Document, Reader, document_of, parts, text_parts
from monosem.tokens import documents, is_held_out, split_contexts, token_ids
from tiny import tiny_texts, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = 1
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def read(corpus: str, column: str | None = None) -> tuple[list[Document], dict[str, Any]]:
    reader = Reader(corpus, column)
    return list(reader.documents(seed=0)), reader.facts()


def split(corpus: str, tokenizer: Any = TOKENIZER, *, n: int = 8, column: str | None = None) -> Any:
    return split_contexts(
        corpus,
        tokenizer,
        context_length=16,
        n_contexts={"train": n, "held_out": 2},
        held_out_fraction=0.3,
        seed=0,
        text_column=column,
    )


def test_the_same_text_is_the_same_document_however_its_file_is_written(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    text = 'Zwölf, "Boxkämpfer"\n東京 😀'
    rows = json.dumps({"text": text}) + "\n"
    table = pyarrow.table({"n": [1], "text": [text]})
    (tmp_path / "a.txt").write_text("\ufeff" + text.replace("\n", "\r\n") + "\r\n", "utf-8")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(text.encode("utf-16")))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text.replace("\n", "\r\n")}, ensure_ascii=False), "utf-8-sig")
    (tmp_path / "d.JSONL.GZ").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "e.json.zst").write_bytes(zstandard.compress(json.dumps([{"text": text}], indent=1).encode()))
    (tmp_path / "f.ndjson.bz2").write_bytes(bz2.compress(rows.encode()))
    for name, delimiter in (("g.csv", ","), ("h.tsv", "\t"), ("i.csv", ";")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows([("n", "text"), (1, text)])
    pyarrow.parquet.write_table(table, tmp_path / "j.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "k.arrow", table.schema) as stream:
        stream.write_table(table)
    with pyarrow.ipc.new_file(tmp_path / "l.arrow", table.schema) as stream:
        stream.write_table(table)
    found, facts = read(str(tmp_path))
    assert facts == {"column": "text", "kind": "text", "n_rows": 12, "skipped": {}}
    assert [document.content for document in found] == [text] * 12
    assert list(documents(f"{tmp_path}/")) == [text]


def test_rows_without_text_are_passed_over_and_counted(tmp_path: Path) -> None:
    rows = [{"id": 1}, {"text": None}, {"text": "one"}, {"text": " \n"}, {"text": 3}, {"text": ["a"]}, "two", 7, None]
    found, facts = read(jsonl(tmp_path / "a.jsonl", rows))
    assert [document.content for document in found] == ["one", "two"]
    assert facts["skipped"] == {"without the column": 1, "null": 1, "empty": 1, "not text": 4}
    assert facts["n_rows"] == 9


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": None}, {"text": None}], "has no text: of 2 rows 2 null"),
        ([{"tokens": ["a", "b"]}], "has no text: of 1 rows 1 not text"),
        (
            [{"body": "x", "id": 1}],
            "line 1 has no column 'text' but body, id; say which column has it",
        ),
    ],
)
def test_a_corpus_without_any_text_says_what_it_has(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(jsonl(tmp_path / "a.jsonl", rows))


def test_the_column_can_be_named(tmp_path: Path) -> None:
    corpus = jsonl(tmp_path / "a.jsonl", [{"text": "title", "content": "one"}, {"content": None}, {"text": "other"}])
    found, facts = read(corpus, "content")
    assert [document.content for document in found] == ["one"]
    assert facts["column"] == "content" and facts["skipped"] == {"null": 1, "without the column": 1}
    (tmp_path / "b.csv").write_text("text,content\na,two\n,\n", "utf-8")
    assert list(documents(str(tmp_path), "content")) == ["one", "two"]
    with pytest.raises(ValueError, match="has no column 'body' but text, content; say which"):
        read(str(tmp_path / "b.csv"), "body")
    (tmp_path / "c.txt").write_text("three", "utf-8")
    with pytest.raises(ValueError, match=r"text_column is 'body', but corpus .* has \.txt files alone; leave it out"):
        read(str(tmp_path / "c.txt"), "body")
    for named in ("sae-probes-text", "python-docstrings"):
        with pytest.raises(ValueError, match=f"text_column is 'body', but {named} has no columns"):
            read(named, "body")


def test_a_chat_is_one_document_in_every_form(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "the sea?"}, {"role": "assistant", "content": "yes"}]
    shared = [{"from": "human", "value": "the sea?"}, {"from": "gpt", "value": "yes"}]
    in_parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}], "name": None} for m in chat]
    whole, ended = {"prompt": chat[:1], "completion": chat[1:]}, {"conversations": shared}
    for number, row in enumerate(({"messages": chat, "text": None}, {"messages": in_parts}, ended, whole)):
        (found,), facts = read(jsonl(tmp_path / f"{number}.jsonl", [row]))
        assert found == document_of(chat) and facts["kind"] == "chat"
    assert json.loads(found.content) == chat
    pictures = [{"role": "user", "content": [{"type": "image"}]}]
    assert document_of(pictures) is None and document_of([{"role": "user"}]) is None
    assert document_of([{"role": "user", "content": ""}]) == Document("", "chat")
    pair = jsonl(tmp_path / "pair.jsonl", [{"prompt": "2 + 2 =", "completion": " 4"}])
    assert read(pair)[0] == [Document("2 + 2 = 4")]


def test_lists_that_a_table_holds_as_json_are_lists(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "the sea?"}, {"role": "assistant", "content": "yes"}]
    for column, value in (("messages", chat), ("conversations", chat), ("input_ids", [5, 6]), ("tokens", [7])):
        with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[column], [json.dumps(value)]])
        assert read(str(tmp_path / "a.csv"))[0] == [document_of(value)]
        assert read(jsonl(tmp_path / "a.jsonl", [{column: json.dumps(value)}]))[0] == [document_of(value)]
    for text in ("[not JSON", "[" * 100_000, '{"a": 1}'):  # a text that begins like one
        assert read(jsonl(tmp_path / "a.jsonl", [{"messages": text}]))[0] == [Document(text)]
    assert read(jsonl(tmp_path / "a.jsonl", [{"text": "[1, 2]"}]))[0] == [Document("[1, 2]")]


def test_chats_become_tokens_by_the_tokenizers_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    said = [text[: 60 + i % 2] for i, text in enumerate(tiny_texts(60))]
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "</s>"}] for text in said]
    corpus = jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    with pytest.raises(ValueError, match=r"holds chats \(messages\), but the subject's tokenizer has no chat template"):
        split(corpus, tokenizer)
    tokenizer.chat_template = TEMPLATE
    found, facts = split(corpus, tokenizer)
    assert facts["column"] == "messages" and facts["kind"] == "chat"
    name = found["train"].document_hashes[0]
    names = [getattr(document_of(chat), "name", "") for chat in chats]
    chat = chats[names.index(name)]
    written = "".join(f"<s>{m['role']}: {m['content']}</s>" for m in chat)
    expected = [*token_ids(tokenizer, [written], control=True)[0], EOS]
    assert found["train"].tokens.flatten()[: len(expected)].tolist() == expected
    assert expected[0] == 0 and expected.count(EOS) == 4
    tokenizer.chat_template = (
        "{% if messages[0].content | length is odd %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    )
    found, facts = split(corpus, tokenizer, n=60)
    assert facts["skipped"]["refused by the chat template"] > 0
    even = {name for name, text in zip(names, said, strict=True) if len(text) % 2 == 0}
    assert set(found["train"].document_hashes) <= even


def test_a_template_that_takes_parts_is_given_parts_and_one_that_takes_neither_is_named(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    system = {"role": "system", "content": "be kind"}
    rows = [{"messages": [system, {"role": "user", "content": text}]} for text in tiny_texts(60)]
    corpus = jsonl(tmp_path / "a.jsonl", rows)
    tokenizer.chat_template = TEMPLATE
    plain, _ = split(corpus, tokenizer)
    in_parts = TEMPLATE.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    assert in_parts != TEMPLATE
    tokenizer.chat_template = in_parts
    found, facts = split(corpus, tokenizer)
    assert found["train"].tokens.equal(plain["train"].tokens) and not facts["skipped"]
    for template, reason in (
        ("{% for m in messages %}<s>{{ m.role }}</s>{% endfor %}", "it leaves out what is said"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x", "no system role"),
        ("{% for %}", "Expected"),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=rf"chats are refused by the chat template \(.*{reason}.*\); give chats"):
            split(corpus, tokenizer)


def test_token_ids_are_used_as_they_are_and_checked(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).integers(0, len(TOKENIZER), (60, 9)).tolist()
    corpus = jsonl(tmp_path / "a.jsonl", [{"input_ids": row, "n": 1} for row in [*rows, []]])
    found, facts = split(corpus)
    assert facts == {
        "column": "input_ids",
        "kind": "token ids",
        "n_rows": 61,
        "skipped": {"empty": 1},
        "cut_characters": CUT,
    }
    tokens = found["train"].tokens.flatten().tolist()
    assert tokens[:9] in rows and tokens[9] == EOS and tokens[10:19] in rows
    with pytest.raises(ValueError, match=rf"has token id {len(TOKENIZER)} in 'tokens', but .* has ids 0 to"):
        split(jsonl(tmp_path / "b.jsonl", [{"tokens": [*row, len(TOKENIZER)]} for row in rows]))


def test_a_long_text_is_cut_at_paragraphs_the_same_however_it_arrives(tmp_path: Path) -> None:
    paragraphs = [f"{text} {text[::-1]}" for text in tiny_texts(90)]
    text = "\n\n".join(paragraphs) + "\n" * 50
    whole = list(text_parts([text], 20_000))
    assert "\n\n".join(whole) == text.strip() and max(map(len, whole)) <= 20_000
    assert all(part.startswith(tuple(paragraphs)) for part in whole)
    for size in (1, 100, 7919):
        assert list(text_parts((text[i : i + size] for i in range(0, len(text), size)), 20_000)) == whole
    (tmp_path / "a.txt").write_bytes(text.replace("\n", "\r\n").encode())
    rows = jsonl(tmp_path / "a.jsonl", [{"text": text}])
    expected = [Document(part) for part in text_parts([text], CUT)]
    assert list(Reader(str(tmp_path / "a.txt")).documents(0, CUT)) == list(Reader(rows).documents(0, CUT)) == expected
    assert list(text_parts(["x" * 12], 5)) == ["xxxxx", "xxxxx", "xx"]
    assert list(text_parts(["one too. three"], 10)) == ["one too.", "three"]
    assert list(text_parts(["x" * 5 + " " * 99], 5)) == ["x" * 5] and list(text_parts([" \n"], 5)) == []


def test_long_ids_and_chats_are_cut_too() -> None:
    ids = Document(" ".join(map(str, range(10_000))), "token ids")
    cut = list(parts(ids, 4000))
    assert [len(part.content.split()) for part in cut] == [1000] * 10
    assert " ".join(part.content for part in cut) == ids.content
    turns = [{"role": role, "content": f"{role} {i} says"} for i in range(9) for role in ("user", "assistant")]
    chat = document_of([{"role": "system", "content": "be brief"}, *turns])
    assert chat is not None
    split_chats = [json.loads(part.content) for part in parts(chat, 100)]
    assert [m for part in split_chats for m in part] == json.loads(chat.content)
    assert len(split_chats) > 2 and all(part[0]["role"] == "user" for part in split_chats[1:])
    long = document_of([{"role": "user", "content": "word " * 100}])
    assert long is not None
    assert {part.kind for part in parts(long, 100)} == {"chat", "text"}


def test_a_long_exchange_is_bounded_and_nothing_of_it_is_lost() -> None:
    """An agent's chat: the user speaks once, then hundreds of messages follow."""
    for others in (["assistant"], ["assistant", "tool"]):
        roles = ["system", "user", *(others[i % len(others)] for i in range(3000))]
        messages = [{"content": f"{i}" + " word" * 20, "role": role} for i, role in enumerate(roles)]
        found = list(parts(Document(json.dumps(messages), "chat"), 2000))
        assert [m for part in found for m in json.loads(part.content)] == messages
        said = [sum(len(m["content"]) for m in json.loads(part.content)) for part in found]
        assert max(said) <= 4 * 2000 and min(said[:-1]) > 3 * 2000
    call = {"role": "assistant", "content": "", "tool_calls": [{"arguments": "x" * 500}]}
    calls = [{"role": "user", "content": "go"}, *[call] * 200]
    found = list(parts(Document(json.dumps(calls), "chat"), 2000))
    assert len(found) > 10 and sum(len(json.loads(part.content)) for part in found) == 201


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_one_long_document_has_text_for_both_sides_of_the_split(tmp_path: Path, suffix: str) -> None:
    import pyarrow
    import pyarrow.parquet

    book = "\n\n".join(tiny_texts(200))
    path = tmp_path / f"book{suffix}"
    if suffix == ".txt":
        path.write_text(book, "utf-8")
    elif suffix == ".jsonl":
        jsonl(path, [{"text": book}])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": [book]}), path)
    found, facts = split(str(path))
    assert facts["cut_characters"] == FINE_CUT and facts["n_rows"] == 1
    sides = {side: set(found[side].document_hashes) for side in ("train", "held_out")}
    assert sides["train"] and sides["held_out"] and not sides["train"] & sides["held_out"]
    assert sides["train"] | sides["held_out"] <= {Document(part).name for part in text_parts([book], FINE_CUT)}
    assert list(documents(str(path))) == [book]


def test_documents_are_cut_finely_only_where_there_are_few(tmp_path: Path) -> None:
    texts = ["\n\n".join(tiny_texts(30, seed=i))[:3000] for i in range(FEW_DOCUMENTS)]
    assert min(map(len, texts)) > FINE_CUT
    assert split(jsonl(tmp_path / "a.jsonl", texts))[1]["cut_characters"] == CUT
    assert split(jsonl(tmp_path / "b.jsonl", texts[1:]))[1]["cut_characters"] == FINE_CUT


def test_few_tokens_of_a_large_corpus_are_those_of_all_of_it_in_order(tmp_path: Path) -> None:
    """Only the documents that come first are kept; where they turn out to be too few, more are."""
    texts = [*tiny_texts(150), *(" " * 3000 + f"{i}" + " " * 3000 + "." for i in range(50)), *tiny_texts(20)]
    corpus = jsonl(tmp_path / "a.jsonl", texts)
    few, many = split(corpus, n=3)[0], split(corpus, n=150)[0]
    assert few["train"].tokens.equal(many["train"].tokens[:3])
    assert many["train"].document_hashes[: len(few["train"].document_hashes)] == few["train"].document_hashes
    assert not any(is_held_out(name, 0.3) for name in many["train"].document_hashes)


def test_names_of_files_and_folders_may_be_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "my corpus ü"
    folder.mkdir()
    (folder / "a b\udcff.TXT").write_text("one", "utf-8")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for corpus in (str(folder), "~/link", f"{folder}/"):
        assert list(documents(corpus)) == ["one"]


def test_a_store_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{\n  "kind": "activation-store",\n  "format": 1\n}', "utf-8")
    (tmp_path / "a.txt").write_text("x", "utf-8")
    with pytest.raises(ValueError, match="was made by monosem; give a folder with text"):
        read(str(tmp_path))
