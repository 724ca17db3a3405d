"""A VAE of counts under three likelihoods with the same networks, and what is measured of it. All in nats."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import elbo_ext

from ... import bounds, likelihoods, reference
from ..vae import VAE, log_likelihood_of, seeded, train

LIKELIHOODS = {
    "poisson": "Poisson",
    "negative_binomial": "negative binomial",
    "zero_inflated_negative_binomial": "zero-inflated negative binomial",
}
"""Each is a special case of the next one: theta -> inf, and gates that are closed."""
_KINDS: dict[str, tuple[Callable[..., Any], str]] = {
    "poisson": (likelihoods.Poisson, "log_rate"),
    "negative_binomial": (likelihoods.NegativeBinomial, "log_mean"),
    "zero_inflated_negative_binomial": (likelihoods.ZeroInflatedNegativeBinomial, "log_mean"),
}
"""The class of each, and the form in which the decoder gives its mean."""
MEASUREMENTS = 30
"""So many times during a training, at most, the bound is measured on held-out examples."""
ROWS = 8192
"""So many rows at once go through a decoder."""


class CountVAE(VAE):
    """VAE of counts x [B, D]: the networks see ln(1 + x) and give the logarithm of the mean, [..., D].

    theta and the gate's probability are learned, one number for each feature: `of_features` has log_theta and gate_logits,
    [D] each, where the likelihood has them.
    """

    log_mean: Tensor

    def __init__(self, train: Tensor, hidden: int, latent: int, likelihood: str) -> None:
        super().__init__(torch.log1p(train), hidden, latent, likelihood)
        self.latent = latent
        self.register_buffer("log_mean", torch.log(train.mean(dim=0) + 1 / len(train)))
        self.of_features = nn.ParameterDict()
        if likelihood != "poisson":
            self.of_features["log_theta"] = nn.Parameter(torch.zeros(train.shape[1]))
        if likelihood == "zero_inflated_negative_binomial":
            self.of_features["gate_logits"] = nn.Parameter(torch.full((train.shape[1],), -3.0))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, D] -> mu, logvar [B, L] of q(z|x)."""
        return super().encode(torch.log1p(x))

    def decode(self, z: Tensor) -> Tensor:
        """z [..., L] -> logarithms of the means [..., D], before the gates."""
        return self.log_mean + super().decode(z)

    def pixels(self, z: Tensor) -> Tensor:
        """z [..., L] -> E[x|z] [..., D]."""
        mean = self.decode(z).exp()
        return mean * torch.sigmoid(-self.of_features["gate_logits"]) if "gate_logits" in self.of_features else mean

    def likelihood_options(self) -> dict[str, Any]:
        """The keyword arguments of `elbo_loss` that describe p(x|z)."""
        kind, recon = _KINDS[self.likelihood]
        return {"likelihood": kind(recon=recon, **self.of_features)}

    def likelihood_parameters(self) -> list[nn.Parameter]:
        """log_theta and gate_logits, where the likelihood has them."""
        return list(self.of_features.values())


@torch.no_grad()
def bounds_of(model: VAE, x: Tensor, ops: Any = elbo_ext, **draws: Any) -> Tensor:
    """ELBO and importance-weighted bound of each example of x [B, D], from the same K draws: [2, B] in float64.

    With w_k = p(x, z_k) / q(z_k|x) these are the mean of ln w_k and the logarithm of the mean of w_k. `ops`: the package,
    or its reference; draws: num_samples, generator and noise of `rsample_with_log_prob`.
    """
    z, log_q, log_p = ops.rsample_with_log_prob(*model.encode(x), **draws)
    log_weights = (log_likelihood_of(model, x, ops)(z) + log_p - log_q).double()
    return torch.stack((log_weights.mean(dim=0), bounds.iwae_bound(log_weights)))


def held_out_bounds(model: VAE, x: Tensor, *, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same for any number of examples x [N, D], with draws that depend on `seed`: ([N], [N])."""
    generator = torch.Generator(device=x.device).manual_seed(seed)
    blocks = x.split(max(1, ROWS // num_samples))
    parts = [bounds_of(model, block, num_samples=num_samples, generator=generator) for block in blocks]
    elbo, bound = torch.cat(parts, dim=1)
    return elbo, bound


def reference_difference(model: CountVAE, x: Tensor, *, num_samples: int, seed: int) -> float:
    """Largest |difference| / max(|bound|, 1 nat) between kernels and the reference in float64, for x [N, D]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_samples, len(x), model.latent, generator=generator).to(x.device)
    kernels = bounds_of(model, x, num_samples=num_samples, noise=noise)
    exact = bounds_of(
        copy.deepcopy(model).double(), x.double(), reference, num_samples=num_samples, noise=noise.double()
    )
    return ((kernels - exact).abs() / exact.abs().clamp(min=1)).max().item()


@torch.no_grad()
def zeros_of(model: CountVAE, *, num_samples: int, seed: int) -> Tensor:
    """P(x_j = 0) of each feature, averaged over draws of z from the prior: [D]."""
    device, features = model.log_mean.device, len(model.log_mean)
    generator = torch.Generator(device=device).manual_seed(seed)
    total = torch.zeros(features, dtype=torch.float64, device=device)
    for block in torch.randn(num_samples, model.latent, generator=generator, device=device).split(ROWS):
        nothing = block.new_zeros((len(block), features))
        # Every element is an example here.
        log_prob = elbo_ext.elbo_loss(
            model.decode(block), nothing, kl=0.0, batch_dims=2, reduction="none", **model.likelihood_options()
        ).log_likelihood
        total += log_prob.double().exp().sum(dim=0)
    return total / num_samples


@dataclasses.dataclass
class Fitted:
    """A trained model as it was at its best epoch on the validation examples, and the bounds on its way.

    curve: a record per measurement, with epoch, validation and test, the means of the bound.
    """

    model: CountVAE
    epoch: int
    curve: list[dict[str, float]]
    seconds: float


def fit(
    likelihood: str,
    train_data: Tensor,
    validation: Tensor,
    test: Tensor,
    *,
    hidden: int,
    latent: int,
    epochs: int,
    num_samples: int,
    seed: int,
    **options: Any,
) -> Fitted:
    """Train, and keep the epoch whose bound is the best on `validation` [N, D]; `test` only is watched.

    num_samples: K of the bounds; options: batch_size and learning_rate. The same seed gives every likelihood the same
    first weights of the networks, the same batches and the same noise.
    """
    device = train_data.device
    with seeded(device, seed):
        model = CountVAE(train_data.cpu(), hidden, latent, likelihood).to(device)
    curve: list[dict[str, float]] = []
    best, state, chosen = -math.inf, model.state_dict(), 0
    every = -(-epochs // MEASUREMENTS)

    def measure(record: dict[str, float]) -> None:
        nonlocal best, state, chosen
        epoch = int(record["epoch"])
        if epoch % every and epoch != epochs:
            return
        bound = {
            name: held_out_bounds(model, data, num_samples=num_samples, seed=seed)[1].mean().item()
            for name, data in (("validation", validation), ("test", test))
        }
        curve.append({"epoch": epoch, **bound})
        if bound["validation"] > best:
            best, state, chosen = bound["validation"], copy.deepcopy(model.state_dict()), epoch

    label = f"{LIKELIHOODS[likelihood]:<31}"
    history = train(model, train_data, elbo_ext, epochs=epochs, seed=seed, after_epoch=measure, label=label, **options)
    model.load_state_dict(state)
    return Fitted(model, chosen, curve, history.seconds)
