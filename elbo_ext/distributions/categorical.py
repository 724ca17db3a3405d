"""Categorical and OneHotCategoricalStraightThrough."""

import math

from torch import Size, Tensor, distributions, no_grad
from torch.types import _size

from .. import functional
from .base import Fused

_NONE_IGNORED = -(2**62)  # no class, and no label that means one


class Categorical(distributions.Categorical, Fused):
    """A class from 0 to C - 1, as :class:`torch.distributions.Categorical`.

    ``log_prob`` is :func:`elbo_ext.categorical_log_prob`. Samples are torch's. See :mod:`elbo_ext.distributions` for dtypes and
    checks.

    Args:
        probs: probabilities ``[*batch_shape, C]``, which torch normalizes. Or
        logits: unnormalized logarithms of them.
        validate_args, and errors: as in :class:`Normal`; ValueError unless one of the two is given.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """logits[value] - ln sum_c e^logits[c]."""

        def of_classes(value: Tensor, batch_dims: int) -> Tensor:
            return functional.categorical_log_prob(
                value.long(), self.logits, ignore_index=_NONE_IGNORED, batch_dims=batch_dims
            )

        return self._score(of_classes, value)

    def entropy(self) -> Tensor:
        """-sum_c p_c ln p_c."""
        return -functional.multinomial_log_prob(self.probs, self.logits, batch_dims=len(self._batch_shape))


class OneHotCategoricalStraightThrough(distributions.OneHotCategoricalStraightThrough, Fused):
    """A one-hot class whose gradient passes straight through to the probabilities, as
    :class:`torch.distributions.OneHotCategoricalStraightThrough` (Bengio, Leonard & Courville 2013).

    Samples are those of :func:`elbo_ext.categorical_rsample_kl`, drawn by the package's noise; ``log_prob`` is
    :func:`elbo_ext.multinomial_log_prob`. See :mod:`elbo_ext.distributions` for dtypes and checks.

    Args:
        probs, logits, validate_args, and errors: as in :class:`Categorical`.
    """

    def __init__(
        self, probs: Tensor | None = None, logits: Tensor | None = None, validate_args: bool | None = None
    ) -> None:
        # torch's own would make one of torch's classes, which checks values, and so cannot be compiled.
        self._categorical = Categorical(probs, logits, validate_args)
        shape = self._categorical._param.shape
        Fused.__init__(self, shape[:-1], shape[-1:], validate_args)

    def expand(
        self, batch_shape: _size, _instance: "OneHotCategoricalStraightThrough | None" = None
    ) -> "OneHotCategoricalStraightThrough":
        new: OneHotCategoricalStraightThrough = self._get_checked_instance(OneHotCategoricalStraightThrough, _instance)  # type: ignore[no-untyped-call]
        new._categorical = self._categorical.expand(batch_shape)
        Fused.__init__(new, Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: _size = Size()) -> Tensor:  # noqa: B008
        """``[*sample_shape, *batch_shape, C]``, in the dtype of the parameters."""
        logits = self.logits
        z, _ = functional.categorical_rsample_kl(
            logits, num_samples=math.prod(sample_shape), batch_dims=len(self._batch_shape)
        )
        return z.reshape(*sample_shape, *logits.shape)

    def sample(self, sample_shape: _size = Size()) -> Tensor:  # noqa: B008
        """The same without a gradient."""
        with no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """logits of the class minus ln sum_c e^logits[c]."""

        def of_one_hot(value: Tensor, batch_dims: int) -> Tensor:
            return functional.multinomial_log_prob(value, self.logits, batch_dims=batch_dims - 1)

        return self._score(of_one_hot, value)

    def entropy(self) -> Tensor:
        """-sum_c p_c ln p_c."""
        return -functional.multinomial_log_prob(self.probs, self.logits, batch_dims=len(self._batch_shape))
