"""The real packages, where they import together: ours in their evaluations, their autoencoders in ours.

Skipped elsewhere; `python -m benchmarks.interop` makes an environment in which nothing is.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from monosem import config, convert
from monosem.config import EvalConfig
from monosem.evals import downstream, evaluate, reconstruction
from monosem.model import Autoencoder, normalize
from monosem.run_folder import open_run
from monosem.subject import Subject
from test_convert_sae_lens import D_MODEL, N_LATENTS, ROWS, K, autoencoder, dense
from tiny import tiny_run, tiny_texts

MISSING = [
    name
    for name in ("sae_bench", "sae_probes", "sae_lens", "transformer_lens", "dictionary_learning", "sparsify")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (python -m benchmarks.interop makes an environment)"
)
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def interop() -> ModuleType:
    """The benchmarks are not installed; they run from the repository's root."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
        found = importlib.import_module("benchmarks.interop")
        found.peers()
        return found


@pytest.fixture(scope="module")
def run(tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interop_run")
    tiny_run(folder, tiny_model, tiny_corpus)
    return folder


@pytest.fixture
def module(run: Path) -> convert.Exposed:
    return convert.expose(Autoencoder.load(run / "autoencoder"), model_name="subject")


def test_transformer_lens_computes_what_our_subject_does(interop: Any, tiny_model: Path, module: Any) -> None:
    from transformer_lens import HookedTransformer

    tokens = torch.randint(3, 200, (3, 16), generator=torch.Generator().manual_seed(0))
    subject = Subject.load(str(tiny_model), dtype="float32", device="cpu")
    with interop.subject_named(tiny_model):
        theirs = HookedTransformer.from_pretrained_no_processing("subject", device="cpu")
    torch.testing.assert_close(theirs(tokens), subject.logits(tokens), atol=1e-3, rtol=1e-3)


def test_core_reports_what_our_evaluation_does(
    interop: Any, run: Path, tiny_model: Path, module: Any, tmp_path: Path
) -> None:
    opened = open_run(str(run), None, torch.device("cpu"))
    contexts = opened.store.contexts("held_out")
    plain = (contexts.tokens > 2).all(1)  # core leaves out special tokens, wherever they are
    tokens, documents = contexts.tokens[plain][:16], contexts.documents[plain][:16]
    assert len(tokens) == 16
    with interop.subject_named(tiny_model):
        theirs = interop.sae_bench_core(module, tokens.tolist(), tmp_path)
    subject = Subject.load(str(tiny_model), dtype="float32", device="cpu")
    found = downstream.metrics(
        subject, opened.autoencoder, opened.store.site, tokens, documents, opened.store.mean,
        first_position=0, n_resamples=10, seed=0,
    )  # fmt: skip
    ours = {metric.name: metric.value for metric in found}
    assert theirs["ce_loss_without_sae"] == pytest.approx(ours["ce_original"], rel=1e-4)
    assert theirs["ce_loss_with_sae"] == pytest.approx(ours["ce_original"] + ours["delta_ce"], rel=1e-4)
    assert theirs["ce_loss_score"] == pytest.approx(ours["loss_recovered_zero"], abs=0.02)
    assert theirs["l0"] == K
    assert theirs["frac_alive"] > 0 and math.isfinite(theirs["cossim"])


def test_sparse_probing_finds_the_latent_of_a_class(
    interop: Any, tiny_model: Path, module: Any, tmp_path: Path
) -> None:
    texts = [text[:60] for text in tiny_texts(240)]
    classes = [[f"{letter * 30} {text}" for text in texts[i::4]] for i, letter in enumerate("aeio")]
    with interop.subject_named(tiny_model):
        found = interop.sae_bench_probing(module, classes, tmp_path, n_train=80, n_test=40, context_length=32)
    assert found["sae_top_1_test_accuracy"] > 0.7
    assert found["sae_test_accuracy"] > 0.9 and found["llm_test_accuracy"] > 0.9


def test_sae_probes_runs_on_ours(interop: Any, tiny_model: Path, module: Any, tmp_path: Path) -> None:
    name = "119_us_state_TX"
    with interop.subject_named(tiny_model):
        found = interop.sae_probes_run(module, HOOK, [name], tmp_path, [1, 4])
    assert [row["k"] for row in found[name]] == [1, 4]
    assert all(0 < row["test_acc"] <= 1 and 0 <= row["test_auc"] <= 1 for row in found[name])
    (stored,) = tmp_path.glob(f"activations/**/{name}_*.pt")
    raw = torch.load(stored, weights_only=True)
    latents = module._own[0].encode(normalize(raw[:50])[0])
    wanted = torch.zeros(50, 48).scatter_add(1, latents.indices.long(), latents.values)
    torch.testing.assert_close(module.encode(raw[:50]), wanted)


@pytest.mark.parametrize("activation", config.activations())
def test_sae_lens_loads_ours_as_its_own(activation: str, interop: Any, tmp_path: Path) -> None:
    from sae_lens import SAE

    ours = autoencoder(activation)
    convert.save_sae_lens(ours, tmp_path, model_name="gpt2-small")
    theirs = SAE.load_from_disk(tmp_path)
    raw = ROWS.view(9, 10, -1)
    with torch.no_grad():
        z = theirs.encode(raw)
        torch.testing.assert_close(z.flatten(0, 1), dense(ours.encode(normalize(ROWS)[0])), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs.decode(z), ours(raw), atol=1e-4, rtol=1e-4)
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"


def sae_lens_of(architecture: str) -> Any:
    import sae_lens

    settings = {"d_in": D_MODEL, "d_sae": N_LATENTS, "dtype": "float32", "device": "cpu"}
    configs: dict[str, Any] = {
        "standard": lambda: sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**settings)),
        "topk": lambda: sae_lens.TopKSAE(sae_lens.TopKSAEConfig(k=K, **settings)),
        "topk_rescaled": lambda: sae_lens.TopKSAE(
            sae_lens.TopKSAEConfig(k=K, rescale_acts_by_decoder_norm=True, **settings)
        ),
        "topk_layer_norm": lambda: sae_lens.TopKSAE(
            sae_lens.TopKSAEConfig(k=K, normalize_activations="layer_norm", **settings)
        ),
        "jumprelu": lambda: sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**settings)),
        "gated": lambda: sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**settings)),
    }
    found = configs[architecture]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return found


@pytest.mark.parametrize("architecture", ["standard", "topk", "topk_rescaled", "topk_layer_norm", "jumprelu", "gated"])
def test_what_sae_lens_saves_is_read_and_measured(architecture: str, interop: Any, tmp_path: Path) -> None:
    theirs = sae_lens_of(architecture)
    theirs.save_model(tmp_path)
    ours = convert.load_sae_lens(tmp_path)
    with torch.no_grad():
        z = theirs.encode(ROWS)
        torch.testing.assert_close(dense(ours.encode(ours.normalize(ROWS)[0])), z, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(ours(ROWS), theirs.decode(z), atol=1e-4, rtol=1e-4)
    assert ours.tells_pre_activations
    measures(ours, (z > 0).sum(1).float().mean(), theirs(ROWS).detach())
    if architecture.endswith("layer_norm"):
        with pytest.raises(ValueError, match="takes back its normalize_activations=layer_norm"):
            convert.wrap(theirs, D_MODEL)
    else:
        measures(convert.wrap(theirs, D_MODEL), (z > 0).sum(1).float().mean(), theirs(ROWS).detach())


def test_dictionary_learnings_and_sparsifys_are_measured(interop: Any) -> None:
    from dictionary_learning import AutoEncoder
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from sparsify import SparseCoder, SparseCoderConfig

    pairs: list[tuple[Any, dict[str, Any]]] = [
        (AutoEncoder(D_MODEL, N_LATENTS), {}),
        (AutoEncoderTopK(D_MODEL, N_LATENTS, K), {"k": K}),
        (SparseCoder(D_MODEL, SparseCoderConfig(num_latents=N_LATENTS, k=K)), {"k": K, "n_latents": N_LATENTS}),
    ]
    for theirs, options in pairs:
        with torch.no_grad():
            found = theirs(ROWS)
        recons = found if isinstance(found, Tensor) else found.sae_out
        ours = convert.wrap(theirs, D_MODEL, **options)
        assert ours.tells_pre_activations
        measures(ours, None if "k" not in options else torch.tensor(float(K)), recons.detach())


def measures(ours: Autoencoder, l0: Tensor | None, recons: Tensor) -> None:
    """Our evaluation gives the L0 and the error that their forward pass has."""
    tally = reconstruction.tally(ours, [ROWS], torch.arange(90) // 5)
    found = {m.name: m.value for m in reconstruction.metrics(tally, n_resamples=10, seed=0)}
    error = (recons - ROWS).square().sum() / (ROWS - ROWS.mean(0)).square().sum()
    assert found["normalized_mse_raw"] == pytest.approx(float(error), rel=1e-3)
    if l0 is not None:
        assert found["l0"] == pytest.approx(float(l0), rel=1e-5)


def test_the_whole_evaluation_takes_one_of_sae_lens(interop: Any, run: Path, tmp_path: Path) -> None:
    convert.save_sae_lens(Autoencoder.load(run / "autoencoder"), tmp_path / "lens")
    wrapped = convert.load_sae_lens(tmp_path / "lens")
    options: dict[str, Any] = {
        "store": str(run / "store"),
        "n_bootstrap": 20,
        "n_tokens_downstream": 200,
        "device": "cpu",
    }
    theirs = evaluate(EvalConfig(run=str(tmp_path / "numbers"), **options), autoencoder=wrapped)
    ours = evaluate(EvalConfig(run=str(run), **options))
    for name, metric in theirs["metrics"].items():
        assert metric["value"] == pytest.approx(ours["metrics"][name]["value"], rel=1e-3, abs=1e-4), name
    assert json.loads((tmp_path / "numbers" / "eval.json").read_text())
