"""(a) The bound over K: between the ELBO and ln p(x), and how far from ln p(x)."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import elbo_ext

from .... import bounds
from ...vae import log_likelihood_of, seeded
from ..models import (
    SIGMAS,
    Check,
    Digits,
    Estimate,
    Finding,
    Size,
    data_of,
    estimate,
    evidence,
    linear_gaussian,
    log_weights,
    progress,
    repeated,
)


def chi_square(model: bounds.LinearGaussian, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Var_q[w] / p(x)^2 = integral p(z|x)^2 / q(z) dz - 1 of a diagonal q, in closed form; inf where it diverges.

    With M and P the precisions of the posterior and q, and d the difference of their means, the integral is
    |M| |P|^-1/2 |2 M - P|^-1/2 exp(1/2 d^T (P + P (2 M - P)^-1 P) d).
    """
    mean, covariance = model.posterior(x)
    precision = torch.linalg.inv(covariance)
    of_q = torch.diag_embed(torch.exp(-logvar))
    root, failed = torch.linalg.cholesky_ex(2 * precision - of_q)
    if bool(failed):
        return torch.full(mean.shape[:-1], torch.inf, dtype=mean.dtype, device=mean.device)
    scaled = (mean - mu) @ of_q
    exponent = ((mean - mu) * scaled).sum(-1) + (scaled * torch.cholesky_solve(scaled.mT, root).mT).sum(-1)
    half_log_det = root.diagonal().log().sum()
    return torch.expm1(precision.logdet() + logvar.sum() / 2 - half_log_det + exponent / 2)


def bound_over_counts(digits: Digits, size: Size, seed: int) -> Finding:
    """(a) ELBO <= IWAE(K) <= ln p(x): rising with K, short of ln p(x) by Var[w] / (2 K p(x)^2)."""
    x_of_vae = digits.test[: size.images]
    device = x_of_vae.device
    model = linear_gaussian(30, 5, seed, device)
    with seeded(device, seed + 1), torch.no_grad():
        x = data_of(model, 32)
        mu, logvar = model.best_diagonal(x)
        # Off the mean, and wide enough for weights of finite variance.
        mu, logvar = mu + 0.3 * torch.exp(0.5 * logvar), (logvar + 0.8).expand_as(mu)
        log_px, elbo = model.log_evidence(x).mean().item(), model.elbo(x, mu, logvar).mean().item()
        variation = chi_square(model, x, mu, logvar[0])
        iwae = partial(bounds.iwae, partial(model.log_likelihood, x))
        linear, gaps = [], []
        for count in progress(size.counts, "(a) linear Gaussian, over K"):
            values = repeated(iwae, mu, logvar, count, max(16, size.rows // (count * len(x))))
            linear.append(estimate(values))
            # exp(values - ln p(x)), the weights' mean over p(x), has the mean 1: a control variate of its logarithm.
            off = values - model.log_evidence(x)
            gaps.append(estimate(torch.expm1(off) - off))
        encoder = digits.model.encode(x_of_vae)
        likelihood = log_likelihood_of(digits.model, x_of_vae, elbo_ext)
        vae = [
            estimate(repeated(partial(bounds.iwae, likelihood), *encoder, count, max(8, size.largest_count // count)))
            for count in progress(size.counts, "(a) VAE, over K")
        ]
        vae_elbo = estimate(repeated(partial(bounds.sgvb_b, likelihood), *encoder, 1, size.evidence_samples // 8))
        vae_log_px = evidence(log_weights(likelihood, *encoder, 2 * size.evidence_samples))

    def curve(bound: list[Estimate], elbo: Estimate, log_px: Estimate) -> dict[str, Any]:
        return {
            "elbo": elbo.value,
            "elbo_error": elbo.error,
            "iwae": [entry.value for entry in bound],
            "iwae_error": [entry.error for entry in bound],
            "log_px": log_px.value,
            "log_px_error": log_px.error,
        }

    def sandwiched(model: str, bound: list[Estimate], elbo: Estimate, log_px: Estimate) -> Check:
        return Check(
            f"ELBO <= IWAE(K) <= ln p(x), rising with K: {model}",
            f"ELBO {elbo.value:.3f}, IWAE({size.largest_count}) {bound[-1].value:.3f}, ln p(x) {log_px.value:.3f}",
            (bound[0] - elbo).zero  # IWAE(1) is the ELBO
            and all((later - earlier).not_negative for earlier, later in pairwise(bound))
            and all((log_px - entry).not_negative for entry in bound)
            and (bound[-1] - bound[0]).value > 0,
        )

    exact = Estimate(elbo, 0.0), Estimate(log_px, 0.0)
    predicted = [(variation / (2 * count)).mean().item() for count in size.counts]
    last, relative = gaps[-1], Estimate(gaps[-1].value / predicted[-1], gaps[-1].error / predicted[-1])
    return Finding(
        {
            "count": size.counts,
            "linear_gaussian": {
                **curve(linear, *exact),
                "gap": [entry.value for entry in gaps],
                "gap_error": [entry.error for entry in gaps],
                "predicted_gap": predicted,
            },
            "vae": curve(vae, vae_elbo, vae_log_px),
        },
        {
            "bounds_in_order_linear_gaussian": sandwiched("linear Gaussian", linear, *exact),
            "bounds_in_order_vae": sandwiched("VAE", vae, vae_elbo, vae_log_px),
            "gap_of_iwae_as_predicted": Check(
                "ln p(x) - IWAE(K) is Var[w] / (2 K p(x)^2) for large K",
                f"K = {size.largest_count}: {last.value:.3e} +- {last.error:.0e}, predicted {predicted[-1]:.3e}",
                # The next order is smaller by another 1 / K.
                abs(relative.value - 1) <= 4 / size.largest_count + SIGMAS * relative.error,
            ),
        },
    )
