"""Fused evidence lower bound for PyTorch: reparameterized sampling, likelihoods and the analytic KL."""

from . import bounds, diagnostics, distributions, functional, likelihoods, reference, serialization  # noqa: F401
from ._version import VERSION as __version__
from .functional import *  # noqa: F403  what functional.__all__ lists
from .nn import ELBOLoss
from .ops import build_info
from .validation import validate_values

__all__ = [
    "ELBOLoss",
    "__version__",
    "bounds",
    "build_info",
    "diagnostics",
    "distributions",
    "likelihoods",
    "reference",
    "validate_values",
]
__all__ += functional.__all__  # in this form type checkers understand it
