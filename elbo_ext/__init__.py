"""Fused evidence lower bound for PyTorch: reparameterized sampling, likelihoods and the analytic KL."""

from . import bounds, diagnostics, functional, likelihoods, reference, serialization  # noqa: F401
from .functional import *  # noqa: F403  what functional.__all__ lists
from .nn import ELBOLoss
from .ops import build_info

__all__ = [*functional.__all__, "ELBOLoss", "bounds", "build_info", "diagnostics", "likelihoods", "reference"]
