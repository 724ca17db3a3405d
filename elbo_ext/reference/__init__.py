"""The public functions in plain Python, PyTorch and NumPy: what the fused kernels are checked against.

Written to be read as mathematics and to be right to the last digits, not to be fast. Arguments are not
validated here. All log-densities and divergences are natural logarithms (nats).

Sources, next to those of :mod:`elbo_ext.reference.noise`:
    Kingma & Welling, "Auto-Encoding Variational Bayes", ICLR 2014.
    Rezende, Mohamed & Wierstra, "Stochastic Backpropagation and Approximate Inference in Deep Generative
    Models", ICML 2014.
    Higgins et al., "beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework",
    ICLR 2017.
"""

from . import categorical, functions, noise
from .categorical import *  # noqa: F403
from .functions import *  # noqa: F403
from .noise import *  # noqa: F403

__all__: list[str] = []
__all__ += categorical.__all__  # in this form type checkers understand it
__all__ += functions.__all__
__all__ += noise.__all__

# What is public is of this module, by name: pickles, help() and error messages say where to import it from.
for _name in __all__:
    globals()[_name].__module__ = __name__
