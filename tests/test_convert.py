"""Foreign autoencoders as ours, and ours as theirs: stubs with the interfaces of the libraries, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from monosem import convert, variants
from monosem.evals import latents, progressive, reconstruction, refinement
from monosem.model import Autoencoder, AutoencoderConfig, initial_weights, normalize

D_MODEL, N_LATENTS, K = 12, 30, 4
ROWS = torch.randn(90, D_MODEL, generator=torch.Generator().manual_seed(0)) + 1
CLUSTERS = torch.arange(90) // 5
OPTIONS = {"n_resamples": 30, "seed": 0}
OURS = Autoencoder(
    AutoencoderConfig(D_MODEL, N_LATENTS, K),
    initial_weights(normalize(ROWS)[0], N_LATENTS, K, tied=True, seed=0),
)


class SaeLensLike(nn.Module):
    """Every latent out, every latent in; W_enc [d, n], b_dec subtracted from the input."""

    def __init__(self, k: int | None = K) -> None:
        super().__init__()
        self.k = k
        self.W_enc = nn.Parameter(OURS.weights.encoder.T.clone())
        self.W_dec = nn.Parameter(OURS.weights.decoder.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(N_LATENTS)), nn.Parameter(OURS.weights.pre_bias.clone())

    def encode(self, x: Tensor) -> Tensor:
        pre_acts = (x - self.b_dec) @ self.W_enc + self.b_enc
        if self.k is None:
            return pre_acts.relu()
        top = pre_acts.topk(self.k)
        return torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())

    def decode(self, z: Tensor) -> Tensor:
        return z @ self.W_dec + self.b_dec


class DictionaryLike(nn.Module):
    """dictionary_learning's: linear layers, a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D_MODEL, N_LATENTS), nn.Linear(N_LATENTS, D_MODEL, bias=False)
        self.encoder.weight.data, self.encoder.bias.data = OURS.weights.encoder.clone(), torch.zeros(N_LATENTS)
        self.decoder.weight.data = OURS.weights.decoder.T.clone()
        self.b_dec = nn.Parameter(OURS.weights.pre_bias.clone())

    def encode(self, x: Tensor, return_active: bool = False) -> Tensor:
        pre_acts = self.encoder(x - self.b_dec).relu()
        top = pre_acts.topk(K)
        return torch.zeros_like(pre_acts).scatter(1, top.indices, top.values)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z) + self.b_dec


class Encoded(NamedTuple):
    top_acts: Tensor
    top_indices: Tensor
    pre_acts: Tensor


class SparsifyLike(nn.Module):
    """Activations and indices, out and in."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D_MODEL, N_LATENTS)
        self.encoder.weight.data, self.encoder.bias.data = OURS.weights.encoder.clone(), torch.zeros(N_LATENTS)
        self.W_dec, self.b_dec = nn.Parameter(OURS.weights.decoder.clone()), nn.Parameter(OURS.weights.pre_bias.clone())

    def encode(self, x: Tensor) -> Encoded:
        pre_acts = self.encoder(x - self.b_dec).relu()
        top = pre_acts.topk(K, sorted=False)
        return Encoded(top.values, top.indices, pre_acts)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        return (top_acts[:, :, None] * self.W_dec[top_indices]).sum(1) + self.b_dec


def wrapped(module: nn.Module) -> convert.Wrapped:
    n_latents = N_LATENTS if isinstance(module, SparsifyLike) else None
    return convert.wrap(module, D_MODEL, n_latents=n_latents, k=K, normalize=normalize)


STUBS = pytest.mark.parametrize("stub", [SaeLensLike, DictionaryLike, SparsifyLike])


@STUBS
def test_wrapped_is_the_same_autoencoder(stub: type[nn.Module]) -> None:
    autoencoder = wrapped(stub())
    assert (autoencoder.config.n_latents, autoencoder.config.k) == (N_LATENTS, K)
    torch.testing.assert_close(autoencoder.weights.decoder, OURS.weights.decoder, atol=1e-5, rtol=0)
    torch.testing.assert_close(autoencoder.weights.pre_bias, OURS.weights.pre_bias)
    x = normalize(ROWS)[0]
    ours, theirs = OURS.encode(x), autoencoder.encode(x)
    torch.testing.assert_close(theirs.values, ours.values, atol=1e-5, rtol=1e-5)
    assert torch.equal(theirs.indices[ours.values > 0.01], ours.indices[ours.values > 0.01])
    torch.testing.assert_close(autoencoder(ROWS.view(9, 10, -1)), OURS(ROWS.view(9, 10, -1)), atol=1e-4, rtol=1e-4)


@STUBS
def test_our_evaluations_measure_it(stub: type[nn.Module]) -> None:
    numbers = []
    for autoencoder in (OURS, wrapped(stub())):
        tally = reconstruction.tally(autoencoder, [ROWS], CLUSTERS)
        found = reconstruction.metrics(tally, **OPTIONS)
        found += refinement.metrics(autoencoder, ROWS, CLUSTERS, **OPTIONS)
        found += latents.breakdown(autoencoder, ROWS, CLUSTERS, CLUSTERS, **OPTIONS)[0]
        found += latents.decoder_clustering(autoencoder, **OPTIONS)[0]
        numbers.append([m.value for m in found])
    assert numbers[1] == pytest.approx(numbers[0], rel=1e-3, abs=1e-4)


def test_without_normalize_it_reads_raw_activations() -> None:
    module = SaeLensLike(k=None)
    autoencoder = convert.wrap(module, D_MODEL)
    assert autoencoder.config.activation == "relu"
    with torch.no_grad():
        torch.testing.assert_close(autoencoder(ROWS), module.decode(module.encode(ROWS)), atol=1e-4, rtol=1e-4)


@STUBS
def test_encode_keeps_the_k_largest(stub: type[nn.Module]) -> None:
    x = normalize(ROWS)[0]
    latents = wrapped(stub()).encode(x, k=2)
    torch.testing.assert_close(latents.values, OURS.encode(x, k=2).values, atol=1e-5, rtol=1e-5)
    assert latents.indices.shape == (len(ROWS), 2)


class Opaque(SaeLensLike):
    """Scales what its encoder gives, so that nothing can be read off the parameters."""

    def encode(self, x: Tensor) -> Tensor:
        return 2 * super().encode(x)


@STUBS
def test_the_encoder_is_found_where_it_gives_the_activations(stub: type[nn.Module]) -> None:
    module = stub()
    if isinstance(module, SaeLensLike):
        module.b_enc.data += torch.linspace(-0.1, 0.1, N_LATENTS)
    else:
        module.encoder.bias.data += torch.linspace(-0.1, 0.1, N_LATENTS)  # type: ignore[operator, union-attr]
    autoencoder, x = wrapped(module), normalize(ROWS)[0]
    assert autoencoder.tells_pre_activations
    torch.testing.assert_close(autoencoder.weights.latent_bias, torch.linspace(-0.1, 0.1, N_LATENTS))
    torch.testing.assert_close(autoencoder.encode(x, k=K).values, autoencoder.encode(x).values, atol=1e-5, rtol=1e-5)
    assert (autoencoder.encode(x, k=2 * K).values > 0).sum() > (autoencoder.encode(x).values > 0).sum()
    assert not wrapped(Opaque()).tells_pre_activations


def test_what_needs_pre_activations_is_refused() -> None:
    x = normalize(ROWS)[0]
    for choice, message in (
        ({"k": K + 1}, "k is 5, but a wrapped Opaque gives only its own 4 latents"),
        ({"threshold": 0.5}, "does not tell its pre-activations, so it has no threshold; give k"),
        ({"k": 1, "threshold": 0.5}, "give one of them"),
        ({"k": 0}, "give a number of latents from 1 to 30"),
    ):
        with pytest.raises(ValueError, match=message):
            wrapped(Opaque()).encode(x, **choice)
    with pytest.raises(ValueError, match="gives only its own 4 latents"):
        progressive.metrics_on_activations(wrapped(Opaque()), ROWS, CLUSTERS, 0.5, **OPTIONS)


def test_relu_keeps_any_k() -> None:
    autoencoder = convert.wrap(SaeLensLike(k=None), D_MODEL)
    latents = autoencoder.encode(ROWS, k=N_LATENTS)
    assert torch.equal(latents.values, autoencoder.encode(ROWS).values)


def test_wrap_says_what_does_not_fit(tmp_path: Path) -> None:
    class Affine(SaeLensLike):
        def decode(self, z: Tensor) -> Tensor:
            return super().decode(z).square()

    class Signed(SaeLensLike):
        def encode(self, x: Tensor) -> Tensor:
            return (x - self.b_dec) @ self.W_enc

    class Pair(SaeLensLike):
        def encode(self, x: Tensor) -> Tensor:
            return (super().encode(x), x)  # type: ignore[return-value]

    class Normalising(SaeLensLike):
        cfg = SimpleNamespace(normalize_activations="layer_norm")

    for module, message in (
        (Normalising(), "takes back its normalize_activations=layer_norm; save it with SAELens"),
        (nn.Linear(2, 2), "Linear has no encode and decode"),
        (Affine(), "decode of Affine is not a weighted sum"),
        (Pair(), "encode of Pair gives tuple"),
        (SparsifyLike(), "give n_latents"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.wrap(module, D_MODEL)
    with pytest.raises(ValueError, match="encode of Signed gives negative activations"):
        convert.wrap(Signed(), D_MODEL).encode(ROWS)
    with pytest.raises(ValueError, match="cannot be saved"):
        wrapped(SaeLensLike()).save(tmp_path)


SITE = {"model": "gpt2", "revision": None, "layer": 3, "location": "resid_post_mlp"}


def known(activation: str = "topk") -> Autoencoder:
    extras = variants.initial_extras(activation, OURS.weights)
    return Autoencoder(AutoencoderConfig(D_MODEL, N_LATENTS, K, activation), OURS.weights, {"site": SITE}, extras)


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu", "gated"])
def test_exposed_encodes_and_decodes_raw_activations_as_ours(activation: str) -> None:
    autoencoder = known(activation)
    module = convert.expose(autoencoder)
    raw = ROWS.view(9, 10, -1)
    dense = module.encode(raw)
    latents = autoencoder.encode(normalize(ROWS)[0])
    assert dense.shape == (9, 10, N_LATENTS)
    assert torch.equal((dense > 0).sum(-1).flatten(), (latents.values > 0).sum(1))
    torch.testing.assert_close(dense.sum(-1).flatten(), latents.values.sum(1))
    torch.testing.assert_close(module.decode(dense), autoencoder(raw), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module(ROWS), autoencoder(ROWS), atol=1e-5, rtol=1e-5)


def test_exposed_is_what_an_evaluation_does_with_it() -> None:
    """In the order of SAEBench's core: settings completed, dtype chosen, latents of a batch, then weights."""
    module: Any = convert.expose(known(), model_name="other")
    cfg = module.cfg
    assert (cfg.model_name, cfg.hook_name, cfg.hook_layer) == ("other", "blocks.3.hook_resid_post", 3)
    cfg.architecture_str, cfg.metadata = cfg.architecture, object()
    assert json.loads(json.dumps(cfg.to_dict()))["d_sae"] == N_LATENTS and "metadata" not in cfg.to_dict()
    before = module(ROWS)
    module = module.to(device="cpu", dtype=torch.bfloat16)
    assert (module.device.type, module.dtype) == ("cpu", torch.bfloat16)
    assert module(ROWS.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(module(ROWS), before), "latents are computed in float32"
    assert module.W_enc.shape == module.W_dec.T.shape == (cfg.d_in, cfg.d_sae)
    assert (module.b_enc.shape, module.b_dec.shape) == ((cfg.d_sae,), (cfg.d_in,))
    torch.testing.assert_close(module.W_dec.float().norm(dim=1), torch.ones(N_LATENTS), atol=1e-2, rtol=0)
    assert torch.zeros(cfg.d_sae, device=module.device).shape == module.encode(ROWS[0][None])[0].shape


def test_exposed_decodes_only_what_it_encoded_last() -> None:
    module = convert.expose(known())
    with pytest.raises(
        ValueError, match=r"decode of tokens \(3,\), but encode last saw None; encode those tokens first"
    ):
        module.decode(torch.zeros(3, N_LATENTS))
    module.encode(ROWS)
    with pytest.raises(ValueError, match=r"decode of tokens \(3,\), but encode last saw \(90,\)"):
        module.decode(torch.zeros(3, N_LATENTS))


def test_expose_says_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="model_name does not follow from this autoencoder's provenance"):
        convert.expose(OURS)
    with pytest.raises(ValueError, match="hook_name does not follow"):
        convert.expose(OURS, model_name="gpt2")
    assert convert.expose(OURS, model_name="gpt2", hook_name="blocks.7.hook_mlp_out").cfg.hook_layer == 7


# The paper's own code, precision, and what a module does beside encode and decode


class TopKOfPaper(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        top = x.topk(self.k)
        return torch.zeros_like(x).scatter(-1, top.indices, top.values.relu())


class PaperLike(nn.Module):
    """openai/sparse_autoencoder's: LayerNorm inside, undone by `decode` with what `encode` gave, and not without."""

    def __init__(self, normalizes: bool = True, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.encoder, self.decoder = (
            nn.Linear(D_MODEL, N_LATENTS, bias=False),
            nn.Linear(N_LATENTS, D_MODEL, bias=False),
        )
        self.encoder.weight.data, self.decoder.weight.data = (
            OURS.weights.encoder.clone(),
            OURS.weights.decoder.T.clone(),
        )
        self.pre_bias = nn.Parameter(OURS.weights.pre_bias.clone())
        self.latent_bias = nn.Parameter(torch.linspace(-0.1, 0.1, N_LATENTS))
        self.activation = TopKOfPaper(K) if normalizes else nn.ReLU()
        self.normalizes, self.epsilon = normalizes, epsilon

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        info = {}
        if self.normalizes:
            mu = x.mean(-1, keepdim=True)
            std = (x - mu).std(-1, keepdim=True)
            x, info = (x - mu) / (std + self.epsilon), {"mu": mu, "std": std}
        return self.activation(self.encoder(x - self.pre_bias) + self.latent_bias), info

    def decode(self, latents: Tensor, info: dict[str, Tensor] | None = None) -> Tensor:
        recons = self.decoder(latents) + self.pre_bias
        if self.normalizes:
            assert info is not None
            recons = recons * info["std"] + info["mu"]
        return recons

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        latents, info = self.encode(x)
        return latents, latents, self.decode(latents, info)

    def saved(self) -> dict[str, Any]:
        state: dict[str, Any] = {**self.state_dict(), "stats_last_nonzero": torch.zeros(N_LATENTS)}
        if self.normalizes:
            return state | {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
        return state | {"activation": "ReLU"}


@pytest.mark.parametrize("size", [3.0, 1e-3])
@pytest.mark.parametrize("normalizes", [True, False])
def test_the_papers_own_module_and_its_state_dict(normalizes: bool, size: float) -> None:
    module, raw = PaperLike(normalizes), ROWS * size
    with torch.no_grad():
        z, info = module.encode(raw)
        expected = module.decode(z, info)
    for autoencoder in (convert.wrap(module, D_MODEL), convert.from_openai(module.saved())):
        assert autoencoder.config.k == (K if normalizes else N_LATENTS) and autoencoder.tells_pre_activations
        torch.testing.assert_close(autoencoder(raw), expected, atol=1e-5 * size, rtol=1e-4)
        latents = autoencoder.encode(autoencoder.normalize(raw)[0])
        dense = torch.zeros(len(raw), N_LATENTS).scatter_add(1, latents.indices.long(), latents.values)
        torch.testing.assert_close(dense, z, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(autoencoder.weights.latent_bias, torch.linspace(-0.1, 0.1, N_LATENTS))


def test_statistics_that_are_not_ours_are_refused() -> None:
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match=r"another reconstruction .* statistics of monosem\.model\.normalize"):
            convert.wrap(PaperLike(epsilon=0.5).to(dtype), D_MODEL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_choice_among_nearly_equal_latents_may_be_rounded_otherwise(dtype: torch.dtype) -> None:
    """Every latent has a near twin, so rounding decides which of the two is among the k."""
    module = PaperLike()
    half = N_LATENTS // 2
    module.encoder.weight.data[half:] = module.encoder.weight.data[:half] * (1 + 1e-4)
    module.latent_bias.data[:] = 0
    autoencoder = convert.wrap(module.to(dtype), D_MODEL)
    assert autoencoder.config.k == K and autoencoder.tells_pre_activations


def test_the_papers_module_is_judged_by_its_forward_too() -> None:
    class SkippingPaper(PaperLike):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            pre, latents, recons = super().forward(x)
            return pre, latents, recons + 0.2 * x

    for normalizes in (True, False):
        with pytest.raises(ValueError, match="forward of SkippingPaper gives another reconstruction"):
            convert.wrap(SkippingPaper(normalizes), D_MODEL)
    leaky = PaperLike()
    leaky.activation = nn.LeakyReLU()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="encode of PaperLike gives negative activations"):
        convert.wrap(leaky, D_MODEL)


def test_a_decoder_of_long_rows_is_read_within_float16() -> None:
    module = SaeLensLike()
    module.W_dec.data *= 20_000
    wrapped = convert.wrap(module.half(), D_MODEL, k=K)
    torch.testing.assert_close(wrapped.weights.decoder, module.W_dec.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stub", [SaeLensLike, DictionaryLike, SparsifyLike, PaperLike])
def test_a_module_is_judged_to_the_precision_of_its_dtype(stub: type[nn.Module], dtype: torch.dtype) -> None:
    module: Any = stub().to(dtype)
    pre_bias = module.pre_bias if isinstance(module, PaperLike) else module.b_dec
    pre_bias.data += 5  # large beside the decoder's rows
    n_latents = N_LATENTS if stub is SparsifyLike else None
    autoencoder = convert.wrap(module, D_MODEL, n_latents=n_latents, k=K)
    assert autoencoder.tells_pre_activations
    named = dict(module.named_parameters())
    decoder = named["W_dec"] if "W_dec" in named else named["decoder.weight"].T
    torch.testing.assert_close(autoencoder.weights.decoder, decoder.float(), atol=1e-5, rtol=0)
    torch.testing.assert_close(autoencoder.weights.pre_bias, pre_bias.float(), atol=1e-5, rtol=0)


class Skipping(SaeLensLike):
    """forward does more than decode of encode."""

    def __init__(self, skip: float) -> None:
        super().__init__()
        self.skip = skip

    def forward(self, x: Tensor) -> Any:
        assert not self.training, "judged as it is used"
        return SimpleNamespace(sae_out=self.decode(self.encode(x)) + self.skip * x)


def test_a_forward_that_does_more_is_refused_and_one_that_does_not_is_taken() -> None:
    module = Skipping(0.0)
    assert convert.wrap(module, D_MODEL, k=K).tells_pre_activations and module.training
    for skip in (0.1, 1.0):
        with pytest.raises(ValueError, match="forward of Skipping gives another reconstruction"):
            convert.wrap(Skipping(skip), D_MODEL, k=K)


@pytest.mark.parametrize(
    "settings",
    [
        {"transcode": True},
        {"skip_connection": True},
        {"finetuning_scaling_factor": True},
        {"normalize_activations": "expected_average_only_in"},
        {"reshape_activations": "hook_z"},
    ],
)
def test_settings_that_change_results_are_refused_by_name(settings: dict[str, Any]) -> None:
    module = SaeLensLike()
    module.cfg = SimpleNamespace(**settings)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=next(iter(settings))):
        convert.wrap(module, D_MODEL, k=K)
    module.cfg = settings  # type: ignore[assignment]
    with pytest.raises(ValueError, match=next(iter(settings))):
        convert.wrap(module, D_MODEL, k=K)
    module.cfg = SimpleNamespace(**dict.fromkeys(settings), normalize_decoder=True, multi_topk=True)  # type: ignore[assignment]
    convert.wrap(module, D_MODEL, k=K)


def test_a_state_dict_that_is_not_known_is_refused() -> None:
    state = PaperLike().saved()
    tied = {k: v for k, v in state.items() if k != "decoder.weight"} | {
        "decoder.linear.weight": state["encoder.weight"]
    }
    torch.testing.assert_close(convert.from_openai(tied).weights.decoder, OURS.weights.encoder)
    for change, told in (
        ({"activation": "Identity"}, "known are TopK"),
        ({"activation_state_dict": {"k": K, "postact_fn": "Identity"}}, "known are TopK"),
        ({"activation_state_dict": {"k": K, "groups": 2}}, "groups"),
        ({"activation_state_dict": {}}, "k = None"),
        ({"scale": torch.ones(1)}, "has .*scale"),
        ({"pre_bias": torch.full((D_MODEL,), torch.nan)}, "not finite"),
    ):
        with pytest.raises(ValueError, match=told):
            convert.from_openai(state | change)
