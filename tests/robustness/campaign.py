"""A trial is a seed: what it does is drawn from it, done, judged and told."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import signal
from pathlib import Path
from typing import Any, NamedTuple

from robustness import damage, forks, jobs
from robustness.forks import Disturbance, Outcome, Surroundings
from robustness.jobs import JOBS, Job, World

VERDICTS = ("identical", "refused", "remade", "harmless", "silent", "traceback", "hang", "lost")
FAULTS = ("silent", "traceback", "hang", "lost")
KINDS = {"kill": 18, "error": 12, "damage": 42, "input": 14, "flag": 8, "surroundings": 6}
"""How often each is drawn."""
TIMEOUT_S = 180.0
PRECIOUS = "not ours, and to be kept\n"
VALUES = (
    *(
        "-1",
        "0",
        "1e999",
        "nan",
        "",
        "9" * 5000,
        "x" * 300,
        "True",
        "[]",
        "None",
        "1.5",
        "0x10",
        "\u0663",
        "\ud800",
        "a b",
    ),
    *("precious.txt", "pipe", "..", ".", "/dev/null", "/dev/full", "/proc/self/mem", "nowhere/at/all", "corpus.jsonl"),
)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


_CHECKED_WHEN_READ = r"(.*?)(store|state|eval)/[^.][^,]*"
"""Files that a finished stage leaves as they are: `_next_reader` says what comes of them."""
_READERS = ("train", "eval", "explain")
"""Of a store: they read all of it."""
_MAY_BE_ABSENT = ("eval.json", "scaling.json")
"""Of what pages show: whoever has not evaluated or fitted has none."""


class Trial(NamedTuple):
    """What was done and what came of it."""

    seed: int
    kind: str
    job: str
    file: str
    """That was damaged, by its name with numbers as N; empty where none was."""
    did: str
    verdict: str
    why: str


def trial(world: World, seed: int) -> Trial:
    """Do and judge the trial of a seed."""
    rng = random.Random(seed)
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    do = {"damage": _damage, "input": _input, "flag": _flag, "surroundings": _surround}.get(kind, _disturb)
    file, did, job, (verdict, why) = do(world, rng, kind)
    return Trial(seed, kind, job.name, _general(file), did, verdict, why)


Told = tuple[str, str, Job, tuple[str, str]]


def _disturb(world: World, rng: random.Random, kind: str) -> Told:
    """Stop or fail the command somewhere, then run it again to its end: the same bytes as if nothing had happened."""
    job = _choice(rng, [job for job in JOBS if job.resumes and world.n_events[job.name] > 1])
    at = rng.randint(1, world.n_events[job.name])
    code = 0 if kind == "kill" else rng.choice([errno.ENOSPC, errno.EIO, errno.EDQUOT])
    disturbance = Disturbance(at, rng.choice(SIGNALS) if kind == "kill" else 0, code)
    world.set_up(job, "fresh")
    before = _kept(world, job)
    first = forks.run(job.call(), world.trial, disturbance, timeout_s=TIMEOUT_S)
    did = f"{job.name}: {disturbance} of {world.n_events[job.name]}, then again"
    if first.hung or _traceback(first) or (first.code < 0 and -first.code != disturbance.signal):
        return "", did, job, ("hang" if first.hung else "traceback", f"disturbed: {first.code} {first.stderr[-600:]}")
    if kind == "error" and first.code not in (0, 2):
        return "", did, job, ("traceback", f"exit code {first.code}: {first.stderr[-600:]}")
    second = forks.run(job.call(), world.trial, timeout_s=TIMEOUT_S)
    if (fault := _broken(second, before, world, job)) is not None:
        return "", did, job, fault
    if second.code and _different(world, job, None):
        return "", did, job, ("lost", f"it cannot go on: {second.stderr[-600:]}")
    if differ := _different(world, job, None if second.code else second):
        return "", did, job, ("silent", f"other bytes in the end: {differ}")
    return "", did, job, ("identical", "")


def _damage(world: World, rng: random.Random, kind: str) -> Told:
    """Damage something that an earlier stage or an earlier run of the command has left, then run the command."""
    job = _choice(rng, [job for job in JOBS if job.needs or job.resumes])
    state = rng.choice(
        [s for s in ("fresh", "half", "done") if s == "fresh" or (s in ("half", "done") and job.resumes and job.outs)]
    )
    world.set_up(job, state)
    own = {path for path in jobs.files(world.trial, job.outs)} if state != "fresh" else set()
    from_before = set(jobs.files(world.trial, job.needs)) - own
    pool = sorted(own) if own and (rng.random() < 0.7 or not from_before) else sorted(from_before)
    if not pool:
        return _damage(world, rng, kind)
    path = rng.choice(pool)
    name = str(path.relative_to(world.trial))
    did = f"{job.name} ({state}): {name} {damage.change(path, rng, world.folder / 'elsewhere')}"
    damaged = _bytes(path)
    before = _kept(world, job)
    found = forks.run(job.call(), world.trial, timeout_s=TIMEOUT_S)
    if (fault := _broken(found, before, world, job)) is not None:
        return name, did, job, fault
    if found.code:
        return name, did, job, _refusal(found, path, world)
    if job.name == "pages":
        return name, did, job, _pages(world, path)
    differ = _different(world, job, found)
    said = path.name in found.stderr or path.parent.name in found.stderr
    found_in = [re.fullmatch(_CHECKED_WHEN_READ, one) for one in differ.split(", ")]
    if name in differ.split(", ") and found_in[0] and len({one and one.groups() for one in found_in}) == 1:
        return name, did, job, _next_reader(world, job, world.trial / found_in[0][1], found_in[0][2], path)
    if differ and _known_otherwise(world, job, path):
        return name, did, job, ("harmless", "it says the same, and is known by another hash")
    if differ:
        still = _bytes(path) == damaged and name in world.after[job.name]
        return name, did, job, ("silent", f"{'it is left as it is' if still else 'other bytes'}, exit code 0: {differ}")
    if path in own and _bytes(path) != damaged:
        loud = said or damaged is None or state == "half" or job.rewrites
        return name, did, job, ("remade", "") if loud else ("silent", "made again without a word")
    return name, did, job, ("harmless", "")


def _next_reader(world: World, job: Job, folder: Path, what: str, path: Path) -> tuple[str, str]:
    """What comes of a damaged `path` in `folder` / `what`, which the command itself did not have to read.

    It goes on from the state once the autoencoder is gone, and from the parts of an evaluation once eval.json is. Of a
    store, every reader must refuse it or not depend on the damage.
    """
    if what != "store":
        (folder / {"state": "autoencoder/config.json", "eval": "eval.json"}[what]).unlink(missing_ok=True)
        return _read_on(world, job, path, f"{folder.relative_to(world.trial) / what}/")
    if job.name == "run":  # whose later stages read it
        for later in folder.iterdir():
            if later.name not in ("store", ".lock"):
                jobs.remove(later)
        return _read_on(world, job, path, f"{folder.relative_to(world.trial)}/store/")
    aside = world.folder / "aside"
    jobs.remove(aside)
    (folder / "store").rename(aside)
    for reader in (jobs.BY_NAME[name] for name in _READERS):
        world.set_up(reader, "fresh")
        jobs.remove(world.trial / "store")
        jobs.copy(aside, world.trial / "store")
        verdict, why = _read_on(world, reader, world.trial / "store" / path.relative_to(folder / "store"), "store/")
        if verdict != "harmless":
            break
    return verdict, why


def _read_on(world: World, job: Job, path: Path, unread: str) -> tuple[str, str]:
    """Run the reader. What is damaged below `unread` and not read yet is harmless."""
    before = _kept(world, job)
    found = forks.run(job.call(), world.trial, timeout_s=TIMEOUT_S)
    if (fault := _broken(found, before, world, job)) is not None:
        return fault[0], f"then {job.name}: {fault[1]}"
    if found.code:
        return _refusal(found, path, world)
    differ = _different(world, job, None)
    if differ and not all(name.startswith(unread) for name in differ.split(", ")):
        return "silent", f"then {job.name}: other bytes, exit code 0: {differ}"
    return "harmless", ""


def _known_otherwise(world: World, job: Job, path: Path) -> bool:
    """Whether the JSON says what it said, laid out otherwise, and the outs differ in hashes of their sources alone."""
    try:
        same = json.loads(path.read_bytes()) == json.loads((world.done / path.relative_to(world.trial)).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    but = frozenset({"sources"})
    return same and jobs.snapshot(world.trial, job.outs, but) == jobs.snapshot(world.done, job.outs, but)


def _input(world: World, rng: random.Random, kind: str) -> Told:
    """Change what somebody gives. It may be taken for what it is or refused; no oracle says what it should come to."""
    job = _choice(rng, [job for job in JOBS if job.user])
    state = "fresh"
    world.set_up(job, state)
    config = job.words and job.name not in ("convert", "check") and rng.random() < 0.25
    if config:
        job, path = _with_config(world, job)
    else:
        if job.name == "pages":
            from monosem.viewer.notes import Notes

            Notes(world.trial / "run/notes.sqlite").write(3, text="a note", starred=True)
        path = rng.choice(jobs.files(world.trial, job.user))
    name = str(path.relative_to(world.trial))
    did = f"{job.name}: {name} {damage.mutate(path, rng)}"
    before = _kept(world, job)
    found = forks.run(job.call(), world.trial, timeout_s=TIMEOUT_S)
    if (fault := _broken(found, before, world, job)) is not None:
        return name, did, job, fault
    if job.name == "pages" and not found.code:
        verdict, why = _pages(world, path)
        return name, did, job, (verdict if verdict == "traceback" else "harmless", why)
    return name, did, job, _refusal(found, path, world, names=False) if found.code else ("harmless", "")


def _with_config(world: World, job: Job) -> tuple[Job, Path]:
    """The job's flags in a file of --config, but for its positional words."""
    flags = [i for i, word in enumerate(job.words) if word.startswith("--")]
    first, fields = flags[0], {}
    for at, end in zip(flags, [*flags[1:], len(job.words)], strict=True):
        if end - at != 2 or "." in job.words[at]:
            continue
        text = job.words[at + 1]
        value: Any = int(text) if text.isdigit() else float(text) if re.fullmatch(r"[\d.e]+", text) else text
        fields[job.words[at][2:].replace("-", "_")] = value
    positional = job.words[1:first]
    fields |= {"run": positional[0]} if positional and job.words[0] != "scale" else {}
    fields |= {"table": positional[0]} if positional and job.words[0] == "scale" else {}
    path = world.trial / "config.json"
    path.write_text(json.dumps(fields, indent=2))
    return job.with_words([job.words[0], *positional, "--config", "config.json"]), path


def _flag(world: World, rng: random.Random, kind: str) -> Told:
    """Another value of a flag, among them files, folders and devices that are not ours to overwrite."""
    job = _choice(rng, [job for job in JOBS if len(job.words) > 2])
    world.set_up(job, "fresh")
    at = rng.choice([i for i, word in enumerate(job.words) if i and not word.startswith("--")])
    value = rng.choice(VALUES)
    words = [*job.words]
    words[at] = value
    if rng.random() < 0.1:
        words.insert(at, rng.choice(["--nonsense", "--out", "-x", "--", "--help=1"]))
    changed = job.with_words(words)
    os.mkfifo(world.trial / "pipe")
    before = _kept(world, job)
    found = forks.run(changed.call(), world.trial, timeout_s=TIMEOUT_S)
    did = f"{' '.join(words)[:300]!r}"
    if not Path("/dev/null").is_char_device() or not (world.trial / "pipe").is_fifo():
        return "", did, job, ("lost", "a device or a pipe was replaced by a file")
    if (fault := _broken(found, before, world, job)) is not None:
        return "", did, job, fault
    return "", did, job, _refusal(found, None, world, names=False) if found.code else ("harmless", "")


def _surround(world: World, rng: random.Random, kind: str) -> Told:
    """An odd environment: the same bytes, or a line that says what is amiss."""
    job = _choice(rng, [job for job in JOBS if job.words])
    around = rng.choice([
        Surroundings(environ={"LANG": "C", "LC_ALL": "C"}), Surroundings(environ={"COLUMNS": "1", "LINES": "1"}),
        Surroundings(environ={"HOME": "/nonexistent", "TMPDIR": "/nonexistent"}), Surroundings(stdout="closed"),
        Surroundings(stdout="full"), Surroundings(stdout="gone"),
        Surroundings(limits={resource.RLIMIT_NOFILE: rng.choice([12, 24, 64])}),
        Surroundings(limits={resource.RLIMIT_FSIZE: rng.choice([0, 100, 5000, 40_000])}),
    ])  # fmt: skip
    world.set_up(job, "fresh")
    before = _kept(world, job)
    found = forks.run(job.call(), world.trial, surroundings=around, timeout_s=TIMEOUT_S)
    did = f"{job.name}: {around}"
    if (fault := _broken(found, before, world, job)) is not None:
        return "", did, job, fault
    if found.code not in (0, 2, 141):
        return "", did, job, ("traceback", f"exit code {found.code}: {found.stderr[-600:]}")
    if found.code == 0:
        differ = _different(world, job, found if around.stdout == "file" else None)
        return "", did, job, ("silent", f"other bytes: {differ}") if differ else ("identical", "")
    again = forks.run(job.call(), world.trial, timeout_s=TIMEOUT_S)
    if (fault := _broken(again, before, world, job)) is not None or (again.code and _different(world, job, None)):
        return "", did, job, fault or ("lost", f"it cannot go on: {again.stderr[-600:]}")
    if differ := _different(world, job, None):
        return "", did, job, ("silent", f"other bytes after going on: {differ}")
    return "", did, job, ("refused", found.stderr[-200:])


def _choice(rng: random.Random, among: list[Job]) -> Job:
    return rng.choices(among, [job.weight for job in among])[0]


def _broken(found: Outcome, before: dict[str, bytes | None], world: World, job: Job) -> tuple[str, str] | None:
    """A hang, a traceback, a death by signal, or something lost that was not the command's to change."""
    if found.hung:
        return "hang", f"still running after {TIMEOUT_S} s"
    if _traceback(found) or found.code < 0 or (found.code == 1 and not _failed_in_part(found)):
        return "traceback", f"{found.code}: {found.stderr[-1200:]}"
    gone = [name for name, data in before.items() if _bytes(world.trial / name) != data]
    return ("lost", f"changed or gone: {', '.join(gone)[:300]}") if gone else None


def _kept(world: World, job: Job) -> dict[str, bytes | None]:
    """What is there and is not the command's to change, with a file that is nobody's."""
    (world.trial / "precious.txt").write_text(PRECIOUS)
    outs = set(jobs.files(world.trial, job.outs))
    every = [p for p in world.trial.rglob("*") if p.is_file() and p.name != ".lock" and p not in outs]
    inside = tuple(str(world.trial / name) for name in job.outs)
    return {str(p.relative_to(world.trial)): _bytes(p) for p in every if not str(p).startswith(inside)}


def _refusal(found: Outcome, path: Path | None, world: World, *, names: bool = True) -> tuple[str, str]:
    """Exit code 2 and one line, which names the file (or its folder), is as it should be."""
    if lines := _failed_in_part(found):
        return "refused", lines[0][:300]
    lines = [line for line in found.stderr.splitlines() if "monosem: error:" in line]
    if found.code != 2 or len(lines) != 1:
        return "traceback", f"exit code {found.code} without a line that says why: {found.stderr[-600:]}"
    if names and path is not None:
        known = {path.name, path.stem, path.parent.name, str(path.parent.relative_to(world.trial))} - {"", "."}
        if not any(name in lines[0] for name in known):
            return "refused", f"without naming {path.name}: {lines[0][:300]}"
    return "refused", lines[0][:300]


def _failed_in_part(found: Outcome) -> list[str]:
    """The lines that go with exit code 1: a part failed, and the rest is done."""
    return [line for line in found.stderr.splitlines() if found.code == 1 and re.search(r"^\w+ failed: ", line)]


def _pages(world: World, path: Path) -> tuple[str, str]:
    """Every page is as it was, or says what is amiss; none is an error of ours."""

    def read(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "answers.json").read_text())

    usual, found = read(world.done), read(world.trial)
    wrong = [address for address, (status, _) in found.items() if status == 500]
    if wrong:
        return "traceback", f"500 at {', '.join(wrong)}"
    quiet = []
    for address, (status, text) in found.items():
        same = jobs.plain(text) == jobs.plain(usual[address][1])
        told = status >= 400 or path.name in text or str(path.parent) in text
        told |= text.count("not computed") > usual[address][1].count("not computed")
        if not same and not told and (path.exists() or path.name not in _MAY_BE_ABSENT):
            quiet.append(address)
    if quiet:
        return "silent", f"other answers without a word: {', '.join(quiet)}"
    return ("harmless" if found == usual else "refused"), ""


def _different(world: World, job: Job, found: Outcome | None) -> str:
    """Which of the outs are not as after an undisturbed run; empty when all are."""
    after, usual = jobs.snapshot(world.trial, job.outs), world.after[job.name]
    differ = sorted(name for name in after.keys() | usual.keys() if after.get(name) != usual.get(name))
    if found is not None and job.name not in ("sweep", "run") and jobs.plain(found.stdout) != world.stdout[job.name]:
        differ.append("what it prints")
    return ", ".join(differ)[:300]


def _traceback(found: Outcome) -> bool:
    return "Traceback (most recent call last)" in found.stderr


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _general(name: str) -> str:
    """A file's name with N for its numbers, so that shards and latents count together."""
    return re.sub(r"\d+", "N", name)
