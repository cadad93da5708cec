"""Documents become contexts whose every token knows where it came from, and held-out documents stay held out."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from monosem import corpora, resources, tokens
from monosem.corpora import corpus_hash
from monosem.tokens import (
    SEPARATOR_POSITION,
    Contexts,
    contexts,
    document_hash,
    documents,
    is_held_out,
    ordered_documents,
)
from tiny import tiny_corpus, tiny_texts, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = 1


def packed(corpus: Path, **changes: Any) -> Contexts:
    options: dict[str, Any] = {
        "context_length": 16,
        "n_contexts": 20,
        "held_out": False,
        "held_out_fraction": 0.3,
        "seed": 0,
    }
    return contexts(str(corpus), TOKENIZER, **options | changes)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def test_contexts_are_the_documents_joined_by_one_separator(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path)
    found = packed(corpus)
    flat: list[tuple[int, int, int]] = []
    chosen = (d for d in ordered_documents(str(corpus), seed=0) if not is_held_out(document_hash(d), 0.3))
    for index, document in enumerate(chosen):
        ids = TOKENIZER(document, add_special_tokens=False)["input_ids"]
        flat += [(token, index, position) for position, token in enumerate(ids)] + [(EOS, index, SEPARATOR_POSITION)]
    addressed = zip(found.tokens.flatten(), found.documents.flatten(), found.positions.flatten(), strict=True)
    assert [tuple(map(int, address)) for address in addressed] == flat[: 20 * 16]


def test_contexts_address_every_token_in_its_document(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path)
    found = packed(corpus)
    ids = {document_hash(d): TOKENIZER(d, add_special_tokens=False)["input_ids"] for d in documents(str(corpus))}
    for token, document, position in zip(*(part.flatten().tolist() for part in found[:3]), strict=True):
        expected = EOS if position == SEPARATOR_POSITION else ids[found.document_hashes[document]][position]
        assert token == expected


def test_contexts_do_not_depend_on_how_many_are_asked_for(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path)
    few, many = packed(corpus, n_contexts=3), packed(corpus)
    assert few.tokens.equal(many.tokens[:3])
    assert few.document_hashes == many.document_hashes[: len(few.document_hashes)]
    assert int(few.documents.max()) == len(few.document_hashes) - 1


def test_contexts_are_silent_about_documents_longer_than_the_window(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    corpus = tiny_corpus(tmp_path)
    with caplog.at_level("WARNING"):
        found = contexts(
            str(corpus), tokenizer, context_length=16, n_contexts=20, held_out=False, held_out_fraction=0.3, seed=0
        )
    assert found.tokens.equal(packed(corpus).tokens)
    assert caplog.text == "" and capfd.readouterr().err == ""


def test_a_control_token_written_in_a_document_is_text(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", ["one </s> two <s> three"])
    found = packed(corpus, context_length=8, n_contexts=2, held_out_fraction=1e-12)
    assert int((found.tokens == EOS).sum()) == int((found.positions == SEPARATOR_POSITION).sum())


def test_contexts_say_how_many_tokens_a_small_corpus_has(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "c.jsonl", ["abc"])
    with pytest.raises(
        ValueError, match=r"has 4 training tokens, but 1,000 contexts of 16 need 16,000; .*n_tokens down"
    ):
        packed(corpus, n_contexts=1000, held_out_fraction=1e-12)
    with pytest.raises(ValueError, match="has 0 held-out tokens: it is one document"):
        packed(corpus, held_out=True, held_out_fraction=1e-12)


def test_the_separator_is_eos_then_bos_then_sep() -> None:
    def separator(eos: int | None, bos: int | None, sep: int | None) -> int:
        return tokens.separator_token(types.SimpleNamespace(eos_token_id=eos, bos_token_id=bos, sep_token_id=sep))

    assert separator(0, 5, 7) == 0
    assert separator(None, 5, 7) == 5
    assert separator(None, None, 7) == 7  # BERT's tokenizer has no other
    with pytest.raises(ValueError, match="no eos, bos or sep token"):
        separator(None, None, None)


def test_held_out_and_training_documents_are_disjoint_for_any_seeds(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path)
    train = {h for seed in range(5) for h in packed(corpus, seed=seed).document_hashes}
    held_out = {h for seed in range(5) for h in packed(corpus, seed=seed, held_out=True, n_contexts=10).document_hashes}
    assert train and held_out and not train & held_out


@given(st.text(), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_the_same_documents_and_more(text: str, a: float, b: float) -> None:
    name = document_hash(text.encode("utf-8", "replace").decode())
    assert is_held_out(name, min(a, b)) <= is_held_out(name, max(a, b))
    assert is_held_out(name, 1.0) and not is_held_out(name, 0.0)


def test_is_held_out_takes_the_share_asked_for() -> None:
    share = sum(is_held_out(document_hash(str(i)), 0.05) for i in range(4000)) / 4000
    assert 0.04 < share < 0.06


def test_documents_are_stripped_and_distinct_over_files(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["one", " two\n", "", "  "])
    write_jsonl(tmp_path / "b.jsonl", ["two", "three", "one", "broken \ud800 escape"])
    assert list(documents(str(tmp_path))) == ["one", "two", "three", "broken ? escape"]


def test_order_depends_on_the_seed_alone(tmp_path: Path) -> None:
    texts = tiny_texts(60)
    forward = write_jsonl(tmp_path / "forward" / "c.jsonl", texts)
    write_jsonl(tmp_path / "split" / "a.jsonl", texts[:9:-1])
    write_jsonl(tmp_path / "split" / "b.jsonl", texts[:10])
    orders = [list(ordered_documents(str(path), seed=0)) for path in (forward, tmp_path / "split")]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(texts) and orders[0] != texts
    assert list(ordered_documents(str(forward), seed=1)) != orders[0]


def test_any_prefix_is_a_mixture_of_the_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {i}" for i in range(100)])
    prefix = [document[0] for document in ordered_documents(str(tmp_path), seed=0)][:40]
    assert min(prefix.count("a"), prefix.count("b")) > 8


def test_every_kind_of_file_is_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    write_jsonl(tmp_path / "a.jsonl", ["from jsonl"])
    (tmp_path / "b.txt").write_text("from txt\nin two lines\n", "utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["from parquet"], "n": [1]}), tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text('n,text\n1,"from, csv"\n', "utf-8")
    frames = ("text\nfrom zst\n", "né\n")
    packed_csv = b"".join(zstandard.ZstdCompressor().compress(frame.encode()) for frame in frames)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "e.csv.zst").write_bytes(packed_csv)
    (tmp_path / "README.md").write_text("not a document", "utf-8")
    expected = ["from jsonl", "from txt\nin two lines", "from parquet", "from, csv", "from zst", "né"]
    assert list(documents(str(tmp_path))) == expected


def test_files_that_cannot_be_read_are_named_with_the_reason(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "columns.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "numbers.parquet")
    whole = zstandard.ZstdCompressor().compress(("text\n" + "\n".join(map(str, range(5000)))).encode())
    contents = {
        "columns.jsonl": b'{"body": "x", "id": 1}\n{"body": "y"}\n',
        "broken.jsonl": b'{"text": "fine"}\n{"text": \n',
        "list.jsonl": b"[1]\n",
        "null.jsonl": b'{"text": null}\n',
        "columns.csv": b"body,label\nx,1\n",
        "unclosed.csv": b'text\n"fine"\n"never closed\nand the rest\n',
        "latin.txt": b"one\ncaf\xe9",
        "empty.txt": b" \n",
        "empty.jsonl": b"",
        "broken.parquet": b"PAR1 no",
        "broken.csv.zst": whole[: len(whole) // 2] + b"junk" * 50,
        "unknown.docx": b"x",
    }
    messages = {
        "columns.parquet": "row 1 has no column 'text' but body; say which column has it (text_column)",
        "numbers.parquet": "has no text: of 1 rows 1 not text; give rows with text, messages or token ids",
        "columns.jsonl": "line 1 has no column 'text' but body, id; say which",
        "broken.jsonl": "broken.jsonl line 2 is not JSON",
        "list.jsonl": "has no text: of 1 rows 1 not text",
        "null.jsonl": "has no text: of 1 rows 1 null",
        "columns.csv": "columns.csv line 2 has no column 'text' but body, label",
        "unclosed.csv": "unclosed.csv line 4 is not CSV (unexpected end of data)",
        "latin.txt": "latin.txt line 2 is not UTF-8 (unexpected end of data at byte 7); save it as UTF-8",
        "empty.txt": "empty.txt has no text; give files",
        "empty.jsonl": "empty.jsonl has no text; give files",
        "broken.parquet": "broken.parquet is not a readable parquet file",
        "broken.csv.zst": "broken.csv.zst is not a whole zstd file",
        "unknown.docx": "unknown.docx is of unknown type",
        "absent.txt": "absent.txt does not exist",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name, message in messages.items():
        with pytest.raises(ValueError) as raised:
            list(documents(str(tmp_path / name)))
        assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_truncated_zst_file_is_never_taken_for_whole(tmp_path: Path) -> None:
    rows = "text\n" + "\n".join(document_hash(str(i)) for i in range(20_000))
    whole = zstandard.ZstdCompressor().compress(rows.encode())
    (tmp_path / "c.csv.zst").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"c\.csv\.zst is not a whole zstd file"):
        list(documents(str(tmp_path / "c.csv.zst")))


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x", "utf-8")
    with pytest.raises(ValueError, match=r"has no \.txt, \.jsonl, .*\.parquet, \.arrow file"):
        list(documents(str(tmp_path)))


def test_corpus_hash_follows_the_content(tmp_path: Path) -> None:
    first = corpus_hash(str(tiny_corpus(tmp_path / "a")))
    assert corpus_hash(str(tiny_corpus(tmp_path / "b"))) == first
    assert corpus_hash(str(tiny_corpus(tmp_path / "c", seed=1))) != first


def write_probe_set(folder: Path, stem: str, *prompts: str) -> None:
    text = "prompt,prompt_len,target\n" + "".join(f"{prompt},5,1\n" for prompt in prompts)
    (folder / f"{stem}.csv.zst").write_bytes(zstandard.ZstdCompressor().compress(text.encode()))


def test_sae_probes_text_reads_prompts_of_the_chosen_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "fetch", lambda name: tmp_path)
    for stem in (*corpora.SAE_PROBES_STEMS, "87_glue_cola"):
        write_probe_set(tmp_path, stem, f"an essay from {stem}", "the same everywhere")
    found = list(documents("sae-probes-text"))
    assert len(found) == len(corpora.SAE_PROBES_STEMS) + 1
    assert not [document for document in found if "glue" in document]
    (tmp_path / "94_ai_gen.csv.zst").unlink()
    with pytest.raises(ValueError, match="lacks 94_ai_gen"):
        list(documents("sae-probes-text"))


def test_sae_probes_text_tells_a_story_once_however_many_questions_follow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "fetch", lambda name: tmp_path)
    story = "once upon a time " * 20
    for stem in corpora.SAE_PROBES_STEMS:
        write_probe_set(tmp_path, stem, f"{stem}: {story} Who?", f"{stem}: {story} Where?", f"{stem} too: {story} Who?")
    found = list(documents("sae-probes-text"))
    assert [d[-4:] for d in found if d.startswith("45_context_ans")] == ["Who?", "Who?"]
    assert len(found) == 2 + 3 * (len(corpora.SAE_PROBES_STEMS) - 1)


def test_python_docstrings_reads_the_long_ones_and_passes_over_broken_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "What this returns, " * 20
    (tmp_path / "good.py").write_text(f'"""{long}"""\ndef f():\n    """Short."""\n', "utf-8")
    (tmp_path / "bad.py").write_text("def (", "utf-8")
    monkeypatch.setattr(corpora, "_python_sources", lambda: ((p.name, p) for p in tmp_path.glob("*.py")))
    assert list(documents("python-docstrings")) == [long.strip()]


def test_python_docstrings_reads_libraries_and_packages_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("argparse.py", "site-packages/torch/nn.py", "site-packages/torch/nn.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    paths = {"stdlib": tmp_path, "purelib": tmp_path / "site-packages", "platlib": tmp_path / "site-packages"}
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(paths[name]))
    assert [name for name, _ in corpora._python_sources()] == ["argparse.py", "torch/nn.py"]


class FakeStream:
    """Stands for a streamed dataset of the hub."""

    rows: tuple[dict[str, Any], ...] = ({"text": "first"}, {"text": "second"}, {"text": "first"})

    def shuffle(self, seed: int, buffer_size: int) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def test_a_hub_dataset_is_streamed_at_the_commit_it_is_at(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> FakeStream:
        asked.append((args, options))
        return FakeStream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(corpora, "_hub_commit", lambda name: "c0ffee")
    assert list(documents("hf:owner/name:subset:validation")) == ["first", "second"]
    assert asked == [(("owner/name", "subset"), {"split": "validation", "streaming": True, "revision": "c0ffee"})]
    monkeypatch.setattr(FakeStream, "rows", ({"body": "x"},))
    with pytest.raises(ValueError, match=r"hf:owner/name has no column 'text' but body"):
        list(documents("hf:owner/name"))


def test_a_hub_dataset_out_of_reach_is_one_clear_line() -> None:
    with pytest.raises(
        ValueError, match=r"cannot read dataset owner/name from the hub \(.*\); check its name"
    ) as raised:
        list(documents("hf:owner/name"))
    assert "\n" not in str(raised.value)
