"""(e) Collapse over beta: how the KL and the active units fall."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import elbo_ext

from .... import bounds, diagnostics
from ...vae import log_likelihood_of, progress_bar, seeded
from ..models import Check, Finding, Size, estimate, repeated, train_vae


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
