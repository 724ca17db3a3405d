"""(c) The gap over training: what is left between the ELBO and ln p(x)."""

from __future__ import annotations

from typing import Any

import torch

from ...vae import seeded
from ..models import Check, Digits, Estimate, Finding, Size, data_of, linear_gaussian, progress


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
