"""A seeded campaign of kills, errors, damage and mutated inputs over all commands and all files of docs/formats.md.

    PYTHONPATH=tests python -m robustness --seed 17             one trial, told in full
    PYTHONPATH=tests python -m robustness --trials 2000 --out results/robustness

docs/robustness.md says what is tried and how it is judged. `forks` runs a command, `jobs` are the commands, `damage`
changes files, `campaign` draws trials and judges them.
"""
