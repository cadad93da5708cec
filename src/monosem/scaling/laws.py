"""The laws of Gao et al. 2024, section 4, in one form: a sum of exponentials of linear forms in logs.

    ln L = logsumexp over terms t of (X_t θ_t)

X_t are columns made of natural logs of n_latents, k, tokens or FLOPs; θ_t are the term's coefficients. A power law with
an irreducible part is two terms, the joint law L(N,K) is two terms of 4 and 2 coefficients, a line in logs is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Logs = dict[str, Float[np.ndarray, " points"]]
"""Natural logs of what a law is of, by name: `n`, `k`, `tokens`, `c`, `size`."""

SLOPE_BOUND = 6.0
"""|slope| of any fit; the laws' own are below 1."""
INTERCEPT_BOUND = 60.0
"""|intercept| of any fit: exp(±60) covers FLOPs and tokens."""


class Law(NamedTuple):
    """A law's name, what it says, its coefficients by term, and the columns that they multiply."""

    title: str
    formula: str
    terms: tuple[tuple[str, ...], ...]
    columns: Callable[[Logs], tuple[tuple[np.ndarray | float, ...], ...]]
    inputs: tuple[str, ...]

    @property
    def coefficients(self) -> tuple[str, ...]:
        return tuple(name for term in self.terms for name in term)

    @property
    def irreducible(self) -> bool:
        """Whether there is a term beside the one that falls."""
        return len(self.terms) > 1

    def design(self, logs: Logs) -> list[Float[np.ndarray, "points coefficients"]]:
        """X_t of each term at the points in `logs`."""
        n_points = len(logs[self.inputs[0]])
        return [np.stack([np.broadcast_to(c, n_points) for c in term], axis=1) for term in self.columns(logs)]

    def log_value(
        self, theta: Float[np.ndarray, "*fits coefficients"], logs: Logs
    ) -> Float[np.ndarray, "*fits points"]:
        """ln L at the points, for each row of coefficients."""
        return log_sum(theta, self.design(logs))


def log_sum(
    theta: Float[np.ndarray, "*fits coefficients"], design: list[Float[np.ndarray, "points _"]]
) -> Float[np.ndarray, "*fits points"]:
    """logsumexp over terms of X_t θ_t."""
    start, terms = 0, []
    for columns in design:
        terms.append(theta[..., start : start + columns.shape[1]] @ columns.T)
        start += columns.shape[1]
    return np.logaddexp.reduce(np.stack(terms), axis=0)


JOINT = Law(
    "L(N,K | D)",
    "exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n) + exp(zeta + eta ln k)",
    (("alpha", "beta_k", "beta_n", "gamma"), ("zeta", "eta")),
    lambda x: ((1.0, x["k"], x["n"], x["k"] * x["n"]), (1.0, x["k"])),
    ("n", "k"),
)
JOINT_REDUCIBLE = Law(
    "L(N,K | D)",
    "exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n)",
    JOINT.terms[:1],
    lambda x: ((1.0, x["k"], x["n"], x["k"] * x["n"]),),
    ("n", "k"),
)


def power(title: str, of: str) -> Law:
    """exp(a - b ln x) + exp(e): falls as x^-b towards the irreducible exp(e)."""
    return Law(title, f"exp(a - b ln {of}) + exp(e)", (("a", "b"), ("e",)), lambda x: ((1.0, -x[of]), (1.0,)), (of,))


def line(title: str, of: str) -> Law:
    """exp(a + p ln x): a power law that may rise, with nothing irreducible."""
    return Law(title, f"exp(a + p ln {of})", (("a", "p"),), lambda x: ((1.0, x[of]),), (of,))


def reducible(law: Law) -> Law:
    """The same law without its irreducible term (of the joint law or of `power`)."""
    if law.terms == JOINT.terms:
        return JOINT_REDUCIBLE._replace(title=law.title)
    (of,) = law.inputs
    return Law(law.title, f"exp(a - b ln {of})", (("a", "b"),), lambda x: ((1.0, -x[of]),), (of,))


DATA = Law(
    "L(N,D)",
    "exp(a - b ln n) + exp(c - d ln tokens) + exp(e)",
    (("a", "b"), ("c", "d"), ("e",)),
    lambda x: ((1.0, -x["n"]), (1.0, -x["tokens"]), (1.0,)),
    ("n", "tokens"),
)
