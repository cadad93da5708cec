"""explain, the pages and the exports at sites and of subjects that give less than the others: the rest is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from starlette.testclient import TestClient

from monosem.activations import ActivationStore
from monosem.config import ExplainConfig
from monosem.evals import ablation
from monosem.explained import ExplainStore
from monosem.explanations.entry import explain
from monosem.export import sae_viewer, site
from monosem.model import Autoencoder
from monosem.subject import Subject
from monosem.viewer import live
from monosem.viewer.server import application
from monosem.viewer.web import Site
from tiny import tiny_run
from zoo import write

HOST = "http://127.0.0.1:8765"
RULES, VOTES, ABLATIONS = ("n2g_recall", "lens_up", "ablation_kl")
CASES = {
    "llama mlp": ("llama", "mlp_post_act", {"votes"}),
    "llama z": ("llama", "attn_z", {"votes"}),
    "opt": ("opt-projected", "model.decoder.layers.1", {"votes"}),
    "mamba": ("mamba", "backbone.layers.1", set()),
    "distilbert": ("distilbert", "transformer.layer.1.ffn.lin2:input", {"votes", "rules", "ablations"}),
}


@pytest.fixture(scope="module")
def explained(
    tiny_model: Path, tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, ExplainStore]]:
    found = {}
    for case, (kind, location, _) in CASES.items():
        out = tmp_path_factory.mktemp(case.replace(" ", "-"))
        model = tiny_model if kind == "llama" else write(out / "model", kind)
        tiny_run(out / "run", model, tiny_corpus, n_latents=24, location=location)
        config = ExplainConfig(run=str(out / "run"), n2g=2, ablations=2, device="cpu")
        found[case] = out / "run", explain(config)
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_computed_is_left_out_with_its_reason(
    explained: dict[str, tuple[Path, ExplainStore]], case: str
) -> None:
    run, found = explained[case]
    _, _, lacking = CASES[case]
    computed = found.manifest["computed"]
    reasons = {what: why for part in computed.values() for what, why in part.get("left_out", {}).items()}
    assert reasons.keys() == lacking
    for what, column in (("rules", RULES), ("votes", VOTES), ("ablations", ABLATIONS)):
        assert (column in found) == (what not in lacking)
    firing = int(found.column("density").argmax())
    with TestClient(application(Site(run)), HOST) as client:
        page = client.get(f"/latents/{firing}")
        assert page.status_code == 200 and page.text.count("<b>left out</b>") == len(lacking)
        view = client.get(f"/api/v1/latents/{firing}").json()
        assert view["left_out"] == reasons and (view["votes"] is None) == ("votes" in lacking)
        assert client.get("/latents").status_code == client.get("/").status_code == 200
        if lacking == {"votes", "rules", "ablations"}:
            assert "--n2g" not in page.text and "--n2g" not in client.get("/latents").text
    assert site.write(run, run / "pages", [firing]) > 1 and sae_viewer.write(found, run / "viewer", [firing]) == 1


@pytest.mark.parametrize("case", CASES)
def test_text_is_tried_at_any_site(explained: dict[str, tuple[Path, ExplainStore]], case: str) -> None:
    run, _ = explained[case]
    loaded = live.load(str(run), "cpu")
    words = "and the end"
    if not loaded.subject.has_logits:
        tried = live.try_text(loaded, words)
        assert tried["next"] is None and all(row["error"] is not None for row in tried["tokens"][1:])
        return
    edits = [live.Edit(3, "clamp", 5.0)]
    tried = live.try_text(loaded, words, edits=edits, n_continue=3)
    assert tried["next"]["kl_edited"] > 0 and tried["continuation"]["edited"] is not None
    assert tried["next"]["kl_recons"] > 0


def test_ablations_where_no_past_is_kept_are_those_of_whole_texts(
    explained: dict[str, tuple[Path, ExplainStore]],
) -> None:
    run, _ = explained["mamba"]
    store, autoencoder = ActivationStore.open(run / "store"), Autoencoder.load(run / "autoencoder")
    subject = Subject.load(store.site.model, dtype="float32", device="cpu")
    text = store.contexts("held_out")
    numbers, effects = ablation.metrics(
        subject, autoencoder, store.site, text.tokens, text.documents, first_position=1, n_ablations=6, n_tokens=4,
        n_resamples=10, seed=0,
    )  # fmt: skip
    assert all(torch.isfinite(torch.tensor(m.value)) for m in numbers)
    for i in range(6):
        at, context = effects["position"][i], text.tokens[effects["context"][i] : effects["context"][i] + 1]
        found = ablation.effects(
            subject, autoencoder, store.site, context[:, : at + 4], torch.tensor([at]),
            torch.tensor([effects["latent"][i]]), n_tokens=4,
        )  # fmt: skip
        assert float(found.sparsity) == pytest.approx(effects["sparsity"][i], rel=1e-3)
