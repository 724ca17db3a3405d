"""Checks of arguments, each written once. Every error names the argument, what came, and what was expected."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .autograd.torch_internals import is_tracing
from .likelihoods import GAUSSIAN_KL, LikelihoodWithParameters
from .ops import REDUCTIONS

# The arguments for the scale of a Gaussian: the names of its forms in their order, and after them those of its floors.
_FORMS = GAUSSIAN_KL.forms["logvar"]
SCALES = (*_FORMS, *GAUSSIAN_KL.floors["logvar"])
PRIOR_SCALES = tuple(f"prior_{name}" for name in SCALES)
RECON_SCALES = tuple(f"recon_{name}" for name in SCALES)
_DIRECT_SCALES = (_FORMS.index("std"), _FORMS.index("var"))

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DATA_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)  # of data, besides those


def tensor(name: str, value: Any) -> Tensor:
    """A floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{name} must have dtype float32, float64, bfloat16 or float16, got {_dtype(value)}; "
            f"convert it first, for example with {name}.{'dequantize' if value.is_quantized else 'float'}()"
        )
    return dense(name, value)


def data_tensor(name: str, value: Any) -> Tensor:
    """A floating-point tensor, or one of counts or pixels as they come: integers or bool."""
    if isinstance(value, Tensor) and value.dtype in DATA_DTYPES:
        return dense(name, value)
    return tensor(name, value)


def dense(name: str, value: Tensor) -> Tensor:
    """No nested, masked or sparse tensor; each is told what to do with it."""
    if value.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, got a nested tensor; pad it, for example with "
            f"torch.nested.to_padded_tensor({name}, 0.0), and mask what is padded with weight="
        )
    if isinstance(value, torch.masked.MaskedTensor):
        raise TypeError(
            f"{name} must be a dense tensor, got a masked tensor; pass {name}.get_data(), and its mask, {name}.get_mask(), "
            "in weight="
        )
    if value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise TypeError(
            f"{name} must be a dense tensor, got layout {layout}; convert it first, for example with {name}.to_dense()"
        )
    return value


def labels(name: str, value: Any) -> Tensor:
    """Classes: a tensor of an integer dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in DATA_DTYPES:
        raise TypeError(f"{name} must have an integer dtype, got {_dtype(value)}; they are numbers of classes")
    return dense(name, value)


def classes(name: str, value: Any, dim: Any, data: bool = False) -> Tensor:
    """A tensor with one class or more along ``dim``; a floating-point one, unless it is data."""
    checked = data_tensor(name, value) if data else tensor(name, value)
    return _along(name, checked, dim, "class")


def is_number(value: Any) -> bool:
    """Of Python or NumPy; True and False are none."""
    if isinstance(value, (int, float)):
        return not isinstance(value, bool)
    return _is_numpy_number(value)


def _is_numpy_number(value: Any) -> bool:
    if not isinstance(value, (np.number, np.ndarray)) or value.ndim != 0:
        return False
    # To Dynamo it is an array, and the dtype of an array a secret; tensor() looks at it.
    return torch.compiler.is_compiling() or value.dtype.kind in "iuf"


def tensor_or_number(name: str, value: Any) -> Tensor | float:
    """A floating-point tensor, or a number that stands for every element: of Python, of NumPy, or an integer or a bool in a
    tensor without dimensions."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if _is_numpy_number(value):
        if not torch.compiler.is_compiling():
            return float(value)
        value = torch.as_tensor(value)  # may change from call to call
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a number, got {type(value).__name__}")
    return tensor(name, _floating(value) if value.dim() == 0 else value)


def _floating(value: Tensor) -> Tensor:
    """Integers as float32, which does not promote others, as integers do not."""
    return value.float() if value.dtype in _INTEGERS else value


def weight(value: Any, name: str = "weight") -> Tensor | None:
    """Weights, which may be integers, or a boolean mask."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.dtype == torch.bool:
            return dense(name, value)
        value = _floating(value)
    return tensor(name, value)


def beta(value: Any) -> Tensor | float:
    """A factor of the KL: a tensor, whose values are not looked at, or a finite number."""
    checked = tensor_or_number("beta", value)
    return checked if isinstance(checked, Tensor) else number("beta", checked)


def kl_weight(value: Any, mu: Tensor, shape: torch.Size) -> Tensor | None:
    """Weights of the elements of a KL, of which ``shape`` is the posterior's and the prior's joint one."""
    checked = weight(value, "kl_weight")
    if checked is not None:
        on_one_device({"mu": mu}, {"kl_weight": checked})
        broadcasts_to_batch("kl_weight of shape {}", checked, shape, "shape of posterior and prior,")
    return checked


def one_form(
    names: Sequence[str], values: Sequence[Any], positive: Sequence[int] = (), default: float | None = None
) -> tuple[str, Tensor | float, int]:
    """Name, value and number of the one form of an input that is given; names and values in the order of the forms.
    ``positive``: forms whose numbers have to be above 0. ``default``: in the first form, where none is given."""
    chosen = [form for form, value in enumerate(values) if value is not None]
    if default is not None and not chosen:
        return names[0], default, 0
    if len(chosen) != 1:
        found = "none of them" if not chosen else " and ".join(names[form] for form in chosen)
        raise ValueError(f"exactly one of {', '.join(names)} must be given, got {found}")
    form = chosen[0]
    value = tensor_or_number(names[form], values[form])
    if form in positive and isinstance(value, float) and not value > 0:
        raise ValueError(f"{names[form]} must be positive, got {value}")
    return names[form], value, form


def scale(
    names: Sequence[str],
    values: Sequence[Any],
    positive: Sequence[int] = _DIRECT_SCALES,
    default: float | None = None,
) -> tuple[str, Tensor | float, int, float]:
    """Name, value, form and floor of the one scale of a Gaussian that is given; names and values in the order of SCALES, the
    floors last. A number is returned with its floor in it; of a tensor the form says which floor it has, if not 0."""
    count = len(_FORMS)
    chosen, floor = 0, 0.0
    for k in range(count, len(values)):
        if values[k] is None:
            continue
        if chosen:
            raise ValueError(f"at most one of {' and '.join(names[count:])} may be given, got both")
        chosen, floor = k - count + 1, number(names[k], values[k], low=0)
    if chosen and all(value is None for value in values[:count]):
        name = names[count + chosen - 1]
        raise ValueError(f"{name} has no use without a scale; pass one of {', '.join(names[:count])} beside it")
    name, value, form = one_form(names[:count], values[:count], positive, default)
    if floor == 0:
        return name, value, form, 0.0
    if isinstance(value, Tensor):
        return name, value, form + chosen * count, floor
    return name, *_above(floor, chosen == 2, value, form), 0.0


def _above(floor: float, of_variance: bool, value: float, form: int) -> tuple[float, int]:
    """A number for a scale with its floor in it, as var or std, and the number of this form."""
    name = _FORMS[form]
    try:
        if name == "rho":
            std = max(value, 0.0) + math.log1p(math.exp(-abs(value)))
        elif name in ("logvar", "log_std"):
            std = math.exp(value / 2 if name == "logvar" else value)
        else:
            std = value if name == "std" else math.sqrt(value)
        if of_variance:
            return (value if name == "var" else std**2) + floor, _FORMS.index("var")
    except OverflowError:  # no floor to speak of
        return value, form
    return std + floor, _FORMS.index("std")


def bins(low: Any, high: Any, bins: Any, width: Any) -> dict[str, float]:
    """The grid of a discretized likelihood, as its formula takes it: the values of the lowest and the highest bin and half
    the width of all. Without outermost bins, they are infinitely far away."""
    if low is None and high is None:
        return {
            "low": -math.inf,
            "high": math.inf,
            "half_bin": 0.5 if width is None else number("width", width, low=0.0, above=True) / 2,
        }
    if low is None or high is None:
        raise ValueError(f"low and high must be given both, or be None both, got low={low} and high={high}")
    if width is not None:
        raise ValueError(f"width has no use beside low and high, between which bins says it, got {width}")
    low = number("low", low)
    high = number("high", high, low=low, above=True)
    return {"low": low, "high": high, "half_bin": (high - low) / (2 * (count("bins", bins, 2) - 1))}


def broadcast(operands: Mapping[str, Any]) -> torch.Size:
    """The shape that all tensors among the operands broadcast to; they must be on one device."""
    shape = device = None
    recorded = torch.compiler.is_compiling() or is_tracing()
    for name, t in operands.items():
        if not isinstance(t, Tensor):
            continue
        if device is None:
            first_name, device, shape = name, t.device, t.shape
            continue
        if t.device != device:
            raise ValueError(
                f"all tensors must be on one device, got {first_name} on {device} and {name} on {t.device}"
            )
        if shape is not None and (recorded or t.shape != shape):
            shape = _joint(shape, t.shape)
    if recorded and shape is not None and is_tracing():  # sizes that the traced program computes
        shape = torch.broadcast_tensors(*(t for t in operands.values() if isinstance(t, Tensor)))[0].shape
    if shape is None:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in operands.items() if isinstance(t, Tensor))
        raise ValueError(f"shapes do not broadcast: {shapes}")
    return shape


def same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    """Tuples of different lengths are compared by their first elements, too, which would ask whether a dynamic batch size
    equals a number of channels."""
    if len(a) != len(b):
        return False
    return tuple(known_shape(a)) == tuple(known_shape(b)) if is_tracing() else tuple(a) == tuple(b)


def known_shape(shape: Sequence[int]) -> Sequence[int]:
    """The sizes as they are in a trace, where they are tensors; without torch's warning, as they only decide upon errors."""
    if not is_tracing():
        return shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return torch.Size(map(int, shape))


def _joint(a: torch.Size, b: torch.Size) -> torch.Size | None:
    a, b = torch.Size(known_shape(a)), torch.Size(known_shape(b))
    if len(a) < len(b):
        a, b = b, a
    lead = len(a) - len(b)
    joint = list(a)
    for i, size in enumerate(b, lead):
        if _holds(joint[i] == 1):
            joint[i] = size
        elif not _holds(size == 1) and _holds(size != joint[i]):
            return None
    return torch.Size(joint)


def _holds(comparison: bool | torch.SymBool) -> bool:
    """Of sizes; not if that depends on data, as in exported code, where a kernel's own check has to do."""
    if not torch.compiler.is_compiling():
        return bool(comparison)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # only then: it imports sympy

    return guard_or_false(comparison)


def at_most_one_broadcasts(recon: Tensor, x: Tensor) -> None:
    """One of the two may repeat, as data does over several samples; both against each other are a forgotten dimension."""
    joint = None if same_shape(recon.shape, x.shape) else _joint(recon.shape, x.shape)
    if joint is not None and not same_shape(joint, recon.shape) and not same_shape(joint, x.shape):
        raise ValueError(
            f"recon of shape {tuple(recon.shape)} and x of shape {tuple(x.shape)} both repeat, to {tuple(joint)}; "
            "at most one of them may"
        )


def on_one_device(first: Mapping[str, Tensor], others: Mapping[str, Any]) -> None:
    """Tensors on the device of the first one."""
    ((name, like),) = first.items()
    for other, t in others.items():
        if isinstance(t, Tensor) and t.device != like.device:
            raise ValueError(
                f"all tensors must be on one device, got {name} on {like.device} and {other} on {t.device}"
            )


def recon_scales(likelihood: LikelihoodWithParameters, scales: Mapping[str, Any]) -> dict[str, Any]:
    """The scales recon_logvar, ... by their names without recon_: for a Gaussian without parameters of its own."""
    given = {name.removeprefix("recon_"): value for name, value in scales.items() if value is not None}
    of_term = likelihood.likelihood
    known = {form for forms in (*of_term.forms_of_inputs, *of_term.floors_of_inputs) for form in forms}
    for name in given:
        if name not in known:
            of_decoder = of_term.forms.get(of_term.decoder, (of_term.decoder,))
            others = [form for form in known if form not in ("x", *of_decoder, *of_term.numbers)]
            reason = (
                f"; pass likelihoods.{of_term.class_name}({min(others)}=...) instead"
                if others
                else ", which has no scale"
            )
            raise ValueError(f"recon_{name} has no meaning for likelihood={of_term.name!r}{reason}")
        if likelihood.parameters:
            raise ValueError(f"recon_{name} has no use beside {likelihood!r}, which has its parameters already")
    return given


def broadcasts_to_batch(
    description: str,
    value: Any,
    batch: torch.Size,
    target: str = "batch shape",
    operands: Mapping[str, Any] | None = None,
) -> None:
    """One number per example, or fewer; a Python number always is. ``{}`` in the description stands for the shape, and
    ``operands`` have made the batch what it is."""
    if not isinstance(value, Tensor) or same_shape(value.shape, batch):
        return
    joint = _joint(batch, value.shape)
    if joint is None or not same_shape(joint, batch):
        described = description.format(tuple(value.shape))
        of_operand = _larger_than_recon(operands or {})
        raise ValueError(f"{described} does not broadcast to the {target} {tuple(batch)}{of_operand}")


def _larger_than_recon(operands: Mapping[str, Any]) -> str:
    """Names a parameter or a weight that has axes which recon and x lack: not the KL's shape is the mistake then."""
    tensors = {name: t for name, t in operands.items() if isinstance(t, Tensor)}
    dims = max((t.dim() for name, t in tensors.items() if name in ("recon", "x")), default=0)
    for name, t in tensors.items():
        if t.dim() > dims:
            return f", the first axes of {name}, which has shape {tuple(t.shape)}, more axes than recon and x"
    return ""


def batch_dims(value: Any, shape: torch.Size) -> int:
    """A number of leading dimensions of a shape."""
    checked = _int("batch_dims", value)
    if not 0 <= checked <= len(shape):
        raise ValueError(
            f"batch_dims must be between 0 and {len(shape)}, the number of dimensions of {tuple(shape)}, got {checked}"
        )
    return checked


def _int(name: str, value: Any, expected: str = "an int") -> int:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    return value if isinstance(value, int) else int(value)


def reduction(value: Any) -> int:
    """One of none, sum and mean, as the number of the operator schema."""
    if not isinstance(value, str) or value not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'sum' or 'mean', got {value!r}")
    return REDUCTIONS[value]


def generator(value: Any, shape: torch.Size) -> None:
    """None, a generator, or one for each example along the first dimension of a sample's ``shape``."""
    if value is None or isinstance(value, torch.Generator):
        return
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"generator must be a torch.Generator, a list of them, or None, got {type(value).__name__}")
    for one in value:
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator must be a list of torch.Generator, got one of {type(one).__name__}")
    if not shape or len(value) != shape[0]:
        raise ValueError(
            f"generator must be a list of one for each example of the joint shape {tuple(shape)}, got {len(value)} of them"
        )


def one_generator(value: Any) -> None:
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(value).__name__}")


def num_samples(value: Any) -> int | None:
    if value is None:
        return None
    checked = _int("num_samples", value, "an int or None")
    if checked < 0:
        raise ValueError(f"num_samples must not be negative, got {checked}")
    return checked


def number(name: str, value: Any, *, low: float = -math.inf, above: bool = False, high: float = math.inf) -> float:
    """A finite number of at least ``low``, or ``above`` it, and at most ``high``, of Python or NumPy; or an
    integer in a tensor without dimensions, for which the tensor's device is waited for."""
    if isinstance(value, Tensor) and value.dim() == 0 and value.dtype in _INTEGERS:
        value = int(value)
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    checked = float(value)
    # In arithmetic that Dynamo traces for a number that changes from call to call, where math.isfinite would stop it.
    finite = checked - checked == 0
    if not finite or (low > -math.inf and not (checked > low if above else checked >= low)):
        bound = "" if low == -math.inf else f" {'above' if above else 'of at least'} {low:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {value}")
    if high < math.inf and checked > high:
        raise ValueError(f"{name} must be at most {high:g}, got {value}")
    return checked


def integer(name: str, value: Any) -> int:
    return _int(name, value)


def count(name: str, value: Any, low: int = 1) -> int:
    checked = _int(name, value)
    if checked < low:
        raise ValueError(f"{name} must be at least {low}, got {checked}")
    return checked


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return value


def keywords(given: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise TypeError(f"{name} is not an argument here; beside the others there are {', '.join(known)}")


def samples(name: str, value: Any, dim: Any = 0) -> Tensor:
    """A floating-point tensor with at least one sample along ``dim``."""
    return _along(name, tensor(name, value), dim, "sample")


def _along(name: str, value: Tensor, dim: Any, what: str) -> Tensor:
    """A tensor that has one element or more along an axis, which ``what`` calls them."""
    dim = _int("dim", dim)
    shape = tuple(known_shape(value.shape))
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim must be an axis of {name}, which has shape {shape}, got {dim}")
    if shape[dim] < 1:
        raise ValueError(f"{name} must have at least one {what} along dim {dim}, got shape {shape}")
    return value


def examples(name: str, value: Any, batch_dims: int, low: int = 1) -> Tensor:
    """A floating-point tensor with at least ``low`` examples in its leading ``batch_dims`` dimensions."""
    checked = tensor(name, value)
    shape = tuple(known_shape(checked.shape))
    if math.prod(shape[:batch_dims]) < low:
        raise ValueError(f"{name} must have at least {low} example{'s' * (low > 1)}, got shape {shape}")
    return checked


def _dtype(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")
