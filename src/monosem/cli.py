"""The command `monosem`: one subcommand a stage, flags named after the config's fields.

Results go to stdout; logs and progress to stderr. A mistake is one line and exit code 2. Ctrl-C, SIGTERM and SIGHUP
save what there is to save and exit with 128 + the signal (130, 143, 129); a second one ends the process at once. Exit
code 1 is of work of which a part failed: the rest is done and written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import itertools
import json
import logging
import os
import re
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any

import tyro

from monosem import __version__, charts, config, interrupts, logs

log = logging.getLogger("monosem")

_STAGES: dict[str, type] = {
    "run": config.RunConfig,
    "harvest": config.HarvestConfig,
    "train": config.TrainConfig,
    "sweep": config.SweepConfig,
    "eval": config.EvalConfig,
    "explain": config.ExplainConfig,
    "serve": config.ServeConfig,
    "export": config.ExportConfig,
    "scale": config.ScaleConfig,
    "plan": config.PlanConfig,
}
_POSITIONAL = {"eval": "run", "explain": "run", "serve": "run", "export": "run", "scale": "table"}
_WITH_JSON = ("eval", "run", "scale", "plan")
_LEAST_COLUMNS = 40

_USAGE = f"""monosem {__version__}: sparse autoencoders of a language model's activations, trained and measured.

usage: monosem COMMAND [--config FILE.json] [flags]

  run       the main job in one folder: harvest, train, evaluate
  harvest   text -> tokens -> activations, kept in a store
  train     activations -> autoencoder
  sweep     activations -> many autoencoders, on one stream
  eval RUN  autoencoder -> numbers on held-out text        (--json: one JSON object on stdout)
            several RUNs, --report PAGE.html: a page to read, and its table as PAGE.md
  explain RUN  what each latent fires on, votes for, is near to and changes; rules of some (--n2g N)
  serve RUN    all of it on pages in the browser, on this machine only   (serve RUN OTHER ...: to compare with)
  export RUN [SITE]  the same pages as files, which open without a server; --parquet FILE, --sae-viewer FOLDER
  scale DIR table of runs -> scaling laws and figures      (--json)
  plan      a budget or a goal -> n, k, tokens, hours, bytes by those laws, and a prediction to check   (--json)

`monosem COMMAND --help` lists the flags. --config gives their defaults; flags win.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(message)s")
    log.setLevel(logging.INFO)
    logs.show_progress(True)
    _open_streams()
    with interrupts.handled(), contextlib.redirect_stderr(logs.Unbreakable(sys.stderr)):
        try:
            return _guarded(sys.argv[1:] if argv is None else argv)
        finally:
            _close_stdout()


def _open_streams() -> None:
    """Closed standard streams lead nowhere; what stdout cannot encode is escaped; helps need some width to end."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if shutil.get_terminal_size().columns < _LEAST_COLUMNS:
        os.environ["COLUMNS"] = str(_LEAST_COLUMNS)


def _close_stdout() -> None:
    """What stdout does not take now, it is not asked to take at the end of the process, which would be a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _guarded(argv: list[str]) -> int:
    """The command's exit code; what went wrong is told in a line."""
    try:
        try:
            return _command(argv)
        finally:
            sys.stdout.flush()  # here, where a reader that went away is an error that we can catch
    except BrokenPipeError:  # as in `| head`
        return 141
    except (ValueError, OSError, MemoryError, RuntimeError, sqlite3.Error) as error:
        message = _message(error)
        if message is None or os.environ.get("MONOSEM_DEBUG"):
            raise
        logs.end_progress()
        print(f"monosem: error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        logs.end_progress()
        print(f"\nmonosem: {str(stop) or 'stopped; run the same command to go on'}", file=sys.stderr)
        return interrupts.exit_code()
    finally:
        logs.show_progress(False)  # to a caller in this process it belongs to the command


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(__version__)
        return 0
    return _stage(argv[0], argv[1:])


def _message(error: Exception) -> str | None:
    """What to tell about a mistake or a machine at its limits; None for an error of our own making."""
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        if "no room" in text:  # `artifacts.write_atomic` has said it all
            return error.strerror
        return f"no room to write ({_of_system(error)}); free some space and run the same command again"
    if isinstance(error, OSError) and error.strerror:
        return _of_system(error)
    if isinstance(error, (ValueError, OSError, sqlite3.Error)):
        return text
    if "can't start new thread" in text:
        return "no more threads can be started here; raise the limit (ulimit -u, or the container's) or end some work"
    if "home directory" in text:
        return "there is no home directory; set HOME, or MONOSEM_CACHE to a folder for what is downloaded"
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"not enough memory ({text or 'out of memory'}); lower n_latents, batch_size or block_contexts"
    return None


def _of_system(error: OSError) -> str:
    """What the operating system says, with the file's name, and what to do where that is known."""
    where = f"{error.filename}: " if error.filename is not None else ""
    remedies = {
        errno.EMFILE: "; raise the limit on open files (ulimit -n)",
        errno.ENFILE: "; the machine has too many files open",
        errno.EACCES: "; change its permissions, or choose another place",
        errno.EROFS: "; choose another place",
    }
    return f"{where}{error.strerror}{remedies.get(error.errno or 0, '')}"


def _stage(name: str, argv: list[str]) -> int:
    if name not in _STAGES:
        raise ValueError(f"there is no command {name!r}; choose one of {', '.join(_STAGES)} (monosem --help)")
    named = [word for word in argv if word.startswith("--") and word.split("=")[0].endswith("activation-options")]
    if len(named) > 1:
        raise ValueError(
            f"{named[0]} is given {len(named)} times and only the last would count; name all options after one"
        )
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--config")
    own.add_argument("--json", action="store_true")
    own.add_argument("--report")
    try:
        ours, rest = own.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"{error} (monosem {name} --help)") from None
    if ours.json and name not in _WITH_JSON:
        raise ValueError(f"--json has no effect on `monosem {name}`; leave it out")
    if ours.report is not None and name != "eval":
        raise ValueError(f"--report has no effect on `monosem {name}`; leave it out")
    more: list[str] = []
    if name in _POSITIONAL and rest and not rest[0].startswith("-"):
        given = list(itertools.takewhile(lambda word: not word.startswith("-"), rest))
        more, rest = given[1:], [f"--{_POSITIONAL[name]}", given[0], *rest[len(given) :]]
        if name == "export" and len(more) == 1:
            rest, more = ["--out", *more, *rest], []
        if more and name not in ("eval", "serve"):
            raise ValueError(f"`monosem {name}` takes one {_POSITIONAL[name]}, not {', '.join(given)}")
    stage = _parse(name, _STAGES[name], ours.config, rest)
    if name == "harvest":
        from monosem.activations import harvest, harvest_layers

        for store in harvest_layers(stage) if stage.layers else [harvest(stage)]:
            counts = (f"{store.n_rows(split):,}" for split in ("train", "held_out"))
            print("{} training and {} held-out activations in {}".format(*counts, store.path))
    elif name == "train":
        from monosem.training import train

        train(stage)
        print(f"autoencoder in {stage.out}/autoencoder; its numbers: monosem eval {stage.out}")
    elif name == "sweep":
        from monosem.sweeps import summary, sweep

        print(f"{summary(sweep(stage))}\nthe runs: {stage.out}/runs.csv; where the time went: {stage.out}/sweep.json")
    elif name == "explain":
        from monosem.explanations.entry import explain

        explained = explain(stage)
        print(f"{explained.n_latents:,} latents over {explained.manifest['n_tokens']:,} tokens in {explained.folder}")
        return int(bool(explained.manifest.get("failed")))
    elif name == "serve":
        charts.library("uvicorn", "viewer")
        from monosem.viewer.server import serve

        serve(dataclasses.replace(stage, others=(*stage.others, *more)))
    elif name == "export":
        _export(stage)
    elif name == "scale":
        from monosem.scaling import scale, summary

        laws = scale(stage)
        print(json.dumps(laws) if ours.json else summary(laws))
    elif name == "plan":
        from monosem.scaling import plan

        found = plan.check(stage) if stage.check else plan.plan(stage)
        print(json.dumps(found) if ours.json else plan.text(found))
    elif name == "eval":
        return _eval([stage, *(dataclasses.replace(stage, run=run) for run in more)], ours.report, as_json=ours.json)
    else:
        return _run(stage, as_json=ours.json)
    return 0


def _eval(stages: list[config.EvalConfig], report: str | None, *, as_json: bool) -> int:
    """1 where a part, or one run of several, failed: what could be had is written all the same."""
    from monosem.evals import Shared, evaluate, table
    from monosem.evals import report as reports
    from monosem.run_folder import open_run
    from monosem.types import resolve_device

    runs = [stage.run for stage in stages]
    labels = reports.labels(runs)
    if report is not None:
        reports.check(report)  # before the hours that it may take to fill it
    for stage in stages[1:]:
        open_run(stage.run, stage.store, resolve_device("cpu"))
    shared, found = Shared(), {}
    for label, stage in zip(labels, stages, strict=True):
        try:
            found[label] = evaluate(stage, shared)
        except ValueError as error:
            if len(stages) == 1:
                raise
            log.error("%s failed: %s", label, error)
    if not found:
        raise ValueError("no run could be evaluated; the lines above say why")
    runs = [stage.run for label, stage in zip(labels, stages, strict=True) if label in found]
    if report is not None:
        reports.write(reports.read(runs), report)
    if as_json:
        print(json.dumps(found if len(stages) > 1 else found[labels[0]]))
    elif report is not None:
        print(f"report of {', '.join(found)}: {report} (its table: {Path(report).with_suffix('.md')})")
    else:
        print("\n\n".join(map(table, found.values())))
    return int(len(found) < len(stages) or any(made.get("failed") for made in found.values()))


def _export(stage: config.ExportConfig) -> None:
    from monosem import export
    from monosem.explained import ExplainStore

    store = ExplainStore(Path(stage.run) / "explain")
    _check_export(store, stage)
    if stage.parquet is not None:
        from monosem.export import table

        print(f"{table.write(store, stage.parquet):,} latents in {stage.parquet}")
    if stage.sae_viewer is not None:
        from monosem.export import sae_viewer

        latents = export.chosen(store, stage.latents)
        print(f"{sae_viewer.write(store, stage.sae_viewer, latents):,} latents in {stage.sae_viewer}/atoms")
    if stage.out is not None:
        from monosem.export import site

        latents = export.chosen(store, stage.latents)
        n_files = site.write(stage.run, stage.out, latents)
        print(f"{len(latents):,} latents, {n_files:,} files: open {stage.out}/index.html, or serve the folder")


def _check_export(store: Any, stage: config.ExportConfig) -> None:
    """`ValueError` unless all that is asked for can be made, before any of it is."""
    from monosem import export

    export.chosen(store, stage.latents)
    if stage.parquet is not None:
        from monosem.export import table

        table.check(stage.parquet)
    if stage.sae_viewer is not None:
        from monosem.export import sae_viewer

        sae_viewer.check(stage.sae_viewer)
    if stage.out is not None:
        charts.library("starlette", "viewer")
        from monosem.export import site

        site.check(Path(stage.out))


def _run(stage: config.RunConfig, *, as_json: bool) -> int:
    from monosem.evals import table
    from monosem.main_job import run

    report = run(stage)
    if as_json:
        print(json.dumps(report))
        return int(bool(report.get("failed")))
    print(table(report))
    print("\nseconds: " + ", ".join(f"{k} {v:g}" for k, v in report["seconds"].items()))
    print(f"everything is under {stage.out}; the released autoencoder is {stage.out}/autoencoder")
    return int(bool(report.get("failed")))


def _parse(name: str, kind: type, config_file: str | None, argv: list[str]) -> Any:
    """The config from `--config` (if any) with the flags on top; a wrong flag is a `ValueError` in tyro's words."""
    from monosem.artifacts import read_json

    default: Any = None
    if config_file is not None:
        default = config.from_dict(kind, read_json(config_file))
    elif not any(f.default is dataclasses.MISSING for f in dataclasses.fields(kind)):
        default = kind()
    default, options = _options_apart(default)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            stage = tyro.cli(kind, prog=f"monosem {name}", args=argv, default=default)
        return _with_options(stage, options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_unboxed(complaint.getvalue())} (monosem {name} --help)") from None


def _options_apart(stage: Any) -> tuple[Any, dict[str, float]]:
    """The stage without activation_options, and those: tyro would fix the names of a dict that has some already."""
    train = stage.train if isinstance(stage, config.RunConfig) else stage
    options = train.activation_options if isinstance(train, config.TrainConfig) else {}
    return (_replaced(stage, {}) if options else stage), options


def _with_options(stage: Any, options: dict[str, float]) -> Any:
    """The stage with `options` where its own activation_options do not say otherwise."""
    if not options:
        return stage
    train = stage.train if isinstance(stage, config.RunConfig) else stage
    return _replaced(stage, {**options, **train.activation_options})


def _replaced(stage: Any, options: dict[str, float]) -> Any:
    if isinstance(stage, config.RunConfig):
        return dataclasses.replace(stage, train=_replaced(stage.train, options))
    return dataclasses.replace(stage, activation_options=options)


def _unboxed(box: str) -> str:
    """tyro's complaint, drawn as a box with a title and ruled sections, as one line."""
    inside = re.sub(r"(?m)^[ │╭╰]+|[ │╮╯]+$", "", box)
    _title, *sections = [" ".join(part.split()) for part in re.split(r"[─-]{4,}", inside)]
    kinds = [s.split()[3] for s in sections if s.startswith("Argument helptext: --")]
    said = [s for s in sections if s and not s.startswith(("Argument helptext:", "For full helptext"))]
    if kinds and (wrong := re.match(r"Error parsing (--\S+): .*?'(.*?)'", said[0])):
        return f"{wrong[1]} is {wrong[2]!r}; give {kinds[0]}"
    return re.sub(r"^Error parsing \w+: ", "", "; ".join(said))


if __name__ == "__main__":
    sys.exit(main())
