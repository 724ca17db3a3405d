"""torch.jit.trace, both exporters of torch.onnx.export, and torch.fx.symbolic_trace: the formulas in torch operations, with
the kernels' values, and samples that are drawn anew by every call of the traced program."""

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elbo_ext
from elbo_ext import ELBO, ELBOLoss, bounds, likelihoods
from elbo_ext.likelihoods import LIKELIHOODS
from samples.registry import arguments_of, function_of


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """That a size became a constant would be wrong for another batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.(trace|script|save|load).*", DeprecationWarning)
        warnings.simplefilter("error", torch.jit.TracerWarning)
        yield


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int) -> dict[str, Tensor]:
    return {
        "x": numbers(batch, 3, seed=1).sigmoid(),
        "mu": numbers(batch, 3, seed=2),
        "std": numbers(batch, 3, seed=3).exp(),
        "kl": numbers(batch, seed=4).abs(),
        "mask": numbers(batch, 3, seed=5) > 0,
        "noise": numbers(batch, 3, seed=6),
    }


SCALE = torch.tensor([0.5, 1.0, 2.0])
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{
        f"likelihood-{name}": lambda x, mu, std, kl, mask, noise, likelihood=likelihood: function_of(likelihood)(
            **arguments_of(likelihood, x=x, counts=(5 * x).ceil(), real=mu, positive=std))
        for name, likelihood in LIKELIHOODS.items()
    },
    "gaussian": lambda x, mu, std, kl, mask, noise: elbo_ext.gaussian_log_prob(x, mu, std=SCALE, weight=mask),
    "laplace": lambda x, mu, std, kl, mask, noise: elbo_ext.laplace_log_prob(x, mu, scale=std, reduction="mean"),
    "bernoulli": lambda x, mu, std, kl, mask, noise: elbo_ext.bernoulli_log_prob(x, mu, batch_dims=0),
    "kl": lambda x, mu, std, kl, mask, noise: elbo_ext.gaussian_kl(mu, std=std, prior_mu=x, prior_var=SCALE),
    "kl-rho": lambda x, mu, std, kl, mask, noise: elbo_ext.gaussian_kl(mu, rho=mu, prior_rho=SCALE),
    "kl-floors": lambda x, mu, std, kl, mask, noise: elbo_ext.gaussian_kl(
        mu, std=std, min_std=0.1, prior_rho=SCALE, prior_min_var=0.1),
    "bins-rho": lambda x, mu, std, kl, mask, noise: elbo_ext.discretized_gaussian_log_prob(x, mu, rho=std, min_var=0.1),
    "elements": lambda x, mu, std, kl, mask, noise: elbo_ext.gaussian_kl(mu, std=std, batch_dims=2),
    "categorical": lambda x, mu, std, kl, mask, noise: elbo_ext.categorical_log_prob(
        mask.sum(1) % 3, mu, weight=kl, reduction="mean"),
    "multinomial": lambda x, mu, std, kl, mask, noise: elbo_ext.multinomial_log_prob(mask, mu),
    "categorical_kl": lambda x, mu, std, kl, mask, noise: elbo_ext.categorical_kl(mu, x, unimix=0.01, weight=kl),
    "categorical_sample": lambda x, mu, std, kl, mask, noise: elbo_ext.categorical_rsample_kl(mu, x, noise=noise),
    "rsample": lambda x, mu, std, kl, mask, noise: elbo_ext.rsample(mu, std=SCALE, noise=noise),
    "rsample_kl-floor": lambda x, mu, std, kl, mask, noise: elbo_ext.rsample_kl(mu, rho=std, noise=noise, min_std=0.1),
    "rsample_kl": lambda x, mu, std, kl, mask, noise: elbo_ext.rsample_kl(mu, std=std, noise=noise, kl_weight=mask),
    **{
        f"log_prob-{gradient}": lambda x, mu, std, kl, mask, noise, gradient=gradient: elbo_ext.rsample_with_log_prob(
            mu, std=std, prior_mu=SCALE, noise=noise, gradient=gradient)
        for gradient in ("pathwise", "sticking_the_landing", "score")
    },
    "elbo-kl": lambda x, mu, std, kl, mask, noise: elbo_ext.elbo_loss(mu, x, kl=kl, recon_std=SCALE, weight=mask),
    "elbo-mu": lambda x, mu, std, kl, mask, noise: elbo_ext.elbo_loss(
        mu, x, mu=mu, std=std, kl_weight=mask, beta=0.5, reduction="none"),
    "elbo-samples": lambda x, mu, std, kl, mask, noise: elbo_ext.elbo_loss(
        torch.stack([mu, std]), x, mu=mu, std=std, likelihood="bernoulli", batch_dims=2, reduction="none"),
    "elbo-object": lambda x, mu, std, kl, mask, noise: elbo_ext.elbo_loss(
        mu, x, kl=0.0, likelihood=likelihoods.Laplace(scale=std), reduction="sum"),
    "elbo-computed": lambda x, mu, std, kl, mask, noise: elbo_ext.elbo_loss(log_likelihood=-kl, kl=kl),
    "free_bits": lambda x, mu, std, kl, mask, noise: bounds.free_bits(kl, 0.3, per="example"),
    "capacity": lambda x, mu, std, kl, mask, noise: bounds.capacity(kl, 0.3, per="batch"),
    "iwae_bound": lambda x, mu, std, kl, mask, noise: bounds.iwae_bound(torch.stack([kl, -kl])),
    "iwae": lambda x, mu, std, kl, mask, noise: bounds.iwae(
        lambda z: elbo_ext.gaussian_log_prob(x, z, batch_dims=2), mu, std=std, num_samples=2,
        noise=torch.stack([noise, -noise])),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients(name: str) -> None:
    """Traced with one batch, called with another, also after it was saved."""
    function = FUNCTIONS[name]

    def flat(*values: Tensor) -> Any:
        result = function(*values)
        return tuple(result) if isinstance(result, tuple) else result

    traced = torch.jit.trace(flat, tuple(inputs(4).values()), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for program in (traced, torch.jit.load(file)):
        for batch in (4, 2):
            results = []
            for called in (program, flat):
                leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs(batch).values()]
                values = called(*leaves)
                values = list(values) if isinstance(values, tuple) else [values]
                total = sum(t.sum() * (i + 1) for i, t in enumerate(values))
                gradients = torch.autograd.grad(total, [t for t in leaves if t.requires_grad], allow_unused=True)
                results.append((values, [g for g in gradients if g is not None and bool(g.any())]))
            torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


class VAE(nn.Module):
    def __init__(self, num_samples: int | None = None, likelihood: str = "bernoulli") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)
        self.num_samples = num_samples
        self.loss = ELBOLoss(likelihood, reduction="none", batch_dims=1 if num_samples is None else 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        mu, logvar = self.encoder(x).chunk(2, 1)
        z, kl = elbo_ext.rsample_kl(mu, logvar, num_samples=self.num_samples)
        return z, *self.loss(self.decoder(z), x, kl=kl)


def assert_is_right(vae: VAE, x: Tensor, program: Callable[[Tensor], Any]) -> None:
    """Its loss is that of its own draw, and the draws differ and are standard normal."""
    z, loss, log_likelihood, kl = program(x)
    again = program(x)[0]
    assert z.shape == again.shape and not bool((z == again).any())
    mu, logvar = vae.encoder(x).chunk(2, 1)
    expected = vae.loss(vae.decoder(z), x, mu, logvar)
    torch.testing.assert_close((loss, log_likelihood, kl), tuple(expected), rtol=1e-5, atol=1e-5)
    noise = ((z - mu) / (logvar / 2).exp()).detach()
    assert abs(float(noise.mean())) < 6 / noise.numel() ** 0.5
    assert abs(float(noise.square().mean()) - 1) < 6 * (2 / noise.numel()) ** 0.5


@pytest.mark.parametrize("num_samples", [None, 3])
def test_jit_trace(num_samples: int | None) -> None:
    vae = VAE(num_samples)
    traced = torch.jit.trace(vae, torch.rand(5, 6), check_trace=False)
    assert_is_right(vae, torch.rand(1000, 6), traced)
    x = torch.rand(7, 6)
    traced(x)[1].sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vae.parameters())


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "laplace"])
@pytest.mark.parametrize("num_samples", [None, 3])
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
def test_onnx(dynamo: bool, num_samples: int | None, likelihood: str) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    vae, file = VAE(num_samples, likelihood).eval(), io.BytesIO()
    names: dict[str, Any] = {"input_names": ["x"], "output_names": ["z", "loss", "log_likelihood", "kl"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the exporters themselves will do away with
        if dynamo:
            torch.onnx.export(
                vae, (torch.rand(5, 6),), file, dynamo=True, dynamic_shapes=({0: torch.export.Dim("b")},), **names
            )
        else:
            axes = {"x": {0: "b"}}
            torch.onnx.export(vae, (torch.rand(5, 6),), file, dynamo=False, dynamic_axes=axes, **names)
    session = runtime.InferenceSession(file.getvalue())
    assert_is_right(vae, torch.rand(1000, 6), lambda x: [torch.tensor(t) for t in session.run(None, {"x": x.numpy()})])


def test_export_keeps_the_kernels() -> None:
    """torch.export alone translates our operators, and keeps them."""
    program = torch.export.export(VAE(), (torch.rand(5, 6),), strict=False)
    assert "elbo_ext.latent" in str(program.graph)


def test_fx() -> None:
    vae = VAE()

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = vae.encoder, vae.decoder

        def forward(self, x: Tensor) -> ELBO:
            mu, logvar = self.encoder(x).chunk(2, 1)
            z, kl = elbo_ext.rsample_kl(mu, logvar)
            return elbo_ext.elbo_loss(self.decoder(z), x, kl=kl, likelihood="bernoulli")

    graph = torch.fx.symbolic_trace(Plain())
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert elbo_ext.rsample_kl in called and elbo_ext.elbo_loss in called
    results = []
    for program in (graph, Plain()):
        torch.manual_seed(7)
        results.append(program(torch.ones(3, 6)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(
    "likelihood",
    [
        likelihoods.Laplace,
        likelihoods.Laplace(scale=0.5),
        likelihoods.NegativeBinomial(theta=torch.full((3,), 2.0), recon="log_mean"),
    ],
    ids=str,
)
def test_fx_with_an_object(likelihood: Any) -> None:
    """Also where its parameters are the module's."""
    x, recon = inputs(5)["mask"].float(), inputs(5)["mu"]
    expected = elbo_ext.elbo_loss(recon, x, kl=0.5, likelihood=likelihood).loss

    def function(recon: Tensor, x: Tensor) -> Tensor:
        return elbo_ext.elbo_loss(recon, x, kl=0.5, likelihood=likelihood).loss

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = ELBOLoss(likelihood)

        def forward(self, recon: Tensor, x: Tensor) -> Tensor:
            return self.loss(recon, x, kl=0.5).loss

    for program in (function, Module()):
        assert torch.equal(torch.fx.symbolic_trace(program)(recon, x), expected)


def test_other_gradients_in_a_trace_that_is_saved() -> None:
    def kl(mu: Tensor) -> Tensor:
        return bounds.balanced_kl(mu, 0.0, posterior_weight=0.25, prior_weight=0.75)

    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(kl, (torch.rand(6, 4),)), file)
    file.seek(0)
    mu = torch.rand(3, 4, requires_grad=True)
    value = torch.jit.load(file)(mu)
    torch.testing.assert_close(value, mu.square().sum(1) / 2)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), mu)[0], 0.25 * mu)


def test_a_generator_in_a_trace() -> None:
    generator = torch.Generator()

    def sample(mu: Tensor) -> Tensor:
        return elbo_ext.rsample(mu, std=2.0, generator=generator)

    traced = torch.jit.trace(sample, (torch.rand(6, 4),), check_trace=False)
    mu = torch.rand(3000, 4)
    z = traced(mu)
    assert z.shape == mu.shape and abs(float(((z - mu) / 2).square().mean()) - 1) < 6 * (2 / z.numel()) ** 0.5
    assert not bool((traced(mu) == z).any())
