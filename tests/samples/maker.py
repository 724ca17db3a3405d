"""Random numbers for the samples."""

import torch
from torch import Tensor

# Of counts, with operands of each dtype.
INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.uint8,
    torch.float16: torch.int16,
}


class Maker:
    """Random tensors of one dtype on one device. All numbers are of size 1, so that no dtype overflows."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def _to(self, t: Tensor, dtype: torch.dtype | None) -> Tensor:
        return t.to(dtype or self.dtype).to(self.device)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._to(torch.randn(shape, generator=self.generator, dtype=torch.float64), dtype)

    def unit(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """In [0, 1): pixels, weights."""
        return self._to(torch.rand(shape, generator=self.generator, dtype=torch.float64), dtype)

    def levels(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """On the grid of 8 values from 0 to 1."""
        return self._to((7 * self.unit(*shape, dtype=torch.float64)).round() / 7, dtype)

    def bits(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self._to(self.unit(*shape, dtype=torch.float64).round(), dtype)

    def positive(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """About 1: rates, dispersions, degrees of freedom."""
        return self._to((0.7 * self.normal(*shape, dtype=torch.float64).cpu()).exp(), dtype)

    def counts(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Counts as they come, half of them 0, in an integer dtype for each dtype of the others. With a dtype of their own
        they have gradients, and then none is 0, where log-probabilities of counts jump."""
        counts = (5 * self.unit(*shape, dtype=torch.float64).cpu().square() ** 2 * 4).floor()
        if dtype is not None and dtype.is_floating_point:
            return self._to(counts + 1, dtype)
        return self._to(counts, dtype or INTEGERS[self.dtype])

    def labels(self, classes: int, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Numbers of classes, in an integer dtype for each dtype of the others that has room for them."""
        default = INTEGERS[self.dtype] if classes < 128 else torch.int64
        return self._to((classes * self.unit(*shape, dtype=torch.float64)).floor(), dtype or default)

    def mask(self, *shape: int) -> Tensor:
        return self.unit(*shape, dtype=torch.float64) < 0.6

    def holes(self, *shape: int) -> Tensor:
        """Weights, two in five of them zero."""
        return self.unit(*shape) * self.mask(*shape)

    def scale(self, form: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A scale whose ln sigma^2 is about 0.7 * normal, in the form asked for: log_scale and scale are log_std and std."""
        logvar = 0.7 * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self._to(from_logvar(logvar, form), dtype)


def from_logvar(logvar: Tensor, form: str) -> Tensor:
    value = logvar if form in ("logvar", "var") else logvar / 2
    if form == "rho":  # ln(e^sigma - 1)
        return value.exp() + torch.log(-torch.expm1(-value.exp()))
    return value if form.startswith("log") else value.exp()


def number(form: str) -> float:
    """The Python number that stands for ln sigma^2 = 0.4."""
    return from_logvar(torch.tensor(0.4, dtype=torch.float64), form).item()
