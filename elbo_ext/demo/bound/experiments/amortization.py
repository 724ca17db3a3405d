"""(d) The amortization gap: how much of ln p(x) - ELBO is the encoder's, and how much is the family's."""

from __future__ import annotations

from functools import partial

import torch

import elbo_ext

from .... import bounds, diagnostics
from ...vae import log_likelihood_of, seeded
from ..models import Check, Digits, Finding, Size, estimate, evidence, log_weights, progress, repeated


def amortization(digits: Digits, size: Size, seed: int) -> Finding:
    """(d) ln p(x) - ELBO = approximation gap + amortization gap, on training and on test images."""
    numbers, checks = {}, {}
    parts = {"train": digits.train[: size.images], "test": digits.test[: size.images]}
    for name, x in progress(tuple(parts.items()), "(d) amortization gap"):
        likelihood = log_likelihood_of(digits.model, x, elbo_ext)
        with torch.no_grad():
            encoder = digits.model.encode(x)
        with seeded(x.device, seed + 1):
            best = diagnostics.amortization_gap(
                partial(bounds.sgvb_b, likelihood, num_samples=16), *encoder, steps=size.steps, learning_rate=0.02
            )
            elbos = [
                estimate(repeated(partial(bounds.sgvb_b, likelihood), mu, logvar, 1, size.evidence_samples))
                for mu, logvar in (encoder, (best.mu, best.logvar))
            ]
            evidences = [
                evidence(log_weights(likelihood, mu, logvar, 2 * size.evidence_samples))
                for mu, logvar in (encoder, (best.mu, best.logvar))
            ]
        amortized, refined = elbos
        log_px = evidences[1]  # the refined q is closer to the posterior: weights of less variance
        amortization, approximation = refined - amortized, log_px - refined
        differing = evidences[0] - evidences[1]
        numbers[name] = {
            "elbo_amortized": amortized.value,
            "elbo_amortized_error": amortized.error,
            "elbo_refined": refined.value,
            "elbo_refined_error": refined.error,
            "log_px": log_px.value,
            "log_px_error": log_px.error,
            "log_px_by_the_encoder": evidences[0].value,
            "log_px_by_the_encoder_error": evidences[0].error,
            "amortization_gap": amortization.value,
            "amortization_gap_error": amortization.error,
            "amortization_gap_of_diagnostics": best.gap.mean().item(),
            "approximation_gap": approximation.value,
            "approximation_gap_error": approximation.error,
        }
        checks[f"gaps_{name}"] = Check(
            f"ELBO <= ELBO of the refined q <= ln p(x), {name} images",
            f"amortization gap {amortization.value:.3f} +- {amortization.error:.3f}, "
            f"approximation gap {approximation.value:.3f} +- {approximation.error:.3f}",
            amortization.value > 0 and approximation.not_negative,
        )
        checks[f"evidence_{name}"] = Check(
            f"ln p(x) does not depend on the q that estimates it, {name} images",
            f"by the encoder's q {evidences[0].value:.3f}, by the refined {evidences[1].value:.3f}",
            differing.zero,
        )
    return Finding(numbers, checks)
