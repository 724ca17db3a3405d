"""The networks of whole training steps: scVI's, a Bayesian network of bayesian-torch's layers, the demo's VAE.

`shipped` is the forward pass as its library has it; `fused` the same with the functions of `ops` in the place of sample,
KL and likelihood, where `ops` is elbo_ext, or elbo_ext.reference with the noise of a step that is checked.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elbo_ext
from elbo_ext import reference
from elbo_ext.demo import vae

from . import first_line
from .contenders import SHIPPED

EXTRA = "bench-steps"
SCVI_HIDDEN = 128


class Result(NamedTuple):
    """Of a forward pass: the loss, and its samples in the order they were drawn, or the noise that they were made of."""

    loss: Tensor
    samples: Sequence[Tensor] = ()
    noise: Sequence[Tensor] = ()


class Replay:
    """The reference's functions, with the noise of a step that was made before; `noise` is what they were given."""

    def __init__(self, result: Result) -> None:
        self._given = iter(result.noise or result.samples)
        self._is_noise = bool(result.noise)
        self.noise: list[Tensor] = []

    def rsample_kl(self, mu: Tensor, logvar: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        given = next(self._given).detach().to(mu.dtype)
        if not self._is_noise:  # read off the sample
            scale = {name: value for name, value in options.items() if name in ("rho", "min_var")}
            with torch.no_grad():
                std = reference.rsample(torch.zeros_like(mu), logvar, noise=torch.ones_like(mu), **scale)
                given = (given - mu) / std
        self.noise.append(given)
        result: tuple[Tensor, Tensor] = reference.rsample_kl(mu, logvar, noise=given, **options)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)


class Model(ABC):
    """A network with the batch that it is trained on."""

    module: nn.Module
    x: Tensor

    def forward(self, contender: str) -> Callable[[], Result]:
        """The forward pass of a contender that has a loss."""
        if contender == "ours":
            return partial(self.fused, elbo_ext)
        return self.shipped if contender == SHIPPED else self.compiled()

    @abstractmethod
    def shipped(self) -> Result: ...

    @abstractmethod
    def compiled(self) -> Callable[[], Result]:
        """`shipped` with its loss alone under torch.compile."""

    @abstractmethod
    def fused(self, ops: Any) -> Result: ...

    @abstractmethod
    def outputs(self) -> list[Tensor]:
        """What a loss is computed from, without a sample; all parameters that `fused` learns get their gradient from
        these."""

    def double(self) -> Model:
        """A copy in float64."""
        model = copy.deepcopy(self)
        model.module.double()
        model.x = model.x.double()
        return model

    def leaves(self) -> list[Tensor]:
        return list(self.module.parameters())

    def drop_gradients(self) -> None:
        for leaf in self.leaves():
            leaf.grad = None

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in [*self.leaves(), self.x])


class ScVI(Model):
    """scvi.module.VAE, dispersion by gene, one batch, the library size observed: what scvi.model.SCVI trains."""

    def __init__(self, case: Any, device: torch.device) -> None:
        from scvi.module import VAE

        genes = case.data[1]
        self.likelihood = case.likelihood
        self.module = VAE(genes, n_batch=1, gene_likelihood=case.likelihood, n_hidden=SCVI_HIDDEN).to(device)
        self.x = counts(case.data, device)
        self.index = torch.zeros(len(self.x), 1, dtype=torch.long, device=device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"X": self.x, "batch": self.index, "labels": self.index}

    def shipped(self) -> Result:
        inferred, _, losses = self.module(self.tensors)
        return Result(losses.loss, [inferred["z"]])

    def compiled(self) -> Callable[[], Result]:
        from scvi.distributions._negative_binomial import log_nb_positive, log_zinb_positive
        from torch.distributions import Normal
        from torch.distributions.kl import _kl_normal_normal  # kl_divergence looks it up, which cannot be compiled

        def formulas(x: Tensor, mean: Tensor, theta: Tensor, gate: Tensor | None, mu: Tensor, std: Tensor) -> Tensor:
            if gate is None:
                log_prob = log_nb_positive(x, mean, theta)
            else:
                log_prob = log_zinb_positive(x, mean, theta, gate)
            posterior = Normal(mu, std, validate_args=False)
            prior = Normal(torch.zeros_like(mu), torch.ones_like(std), validate_args=False)
            return torch.mean(-log_prob.sum(-1) + _kl_normal_normal(posterior, prior).sum(dim=-1))

        compiled = torch.compile(formulas, fullgraph=True, dynamic=False)

        def forward() -> Result:
            inferred, generated = self.module(self.tensors, compute_loss=False)
            px, qz = generated["px"], inferred["qz"]
            gate = px.zi_logits if self.likelihood == "zinb" else None
            return Result(compiled(self.x, px.mu, px.theta, gate, qz.loc, qz.scale), [inferred["z"]])

        return forward

    def encode(self) -> tuple[Tensor, Tensor]:
        encoder = self.module.z_encoder
        hidden = encoder.encoder(torch.log1p(self.x), self.index)
        return encoder.mean_encoder(hidden), encoder.var_encoder(hidden)

    def decode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        library = torch.log(self.x.sum(1)).unsqueeze(1)
        _, _, mean, gate = self.module.decoder(self.module.dispersion, z, library, self.index, self.index)
        return mean, gate

    def fused(self, ops: Any) -> Result:
        mu, logvar = self.encode()
        z, kl = ops.rsample_kl(mu, logvar, min_var=self.module.z_encoder.var_eps)
        mean, gate = self.decode(z)
        counted = {"log_theta": self.module.px_r, "reduction": "mean"}
        if self.likelihood == "zinb":
            log_prob = ops.zero_inflated_negative_binomial_log_prob(self.x, mean, gate_logits=gate, **counted)
        else:
            log_prob = ops.negative_binomial_log_prob(self.x, mean, **counted)
        return Result(kl.mean() - log_prob, [z])

    def outputs(self) -> list[Tensor]:
        mu, logvar = self.encode()
        mean, gate = self.decode(mu)
        return [mean, *([gate] if self.likelihood == "zinb" else []), self.module.px_r, mu, logvar]


class Bayesian(Model):
    """Three layers of bayesian-torch, ten classes; the loss of its README: cross entropy + KL / batch, where the KL of a
    layer is the mean over its weights and the mean over its biases."""

    def __init__(self, case: Any, device: torch.device) -> None:
        from bayesian_torch.layers import LinearReparameterization

        widths = (case.data[1], case.hidden, case.hidden, 10)
        layers = [LinearReparameterization(m, n) for m, n in itertools.pairwise(widths)]
        self.module = nn.ModuleList(layers).to(device)
        self.x = torch.rand(case.data, device=device)
        self.y = torch.randint(10, (len(self.x),), device=device)

    def shipped(self) -> Result:
        out, kl = self.x, 0.0
        for layer in self.module:
            out, kl_of_layer = layer(out if layer is self.module[0] else out.relu())
            kl = kl + kl_of_layer
        noise = [eps for layer in self.module for eps in (layer.eps_weight, layer.eps_bias)]
        return Result(F.cross_entropy(out, self.y) + kl / len(self.x), noise=noise)

    def compiled(self) -> Callable[[], Result]:
        kl_div = self.module[0].kl_div

        def sample(mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> tuple[Tensor, Tensor]:
            sigma = torch.log1p(torch.exp(rho))
            return mu + sigma * torch.randn_like(sigma), kl_div(mu, sigma, prior_mu, prior_sigma)

        def loss(logits: Tensor, y: Tensor, kls: list[Tensor]) -> Tensor:
            return F.cross_entropy(logits, y) + sum(kls) / len(y)

        sample, loss = (torch.compile(part, fullgraph=True, dynamic=False) for part in (sample, loss))

        def forward() -> Result:
            def draw(layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
                parts = (f"mu_{name}", f"rho_{name}", f"prior_{name}_mu", f"prior_{name}_sigma")
                return sample(*(getattr(layer, part) for part in parts))

            logits, samples, kls = self._forward(draw)
            return Result(loss(logits, self.y, kls), samples)

        return forward

    def fused(self, ops: Any) -> Result:
        def draw(layer: nn.Module, name: str) -> tuple[Tensor, Tensor]:
            mu, rho = getattr(layer, f"mu_{name}"), getattr(layer, f"rho_{name}")
            prior = {"prior_mu": float(layer.prior_mean), "prior_std": float(layer.prior_variance)}
            z, kl = ops.rsample_kl(mu, rho=rho, **prior, reduction="sum")
            return z, kl / mu.numel()

        logits, samples, kls = self._forward(draw)
        return Result(F.cross_entropy(logits, self.y) + sum(kls) / len(self.x), samples)

    def _forward(
        self, draw: Callable[[nn.Module, str], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The network with weights that are drawn elsewhere: logits, samples, KLs."""
        out, samples, kls = self.x, [], []
        for layer in self.module:
            (weight, kl), (bias, kl_bias) = draw(layer, "weight"), draw(layer, "bias")
            out = F.linear(out if layer is self.module[0] else out.relu(), weight, bias)
            samples += [weight, bias]
            kls += [kl, kl_bias]
        return out, samples, kls

    def outputs(self) -> list[Tensor]:
        logits, _, _ = self._forward(lambda layer, name: (getattr(layer, f"mu_{name}"), torch.zeros(())))
        return [logits, *(rho for layer in self.module for rho in (layer.rho_weight, layer.rho_bias))]


class DemoVAE(Model):
    """The demo's VAE and its step; what ships is written by hand, its `EAGER`."""

    module: vae.VAE

    def __init__(self, case: Any, device: torch.device) -> None:
        self.x = torch.rand(case.data, device=device)
        self.module = vae.VAE(self.x, case.hidden, case.latent[1], case.likelihood).to(device)

    def shipped(self) -> Result:
        return self.fused(vae.EAGER)

    def compiled(self) -> Callable[[], Result]:
        def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, fullgraph=True, dynamic=False)

        return partial(self.fused, SimpleNamespace(**{name: compiled(f) for name, f in vars(vae.EAGER).items()}))

    def fused(self, ops: Any) -> Result:
        samples: list[Tensor] = []

        def rsample_kl(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
            z, kl = ops.rsample_kl(mu, logvar)
            samples.append(z)
            return z, kl

        seen = SimpleNamespace(rsample_kl=rsample_kl, elbo_loss=ops.elbo_loss)
        return Result(vae.elbo(self.module, self.x, seen).loss, samples)

    def outputs(self) -> list[Tensor]:
        mu, logvar = self.module.encode(self.x)
        learned = [self.module.recon_logvar] if self.module.likelihood == "gaussian" else []
        return [self.module.decode(mu), *learned, mu, logvar]


MODELS: dict[str, type[Model]] = {"scvi": ScVI, "bnn": Bayesian, "vae": DemoVAE}
NEEDS = {"scvi": ("scvi.module", "scvi-tools"), "bnn": ("bayesian_torch.layers", "bayesian-torch")}
"""What is imported for a model, and the package that has it."""


@cache
def missing(model: str) -> str | None:
    """Why a model cannot be made here, or None."""
    if model not in NEEDS:
        return None
    module, package = NEEDS[model]
    try:
        importlib.import_module(module)
    except Exception as error:  # such as torchvision's for another build of torch
        if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
            return f"needs {package}, which is not installed: pip install 'elbo_ext[{EXTRA}]'"
        return f"{package} cannot be imported: {first_line(error)}"
    return None


def make(case: Any, device: torch.device, seed: int = 0) -> Model:
    """A network as it is initialized, with data; the caller's random state stays as it is."""
    with vae.seeded(device, seed):
        return MODELS[case.model](case, device)


def counts(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Counts of cells by genes as a sequencer gives them, some 80 % of them zero: the genes' means are log-normal, the
    counts negative binomial with theta = 1."""
    means = torch.exp(1.6 * torch.randn(shape[1], device=device) - 2.2)
    rates = means * torch.empty(shape, device=device).exponential_()  # a gamma of shape 1
    return torch.poisson(rates)
