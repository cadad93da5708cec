"""What each metric is, in a line, and which numbers stand beside it: what a report says of a name.

docs/notation.md, docs/explainability.md and docs/probes.md have the formulas, spaces and the reasons.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

DEFINITIONS: dict[str, str] = {
    "normalized_mse": "Σ‖x − x̂‖² / Σ‖x − x̄‖², held-out tokens, normalised space; predicting the mean gives 1",
    "normalized_mse_train": "normalized_mse on tokens that were trained on; the gap between the two is overfitting",
    "normalized_mse_raw": "normalized_mse in raw space; a few tokens of huge norm may decide it",
    "explained_variance": "1 − normalized_mse",
    "l0": "mean number of active latents",
    "cosine": "mean of x·x̂ / (‖x‖ ‖x̂‖), about zero, not about x̄",
    "never_fired_fraction": "share of latents that fired on none of the n held-out tokens; falls as n grows",
    "dead_fraction": "share of latents that did not fire in the last n tokens of training",
    "dense_fraction_{percent}pct": "share of latents that fired on more than {percent}% of tokens",
    "decoder_max_cosine": "mean over latents of the largest cosine with another's decoder direction",
    "decoder_max_cosine_random": "decoder_max_cosine of as many random directions",
    "pca_normalized_mse": "normalized_mse of x rebuilt from its round(l0) largest principal components",
    "relative_bias": "Σ‖ŷ‖² / Σ ŷ·y, both about x̄: 1 when scaling x̂ cannot improve it, below 1 when x̂ is too small",
    "recons_slope": "Σ ŷ·y / Σ‖y‖²: slope of ŷ on y, both about x̄",
    "ce_original": "mean of −ln p(next token), the subject as it is",
    "delta_ce": "mean of ln p(next token) − ln q(next token), q with x̂ in place of x",
    "kl": "mean of KL(p ‖ q) over the vocabulary",
    "{quantity}_mean_ablation": "{quantity} with the mean of the training activations in place of x̂",
    "{quantity}_zero_ablation": "{quantity} with zeros in place of x̂",
    "{quantity}_pca": "{quantity} with x rebuilt from its principal components, round(l0) of them, in place of x̂",
    "top1_agreement": "share of predictions where p and q have the same most likely token",
    "loss_recovered_mean": "1 − delta_ce / delta_ce_mean_ablation",
    "loss_recovered_zero": "1 − delta_ce / delta_ce_zero_ablation; flatters: zeros are far worse than no information",
    "compute_equivalent": "share of the subject's pretraining compute with which a published loss law reaches the "
    "loss after delta_ce; modelled",
    "refined_normalized_mse": "normalized_mse with the magnitudes ≥ 0 that rebuild x best from the same active latents",
    "unrefined_normalized_mse": "normalized_mse of the tokens of refined_normalized_mse",
    "shrinkage": "mean of c/z − 1, c the refined and z the original activation; positive where activations are shrunk",
    "refinement_slope": "Σ c·z / Σ z² over active latents; 1 without shrinkage",
    "progressive_{quantity}_k{k}": "{quantity} of x rebuilt from its {k} largest pre-activations",
    "progressive_{quantity}_threshold": "{quantity} of x rebuilt from every pre-activation above one threshold, which "
    "lets k a token pass on training tokens",
    "progressive_l0_threshold": "mean number of pre-activations above the one threshold on the evaluated tokens",
    "ablation_sparsity": "mean (‖δ‖₁/‖δ‖₂)²/(vocab·T), δ the change of the next T tokens' logits when one active "
    "latent is taken out: the share of logits it moves; 1 when all move alike",
    "ablation_sparsity_own_token": "ablation_sparsity of the ablated token's own logits, T = 1; 2/π for normal changes",
    "ablation_sparsity{own}_channels": "ablation_sparsity{own} of a random channel of the residual stream",
    "ablation_sparsity{own}_random_directions": "ablation_sparsity{own} of a random direction, as long as the latent's "
    "change",
    "ablation_sparsity{own}_random_dictionary": "ablation_sparsity{own} of a direction most active in a random "
    "dictionary",
    "probe_loss": "held-out cross-entropy of the logistic probe on the latent that was best on the other half, mean "
    "over tasks",
    "probe_accuracy": "of the probe of probe_loss: share of held-out texts guessed right",
    "probe_auc": "of the probe of probe_loss: probability that a text of label 1 scores above one of label 0",
    "probe_loss_train": "cross-entropy of the probe of probe_loss where it was chosen: a minimum, which flatters",
    "probe_loss_null": "probe_loss_train when the labels are shuffled",
    "probe_selection_bias": "entropy of the labels minus probe_loss_null: what taking the best of n finds in nothing",
    "probe_loss_channels": "probe_loss among the channels of the normalised activation",
    "probe_loss_random_directions": "probe_loss among random directions, as many as there are latents",
    "probe_loss_dense": "cross-entropy of a logistic probe on the whole activation",
    "probe_loss_length": "cross-entropy of a probe on the log of the text's characters",
    "probe_loss_last_character": "cross-entropy of a probe on the text's last character",
    "probe_loss_constant": "cross-entropy of the share of labels in the training half",
    "probe_not_converged": "share of all probes that did not converge in 60 iterations; kept at their last step",
    "n2g_recall": "of the tokens on which a latent fires, the share at which its N2G rule predicts; mean over latents",
    "n2g_precision": "of the tokens at which the rule predicts, the share on which the latent fires; 0 when it never "
    "predicts; mean over latents",
    "n2g_{score}_q{percent}": "n2g_{score}, predicts and fires above the latent's {percent}% quantile of positive "
    "activations",
    "n2g_{score}_{gram}gram": "n2g_{score} of the {gram}gram rule, from all the building text",
    "n2g_density": "share of tokens on which the latent fires, mean over latents",
    "n2g_never_predicts": "share of latents whose rule predicts at none of the tokens",
    "n2g_never_fires": "share of latents that fire at none of the tokens",
    "explanation_{quantity}_real": "{quantity} with no latent simulated: the reconstruction",
    "explanation_{quantity}_unigram{share}": "{quantity} with latents replaced by what their unigram rules predict"
    "{share}",
    "explanation_{quantity}_zero{share}": "{quantity} with latents set to 0{share}",
    "explanation_{quantity}{share}": "{quantity} with latents replaced by what their N2G rules predict{share}",
    "detection_balanced_accuracy": "does the latent fire in this text? a judge's mean of right yes and right no",
    "fuzzing_balanced_accuracy": "does the latent fire on the marked tokens? a judge's mean of right yes and right no",
}
"""Name -> definition; a name in braces stands for what `_FIELDS` lets it be. The first that fits is meant."""

_FIELDS = {
    "quantity": "normalized_mse|delta_ce|kl", "k": r"\d+", "percent": r"\d+", "score": "recall|precision",
    "gram": "uni|bi", "share": r"|_at_\d+", "own": "|_own_token",
}  # fmt: skip
_LAST = "_last"

_SECTIONS = {
    "Reconstruction": r"(pca_)?normalized_mse.*|explained_variance|l0|cosine|relative_bias|recons_slope",
    "Downstream": r"ce_original|delta_ce.*|kl.*|top1_agreement|loss_recovered.*|compute_equivalent",
    "Latents": r"never_fired_fraction|dead_fraction|dense_.*|decoder_.*",
    "Probes": r"probe_.*",
    "Explanations": r"n2g_.*|explanation_.*|detection_.*|fuzzing_.*",
    "Ablation sparsity": r"ablation_.*",
    "Refined magnitudes": r"(un)?refined_.*|shrinkage|refinement_slope",
    "Other sparsities": r"progressive_.*",
    "Others": r".*",
}
"""Title -> the names that belong there; the first that fits."""

_BESIDE = {
    "normalized_mse": {"training tokens": "normalized_mse_train", "PCA, l0 directions": "pca_normalized_mse"},
    "delta_ce|kl": {
        "PCA, l0 directions": "{0}_pca", "mean ablation": "{0}_mean_ablation", "zero ablation": "{0}_zero_ablation"
    },
    "decoder_max_cosine": {"random directions": "decoder_max_cosine_random"},
    "probe_loss(_last)?": {
        "dense probe": "probe_loss_dense{1}", "random directions": "probe_loss_random_directions{1}",
        "channels": "probe_loss_channels{1}", "shuffled labels, training": "probe_loss_null{1}",
        "constant": "probe_loss_constant", "length": "probe_loss_length", "last character": "probe_loss_last_character",
    },
    "probe_loss_train(_last)?": {"shuffled labels": "probe_loss_null{1}"},
    "n2g_(?:recall|precision)": {"unigram": "{0}_unigram", "bigram": "{0}_bigram"},
    r"(explanation_(?:delta_ce|kl))(_at_\d+)?": {
        "none simulated": "{1}_real", "unigram": "{1}_unigram{2}", "set to 0": "{1}_zero{2}"
    },
    "ablation_sparsity(?:_own_token)?": {
        "channels": "{0}_channels", "random directions": "{0}_random_directions",
        "random dictionary": "{0}_random_dictionary",
    },
    "refined_normalized_mse": {"unrefined": "unrefined_normalized_mse"},
}  # fmt: skip
"""Name -> label -> the number that it is read against, where {0} is the name and {1}, {2} what it has in brackets."""


class Row(NamedTuple):
    """A metric, and the numbers it is read against: label -> name."""

    name: str
    beside: dict[str, str]


def definition(name: str) -> str | None:
    """What the metric is, in a line; None for a name that is not one."""
    for pattern, text in DEFINITIONS.items():
        regex = re.sub(r"\{(\w+)\}", lambda field: f"(?P<{field[1]}>{_FIELDS[field[1]]})", pattern)
        if found := re.fullmatch(regex, name):
            fields = found.groupdict()
            if "share" in fields:
                fields["share"] = re.sub(r"_at_(\d+)", r", a random \1% of those explained", fields["share"])
            return text.format(**fields)
    if name.startswith("probe_") and name.endswith(_LAST) and (of_mean := definition(name.removesuffix(_LAST))):
        return f"{of_mean}; of the last token instead of the mean over the text"
    return None


def sections(names: Iterable[str]) -> dict[str, list[Row]]:
    """Every name once, by section: as a row, or beside the row that it is a baseline of."""
    names = list(names)
    beside = {name: _beside(name, names) for name in names}
    baselines = {other for others in beside.values() for other in others.values()}
    found: dict[str, list[Row]] = {}
    for title in _SECTIONS:
        own = [name for name in names if name not in baselines and _section(name) == title]
        if own:
            found[title] = [Row(name, beside[name]) for name in own]
    return found


def _section(name: str) -> str:
    return next(title for title, pattern in _SECTIONS.items() if re.fullmatch(pattern, name))


def _beside(name: str, names: list[str]) -> dict[str, str]:
    if name.startswith("progressive_") and name.endswith("_threshold"):
        start = f"{name.removesuffix('threshold')}k"
        return {f"k' = {other.removeprefix(start)}": other for other in names if other.startswith(start)}
    for pattern, others in _BESIDE.items():
        if found := re.fullmatch(pattern, name):
            filled = {label: other.format(name, *(g or "" for g in found.groups())) for label, other in others.items()}
            return {label: other for label, other in filled.items() if other in names}
    return {}
