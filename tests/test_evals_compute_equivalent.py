"""The compute equivalent against its closed form, and what it refuses to say."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from monosem.evals import compute_equivalent as ce
from monosem.evals import downstream

NAMED = "smollm2-135m-instruct-q4_1"
LAWS = pytest.mark.parametrize("law", [ce.BESIROGLU, ce.HOFFMANN], ids=lambda law: law.name)


def planted_sums(delta: float, spread: float = 0.0, n: int = 40) -> Tensor:
    """As of `downstream.sums_of`: CE 4, the reconstruction's ΔCE around `delta`, the ablations' 5 and 10."""
    generator = torch.Generator().manual_seed(0)
    per_document = delta + spread * torch.randn(n, generator=generator, dtype=torch.float64)
    per_document += delta - per_document.mean()
    sums = torch.zeros(n, 13, dtype=torch.float64)
    sums[:, 0] = 100
    for variant, value in enumerate((per_document, torch.tensor(5.0), torch.tensor(10.0))):
        sums[:, downstream._column(variant, downstream._CE)] = 400
        sums[:, downstream._column(variant, downstream._DELTA_CE)] = 100 * value
    return sums


def closed_form(law: ce.Law, replaced: float, subject: float) -> float:
    ratio = (replaced - law.irreducible) / (subject - law.irreducible)
    return float(ratio ** -((law.alpha + law.beta) / (law.alpha * law.beta)))


@LAWS
def test_the_optimum_is_the_least_loss_for_its_compute(law: ce.Law) -> None:
    for compute in (1e19, 1e21, 1e23):
        parameters, tokens = law.optimum(compute)
        assert 6 * parameters * tokens == pytest.approx(compute)
        least = law.loss(parameters, tokens)
        assert all(law.loss(parameters * f, tokens / f) > least for f in (0.5, 0.9, 1.1, 2))


@LAWS
def test_the_frontier_covers_the_fitted_range_and_no_more(law: ce.Law) -> None:
    curve = ce.frontier(law)
    for end, further in ((0, 0.97), (-1, 1.03)):
        assert not law.outside(*law.optimum(curve.compute_flops[end]))
        assert law.outside(*law.optimum(curve.compute_flops[end] * further))


@LAWS
@given(share=st.floats(0, 1))
def test_compute_at_inverts_the_law_between_the_points(law: ce.Law, share: float) -> None:
    curve = ce.frontier(law, n_points=3)
    compute = curve.compute_flops[0] ** (1 - share) * curve.compute_flops[-1] ** share
    loss = torch.tensor(law.loss(*law.optimum(compute)), dtype=torch.float64)
    assert float(curve.compute_at(loss)) == pytest.approx(compute, rel=1e-9)


def test_the_shipped_curve_is_the_frontier_of_its_law() -> None:
    curve, expected = ce.read_curve(), ce.frontier(ce.BESIROGLU)
    assert curve._replace(subjects={}) == expected
    entry = curve.subjects[NAMED]
    assert (entry.parameters, entry.tokens) == (135e6, 2e12)
    assert entry.loss == ce.BESIROGLU.loss(135e6, 2e12)


@pytest.mark.parametrize("delta", [0.05, 0.2, 0.4])
def test_compute_equivalent_is_its_closed_form(delta: float) -> None:
    curve = ce.read_curve()
    subject = curve.subjects[NAMED]
    (metric,), facts = ce.metrics(planted_sums(delta), curve, subject, n_resamples=50, seed=0)
    expected = closed_form(ce.BESIROGLU, subject.loss + delta, subject.loss)
    assert (metric.value, metric.low, metric.high) == (pytest.approx(expected, rel=1e-6),) * 3
    assert (metric.unit, metric.n) == ("fraction of pretraining compute, modelled", 4000)
    assert facts["loss_recovered_zero"] == pytest.approx(1 - delta / 10)
    assert facts["answers"]["recons"] == f"{expected:.3g} of the subject's pretraining compute"
    assert facts["subject_outside"] == "2e+12 tokens are not in 5e+09 to 5e+11"


def test_no_loss_costs_all_the_compute() -> None:
    curve = ce.read_curve()
    (metric,), _ = ce.metrics(planted_sums(0.0), curve, curve.subjects[NAMED], n_resamples=20, seed=0)
    assert metric.value == pytest.approx(1)


def test_the_interval_carries_delta_ce_through() -> None:
    curve, sums = ce.read_curve(), planted_sums(0.2, spread=0.1)
    subject = curve.subjects[NAMED]
    (metric,), _ = ce.metrics(sums, curve, subject, n_resamples=200, seed=3)
    delta = downstream.bootstrap(sums, downstream.delta_ce(0), n_resamples=200, seed=3)
    low, high = (closed_form(ce.BESIROGLU, subject.loss + d, subject.loss) for d in (delta.high, delta.low))
    assert (metric.low, metric.high) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3))
    assert metric.low < metric.value < metric.high


def test_a_loss_beyond_the_curve_gets_words_and_no_number(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "monosem")
    curve = ce.read_curve()
    metrics, facts = ce.metrics(planted_sums(3.0), curve, curve.subjects[NAMED], n_resamples=20, seed=0)
    assert metrics == []
    for answer in facts["answers"].values():
        assert answer.startswith("no number: the replaced loss") and "above 3.029" in answer
    assert "compute_equivalent is left out" in caplog.text
    easy = curve.subjects[NAMED]._replace(loss=1.9)
    metrics, facts = ce.metrics(planted_sums(0.1), curve, easy, n_resamples=20, seed=0)
    assert metrics == [] and "no number: the subject's loss 1.9 is below" in facts["answers"]["recons"]


def test_resamples_beyond_the_curve_count_as_its_end() -> None:
    curve = ce.read_curve()
    subject = curve.subjects[NAMED]
    (metric,), _ = ce.metrics(planted_sums(0.4, spread=1.0), curve, subject, n_resamples=100, seed=0)
    assert metric.low == pytest.approx(curve.compute_flops[0] / float(curve.compute_at(torch.tensor(subject.loss))))


def test_anchoring_forms_agree_where_the_text_is_the_laws() -> None:
    assert ce.anchored("additive", 4.0, 0.3, 2.6, 1.8) == pytest.approx(2.9)
    assert ce.anchored("multiplicative", 2.6, 0.3, 2.6, 1.8) == pytest.approx(2.9)
    assert ce.anchored("multiplicative", 3.4, 0.3, 2.6, 1.8) == pytest.approx(2.75)  # half as reducible
    with pytest.raises(ValueError, match=r"ce is 1\.5, not above the law's irreducible 1\.8; only additive"):
        ce.anchored("multiplicative", 1.5, 0.3, 2.6, 1.8)


def test_sensitivity_has_a_value_or_a_reason_in_every_row() -> None:
    rows = ce.sensitivity(4.007, 0.334, ce.read_curve().subjects[NAMED])
    assert len(rows) == 4 + 10 + 2
    assert all((row["value"] is None) == bool(row["outside"]) for row in rows)
    values = {(r["law"], r["anchoring"], r["path"], r["changed"]): r["value"] for r in rows}
    subject = ce.BESIROGLU.loss(135e6, 2e12)
    additive = closed_form(ce.BESIROGLU, subject + 0.334, subject)
    assert values["besiroglu-2024", "additive", "frontier", ""] == pytest.approx(additive, rel=1e-6)
    assert values["besiroglu-2024", "multiplicative", "frontier", ""] > 2 * additive
    assert values["besiroglu-2024", "additive", "same tokens per parameter", ""] is None  # 723 billion tokens
    fewer = values["besiroglu-2024", "additive", "same parameters", ""]
    assert ce.BESIROGLU.loss(135e6, 2e12 * fewer) == pytest.approx(subject + 0.334)
    assert "below the law's irreducible" in ce.sensitivity(1.5, 0.1, ce.read_curve().subjects[NAMED])[1]["outside"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "other"}, "is no loss-curve of format 1"),
        ({"format": 2}, "is no loss-curve of format 1"),
        ({"more": 1}, "it needs"),
        ({"points": [{"compute_flops": 1, "loss": 2}]}, "two points or more"),
        ({"points": [{"compute_flops": 2, "loss": 3}, {"compute_flops": 1, "loss": 2}]}, "rising and loss falling"),
        ({"points": [{"compute_flops": 1, "loss": 2}, {"compute_flops": 2, "loss": 3}]}, "rising and loss falling"),
        ({"points": [{"compute_flops": 1}]}, "points or subjects of another form"),
        ({"subjects": {"a": {"loss": 1}}}, "points or subjects of another form"),
        ({"irreducible_loss": 2.5}, "not positive"),
    ],
)
def test_read_curve_refuses_what_is_not_one(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    path.write_text(json.dumps({**json.loads(ce.DEFAULT_CURVE.read_text("utf-8")), **change}))
    with pytest.raises(ValueError, match=message):
        ce.read_curve(path)


def test_a_measured_curve_needs_no_law(tmp_path: Path) -> None:
    data = {
        "kind": "loss-curve", "format": 1, "name": "own", "source": "measured", "modelled": False,
        "irreducible_loss": 0, "parameters_range": [1e6, 1e9], "tokens_range": [1e9, 1e10],
        "points": [{"compute_flops": 10.0 ** (15 + i), "loss": 4.0 * 0.9**i} for i in range(5)],
        "subjects": {"s": {"parameters": 1e8, "tokens": 2e9, "loss": 4.0 * 0.9**3, "source": "measured"}},
    }  # fmt: skip
    path = tmp_path / "curve.json"
    path.write_text(json.dumps(data))
    curve = ce.read_curve(path)
    delta = 4.0 * (0.9**1 - 0.9**3)
    (metric,), facts = ce.metrics(planted_sums(delta), curve, curve.subjects["s"], n_resamples=20, seed=0)
    assert metric.value == pytest.approx(0.01) and math.isclose(metric.low, metric.high)
    assert (metric.unit, facts["subject_outside"]) == ("fraction of pretraining compute, measured", "")
