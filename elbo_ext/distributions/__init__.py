"""torch.distributions, computed by the kernels: change the import, and keep the rest.

``Normal``, ``Laplace``, ``StudentT``, ``Bernoulli``, ``ContinuousBernoulli``, ``Poisson``, ``NegativeBinomial``,
``Categorical`` and ``OneHotCategoricalStraightThrough`` are subclasses of torch's classes of these names and take what those
take. ``ZeroInflatedNegativeBinomial``, which torch lacks, is a :class:`torch.distributions.Distribution`. ``DiagonalGaussian``
is the posterior of diffusers' autoencoders::

    from elbo_ext.distributions import Normal

    posterior = Normal.from_logvar(mu, logvar)  # or Normal(mu, std)
    z = posterior.rsample()
    kl = torch.distributions.kl_divergence(posterior, Normal(0.0, 1.0)).sum(-1)

What torch builds of a distribution (``expand``, ``Independent``, ``TransformedDistribution``, ``kl_divergence`` with another
class) works as with torch's own.

**Values** are in nats, those of the package's functions: ``log_prob`` has one per element, in the joint shape of ``value`` and
the parameters, and is right where torch's formulas overflow or cancel. ``log_prob``, ``entropy`` and ``kl_divergence`` are
float64 if any tensor is, else float32, also for bfloat16 and float16, where torch rounds them. Samples have the parameters'
dtype. Parameters are floating-point tensors or numbers.

**Samples.** ``Normal``, the Gaussian part of ``StudentT``, ``OneHotCategoricalStraightThrough`` and ``DiagonalGaussian`` use
the package's noise: a seed drawn from torch's generator, so that ``torch.manual_seed`` acts, but other numbers than those of
``torch.randn`` (:func:`elbo_ext.rsample`). The others draw by torch's generator what torch's classes draw after the same seed,
but in float32 where the parameters have half precision, which has too few numbers for the tails.

**validate_args.** Values are checked as torch does, by default unless Python runs with -O. Checks wait for the device: they are
off for tensors that are not on the CPU unless ``validate_args=True`` asks for them, and for distributions that are made inside
of ``torch.compile``. The first ``torch.compile`` turns the default off in the whole process, for torch's classes as well; that
is torch's doing. The dtype and layout of parameters are always checked.

**KL.** ``kl_divergence`` of two ``Normal``, ``Laplace``, ``Poisson`` or categoricals keeps full relative precision however
close they are, also where one of the two is torch's. Pairs of different families have torch's formulas. As in torch there is
none of two ``StudentT`` or two ``NegativeBinomial``."""

from . import kl  # noqa: F401  registers what torch.distributions.kl_divergence looks up
from .bernoulli import Bernoulli, ContinuousBernoulli
from .categorical import Categorical, OneHotCategoricalStraightThrough
from .counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from .diagonal_gaussian import DiagonalGaussian
from .location_scale import Laplace, Normal, StudentT

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiagonalGaussian",
    "Laplace",
    "NegativeBinomial",
    "Normal",
    "OneHotCategoricalStraightThrough",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
]
