"""Fused evidence lower bound for PyTorch: reparameterized sampling, likelihoods and the analytic KL."""

from . import bounds, diagnostics, reference
from .functional import (
    ELBO,
    bernoulli_log_prob,
    elbo_loss,
    gaussian_kl,
    gaussian_log_prob,
    rsample,
    rsample_kl,
    rsample_with_log_prob,
)
from .nn import ELBOLoss
from .ops import build_info

__all__ = [
    "ELBO",
    "ELBOLoss",
    "bernoulli_log_prob",
    "bounds",
    "build_info",
    "diagnostics",
    "elbo_loss",
    "gaussian_kl",
    "gaussian_log_prob",
    "reference",
    "rsample",
    "rsample_kl",
    "rsample_with_log_prob",
]
