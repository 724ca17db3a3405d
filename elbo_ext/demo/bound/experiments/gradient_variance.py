"""(b) The gradient's variance: which estimators are noisier, where they have none, and the signal-to-noise ratio over K."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .... import bounds
from ...vae import seeded
from ..models import (
    ROWS,
    SIGMAS,
    ZERO_VARIANCE,
    Check,
    Estimate,
    Finding,
    Size,
    data_of,
    estimate,
    linear_gaussian,
    progress,
)

ESTIMATORS: dict[str, Callable[..., Tensor]] = {
    "score function": partial(bounds.score_function, baseline=None),
    "score function, baseline": bounds.score_function,
    "SGVB A": bounds.sgvb_a,
    "SGVB B": bounds.sgvb_b,
    "STL": bounds.sticking_the_landing,
    "IWAE": bounds.iwae,
    "DReG": bounds.dreg,
}
IMPORTANCE_WEIGHTED = ("IWAE", "DReG")
PARAMETERS = ("mu", "logvar")


class GradientMoments(NamedTuple):
    """Of one estimator's gradient by mu or logvar [L]: variance and mean over independent repetitions."""

    mean: Tensor
    mean_error: Tensor
    variance: Estimate  # summed over the dimensions

    def snr(self, signal: Tensor) -> Estimate:
        """Signal-to-noise ratio of the whole vector, with a mean that is known better than from these draws."""
        ratio = (signal.square().sum() / self.variance.value).sqrt().item()
        return Estimate(ratio, ratio * self.variance.error / (2 * self.variance.value))


def gradient_moments(
    estimator: Callable[..., Tensor],
    log_likelihood: Callable[[Tensor], Tensor],
    mu: Tensor,
    logvar: Tensor,
    num_samples: int,
    repetitions: int,
) -> dict[str, GradientMoments]:
    """{"mu", "logvar": moments} of the gradient for one example, mu and logvar [L], over so many draws."""
    chunk = max(1, ROWS // num_samples)
    gradients = []
    for first in range(0, repetitions, chunk):
        count = min(chunk, repetitions - first)
        leaves = [t.expand(count, -1).clone().requires_grad_() for t in (mu, logvar)]
        value = estimator(log_likelihood, *leaves, num_samples=num_samples, reduction="sum")
        gradients.append(torch.autograd.grad(value, leaves))
    moments = {}
    for name, parts in zip(PARAMETERS, zip(*gradients, strict=True), strict=True):
        gradient = torch.cat(parts)
        mean = gradient.mean(0)
        variance = estimate((gradient - mean).square().sum(1) * (repetitions / (repetitions - 1)))
        moments[name] = GradientMoments(mean, gradient.std(0) / math.sqrt(repetitions), variance)
    return moments


def pathwise_variances(
    model: bounds.LinearGaussian, x: Tensor, mu: Tensor, logvar: Tensor
) -> dict[str, dict[str, float]]:
    """Closed form of the reparameterized gradients' variance at K = 1, where the posterior is diagonal.

    Sums over the dimensions. With eps the noise, s and m^-1/2 the standard deviations of q and of the posterior, d the
    distance of their means, a dimension's gradient by mu is g = -m (d + s eps) + [STL] eps / s, that by logvar
    s eps g / 2, up to constants; B has the likelihood's precision m - 1 in place of m, and its distance to the mean.
    """
    mean, covariance = model.posterior(x)
    precision, distance, std = 1 / covariance.diagonal(), mu - mean, torch.exp(0.5 * logvar)
    force = precision * distance

    def variances(force: Tensor, slope: Tensor) -> dict[str, float]:
        of_logvar = std.square() * (force.square() + 2 * slope.square()) / 4
        return {"mu": slope.square().sum().item(), "logvar": of_logvar.sum().item()}

    return {
        "SGVB A": variances(force, precision * std),
        "SGVB B": variances(force - mu, (precision - 1) * std),
        "STL": variances(force, precision * std - 1 / std),
    }


def gradient_variance(size: Size, seed: int, device: torch.device) -> Finding:
    """(b) Score function > its baseline > reparameterization; STL and DReG vanish at the posterior; SNR over K."""
    model = linear_gaussian(6, 3, seed, device, orthogonal=True)
    with seeded(device, seed + 1):
        x = data_of(model, 1)[0]
        mean, covariance = model.posterior(x)
        half_logvar = covariance.diagonal().log() / 2
        likelihood = partial(model.log_likelihood, x)

        def moments(name: str, distance: float, ratio: float, count: int) -> dict[str, GradientMoments]:
            """q's mean `distance` posterior standard deviations off, its sigma `ratio` times the posterior's."""
            mu, logvar = mean + distance * half_logvar.exp(), 2 * (half_logvar + math.log(ratio))
            return gradient_moments(ESTIMATORS[name], likelihood, mu, logvar, count, size.repetitions)

        def least(name: str) -> int:
            return 2 if name == "score function, baseline" else 1  # the other samples are the baseline

        distance, ratio = 0.6, 1.35
        over_counts = {
            name: {count: moments(name, distance, ratio, count) for count in size.counts if count >= least(name)}
            for name in progress(tuple(ESTIMATORS), "(b) gradients over K")
        }
        count = 8
        ratios = [2 ** (n / 4) for n in range(-8, 9)]
        over_ratios = {
            name: [moments(name, 0.0, r, count) for r in ratios]
            for name in progress(tuple(ESTIMATORS), "(b) gradients over sigma")
        }
    mu, logvar = (
        (mean + distance * half_logvar.exp()).requires_grad_(),
        (2 * (half_logvar + math.log(ratio))).requires_grad_(),
    )
    exact = dict(zip(PARAMETERS, torch.autograd.grad(model.elbo(x, mu, logvar), (mu, logvar)), strict=True))
    predicted = pathwise_variances(model, x, mu.detach(), logvar.detach())
    predicted_over_ratios = [pathwise_variances(model, x, mean, 2 * (half_logvar + math.log(r))) for r in ratios]

    def snr(name: str, k: int, parameter: str) -> Estimate:
        # That the means are these is a check of its own.
        importance_weighted = name in IMPORTANCE_WEIGHTED
        signal = over_counts["DReG"][k][parameter].mean if importance_weighted else exact[parameter]
        return over_counts[name][k][parameter].snr(signal)

    def numbers(parameter: str) -> dict[str, Any]:
        return {
            "over_count": {
                name: {
                    "count": list(entries),
                    "variance": [entry[parameter].variance.value for entry in entries.values()],
                    "variance_error": [entry[parameter].variance.error for entry in entries.values()],
                    "snr": [snr(name, k, parameter).value for k in entries],
                    "snr_error": [snr(name, k, parameter).error for k in entries],
                }
                for name, entries in over_counts.items()
            },
            "over_sigma": {
                name: {
                    "variance": [entry[parameter].variance.value for entry in entries],
                    "variance_error": [entry[parameter].variance.error for entry in entries],
                }
                for name, entries in over_ratios.items()
            },
            "predicted_over_count": {
                name: [values[parameter] / count for count in size.counts] for name, values in predicted.items()
            },
            "predicted_over_sigma": {
                name: [values[name][parameter] / count for values in predicted_over_ratios] for name in predicted
            },
        }

    # ---- against theory ----

    unbiased, farthest = True, 0.0
    for name, entries in over_counts.items():
        for k, entry in entries.items():
            for parameter in PARAMETERS:
                expected, error = exact[parameter], entry[parameter].mean_error
                if name in IMPORTANCE_WEIGHTED:  # there is no closed form: one is held against the other
                    other = over_counts["DReG"][k][parameter]
                    expected, error = other.mean, torch.hypot(error, other.mean_error)
                deviation = ((entry[parameter].mean - expected).abs() / error).max().item()
                farthest = max(farthest, deviation)
                unbiased &= deviation <= SIGMAS

    matches = [
        (over_counts[name][k][parameter].variance - predicted[name][parameter] / k).zero
        for name in predicted
        for k in size.counts
        for parameter in PARAMETERS
    ]
    at_posterior = ratios.index(1.0)
    landed = {
        name: max(over_ratios[name][at_posterior][parameter].variance.value for parameter in PARAMETERS)
        for name in ESTIMATORS
    }
    lands = ("STL", "DReG", "score function, baseline")
    kept = min(variance for name, variance in landed.items() if name not in lands)
    largest = {name: entries[size.largest_count]["mu"] for name, entries in over_counts.items()}
    score, baseline, pathwise = (
        largest[name].variance for name in ("score function", "score function, baseline", "SGVB A")
    )

    def exponent(name: str) -> float:
        """Of K in the SNR, between the first and the last of the upper half of the counts."""
        first, last = size.counts[len(size.counts) // 2], size.counts[-1]
        return math.log(snr(name, last, "mu").value / snr(name, first, "mu").value) / math.log(last / first)

    falls, rises = exponent("IWAE"), exponent("DReG")
    return Finding(
        {
            "count": size.counts,
            "distance_over_count": distance,
            "sigma_ratio_over_count": ratio,
            "sigma_ratio": ratios,
            "count_over_sigma": count,
            "repetitions": size.repetitions,
            **{parameter: numbers(parameter) for parameter in PARAMETERS},
        },
        {
            "gradients_unbiased": Check(
                "all gradients are unbiased: that of the exact ELBO, IWAE's equal to DReG's",
                f"at most {farthest:.1f} standard errors off",
                unbiased,
            ),
            "variance_as_predicted": Check(
                "the variance of SGVB A, SGVB B and STL is the closed form's, over K and both parameters",
                f"{sum(matches)} of {len(matches)} within {SIGMAS} standard errors",
                all(matches),
            ),
            "score_function_noisier": Check(
                "variance by mu: score function > with baseline > reparameterized",
                f"K = {size.largest_count}: {score.value:.2g} > {baseline.value:.2g} > {pathwise.value:.2g}",
                score.value > baseline.value > pathwise.value,
            ),
            "zero_variance_at_posterior": Check(
                "at the posterior STL, DReG and the score function with baseline have no variance, the others have",
                f"{', '.join(f'{name} {landed[name]:.0e}' for name in lands)}; the others {kept:.2g} and more",
                max(landed[name] for name in lands) < ZERO_VARIANCE and kept > 0.01,
            ),
            "signal_to_noise": Check(
                "signal-to-noise ratio ~ K^-1/2 for IWAE, K^+1/2 for DReG",
                f"IWAE K^{falls:+.2f}, DReG K^{rises:+.2f}",
                # The exponents are those of large K.
                abs(falls + 0.5) < 0.2 and abs(rises - 0.5) < 0.2,
            ),
        },
    )
