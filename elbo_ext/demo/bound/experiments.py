"""What theory says about the bound, measured: one function per statement of python -m elbo_ext.demo bound.

Each returns a `Finding`: the numbers of its figure, as lists and floats, and the checks that hold them against
theory. Repetitions of an estimator are batch dimensions of one call. A tolerance of `SIGMAS` standard errors is meant
where it says "within its error".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

import elbo_ext

from ... import bounds, diagnostics
from ..vae import log_likelihood_of, progress_bar, seeded
from .models import (
    ROWS,
    SIGMAS,
    ZERO_VARIANCE,
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
    train_vae,
)

# --- (a) the bound over K -----------------------------------------------------------------------------------


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


# --- (b) the gradient's variance ----------------------------------------------------------------------------

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


# --- (c) the gap over training ------------------------------------------------------------------------------


def gap_over_training(digits: Digits, size: Size, seed: int) -> Finding:
    """(c) A diagonal q ends at the floor of its family, one with full covariance at ln p(x)."""
    device = digits.test.device
    model = linear_gaussian(8, 4, seed, device)
    with seeded(device, seed + 1):
        x = data_of(model, 16)
    log_px = model.log_evidence(x).mean().item()
    floor = model.gap(x, *model.best_diagonal(x)).mean().item()

    def ascend(label: str, full: bool) -> dict[str, list[float]]:
        """Adam on the exact ELBO, by the means of q and its Cholesky factor: diagonal (as logvar) and what is below."""
        mu, logvar, below = (
            torch.zeros(shape, dtype=x.dtype, device=device, requires_grad=True) for shape in ((16, 4), (4,), (4, 4))
        )
        optimizer = torch.optim.Adam([mu, logvar, below] if full else [mu, logvar], lr=0.05)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.steps)
        history: dict[str, list[float]] = {"elbo": [], "gap": []}
        for _ in progress(range(size.steps), f"(c) {label} q"):
            q: dict[str, Any] = {"logvar": logvar}
            if full:
                root = below.tril(-1) + torch.diag_embed(torch.exp(0.5 * logvar))
                q = {"covariance": root @ root.mT}
            elbo = model.elbo(x, mu, **q).mean()
            history["elbo"].append(elbo.item())
            history["gap"].append(model.gap(x, mu, **q).mean().item())
            optimizer.zero_grad()
            (-elbo).backward()
            optimizer.step()
            decay.step()
        return history

    diagonal, full = ascend("diagonal", False), ascend("full", True)
    off = max(
        abs(elbo + gap - log_px)
        for entry in (diagonal, full)
        for elbo, gap in zip(entry["elbo"], entry["gap"], strict=True)
    )
    vae = digits.training
    gaps = [Estimate(*entry) for entry in zip(vae["gap"], vae["gap_error"], strict=True)]
    return Finding(
        {
            "linear_gaussian": {"log_px": log_px, "diagonal_floor": floor, "diagonal": diagonal, "full": full},
            "vae": vae,
        },
        {
            "gap_is_the_kl": Check(
                "ln p(x) = ELBO + KL(q || p(z|x)) at every step of the training, linear Gaussian",
                f"largest difference of the two sides {off:.0e}",
                off < 1e-9,
            ),
            "floor_of_the_family": Check(
                "the gap of a diagonal q ends at its family's floor, of a full covariance at 0",
                f"diagonal {diagonal['gap'][-1]:.4f}, floor {floor:.4f}; full {full['gap'][-1]:.1e}",
                min(diagonal["gap"]) > floor * (1 - 1e-9) > 0
                and diagonal["gap"][-1] < 1.01 * floor
                and full["gap"][-1] < 0.01 * floor,
            ),
            "gap_of_the_vae": Check(
                "ELBO <= ln p(x) throughout the training of the VAE",
                f"gap {min(gaps).value:.2f} to {max(gaps).value:.2f}, {gaps[-1].value:.2f} at the end",
                all(gap.not_negative for gap in gaps) and gaps[-1].value > 0,
            ),
        },
    )


# --- (d) the amortization gap -------------------------------------------------------------------------------


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


# --- (e) collapse over beta ---------------------------------------------------------------------------------


def collapse(train_data: Tensor, test_data: Tensor, size: Size, seed: int) -> Finding:
    """(e) The KL falls with beta, dimension by dimension, until q(z|x) is the prior for every x."""
    rows: list[dict[str, Any]] = []
    total = len(size.betas) * size.epochs * (len(train_data) // 64)
    with progress_bar(total=total, desc=f"{'(e) training over beta':<28}", disable=None) as bar:
        for beta in size.betas:
            model = train_vae(train_data, size, seed, beta=beta, bar=bar)
            with seeded(test_data.device, seed + 1), torch.no_grad():
                mu, logvar = model.encode(test_data)
                report = diagnostics.collapse_report(mu, logvar)
                elbo = estimate(
                    repeated(partial(bounds.sgvb_b, log_likelihood_of(model, test_data, elbo_ext)), mu, logvar, 1, 32)
                )
                information = diagnostics.aggregate_posterior(mu, logvar, num_samples=4).mutual_information.item()
            kl = report.kl.sum().item()
            rows.append(
                {
                    "beta": beta,
                    "kl": kl,
                    "kl_per_dimension": report.kl.sort(descending=True).values.tolist(),
                    "silent": report.silent.tolist(),
                    "active": int(report.active.sum()),
                    "collapsed": int(report.collapsed.sum()),
                    "mutual_information": information,
                    "mutual_information_at_most": math.log(len(mu)),
                    "elbo": elbo.value,
                    "elbo_error": elbo.error,
                    "log_likelihood": elbo.value + kl,
                }
            )
    kls, active, collapsed = ([row[name] for row in rows] for name in ("kl", "active", "collapsed"))
    latent = len(rows[0]["kl_per_dimension"])

    def listed(values: Sequence[Any], form: str) -> str:
        return " ".join(format(value, form) for value in values)

    return Finding(
        {"latent": latent, "betas": rows},
        {
            "kl_falls_with_beta": Check(
                "the KL of the trained VAE falls as beta rises, until nothing is left of it",
                f"beta {listed(size.betas, 'g')}: KL {listed(kls, '.2g')}",
                all(later < max(earlier, 0.01) for earlier, later in pairwise(kls)),
            ),
            "units_collapse": Check(
                f"all {latent} units are active at the smallest beta and collapsed to the prior at the largest",
                f"active {listed(active, 'd')}; collapsed {listed(collapsed, 'd')}",
                active[0] == latent and collapsed[0] == 0 and active[-1] == 0 and collapsed[-1] == latent,
            ),
        },
    )
