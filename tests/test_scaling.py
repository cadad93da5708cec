"""Scaling laws that were planted are found again, within their intervals, and a table that cannot tell says so."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import runs_table
from monosem import charts, cli
from monosem.config import PlanConfig, ScaleConfig
from monosem.scaling import costs, fit, laws, plan, questions, scale, tables
from runs_table import D_MODEL, KS, PLANTED, SIZES, TOKENS, planted_compute, row, rows, write

pytest.importorskip("scipy")

THETA = np.array(list(PLANTED.values()))


def grid(noise: float, seed: int) -> tuple[laws.Logs, np.ndarray]:
    n, k = (a.ravel() for a in np.meshgrid(np.log(SIZES), np.log(KS), indexing="ij"))
    logs = {"n": n, "k": k}
    return logs, laws.JOINT.log_value(THETA, logs) + noise * np.random.default_rng(seed).standard_normal(len(n))


def scaled(folder: Path, **options: Any) -> dict[str, Any]:
    return scale(ScaleConfig(str(folder), figures=False, **options))


def told(folder: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as raised:
        scaled(folder, **options)
    return str(raised.value)


# laws and fits


@given(
    theta=st.lists(st.floats(-1, 1), min_size=6, max_size=6),
    n=st.floats(10, 1e6),
    k=st.floats(1, 512),
)
def test_the_joint_law_is_the_papers_sum_of_two_exponentials(theta: list[float], n: float, k: float) -> None:
    a, bk, bn, g, z, e = theta
    said = math.exp(a + bk * math.log(k) + bn * math.log(n) + g * math.log(k) * math.log(n)) + math.exp(
        z + e * math.log(k)
    )
    found = laws.JOINT.log_value(np.array(theta), {"n": np.log([n]), "k": np.log([k])})
    assert found[0] == pytest.approx(math.log(said), abs=1e-9)


def test_without_noise_the_joint_law_is_recovered_exactly() -> None:
    logs, log_y = grid(0.0, 0)
    assert fit.best_fit(laws.JOINT, logs, log_y, 0).theta[0] == pytest.approx(THETA, abs=1e-5)


def test_minimise_agrees_with_scipy_on_the_same_huber_loss() -> None:
    from scipy.optimize import least_squares

    logs, log_y = grid(0.01, 1)
    log_y[3] += 0.3  # an outlier, so that the loss is not a square everywhere
    design = laws.JOINT.design(logs)

    def residual(theta: np.ndarray) -> np.ndarray:
        return log_y - laws.log_sum(theta, design)

    theirs = least_squares(residual, THETA, loss="huber", f_scale=fit.HUBER_DELTA, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    ours = fit.best_fit(laws.JOINT, logs, log_y, 0)
    assert ours.cost[0] <= theirs.cost * (1 + 1e-9)
    assert ours.cost[0] == pytest.approx(fit.huber(residual(ours.theta[0])).sum())
    assert laws.log_sum(ours.theta[0], design) == pytest.approx(laws.log_sum(theirs.x, design), abs=1e-5)


def test_an_outlier_moves_a_fit_by_less_than_squares_would() -> None:
    logs, log_y = grid(0.002, 2)
    clean = laws.JOINT.log_value(fit.best_fit(laws.JOINT, logs, log_y, 0).theta[0], logs)
    log_y[10] += 1.0
    moved = laws.JOINT.log_value(fit.best_fit(laws.JOINT, logs, log_y, 0).theta[0], logs)
    assert np.abs(moved - clean)[np.arange(len(log_y)) != 10].max() < 0.02


def test_intervals_of_gamma_and_eta_hold_the_truth_in_most_of_60_tables() -> None:
    hits = {"gamma": 0, "eta": 0}
    for seed in range(60):
        logs, log_y = grid(0.005, 500 + seed)
        best = fit.best_fit(laws.JOINT, logs, log_y, 0).theta[0]
        for name in hits:
            index = laws.JOINT.coefficients.index(name)
            low, high = fit.profile(laws.JOINT, logs, log_y, best, index)
            hits[name] += (low is None or low <= THETA[index]) and (high is None or THETA[index] <= high)
            assert (low is None or low <= best[index]) and (high is None or best[index] <= high)
    assert min(hits.values()) >= 0.85 * 60, hits
    assert max(hits.values()) < 60 or min(hits.values()) < 60, "intervals that never miss are too wide"


def test_held_out_error_without_noise_is_zero_and_sees_a_wrong_law() -> None:
    logs, log_y = grid(0.0, 0)
    cells = np.arange(len(log_y))
    best = fit.best_fit(laws.JOINT, logs, log_y, 0).theta[0]
    assert fit.held_out_error(laws.JOINT, logs, log_y, best, cells) < 1e-4
    plain = laws.reducible(laws.JOINT)
    wrong = fit.best_fit(plain, logs, log_y, 0).theta[0]
    assert fit.held_out_error(plain, logs, log_y, wrong, cells) > 1e-3


# monosem scale


def test_scale_finds_the_planted_joint_law_and_its_signs(tmp_path: Path) -> None:
    report = scaled(write(tmp_path, rows(noise=0.002)))
    joint = report["joint"]
    assert joint["law"] == "L(N,K | D)" and joint["at"]["tokens"] == TOKENS and joint["verdict"] == "holds"
    assert joint["n_runs"] == len(SIZES) * len(KS) and joint["excluded"] == []
    for name, c in joint["coefficients"].items():
        assert c["low"] <= PLANTED[name] <= c["high"], name
    assert joint["irreducible"]["preferred"] == "with"
    assert 0 < joint["held_out_error"] < 0.01 and 0 < joint["extrapolation_error"] < 0.02
    assert set(report["n_fixed_tokens"]) == {str(k) for k in KS}
    for entry in report["n_fixed_tokens"].values():
        assert entry["law"] == "L(N | D)" and entry["verdict"] == "holds"


def test_scale_says_cannot_tell_of_convergence_when_runs_still_gain(tmp_path: Path) -> None:
    report = scaled(write(tmp_path, rows(ks=(32, 64))))
    for entry in report["n_converged"].values():
        assert entry["verdict"] == "cannot tell" and entry["coefficients"] is None and "0 sizes" in entry["reason"]
        assert len(entry["excluded"]) == len(SIZES) and "still gained 6.7%" in entry["excluded"][0]["reason"]
    assert report["joint_converged"]["law"] == "L(N,K)" and report["joint_converged"]["verdict"] == "cannot tell"


def converging(n: float, k: float, tokens: float) -> float:
    """Gains exactly 1% in the doubling that ends at 64 n^0.6 · 40 tokens, and falls to 0.1 + 3 n^-0.4."""
    limit, at = 0.1 + 3.0 * n**-0.4, 2560 * n**0.6
    return limit * math.exp(0.0101 * 4 / 3 * (at / tokens) ** 2 / 1.0 * 0.25)


def test_scale_finds_convergence_and_its_exponent(tmp_path: Path) -> None:
    report = scaled(write(tmp_path, rows(converging, ks=(32,), doublings=7)))
    law, growth = report["n_converged"]["32"], report["tokens_to_convergence"]["32"]
    assert law["law"] == "L(N)" and law["verdict"] == "holds" and law["excluded"] == []
    assert law["coefficients"]["b"]["value"] == pytest.approx(0.4, abs=0.02)
    assert growth["coefficients"]["p"]["value"] == pytest.approx(0.6, abs=0.05) and growth["verdict"] == "holds"


def test_convergence_needs_distinct_tokens_not_epochs(tmp_path: Path) -> None:
    report = scaled(write(tmp_path, rows(converging, ks=(32,), doublings=7, epochs=2.0)))
    assert report["n_converged"]["32"]["verdict"] == "cannot tell"
    assert "within one epoch" in report["n_converged"]["32"]["excluded"][0]["reason"]


def test_three_converged_sizes_cannot_tell(tmp_path: Path) -> None:
    good = rows(converging, ks=(32,), doublings=7, sizes=SIZES[:3])
    report = scaled(write(tmp_path, good + rows(ks=(32,), doublings=7, sizes=SIZES[3:])))
    assert report["n_converged"]["32"]["verdict"] == "cannot tell"
    assert "3 sizes; 4 are needed" in report["n_converged"]["32"]["reason"]


def test_the_compute_frontier_has_the_planted_exponents(tmp_path: Path) -> None:
    table = rows(planted_compute, sizes=(512, *SIZES), ks=(32,), doublings=8, noise=0.002)
    found = scaled(write(tmp_path, table))["compute"]["flops"]["32"]
    b = found["coefficients"]["b"]
    assert b["low"] <= 0.35 * 0.42 / 0.77 <= b["high"] and b["high"] - b["low"] < 0.1
    p = found["optimal_n"]["coefficients"]["p"]
    assert p["low"] - 0.02 <= 0.42 / 0.77 <= p["high"] + 0.02
    assert found["verdict"] == "holds" and len(found["frontier"]) >= 5


def test_a_frontier_at_the_edge_of_the_sizes_cannot_tell(tmp_path: Path) -> None:
    found = scaled(write(tmp_path, rows(ks=(32,))))["compute"]["flops"][
        "32"
    ]  # no cost in tokens: the largest is always best
    assert found["verdict"] == "cannot tell" and "widen the sizes" in found["reason"]


def test_converged_tokens_lie_between_the_doublings_on_both_sides_of_one_percent(tmp_path: Path) -> None:
    nmse = {1.0: 0.5, 1.9: 0.46, 4.0: 0.455, 8.0: 0.4545}  # gains: 8.5% (ratio 1.9), 1.0% (ratio 2.1), 0.1%
    table = [row("r", 1024, 8, tokens * 2**20, value) for tokens, value in nmse.items()]
    (found,) = tables.converged(tables.read_table(write(tmp_path, table) / "runs.csv").points)
    assert 4.0 <= found.tokens / 2**20 <= 8.0 and found.point.normalized_mse == 0.4545
    nmse[8.0] = 0.44
    table = [row("r", 1024, 8, tokens * 2**20, value) for tokens, value in nmse.items()]
    (found,) = tables.converged(tables.read_table(write(tmp_path, table[:2]) / "runs.csv").points)
    assert math.isnan(found.tokens) and "still gained 8." in found.reason


def test_a_parquet_table_reads_as_the_csv(tmp_path: Path) -> None:
    parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    table = rows(ks=(8,), doublings=1)
    csv = tables.read_table(write(tmp_path, table) / "runs.csv")
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "other.parquet")
    assert tables.read_table(tmp_path / "other.parquet").points == csv.points


# what is left out


def test_a_worse_lr_another_setting_and_a_short_run_are_left_out_and_named(tmp_path: Path) -> None:
    table = rows(ks=(32,))
    end = planted = runs_table.planted_joint(4096, 32, TOKENS)
    table.append(row("worse-lr", 4096, 32, TOKENS, end * 1.1, lr=3e-4))
    table.append(row("no-auxk", 4096, 32, TOKENS, planted, auxk=0))
    table.append(row("short", 4096, 32, TOKENS / 2, planted))
    excluded = {e["run"]: e["reason"] for e in scaled(write(tmp_path, table))["n_fixed_tokens"]["32"]["excluded"]}
    assert set(excluded) == {"worse-lr", "no-auxk", "short"}
    assert "lr 0.0003 gives" in excluded["worse-lr"] and "no AuxK" in excluded["no-auxk"]
    assert excluded["short"] == f"not evaluated at {TOKENS:,} tokens"


def test_seeds_of_the_best_lr_all_stay(tmp_path: Path) -> None:
    nmse = runs_table.planted_joint(4096, 32, TOKENS) * 1.003
    table = [*rows(ks=(32,)), row("again", 4096, 32, TOKENS, nmse, seed=1)]
    assert scaled(write(tmp_path, table))["n_fixed_tokens"]["32"]["n_runs"] == len(SIZES) + 1


def test_a_diverged_run_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = [*rows(ks=(32,)), row("burst", 4096, 32, TOKENS, math.nan, status="diverged", lr=1.0)]
    assert scaled(write(tmp_path, table))["excluded"] == [{"run": "burst", "reason": "diverged"}]
    assert "run burst is left out: diverged" in caplog.text


# errors name the rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalized_mse": math.nan}, r"line 3 \(run topk-1024-8\): a normalized_mse that is not a positive number"),
        ({"normalized_mse": 0.0}, r"line 3 \(run topk-1024-8\): a normalized_mse"),
        ({"k": 4096}, r"line 3 \(run topk-1024-8\): k > n_latents"),
        ({"lr": "fast"}, r"line 3 \(run topk-1024-8\): lr is 'fast'; give a number"),
        ({"n_latents": 12.5}, r"line 3 \(run topk-1024-8\): n_latents is '12.5'; give a whole number"),
        ({"layer": 7}, r"mixes sites of one subject \(layer 22 .*; layer 7 .*lines 2, 3|layer 7.*; layer 22"),
        ({"subject": "T"}, r"mixes the subjects S, T \(first at lines 2, 3 .*--subject"),
        ({"tokens": -1}, "line 3 .*out of range"),
        ({"tokens": math.inf}, r"line 3 \(run topk-1024-8\): tokens is 'inf'; give a number"),
        ({"lr": math.nan}, r"line 3 \(run topk-1024-8\): lr is 'nan'; give a number"),
        ({"sparsity_coef": math.nan}, "line 3 .*sparsity_coef is 'nan'; give a number"),
        ({"tokens": 131_072}, r"lines 2, 3 \(run topk-1024-8\): one run twice at 131,072 tokens; rename or remove"),
    ],
)
def test_a_wrong_row_is_an_error_that_names_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import re

    table = rows()
    table[1] |= change
    assert re.search(message, told(write(tmp_path, table)))


def test_runs_that_no_column_tells_apart_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path, [row("a", 8, 2, 64, 0.5), row("b", 8, 2, 64, 0.6), row("c", 8, 2, 64, 0.7, seed=1)])
    tables.read_table(folder / "runs.csv")
    assert [r.getMessage().split(" have")[0] for r in caplog.records] == ["runs a, b"]


def test_a_table_that_lacks_columns_is_refused_and_they_are_named(tmp_path: Path) -> None:
    write(tmp_path, rows(), [c for c in tables.COLUMNS if c not in ("epochs", "l0")])
    assert "lacks the columns epochs, l0" in told(tmp_path)


def test_too_few_runs_and_identical_sizes_are_refused(tmp_path: Path) -> None:
    assert "all have n_latents = 4,096" in told(write(tmp_path / "a", rows(sizes=(4096,))))
    message = told(write(tmp_path / "b", rows(sizes=(1024, 2048), ks=(32,))))
    assert "too few runs for any law" in message and "(run topk-1024-32, topk-2048-32)" in message


def test_no_table_is_refused(tmp_path: Path) -> None:
    assert "has no runs.csv" in told(tmp_path)
    assert "does not exist" in told(tmp_path / "nowhere")
    assert "has no rows" in told(write(tmp_path, []))
    assert "no run was evaluated at 5 tokens" in told(write(tmp_path, rows()), tokens=5)


def test_runs_planned_for_other_tokens_than_most_are_left_out_of_a_law_at_fixed_tokens(tmp_path: Path) -> None:
    longer = rows(lambda n, k, tokens: 0.9, sizes=(768,), ks=(32,), prefix="longer", n_tokens=4 * runs_table.TOKENS)
    joint = scaled(write(tmp_path, rows() + longer))["joint"]
    assert [e["run"] for e in joint["excluded"]] == [longer[0]["run"]]
    assert "planned for" in joint["excluded"][0]["reason"]
    assert joint["coefficients"] == scaled(write(tmp_path, rows()))["joint"]["coefficients"]


# subjects


def test_exponents_across_three_subjects_of_one_family(tmp_path: Path) -> None:
    table, known = [], {}
    for i, (name, size) in enumerate([("small", 1e8), ("middle", 4e8), ("large", 16e8)]):

        def nmse(n: float, k: float, tokens: float, b: float = 0.5 - 0.1 * i) -> float:
            return 0.1 + 5 * n**-b

        table += rows(nmse, ks=(32,), prefix=name, subject=name, layer=10 + i, noise=0.001, seed=i)
        known[name] = {"family": "F", "parameters": size}
    families = tmp_path / "families.json"
    families.write_text(json.dumps(known))
    report = scaled(write(tmp_path, table), families=str(families), subject="small")
    trend = report["subjects"]["families"]["F"]
    assert trend["n_subjects"] == 3 and trend["verdict"] == "holds"
    assert trend["coefficients"]["p"]["value"] == pytest.approx(-0.1 / math.log(4), abs=0.03)
    relu_only = [{**row, "run": "r" + row["run"], "subject": "other", "activation": "relu"} for row in table[:6]]
    families.write_text(json.dumps({**known, "other": known["small"]}))
    more = scaled(write(tmp_path, table + relu_only), families=str(families), subject="small")
    assert more["subjects"] == report["subjects"]  # nothing to fit there
    write(tmp_path, table)
    known["large"]["family"] = "G"
    families.write_text(json.dumps(known))
    split = scaled(tmp_path, families=str(families), subject="small")["subjects"]
    assert {t["verdict"] for t in split["families"].values()} == {"cannot tell"} and len(split["subjects"]) == 3
    families.write_text(json.dumps({"small": known["small"]}))
    assert "no entry for large, middle" in told(tmp_path, families=str(families))
    families.write_text(json.dumps({**known, "small": {"family": "F", "parameters": -1}}))
    assert "parameters of small must be a positive number" in told(tmp_path, families=str(families))
    families.write_text("[1]")
    assert "not of the form" in told(tmp_path, families=str(families))


# NMSE against L0


def relu_rows(n: int, gap: float) -> list[dict[str, Any]]:
    found = []
    for l0 in (11.0, 23.0, 47.0, 95.0):
        nmse = runs_table.planted_joint(n, l0, TOKENS) * math.exp(gap)
        options = {"activation": "relu", "l0": l0, "auxk": 0, "sparsity_coef": 1 / l0}
        found.append(row(f"relu-{n}-{l0:g}", n, 32, TOKENS, nmse, **options))
        found.append(row(f"relu-{n}-{l0:g}-bad", n, 32, TOKENS, nmse * 1.2, lr=1e-2, **options))
    return found


def test_the_gap_between_relu_and_topk_is_read_between_runs_that_bracket_an_l0(tmp_path: Path) -> None:
    table = rows(doublings=0)
    for i, n in enumerate(SIZES):
        table += relu_rows(n, 0.05 + 0.04 * i)
        for l0 in (30.0, 60.0):  # better than the price's other runs in NMSE, not at their L0
            nmse = 1.05 * runs_table.planted_joint(n, l0, TOKENS) * math.exp(0.05 + 0.04 * i)
            options = {"activation": "relu", "l0": l0, "auxk": 0, "sparsity_coef": 1 / 23}
            table.append(row(f"relu-{n}-{l0:g}-slow", n, 32, TOKENS, nmse, lr=1e-4, **options))
    found = scaled(write(tmp_path, table))["sparsity"]
    gaps = {(g["n_latents"], g["l0"]): g["gap"] for g in found["gaps"]}
    assert {l0 for _, l0 in gaps} == {16, 32, 64}, "8 and 128 are not bracketed"
    for i, n in enumerate(SIZES):
        assert gaps[n, 32]["value"] == pytest.approx(0.05 + 0.04 * i, abs=0.01)
        assert gaps[n, 32]["low"] < gaps[n, 32]["value"] < gaps[n, 32]["high"]
    growth = found["topk_relu_gap"]
    assert growth["verdict"] == "holds" and growth["n_sizes"] == len(SIZES)
    assert growth["coefficients"]["p"]["value"] == pytest.approx(0.04 / math.log(2), abs=0.01)
    assert all(len(curve) == 10 for curve in found["curves"]["relu"].values()), "every lr is shown"


# costs


def test_costs_are_recovered_from_the_table(tmp_path: Path) -> None:
    found = scaled(write(tmp_path, rows(ks=(8, 32), doublings=1)))["costs"]
    seconds = costs.per_token(found["seconds"], 65536, 32, D_MODEL)
    assert seconds == pytest.approx(1e-6 + 2e-11 * 65536 * D_MODEL + 1e-10 * 32 * D_MODEL, rel=1e-6)
    assert costs.per_token(found["flops"], 2048, 8, D_MODEL) == pytest.approx(6 * 2048 * D_MODEL, rel=1e-6)
    assert found["seconds"]["worst"] < 1e-6


# figures


def test_figures_are_drawn_and_the_same_bytes_twice(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("plotly")
    table = [*rows(converging, ks=(32,), sizes=SIZES[:4], doublings=5), *relu_rows(4096, 0.1)]
    write(tmp_path, table)
    seen = []
    for _ in range(2):
        scale(ScaleConfig(str(tmp_path)))
        files = [*sorted((tmp_path / "figures").iterdir()), tmp_path / "scaling.html"]
        seen.append({file.name: file.read_bytes() for file in files})
    assert seen[0] == seen[1]
    names = ("compute", "compute_dense_equivalent", "n", "k", "tokens", "convergence", "residuals", "l0")
    assert set(seen[0]) == {*(f"{name}.png" for name in names), "scaling.html"}
    page = seen[0]["scaling.html"].decode()
    assert all(f'id="{name}"' in page for name in names)
    assert page.count("<script") > len(names) and 'src="http' not in page, "plotly.js is inside the page"


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nolib is not installed.*pip install 'monosem\[lab\]'"):
        charts.library("nolib.submodule")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    with pytest.raises(ValueError, match=r"pyarrow is not installed.*pip install 'monosem\[hub\]'"):
        tables.read_table(Path("runs.parquet"))


# plans


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scaling.json of runs that follow `planted_compute`: the best n and tokens for a budget are known."""
    folder = tmp_path_factory.mktemp("fitted")
    scaled(write(folder, rows(planted_compute, ks=(32,), doublings=4, noise=0.001)))
    return folder / "scaling.json"


def planned(fitted: Path, **options: Any) -> dict[str, Any]:
    (found,) = plan.plan(PlanConfig(scaling=str(fitted), **options))["plans"]
    return found


def test_a_plan_for_flops_is_the_optimum_of_the_planted_law(fitted: Path) -> None:
    budget = 6 * D_MODEL * 8192 * 2_000_000.0
    sizes = np.geomspace(500, 100_000, 4000)
    best = min(planted_compute(n, 32, budget / (6 * D_MODEL * n)) for n in sizes)
    found = planned(fitted, flops=budget)
    assert found["flops"] == pytest.approx(budget, rel=1e-3)
    assert planted_compute(found["n_latents"], 32, found["tokens"]) == pytest.approx(best, rel=0.01)
    assert found["nmse"]["low"] < best < found["nmse"]["high"] and not found["nmse"]["extrapolated"]
    goal = planned(fitted, nmse=found["nmse"]["value"])
    assert goal["flops"] == pytest.approx(budget, rel=0.05) and goal["nmse"]["value"] == pytest.approx(best, rel=0.02)
    own = planned(fitted, tokens=found["tokens"])
    assert own["n_latents"] == pytest.approx(found["n_latents"], rel=0.5)


def test_hours_are_the_tables_or_an_estimate_that_says_so(fitted: Path) -> None:
    here = planned(fitted, hours=0.5, n_latents=4096)
    seconds = 1e-6 + 2e-11 * 4096 * D_MODEL + 1e-10 * 32 * D_MODEL
    assert here["seconds"] == pytest.approx(1800, rel=1e-3) and here["tokens"] == pytest.approx(
        1800 / seconds, rel=1e-3
    )
    assert here["seconds_from"] == "measured in the table"
    there = planned(fitted, hours=0.5, n_latents=4096, flops_per_s=1e12, mfu=0.5, gpus=4, price_per_hour=3.0)
    assert there["tokens"] == pytest.approx(1800 * 2e12 / (6 * D_MODEL * 4096), rel=1e-3)
    assert there["seconds_from"] == "estimate: 0.5 of 1e+12 FLOPs/s" and there["price"] == pytest.approx(6.0)


def test_bytes_are_weights_moments_average_and_gradients_of_each_packed_autoencoder(fitted: Path) -> None:
    found = planned(fitted, tokens=TOKENS, n_latents=8192, pack=3, memory_gib=0.5)
    weights = 4 * (2 * 8192 * D_MODEL + 8192 + D_MODEL)
    assert found["bytes"]["weights"] == 3 * weights and found["bytes"]["total"] > 3 * 5 * weights
    assert not found["fits"] and planned(fitted, tokens=TOKENS, n_latents=8192, memory_gib=2.0)["fits"]


def test_an_unreachable_goal_and_an_unfitted_k_are_refused(fitted: Path) -> None:
    with pytest.raises(ValueError, match="out of reach at k = 32: the law's least is"):
        planned(fitted, nmse=0.01)
    with pytest.raises(ValueError, match=r"no fitted L\(N,D\) at k = 8; fitted k: 32"):
        planned(fitted, flops=1e14, k=8)
    with pytest.raises(ValueError, match="give a budget or a goal"):
        planned(fitted)
    with pytest.raises(ValueError, match="not flops, hours"):
        planned(fitted, flops=1.0, hours=1.0)
    with pytest.raises(ValueError, match="not one batch of 1,024; raise the budget, or lower nmse"):
        planned(fitted, flops=1.0, k=32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"check": "a", "table": "b", "k": 3, "gpus": 2}, "compares a prediction with a table; leave out k, gpus"),
        ({"mfu": 0.5, "flops": 1e9}, "mfu has no effect without flops_per_s"),
        ({"gpus": 2, "flops": 1e9}, "gpus has no effect without flops_per_s"),
        ({"flops": math.inf}, "flops is inf; give a positive number"),
    ],
)
def test_a_plan_refuses_what_has_no_effect(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PlanConfig(**options)


def test_a_prediction_is_written_once_and_checked_against_the_run(
    fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "prediction.json")
    budget = ["--tokens", "8388608", "--n-latents", "16384", "--k", "32"]
    assert cli.main(["plan", "--scaling", str(fitted), *budget, "--out", file, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["plans"][0]["nmse"]
    assert said["low"] < said["value"] < said["high"] and said["extrapolated"]
    assert cli.main(["plan", "--scaling", str(fitted), *budget, "--out", file]) == 2
    assert "a prediction is not overwritten" in capsys.readouterr().err
    checking = ["plan", "--check", file, "--table", str(tmp_path), "--json"]
    for nmse, verdict in ((None, "no run yet"), (said["value"], "inside"), (said["high"] * 1.01, "outside")):
        more = [] if nmse is None else [row("new", 16384, 32, 8_388_608, nmse)]
        write(tmp_path, [*rows(ks=(32,), doublings=0), *more])
        assert cli.main(checking) == 0
        assert json.loads(capsys.readouterr().out)["verdict"] == verdict


# the command


def test_scale_prints_json_or_a_table_and_writes_the_same_bytes_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(write(tmp_path, rows(ks=(16, 64), noise=0.003, doublings=3)))
    assert cli.main(["scale", folder, "--no-figures", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    first = (tmp_path / "scaling.json").read_bytes()
    assert set(printed["joint"]["coefficients"]) == set(PLANTED) and "draws" not in printed["joint"]
    assert len(json.loads(first)["joint"]["draws"]) == 200
    assert cli.main(["scale", folder, "--no-figures"]) == 0
    assert (tmp_path / "scaling.json").read_bytes() == first
    said = capsys.readouterr().out
    assert "L(N,K | D)" in said and "gamma" in said and "n_converged: cannot tell" in said


def test_every_law_has_the_same_form(tmp_path: Path) -> None:
    from monosem.scaling import walk

    keys = {"law", "formula", "claim", "verdict", "reason", "at", "coefficients", "n_runs", "n_points", "residual_sd"}
    keys |= {"held_out_error", "extrapolation_error", "irreducible", "excluded"}
    report = scaled(write(tmp_path, rows(planted_compute, ks=(16, 32), doublings=8)))
    for name, entry in walk(report):
        assert keys <= set(entry), name
        assert entry["verdict"] in ("holds", "fails", "cannot tell")
    assert questions.MIN_SIZES == 4
