"""The operators made differentiable: functions that choose the torch.autograd.Function which the caller's way of
differentiating needs.

One module per family of operators (term_sum, latent, latent_list, elbo, importance, surrogates) says what is
differentiated; modes.py alone knows the ways of differentiating, and torch_internals.py alone what torch has no public name
for. First derivatives come from the kernels. Derivatives of derivatives are taken of the same formula written in torch
operations (formulas.py), by torch itself.
"""

from .categorical import CategoricalSpec, categorical_sample
from .derivatives import sum_of_elements
from .elbo import elbo
from .importance import importance_bound, normalized_weights
from .latent import LatentSpec, explicit_noise, latent
from .latent_list import LatentListSpec, latent_list
from .surrogates import weighted_gradient, weighted_once_more, with_gradient_of
from .term_sum import TermSpec, term_sum
from .torch_internals import in_forward_mode, in_trace, in_transform

__all__ = [
    "CategoricalSpec",
    "LatentListSpec",
    "LatentSpec",
    "TermSpec",
    "categorical_sample",
    "elbo",
    "explicit_noise",
    "importance_bound",
    "in_forward_mode",
    "in_trace",
    "in_transform",
    "latent",
    "latent_list",
    "normalized_weights",
    "sum_of_elements",
    "term_sum",
    "weighted_gradient",
    "weighted_once_more",
    "with_gradient_of",
]
