"""The loss as a module."""

from typing import Any

import torch
from torch import Tensor

from . import arguments
from .functional import ELBO, elbo_loss
from .likelihoods import Likelihood, LikelihoodWithParameters, by_name


class ELBOLoss(torch.nn.Module):
    """:func:`elbo_ext.elbo_loss` with its options fixed.

    Args:
        likelihood: a name or an object, as in :func:`elbo_ext.elbo_loss`. The parameters of an object become attributes of
            the module, ``recon_scale`` for a ``scale``: saved and moved with it, and learned if they are parameters.
        beta: factor of the KL; a tensor or a ``torch.nn.Parameter`` is moved and saved with the module.
        batch_dims, reduction: as in :func:`elbo_ext.elbo_loss`.
        recon_logvar: scale of the Gaussian likelihood: a number, a tensor, or a ``torch.nn.Parameter``, which is then
            learned with the module; ``recon_log_std=``, ``recon_std=``, ``recon_var=`` or ``recon_rho=`` may stand in its
            place, ``recon_min_std=`` or ``recon_min_var=`` with it.

    Shapes: as in :func:`elbo_ext.elbo_loss`; returns ``ELBO(loss, log_likelihood, kl)`` in nats. Anything else that the
    function takes (``kl``, the prior, ``weight``, another ``beta``) may be passed to the call.

    Raises:
        ValueError, TypeError: on construction for an unknown likelihood or reduction, a ``beta`` or ``batch_dims`` that is
            none, for two scales, or for a scale with the Bernoulli; on the call as the function.
    """

    def __init__(
        self,
        likelihood: str | Likelihood | LikelihoodWithParameters = "gaussian",
        *,
        beta: float = 1.0,
        batch_dims: int = 1,
        reduction: str = "mean",
        recon_logvar: Any = None,
        recon_log_std: Any = None,
        recon_std: Any = None,
        recon_var: Any = None,
        recon_rho: Any = None,
        recon_min_std: float | None = None,
        recon_min_var: float | None = None,
    ) -> None:
        super().__init__()
        given = (recon_logvar, recon_log_std, recon_std, recon_var, recon_rho, recon_min_std, recon_min_var)
        scales = dict(zip(arguments.RECON_SCALES, given, strict=True))
        chosen = by_name(likelihood)
        arguments.recon_scales(chosen, scales)
        arguments.reduction(reduction)
        self.likelihood = likelihood
        for name, value in chosen.parameters.items():
            self._set(f"recon_{name}", value)
        self._set("beta", arguments.beta(beta))
        self.batch_dims, self.reduction = arguments.count("batch_dims", batch_dims, low=0), reduction
        self.scale_name, self.floor = None, {}
        if any(scale is not None for scale in scales.values()):
            self.scale_name, *_ = arguments.scale(arguments.RECON_SCALES, given)
            # Under the name of its form, so that the state of one form does not load into another.
            self._set(self.scale_name, scales.pop(self.scale_name))
            self.floor = {name: value for name, value in scales.items() if value is not None}

    def _set(self, name: str, value: Any) -> None:
        """A parameter is learned, a tensor moved and saved with the module."""
        if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
            self.register_buffer(name, value)
        else:
            setattr(self, name, value)

    @property
    def scale(self) -> Any:
        """The scale of the likelihood, in the form that it was given in; None if it has none of its own."""
        return None if self.scale_name is None else getattr(self, self.scale_name)

    def forward(
        self,
        recon: Tensor | None = None,
        x: Tensor | None = None,
        mu: Tensor | None = None,
        logvar: Any = None,
        **options: Any,
    ) -> ELBO:
        fixed: dict[str, Any] = {"beta": self.beta, "batch_dims": self.batch_dims, "reduction": self.reduction}
        if self.scale_name is not None:
            fixed |= {self.scale_name: self.scale, **self.floor}
        return elbo_loss(recon, x, mu, logvar, **{"likelihood": self._likelihood_now(), **fixed, **options})

    def _likelihood_now(self) -> str | Likelihood | LikelihoodWithParameters:
        """With the parameters as the module has them now, moved, loaded or learned."""
        names = by_name(self.likelihood).parameters
        if not names:
            return self.likelihood
        chosen = by_name(self.likelihood)
        return chosen.likelihood(recon=chosen.recon, **{name: getattr(self, f"recon_{name}") for name in names})

    def extra_repr(self) -> str:
        options: dict[str, Any] = {"likelihood": self._likelihood_now()}
        if self.scale_name is not None:
            scale = self.scale
            options[self.scale_name] = scale
            options |= self.floor
        options |= {"beta": self.beta, "batch_dims": self.batch_dims, "reduction": self.reduction}
        return ", ".join(
            f"{name}={f'tensor of shape {tuple(value.shape)}' if isinstance(value, Tensor) else repr(value)}"
            for name, value in options.items()
        )
