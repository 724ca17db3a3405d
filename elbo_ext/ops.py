"""Loads the compiled libraries and completes its operators: shapes for tracing, and the opaque seed draw.

The operators themselves (``torch.ops.elbo_ext.*``) are declared in csrc/ops/schema.cpp. They know nothing of autograd,
which elbo_ext/autograd adds, and need no autocast rule: they take mixed dtypes as they come and compute in float32.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

from ._version import VERSION

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"elbo_ext's compiled library could not be loaded with torch {torch.__version__} ({error}); "
        "reinstall with 'pip install .' from the source folder; torch >= 2.11 is needed"
    ) from error

__all__ = [
    "NONE",
    "REDUCTIONS",
    "TERM_NUMBERS",
    "WITH_KL",
    "WITH_LOG_PROB",
    "Z_ALONE",
    "as_tensor",
    "build_info",
    "draw_on_cuda",
    "draw_seed",
    "draw_seeds",
]

# Numbers of the operator schema (csrc/ops/schema.cpp).
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
NONE = REDUCTIONS["none"]
# What the latent stage returns: z alone, z and the KL, or z, log q and log p, by how log q is differentiated.
Z_ALONE, WITH_KL = 0, 1
WITH_LOG_PROB = {"pathwise": 2, "sticking_the_landing": 3, "score": 4}
TERM_NUMBERS: dict[str, int] = {name: number for name, (number, _) in _C.terms().items()}


def _load_cuda_library() -> tuple[list[str], str]:
    """The architectures of the CUDA library, which is loaded if torch has CUDA, with a GPU or without; and its state.

    Without it the package works on CPU tensors; CUDA tensors raise an error that says what is missing.
    """
    library = Path(__file__).with_name("_cuda.so")
    if torch.version.cuda is None:
        return [], f"{'built, but not loaded' if library.exists() else 'not built'}: this torch has no CUDA"
    advice = "reinstall it with 'pip install .' from the source folder where nvcc, CUDA's compiler, is on the PATH"
    if not library.exists():
        _C.set_cuda_absence(f"it was built without CUDA; {advice}")
        return [], "not built"
    try:
        return _C.load_cuda_library(str(library)).split(), "loaded"
    except RuntimeError as error:
        _C.set_cuda_absence(f"its CUDA library could not be loaded with torch {torch.__version__} ({error}); {advice}")
        return [], f"could not be loaded: {error}"


CUDA_ARCHITECTURES, _CUDA_LIBRARY = _load_cuda_library()


def build_info() -> dict[str, object]:
    """How the package was built and what it runs on.

    Returns:
        A dict with ``version`` of the package, ``compiler``, ``flags``, ``instruction_sets`` compiled in and
        ``instruction_set`` in use (the widest the machine has, bounded by torch's ATEN_CPU_CAPABILITY),
        ``cuda_library``, whether it is loaded or why it is not, its ``cuda_architectures`` (empty: not loaded),
        ``torch_built_against`` and ``torch_running``.
    """
    return {
        "version": VERSION,
        "compiler": _C.compiler,
        "flags": _C.flags,
        "instruction_sets": _C.instruction_sets(),
        "instruction_set": _C.instruction_set(),
        "cuda_library": _CUDA_LIBRARY,
        "cuda_architectures": CUDA_ARCHITECTURES,
        "torch_built_against": _C.torch_built_against,
        "torch_running": torch.__version__,
    }


# ---- the seed ----


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """One int64 drawn uniformly by torch's generator of the device (or ``generator``), shape ``[1]``.

    This is the only randomness the package consumes, and torch makes it: ``torch.manual_seed``, ``generator=``,
    activation checkpointing, CUDA graphs and vmap's ``randomness=`` therefore act as on any torch function.
    """
    return _draw(device, generator, 1)


def draw_seeds(device: torch.device, generator: torch.Generator | None, count: int) -> Tensor:
    """As many draws, one after the other, ``[count]``. On a CPU one call of torch makes the same."""
    if device.type == "cpu":
        return _draw(device, generator, count)
    return torch.cat([draw_seed(device, generator) for _ in range(count)])


def _draw(device: torch.device, generator: torch.Generator | None, count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator, dtype=torch.int64, device=device)


draw_on_cuda = _C.draw_on_cuda

# inductor replaces torch.randint by its own generator, with other draws; inside this operator it cannot. The tag keeps a
# recomputation from drawing anew.
torch.library.define("elbo_ext::draw_seed", "(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


@torch.library.impl("elbo_ext::draw_seed", ("cpu", "cuda"))
def _(like: Tensor) -> Tensor:
    return draw_seed(like.device)


# An ordered effect: compiled code draws as often, and in the same order, as eager code. Without it two equal draws are
# merged by common subexpression elimination, which looks only at torch's own random functions.
# torch has no public name for it (seen in 2.11.0, 2.13.0 and 2.15.0), as for what autograd/torch_internals.py uses; that
# cannot be imported before this module.
_register_effectful_op(torch.ops.elbo_ext.draw_seed.default, _EffectType.ORDERED)


@torch.library.register_fake("elbo_ext::draw_seed")
def _(like: Tensor) -> Tensor:
    return like.new_empty((1,), dtype=torch.int64)


# ---- shapes and dtypes of the results, for FakeTensor (torch.compile, export, meta tensors) ----

Operands = Sequence[Tensor | None]
Numbers = Sequence[float]  # that stand for operands that are None


def value_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, else float32: half precision is computed and summed in float32. As in torch, a
    tensor without dimensions does not promote those that have some, and data of an integer type promotes nothing."""
    any_dims = number_is_double = False
    for t in tensors:
        if t is None or not t.is_floating_point():
            continue
        if t.dim() == 0:
            number_is_double = number_is_double or t.dtype is torch.float64
        elif t.dtype is torch.float64:
            return torch.float64
        else:
            any_dims = True
    return torch.float64 if number_is_double and not any_dims else torch.float32


def sample_dtype(mu: Tensor | None, scale: Tensor | None) -> torch.dtype:
    """The dtype of a sample: what mu and the scale promote to, as torch.result_type, which Dynamo does not trace."""
    given = [t for t in (mu, scale) if t is not None]
    promoting = [t for t in given if t.dim() > 0] or given
    return torch.promote_types(promoting[0].dtype, promoting[-1].dtype)


def as_tensor(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor without dimensions. In compiled code not by torch.full, of which inductor of torch 2.11 and 2.13
    keeps an old number where it changes from call to call, and which is compiled anew for each."""
    if torch.compiler.is_compiling():
        return torch.zeros((), dtype=dtype, device=device) + number
    return torch.full((), number, dtype=dtype, device=device)


def _first(tensors: Sequence[Tensor | None]) -> Tensor:
    return next(t for t in tensors if t is not None)


def _broadcast(tensors: Sequence[Tensor | None]) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(*(t.shape for t in tensors if t is not None))
    return shape


def _gradients(operands: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [torch.empty_like(t) for t, need in zip(operands, needs, strict=True) if t is not None and need]


@torch.library.register_fake("elbo_ext::categorical")
@torch.library.register_fake("elbo_ext::term_sum")
def _(term: int, operands: Operands, constants: Numbers, forms: int, batch_dims: int, reduction: int) -> Tensor:
    shape = _broadcast(operands)[:batch_dims] if reduction == NONE else ()
    return _first(operands).new_empty(shape, dtype=value_dtype(*operands))


@torch.library.register_fake("elbo_ext::categorical_backward")
@torch.library.register_fake("elbo_ext::term_sum_backward")
def _(
    term: int,
    operands: Operands,
    constants: Numbers,
    forms: int,
    batch_dims: int,
    reduction: int,
    grad: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    return _gradients(operands, needs)


@torch.library.register_fake("elbo_ext::categorical_with_gradients")
@torch.library.register_fake("elbo_ext::term_sum_with_gradients")
def _(
    term: int,
    operands: Operands,
    constants: Numbers,
    forms: int,
    batch_dims: int,
    reduction: int,
    factor: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    value = _first(operands).new_empty((), dtype=value_dtype(*operands))
    return [value, *_gradients(operands, needs)]


@torch.library.register_fake("elbo_ext::elbo_with_gradients")
def _(
    term: int,
    operands: Operands,
    constants: Numbers,
    forms: int,
    batch_dims: int,
    reduction: int,
    kl: Tensor,
    beta: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    loss, log_likelihood, reduced_kl = (_first(operands).new_empty((), dtype=value_dtype(*operands)) for _ in range(3))
    return [loss, log_likelihood, reduced_kl, _one_number(kl.shape, loss), *_gradients(operands, needs)]


@torch.library.register_fake("elbo_ext::elbo_backward")
def _(
    gradients: Sequence[Tensor],
    of_kl: Tensor,
    grad_loss: Tensor | None,
    grad_log_likelihood: Tensor | None,
    grad_kl: Tensor | None,
    beta: float,
) -> Tensor:
    return _one_number(of_kl.shape, of_kl)


def _one_number(expanded_to: Sequence[int], like: Tensor) -> Tensor:
    return like.new_empty(()).expand(expanded_to)


@torch.library.register_fake("elbo_ext::latent")
def _(
    inputs: Operands,
    constants: Numbers,
    forms: int,
    seed: Tensor | None,
    noise: Tensor | None,
    num_samples: int | None,
    results: int,
    batch_dims: int,
    reduction: int,
) -> list[Tensor]:
    mu, scale = inputs[:2]
    full = _broadcast(inputs)
    dtype = sample_dtype(mu, scale)
    first = mu if mu is not None else _first(inputs)
    samples = () if num_samples is None else (num_samples,)
    if num_samples is None and first.dim() == len(full) and first.shape == full:  # ranks first: arguments.same_shape
        z = torch.empty_like(first, dtype=dtype)
    else:
        z = first.new_empty((*samples, *full), dtype=dtype)
    batch = full[:batch_dims]
    shapes: list[tuple[int, ...]]
    if results == Z_ALONE:
        shapes = []
    elif results == WITH_KL:
        shapes = [batch if reduction == NONE else ()]
    else:
        shapes = [(*samples, *batch)] * 2
    return [z, *(first.new_empty(shape, dtype=value_dtype(*inputs)) for shape in shapes)]


@torch.library.register_fake("elbo_ext::latent_backward")
def _(
    inputs: Operands,
    constants: Numbers,
    forms: int,
    seed: Tensor | None,
    noise: Tensor | None,
    num_samples: int | None,
    results: int,
    batch_dims: int,
    reduction: int,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    grad_log_q: Tensor | None,
    grad_log_p: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    full = _broadcast(inputs)
    gradients = _gradients(inputs, needs[:-1])
    if noise is not None and needs[-1]:
        gradients.append(noise.new_empty((*(() if num_samples is None else (num_samples,)), *full)))
    return gradients


@torch.library.register_fake("elbo_ext::latent_list")
def _(
    inputs: Operands,
    constants: Numbers,
    forms: int,
    seeds: Tensor,
    num_samples: int | None,
    results: int,
    batch_dims: int,
    reduction: int,
) -> list[Tensor]:
    width = len(inputs) // seeds.numel()
    each = [
        torch.ops.elbo_ext.latent(
            inputs[first : first + width], constants[first : first + width], forms, seeds[:1], None, num_samples, results,
            batch_dims, reduction,
        )
        for first in range(0, len(inputs), width)
    ]  # fmt: skip
    return [*(one[0] for one in each), *each[0][1:]]


@torch.library.register_fake("elbo_ext::latent_list_backward")
def _(
    inputs: Operands,
    constants: Numbers,
    forms: int,
    seeds: Tensor,
    num_samples: int | None,
    results: int,
    batch_dims: int,
    reduction: int,
    grad_z: Operands,
    grad_kl: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    return _gradients(inputs, needs)


@torch.library.register_fake("elbo_ext::categorical_sample")
def _(
    operands: Operands,
    constants: Numbers,
    seed: Tensor | None,
    noise: Tensor | None,
    num_samples: int | None,
    batch_dims: int,
    reduction: int,
) -> list[Tensor]:
    like, shape = _first(operands), _broadcast(operands)
    z = like.new_empty(shape if num_samples is None else (num_samples, *shape))
    return [z, like.new_empty(shape[:batch_dims] if reduction == NONE else (), dtype=value_dtype(*operands))]


@torch.library.register_fake("elbo_ext::categorical_sample_backward")
def _(
    operands: Operands,
    constants: Numbers,
    batch_dims: int,
    reduction: int,
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    return _gradients(operands, needs)


@torch.library.register_fake("elbo_ext::gumbel_noise")
@torch.library.register_fake("elbo_ext::normal_noise")
def _(seed: Tensor, count: int, double_precision: bool, first: int = 0) -> Tensor:
    return seed.new_empty((seed.numel(), count), dtype=torch.float64 if double_precision else torch.float32)


@torch.library.register_fake("elbo_ext::importance_bound")
def _(log_weights: Tensor, with_weights: bool) -> list[Tensor]:
    bound = log_weights.new_empty(log_weights.shape[1:])
    return [bound, torch.empty_like(log_weights)] if with_weights else [bound]


@torch.library.register_fake("elbo_ext::scale_gradients_")
def _(gradients: Sequence[Tensor], factor: Tensor, negated: bool = False) -> None:
    return None
