"""Which fraction of the subject's pretraining compute would a model with the replaced loss have cost?

Gao et al. 2024, section 4.1, give this number without a derivation. Ours is *modelled*, out of a published law of how
loss falls with compute; docs/compute_equivalent.md derives it and says what it hangs on:

    L(N, D) = E + A / N^alpha + B / D^beta                       N parameters, D tokens, nats per token
    C(L)    = least 6·N·D FLOPs with which the law reaches L      (the frontier, kept as a table: `LossCurve`)
    compute_equivalent = C(L_subject + ΔCE) / C(L_subject)        L_subject = L(N, D) of the subject

A loss beyond the curve has no number, only an answer in words: nothing is extrapolated.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from monosem import artifacts
from monosem.evals import downstream
from monosem.evals.bootstrap import as_metric, bootstrap
from monosem.types import Metric

CURVE_KIND = "loss-curve"
DEFAULT_CURVE = Path(__file__).with_name("loss_curve.json")
"""The frontier of BESIROGLU within the range it was fitted on, with the subjects whose pretraining is published."""

_FORMAT = 1
_KEYS = {
    "kind",
    "format",
    "name",
    "source",
    "modelled",
    "irreducible_loss",
    "parameters_range",
    "tokens_range",
    "points",
}
_KEYS |= {"subjects"}
_RECONS, _ABLATIONS = 0, {"mean_ablation": 1, "zero_ablation": 2}  # patches of `downstream.patches_of`

Anchoring = Literal["additive", "multiplicative"]
log = logging.getLogger("monosem")


class Law(NamedTuple):
    """A loss law L(N, D) and the sizes of the models that it was fitted on."""

    name: str
    source: str
    irreducible: float
    a: float
    b: float
    alpha: float
    beta: float
    parameters_range: tuple[float, float] = (70e6, 16e9)
    tokens_range: tuple[float, float] = (5e9, 500e9)

    def loss(self, parameters: float, tokens: float) -> float:
        """E + A / N^alpha + B / D^beta."""
        return self.irreducible + self.a / parameters**self.alpha + self.b / tokens**self.beta

    @property
    def balance(self) -> float:
        """G, with N = G·(C/6)^(beta/(alpha+beta)) on the frontier."""
        return (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))

    def optimum(self, compute_flops: float) -> tuple[float, float]:
        """(N, D) of least loss with 6·N·D = compute: where alpha·A / N^alpha = beta·B / D^beta."""
        parameters = self.balance * (compute_flops / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, compute_flops / 6 / parameters

    def outside(self, parameters: float, tokens: float) -> str:
        """What of a model is beyond the fitted range, in words; empty when nothing is."""
        return _beyond(parameters, tokens, self.parameters_range, self.tokens_range)


HOFFMANN = Law(
    "hoffmann-2022", "Hoffmann et al. 2022, arXiv 2203.15556, approach 3; exponents and E unrounded, as Besiroglu et "
    "al. 2024 read them in its source", 1.6934, 406.4, 410.7, 0.3392, 0.2849,
)  # fmt: skip
BESIROGLU = Law(
    "besiroglu-2024", "Besiroglu et al. 2024, arXiv 2404.10102: approach 3 of Hoffmann et al. 2022, fitted again to "
    "data read off its figure", 1.8172, 482.01, 2085.43, 0.3478, 0.3658,
)  # fmt: skip
STANDARD_ERRORS = {"irreducible": 0.03, "a": 124.58, "b": 1293.23, "alpha": 0.02, "beta": 0.02}
"""Of BESIROGLU's parameters, by the same paper's bootstrap. They are strongly correlated."""


class Pretraining(NamedTuple):
    """What a subject cost, and its loss on the curve."""

    parameters: float
    tokens: float
    loss: float
    source: str


class LossCurve(NamedTuple):
    """Loss against pretraining compute in a family of models: rising compute, falling loss (docs/formats.md)."""

    name: str
    source: str
    modelled: bool
    irreducible_loss: float
    parameters_range: tuple[float, float]
    tokens_range: tuple[float, float]
    compute_flops: tuple[float, ...]
    loss: tuple[float, ...]
    subjects: dict[str, Pretraining]

    def compute_at(self, loss: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """FLOPs at a loss on the curve, by straight lines between points in (log(loss − irreducible), log FLOPs)."""
        reducible = torch.tensor(self.loss[::-1], dtype=torch.float64).sub(self.irreducible_loss).log()
        flops = torch.tensor(self.compute_flops[::-1], dtype=torch.float64).log()
        at = (loss.double() - self.irreducible_loss).log()
        right = torch.searchsorted(reducible, at.contiguous()).clamp(1, len(flops) - 1)
        share = (at - reducible[right - 1]) / (reducible[right] - reducible[right - 1])
        return flops[right - 1].lerp(flops[right], share).exp()

    def outside(self, loss: float) -> str:
        """Why a loss has no compute on this curve; empty when it has one."""
        slack = 1e-9 * self.loss[0]
        if loss > self.loss[0] + slack:
            return (
                f"loss {loss:.4g} is above {self.loss[0]:.4g}, the highest of {self.name}: less compute than its least"
            )
        if loss < self.loss[-1] - slack:
            return (
                f"loss {loss:.4g} is below {self.loss[-1]:.4g}, the lowest of {self.name}: more compute than its most"
            )
        return ""


def read_curve(path: str | Path = DEFAULT_CURVE) -> LossCurve:
    """The curve in a JSON file; `ValueError` when it is not one, or compute does not rise while loss falls."""
    data = artifacts.read_json(path)
    if not isinstance(data, dict) or (data.get("kind"), data.get("format")) != (CURVE_KIND, _FORMAT):
        raise ValueError(f"{path} is no {CURVE_KIND} of format {_FORMAT}; see docs/formats.md for how to write one")
    if data.keys() != _KEYS:
        raise ValueError(f"{path} has keys {', '.join(sorted(data))}; it needs {', '.join(sorted(_KEYS))}")
    try:
        flops, loss = (tuple(float(p[key]) for p in data["points"]) for key in ("compute_flops", "loss"))
        ranges = [(float(low), float(high)) for low, high in (data["parameters_range"], data["tokens_range"])]
        subjects = {name: Pretraining(**entry) for name, entry in data["subjects"].items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} has points or subjects of another form ({error!r}); see docs/formats.md") from None
    if len(flops) < 2 or sorted(set(flops)) != list(flops) or sorted(set(loss), reverse=True) != list(loss):
        raise ValueError(
            f"{path} needs two points or more, compute_flops rising and loss falling from each to the next"
        )
    if not (flops[0] > 0 and loss[-1] > data["irreducible_loss"]):
        raise ValueError(f"{path} has compute or loss - irreducible_loss that is not positive; correct it")
    name, source, modelled, irreducible = (data[key] for key in ("name", "source", "modelled", "irreducible_loss"))
    return LossCurve(name, source, modelled, irreducible, ranges[0], ranges[1], flops, loss, subjects)


def frontier(law: Law, n_points: int = 33) -> LossCurve:
    """The law's least loss against compute, over the compute at which N and D are in the range it was fitted on."""
    ends = []
    for parameters, tokens in zip(law.parameters_range, law.tokens_range, strict=True):
        at_parameters = 6 * (parameters / law.balance) ** ((law.alpha + law.beta) / law.beta)
        at_tokens = 6 * (tokens * law.balance) ** ((law.alpha + law.beta) / law.alpha)
        ends.append((at_parameters, at_tokens))
    first, last = max(ends[0]), min(ends[1])
    steps = [i / (n_points - 1) for i in range(n_points)]
    flops = tuple(first ** (1 - s) * last**s for s in steps)
    loss = tuple(law.loss(*law.optimum(c)) for c in flops)
    ranges = law.parameters_range, law.tokens_range
    return LossCurve(f"{law.name} frontier", law.source, True, law.irreducible, *ranges, flops, loss, {})


def metrics(
    sums: Float[Tensor, "n_clusters n_sums"], curve: LossCurve, subject: Pretraining, *, n_resamples: int, seed: int
) -> tuple[list[Metric], dict[str, Any]]:
    """compute_equivalent, anchored additively, and what it rests on; no metric where a loss is off the curve.

    `sums` are `downstream.sums_of` the patches of `downstream.patches_of`. The interval is ΔCE's, carried through; a
    resample off the curve counts as the curve's end. The facts also have loss_recovered_zero, which flatters, an answer
    in words for the reconstruction and both ablations, and subject_outside: whether the subject itself is of a size
    that the curve does not speak of.
    """
    subject_loss = subject.loss
    answers = {"recons": _answer(sums, _RECONS, curve, subject_loss)}
    answers |= {name: _answer(sums, variant, curve, subject_loss) for name, variant in _ABLATIONS.items()}
    totals = sums.sum(0)
    delta, zero = (float(downstream.delta_ce(v)(totals)) for v in (_RECONS, _ABLATIONS["zero_ablation"]))
    facts: dict[str, Any] = {
        "label": "modelled" if curve.modelled else "measured",
        "curve": curve.name,
        "source": curve.source,
        "anchoring": "additive",
        "subject_loss": subject_loss,
        "subject_outside": _beyond(subject.parameters, subject.tokens, curve.parameters_range, curve.tokens_range),
        "replaced_loss": subject_loss + delta,
        "loss_recovered_zero": 1 - delta / zero,
        "answers": answers,
    }
    if facts["subject_outside"]:
        log.warning("compute_equivalent: the subject's loss is extrapolated (%s)", facts["subject_outside"])
    if curve.outside(subject_loss) or curve.outside(subject_loss + delta):
        log.warning("compute_equivalent is left out: %s", answers["recons"])
        return [], facts

    def fraction(totals: Tensor) -> Tensor:
        replaced = (subject_loss + downstream.delta_ce(_RECONS)(totals)).clamp(curve.loss[-1], curve.loss[0])
        return curve.compute_at(replaced) / curve.compute_at(torch.tensor(subject_loss))

    interval = bootstrap(sums, fraction, n_resamples=n_resamples, seed=seed)
    unit = f"fraction of pretraining compute, {facts['label']}"
    return [as_metric("compute_equivalent", interval, unit=unit, n=downstream.n_predictions(sums))], facts


def sensitivity(ce: float, delta_ce: float, pretraining: Pretraining) -> list[dict[str, Any]]:
    """compute_equivalent under other laws, anchorings, parameters (± one standard error) and paths than the first's.

    Each row says what it assumes, and has `value` or, where that is None, `outside`: why there is none. Paths beside
    the frontier keep the subject's tokens per parameter, or its size.
    """
    rows = []
    for law in (BESIROGLU, HOFFMANN):
        for anchoring in get_args(Anchoring):
            rows.append(_row(law, anchoring, "frontier", "", ce, delta_ce, pretraining))
    for name, error in STANDARD_ERRORS.items():
        for sign in (-1, 1):
            law = BESIROGLU._replace(**{name: getattr(BESIROGLU, name) + sign * error})
            rows.append(_row(law, "additive", "frontier", f"{name} {sign:+d} s.e.", ce, delta_ce, pretraining))
    for path in ("same tokens per parameter", "same parameters"):
        rows.append(_row(BESIROGLU, "additive", path, "", ce, delta_ce, pretraining))
    return rows


def anchored(anchoring: Anchoring, ce: float, delta_ce: float, subject_loss: float, irreducible: float) -> float:
    """The loss on the curve that stands for ce + delta_ce on our text, given that subject_loss stands for ce.

    additive: our text is harder by the same nats for every model, subject_loss + delta_ce.
    multiplicative: by the same factor on what is reducible, E + (subject_loss − E)·(1 + delta_ce / (ce − E)).
    """
    if anchoring == "additive":
        return subject_loss + delta_ce
    if ce <= irreducible:
        raise ValueError(
            f"ce is {ce:.4g}, not above the law's irreducible {irreducible:.4g}; only additive anchoring fits"
        )
    return irreducible + (subject_loss - irreducible) * (1 + delta_ce / (ce - irreducible))


def _beyond(
    parameters: float, tokens: float, parameters_range: tuple[float, float], tokens_range: tuple[float, float]
) -> str:
    found = []
    for what, value, (low, high) in (("parameters", parameters, parameters_range), ("tokens", tokens, tokens_range)):
        if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9):
            found.append(f"{value:.3g} {what} are not in {low:.3g} to {high:.3g}")
    return ", ".join(found)


def _answer(sums: Tensor, variant: int, curve: LossCurve, subject_loss: float) -> str:
    replaced = subject_loss + float(downstream.delta_ce(variant)(sums.sum(0)))
    if why := curve.outside(subject_loss):
        return f"no number: the subject's {why}"
    if why := curve.outside(replaced):
        return f"no number: the replaced {why}"
    both = curve.compute_at(torch.tensor([replaced, subject_loss], dtype=torch.float64))
    return f"{float(both[0] / both[1]):.3g} of the subject's pretraining compute"


def _row(
    law: Law, anchoring: Anchoring, path: str, changed: str, ce: float, delta_ce: float, pretraining: Pretraining
) -> dict[str, Any]:
    subject_loss = law.loss(pretraining.parameters, pretraining.tokens)
    value, outside = None, ""
    if anchoring == "multiplicative" and ce <= law.irreducible:
        outside = f"the subject's loss on our text, {ce:.4g}, is below the law's irreducible loss"
    else:
        replaced = anchored(anchoring, ce, delta_ce, subject_loss, law.irreducible)
        if path == "frontier":
            curve = frontier(law, n_points=2)
            outside = curve.outside(replaced) or curve.outside(subject_loss)
            both = curve.compute_at(torch.tensor([replaced, subject_loss], dtype=torch.float64))
            value = float(both[0] / both[1])
        else:
            value = _fraction_on_path(law, path, replaced, pretraining)
            outside = law.outside(*_on_path(path, value, pretraining))
    row = {"law": law.name, "anchoring": anchoring, "path": path, "changed": changed}
    return {**row, "value": None if outside else value, "outside": outside}


def _on_path(path: str, fraction: float, pretraining: Pretraining) -> tuple[float, float]:
    """(N, D) of the model that cost `fraction` of the subject's compute."""
    if path == "same parameters":
        return pretraining.parameters, pretraining.tokens * fraction
    return pretraining.parameters * fraction**0.5, pretraining.tokens * fraction**0.5


def _fraction_on_path(law: Law, path: str, loss: float, pretraining: Pretraining) -> float:
    """The fraction at which the path has this loss, by bisection: less compute is more loss."""
    low, high = -40.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        if law.loss(*_on_path(path, math.exp(middle), pretraining)) > loss:
            low = middle
        else:
            high = middle
    return math.exp(high)
