"""Every kind of bad input: the type of the error and its whole message, for every public function."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import elbo_ext
from elbo_ext import (
    ELBOLoss,
    bernoulli_log_prob,
    bounds,
    discretized_gaussian_log_prob,
    elbo_loss,
    gaussian_kl,
    gaussian_log_prob,
    laplace_log_prob,
    likelihoods,
    reference,
    rsample,
    rsample_kl,
    rsample_with_log_prob,
)
from elbo_ext.arguments import DATA_DTYPES
from elbo_ext.likelihoods import LIKELIHOODS
from samples import OVER_CLASSES
from samples.registry import function_of, tensor_inputs

A = torch.full((2, 3), 0.5)  # valid as anything: data, mean, logits, each form of a scale
ROWS = torch.full((2,), 0.5)  # one number per example
FORMS = ("logvar", "log_std", "std", "var", "rho")
FLOORS = ("min_std", "min_var")
DTYPE_MESSAGE = (
    "{name} must have dtype float32, float64, bfloat16 or float16, got {dtype}; "
    "convert it first, for example with {name}.float()"
)


def kl_of_elbo(**arguments: Any) -> elbo_ext.ELBO:
    return elbo_loss(A, A, **arguments)


def module(recon: Tensor, x: Tensor, recon_logvar: Any, **arguments: Any) -> elbo_ext.ELBO:
    return ELBOLoss(recon_logvar=recon_logvar, batch_dims=arguments.pop("batch_dims", 1))(recon, x, **arguments)


# One valid call of each function, with every operand a tensor, in the order in which messages name them. The bad calls
# below change one argument of it.
VALID: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "rsample": (rsample, dict(mu=A, logvar=A)),
    "rsample_kl": (rsample_kl, dict(mu=A, logvar=A, prior_mu=A, prior_logvar=A)),
    "rsample_with_log_prob": (rsample_with_log_prob, dict(mu=A, logvar=A, prior_mu=A, prior_logvar=A)),
    "gaussian_kl": (gaussian_kl, dict(mu=A, logvar=A, prior_mu=A, prior_logvar=A, weight=A)),
    **{
        f"{name}_log_prob": (function_of(likelihood), dict.fromkeys([*tensor_inputs(likelihood), "weight"], A))
        for name, likelihood in LIKELIHOODS.items()
        if not likelihood.over_classes  # which have tests of their own: test_class_arguments.py
    },
    "elbo_loss-computed": (elbo_loss, dict(log_likelihood=ROWS, mu=A, logvar=A)),
    "elbo_loss-likelihood": (elbo_loss, dict(x=A, recon=A, recon_logvar=A, weight=A, kl=ROWS)),
    "elbo_loss-bernoulli": (elbo_loss, dict(x=A, recon=A, weight=A, kl=ROWS, likelihood="bernoulli")),
    "elbo_loss-posterior": (kl_of_elbo, dict(mu=A, logvar=A, prior_mu=A, prior_logvar=A)),
    "ELBOLoss": (module, dict(x=A, recon=A, recon_logvar=A, weight=A, kl=ROWS)),
}
# Operands that a number may stand for.
NUMBERS = {"logvar", "prior_mu", "prior_logvar", "recon_logvar", "beta", "kl"}
NUMBERS |= {name for likelihood in LIKELIHOODS.values() for name in tensor_inputs(likelihood)} - {"x"}
# Arguments that are no operands of the joint shape.
APART = {"kl", "likelihood", "log_likelihood"}

OPERANDS = [
    (case, name) for case, (_, valid) in VALID.items() for name, value in valid.items() if isinstance(value, Tensor)
]
BROADCAST = [(case, name) for case, name in OPERANDS if name not in APART]


def call(case: str, **changes: Any) -> Any:
    function, valid = VALID[case]
    return function(**{**valid, **changes})


def assert_error(error: type[Exception], message: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(error) as raised:
        function(*args, **kwargs)
    assert type(raised.value) is error
    assert str(raised.value) == message


@pytest.mark.parametrize("case", VALID)
def test_the_valid_calls_are_valid(case: str) -> None:
    """Otherwise the tests below would prove nothing about the argument they change."""
    call(case)


def test_every_tensor_argument_is_tested() -> None:
    """An argument that someone adds to a function has to be added to VALID, or here."""
    elsewhere = {
        "noise",
        "beta",
        "kl_weight",
        "scale",
        *FORMS,
        *(f"prior_{form}" for form in FORMS),
        *(f"recon_{form}" for form in FORMS),
        *(form for likelihood in LIKELIHOODS.values() for forms in likelihood.forms_of_inputs for form in forms[1:]),
    }
    for name in elbo_ext.__all__:
        function = getattr(elbo_ext, name)
        if not inspect.isfunction(function) or name == "build_info" or name in OVER_CLASSES:
            continue
        annotated = {n for n, p in inspect.signature(function).parameters.items() if "Tensor" in str(p.annotation)}
        covered = {argument for case, argument in OPERANDS if case.split("-")[0] == name}
        assert annotated - covered - elsewhere == set(), name


# ---- what is no floating-point tensor ----


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("case", "name"), OPERANDS)
def test_dtype(case: str, name: str, dtype: torch.dtype) -> None:
    value = VALID[case][1][name].to(dtype)
    if name == "weight" and dtype in (torch.bool, torch.int64, torch.uint8):
        call(case, weight=value)  # a mask is welcome
        return
    if name == "x" and dtype in DATA_DTYPES:
        call(case, x=value)  # so are counts and pixels as they come; their values are tested in test_values.py
        return
    message = DTYPE_MESSAGE.format(name=name, dtype=str(dtype).removeprefix("torch."))
    assert_error(TypeError, message, call, case, **{name: value})


@pytest.mark.parametrize("value", [[0.5, 0.5], np.zeros(3), "0.5", True, 0.5, 1j, np.float32(0.5), A.shape], ids=repr)
@pytest.mark.parametrize(("case", "name"), OPERANDS)
def test_not_a_tensor(case: str, name: str, value: Any) -> None:
    if name in NUMBERS and type(value) in (float, np.float32):
        call(case, **{name: value})
        return
    expected = "a torch.Tensor or a number" if name in NUMBERS else "a torch.Tensor"
    assert_error(TypeError, f"{name} must be {expected}, got {type(value).__name__}", call, case, **{name: value})


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (rsample, dict(mu=None, logvar=A), "mu"),
        (gaussian_kl, dict(mu=None, logvar=A), "mu"),
        (rsample_kl, dict(mu=None, logvar=A), "mu"),
        (gaussian_log_prob, dict(x=None, mean=A), "x"),
        (bernoulli_log_prob, dict(x=None, logits=A), "x"),
        (elbo_loss, dict(recon=None, x=A, kl=ROWS), "recon"),
        (elbo_loss, dict(recon=A, x=None, kl=ROWS), "x"),
    ],
)
def test_none_where_a_tensor_is_needed(function: Callable[..., Any], arguments: dict[str, Any], name: str) -> None:
    assert_error(TypeError, f"{name} must be a torch.Tensor, got NoneType", function, **arguments)


def test_none_where_a_mean_is_needed() -> None:
    assert_error(TypeError, "mean must be a torch.Tensor or a number, got NoneType", gaussian_log_prob, A, None)
    assert_error(TypeError, "logits must be a torch.Tensor or a number, got NoneType", bernoulli_log_prob, A, None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("function", "arguments", "prefix"),
    [
        (rsample, dict(mu=A), ""),
        (rsample_kl, dict(mu=A), ""),
        (rsample_kl, dict(mu=A, logvar=A), "prior_"),
        (gaussian_kl, dict(mu=A), ""),
        (gaussian_kl, dict(mu=A, logvar=A), "prior_"),
        (gaussian_log_prob, dict(x=A, mean=A), ""),
        (elbo_loss, dict(recon=A, x=A, kl=ROWS), "recon_"),
        (elbo_loss, dict(recon=A, x=A, mu=A), ""),
        (elbo_loss, dict(recon=A, x=A, mu=A, logvar=A), "prior_"),
        (ELBOLoss, dict(), "recon_"),
    ],
)
def test_value_of_a_scale(function: Callable[..., Any], arguments: dict[str, Any], prefix: str, form: str) -> None:
    """Each keyword of a scale is checked under its own name, and as a number > 0 where it says sigma or its square."""
    name = prefix + form
    value: Any = torch.ones(3, dtype=torch.int32)
    assert_error(TypeError, DTYPE_MESSAGE.format(name=name, dtype="int32"), function, **{**arguments, name: value})
    for value in ("1", True, [1.0]):
        message = f"{name} must be a torch.Tensor or a number, got {type(value).__name__}"
        assert_error(TypeError, message, function, **{**arguments, name: value})
    for value in (0, 0.0, -1, -0.5, float("nan"), float("-inf")):
        if form in ("std", "var"):
            message = f"{name} must be positive, got {float(value)}"
            assert_error(ValueError, message, function, **{**arguments, name: value})
        else:
            function(**{**arguments, name: value})  # any logarithm will do
    function(**{**arguments, name: 2})


# ---- the number of scales ----


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (rsample, dict(mu=A)),
        (rsample_kl, dict(mu=A)),
        (gaussian_kl, dict(mu=A)),
        (elbo_loss, dict(recon=A, x=A, mu=A)),
        (ELBOLoss(), dict(recon=A, x=A, mu=A)),
    ],
    ids=["rsample", "rsample_kl", "gaussian_kl", "elbo_loss", "ELBOLoss"],
)
def test_no_scale(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    message = "exactly one of logvar, log_std, std, var, rho must be given, got none of them"
    assert_error(ValueError, message, function, **arguments)


@pytest.mark.parametrize(
    ("function", "arguments", "prefix"),
    [
        (rsample, dict(mu=A), ""),
        (rsample_kl, dict(mu=A), ""),
        (rsample_kl, dict(mu=A, logvar=A), "prior_"),
        (gaussian_kl, dict(mu=A), ""),
        (gaussian_kl, dict(mu=A, std=1.0), "prior_"),
        (gaussian_log_prob, dict(x=A, mean=A), ""),
        (discretized_gaussian_log_prob, dict(x=A, mean=A), ""),
        (elbo_loss, dict(recon=A, x=A, mu=A), ""),
        (elbo_loss, dict(recon=A, x=A, mu=A, logvar=A), "prior_"),
        (elbo_loss, dict(recon=A, x=A, kl=ROWS), "recon_"),
        (elbo_loss, dict(recon=A, x=A, kl=ROWS, likelihood="discretized_gaussian"), "recon_"),
        (ELBOLoss, dict(), "recon_"),
        (ELBOLoss(), dict(recon=A, x=A, kl=ROWS), "recon_"),
        (ELBOLoss(recon_std=2.0), dict(recon=A, x=A, mu=A, logvar=A), "prior_"),
        (likelihoods.Gaussian, dict(), ""),
        (likelihoods.DiscretizedGaussian, dict(), ""),
    ],
)
def test_several_scales(function: Callable[..., Any], arguments: dict[str, Any], prefix: str) -> None:
    logvar, log_std, std, var, rho = (prefix + form for form in FORMS)
    start = f"exactly one of {logvar}, {log_std}, {std}, {var}, {rho} must be given, got "
    assert_error(ValueError, start + f"{logvar} and {std}", function, **arguments, **{logvar: A, std: 1.0})
    assert_error(ValueError, start + f"{log_std} and {var}", function, **arguments, **{log_std: 0, var: A})
    three = {var: 1.0, logvar: 0.0, std: 1.0}
    assert_error(ValueError, start + f"{logvar} and {std} and {var}", function, **arguments, **three)


# ---- floors ----

FLOORED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (rsample, dict(mu=A), ""),
    (rsample_kl, dict(mu=A), ""),
    (rsample_kl, dict(mu=A, logvar=A), "prior_"),
    (rsample_with_log_prob, dict(mu=A), ""),
    (rsample_with_log_prob, dict(mu=A, rho=A), "prior_"),
    (gaussian_kl, dict(mu=A), ""),
    (gaussian_kl, dict(mu=A, std=1.0), "prior_"),
    (gaussian_log_prob, dict(x=A, mean=A), ""),
    (discretized_gaussian_log_prob, dict(x=A, mean=A), ""),
    (elbo_loss, dict(recon=A, x=A, mu=A), ""),
    (elbo_loss, dict(recon=A, x=A, mu=A, logvar=A), "prior_"),
    (elbo_loss, dict(recon=A, x=A, kl=ROWS), "recon_"),
    (elbo_loss, dict(recon=A, x=A, kl=ROWS, likelihood="discretized_gaussian"), "recon_"),
    (ELBOLoss, dict(), "recon_"),
    (ELBOLoss(), dict(recon=A, x=A, mu=A), ""),
    (likelihoods.Gaussian, dict(), ""),
    (likelihoods.DiscretizedGaussian, dict(low=None, high=None), ""),
]


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize(("function", "arguments", "prefix"), FLOORED)
def test_value_of_a_floor(function: Callable[..., Any], arguments: dict[str, Any], prefix: str, floor: str) -> None:
    name, scale = prefix + floor, {prefix + "rho": A}
    for value in (A, "1", True, [1.0]):
        message = f"{name} must be a number, got {type(value).__name__}"
        assert_error(TypeError, message, function, **arguments, **scale, **{name: value})
    for value in (-0.5, float("nan"), float("inf")):
        message = f"{name} must be a finite number of at least 0, got {value}"
        assert_error(ValueError, message, function, **arguments, **scale, **{name: value})
    function(**arguments, **scale, **{name: 1})
    function(**arguments, **{prefix + "std": 0.5, name: 0.0})


@pytest.mark.parametrize("floor", FLOORS)
@pytest.mark.parametrize(("function", "arguments", "prefix"), FLOORED)
def test_a_floor_without_a_scale(
    function: Callable[..., Any], arguments: dict[str, Any], prefix: str, floor: str
) -> None:
    message = f"{prefix + floor} has no use without a scale; pass one of {', '.join(prefix + form for form in FORMS)} beside it"
    assert_error(ValueError, message, function, **arguments, **{prefix + floor: 0.1})


@pytest.mark.parametrize(("function", "arguments", "prefix"), FLOORED)
def test_two_floors(function: Callable[..., Any], arguments: dict[str, Any], prefix: str) -> None:
    both = {prefix + "std": A, prefix + "min_std": 0.1, prefix + "min_var": 0.1}
    message = f"at most one of {prefix}min_std and {prefix}min_var may be given, got both"
    assert_error(ValueError, message, function, **arguments, **both)


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_elsewhere(floor: str) -> None:
    """Where there is no Gaussian scale, and in a likelihood object."""
    message = f"recon_{floor} has no meaning for likelihood='bernoulli', which has no scale"
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, likelihood="bernoulli", **{"recon_" + floor: 0.1})
    message = f"{floor} has no use beside kl, which is computed already"
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, **{floor: 0.1})
    for likelihood in (likelihoods.Gaussian, likelihoods.DiscretizedGaussian):
        with_floor = likelihood(rho=A, **{floor: 0.1})
        loss = elbo_loss(A, A, kl=ROWS, likelihood=with_floor).loss
        assert loss == elbo_loss(A, A, kl=ROWS, likelihood=likelihood, recon_rho=A, **{"recon_" + floor: 0.1}).loss
        assert loss == ELBOLoss(with_floor)(A, A, kl=ROWS).loss != elbo_loss(A, A, kl=ROWS, likelihood=likelihood).loss
    message = f"{floor} is no parameter of the laplace likelihood, which takes log_scale, scale"
    assert_error(TypeError, message, likelihoods.Laplace, **{floor: 0.1})


def test_a_scale_of_the_call_beside_that_of_the_module() -> None:
    message = (
        "exactly one of recon_logvar, recon_log_std, recon_std, recon_var, recon_rho must be given, "
        "got recon_std and recon_var"
    )
    assert_error(ValueError, message, ELBOLoss(recon_std=2.0), A, A, kl=ROWS, recon_var=1.0)


# ---- shapes and devices ----


@pytest.mark.parametrize(("case", "name"), BROADCAST)
def test_shapes_that_do_not_broadcast(case: str, name: str) -> None:
    shapes = {n: (4,) if n == name else (2, 3) for c, n in BROADCAST if c == case}
    listed = ", ".join(f"{n} {shape}" for n, shape in shapes.items())
    assert_error(ValueError, f"shapes do not broadcast: {listed}", call, case, **{name: torch.ones(4)})


def test_shapes_that_broadcast_only_in_pairs() -> None:
    """[2, 1] with [1, 3] gives [2, 3]; a third operand has to go with that, not with the two."""
    arguments = dict(x=torch.ones(2, 1), mean=torch.ones(1, 3), logvar=torch.ones(3, 3))
    message = "shapes do not broadcast: x (2, 1), mean (1, 3), logvar (3, 3)"
    assert_error(ValueError, message, gaussian_log_prob, **arguments)


def test_empty_does_not_broadcast_with_several() -> None:
    message = "shapes do not broadcast: mu (0, 3), logvar (2, 3)"
    assert_error(ValueError, message, rsample, torch.ones(0, 3), A)


@pytest.mark.parametrize(("case", "name"), BROADCAST)
def test_devices(case: str, name: str) -> None:
    """The meta device stands for another one: it is there on every machine."""
    first, second = [n for c, n in BROADCAST if c == case][:2]
    on = {n: "meta" if n == name else "cpu" for n in (first, second, name)}
    other = second if name == first else name
    message = f"all tensors must be on one device, got {first} on {on[first]} and {other} on {on[other]}"
    assert_error(ValueError, message, call, case, **{name: A.to("meta")})


X, META = torch.zeros(2, 3), torch.zeros(2, 3, device="meta")
SEED, ROW = torch.zeros(1, dtype=torch.int64), torch.zeros(2)
TERM = ([0.0, 0.0, 0.0, 1.0], 0, 1)  # of a Gaussian
LATENT = ([X, X], [0.0, 0.0], 0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("term_sum", (0, [X, META, None, None], *TERM, 0)),
        ("term_sum", (0, [X, X, None, META], *TERM, 0)),
        ("term_sum_backward", (0, [X, X, None, None], *TERM, 0, ROW.to("meta"), [True] * 4)),
        ("elbo_with_gradients", (0, [X, X, None, None], *TERM, 1, ROW.to("meta"), 1.0, [True] * 4)),
        ("latent", ([X, META], *LATENT[1:], SEED, None, None, 0, 1, 0)),
        ("latent", (*LATENT, SEED.to("meta"), None, None, 0, 1, 0)),
        ("latent", (*LATENT, None, META, None, 0, 1, 0)),
        ("latent_backward", (*LATENT, SEED, None, None, 0, 1, 0, META, None, None, None, [True] * 3)),
        ("elbo_backward", ([META], ROW, None, None, None, 1.0)),
        ("elbo_backward", ([X], ROW, ROW[0].to("meta"), None, None, 1.0)),
        ("scale_gradients_", ([X, META], torch.ones(()))),
    ],
)
def test_operators_on_several_devices(name: str, arguments: tuple) -> None:
    """The operators themselves, which would read memory of another device. A meta tensor stands in for one there."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=r"elbo_ext: .+ was given tensors on several devices; one is expected"):
        getattr(torch.ops.elbo_ext, name).default.redispatch(keys, *arguments)


def test_devices_of_the_two_parts_of_the_loss() -> None:
    meta = A.to("meta")
    message = "all tensors must be on one device, got recon on cpu and {} on meta"
    assert_error(ValueError, message.format("kl"), elbo_loss, A, A, kl=ROWS.to("meta"))
    assert_error(ValueError, message.format("beta"), elbo_loss, A, A, kl=ROWS, beta=ROWS.to("meta"))
    assert_error(ValueError, message.format("mu"), elbo_loss, A, A, meta, 0.0)
    message = "all tensors must be on one device, got recon on meta and mu on cpu"
    assert_error(ValueError, message, elbo_loss, meta, meta, A, 0.0)


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(2, 3), torch.ones(1, 2)])
@pytest.mark.parametrize("name", ["kl", "beta"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_one_number_per_example(name: str, value: Tensor, reduction: str) -> None:
    arguments = {"kl": ROWS, name: value, "reduction": reduction}
    message = f"{name} of shape {tuple(value.shape)} does not broadcast to the batch shape (2,)"
    assert_error(ValueError, message, elbo_loss, A, A, **arguments)
    assert_error(ValueError, message, ELBOLoss(), A, A, **arguments)


@pytest.mark.parametrize("name", ["scale", "recon_std", "weight"])
def test_a_parameter_that_is_larger_than_recon(name: str) -> None:
    """Not the KL is at fault."""
    larger = torch.ones(5, 2, 3)
    message = (
        f"kl of shape (2,) does not broadcast to the batch shape (5,), the first axes of {name}, "
        "which has shape (5, 2, 3), more axes than recon and x"
    )
    options = {"likelihood": likelihoods.Laplace(scale=larger)} if name == "scale" else {name: larger}
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, **options)


def test_a_posterior_of_another_batch() -> None:
    """The KL is not the caller's argument: the message has to name what the caller passed."""
    message = "the KL of mu and its scale has shape {}, which does not broadcast to the batch shape {}"
    assert_error(ValueError, message.format((3,), (2,)), elbo_loss, A, A, torch.ones(3, 4), 0.0)
    assert_error(ValueError, message.format((5,), (5, 2)), elbo_loss, A.expand(5, 2, 3), A, A.expand(5, 2, 3), 0.0,
                 batch_dims=2)  # fmt: skip


def test_data_without_a_batch_beside_a_posterior_with_one() -> None:
    """The KL would be summed over the examples, and the total given to each."""
    message = (
        "x of shape (3,) has no batch dimension, so that those of mu, of shape (2, 4), "
        "are taken for latent ones; expand x to the batch, or pass kl"
    )
    assert_error(ValueError, message, elbo_loss, A, A[0], torch.ones(2, 4), 0.0)


def test_recon_and_x_that_repeat_against_each_other() -> None:
    """The classic forgotten channel dimension would score every image against every other."""
    message = "recon of shape (2, 1, 3) and x of shape (2, 3) both repeat, to (2, 2, 3); at most one of them may"
    assert_error(ValueError, message, elbo_loss, A[:, None], A, kl=ROWS)


# ---- options ----


OPTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    name: case for name, case in VALID.items() if name not in ("rsample", "elbo_loss-posterior")
}


@pytest.mark.parametrize("value", [1.0, "1", None, True, torch.tensor(1), np.float64(1), [1]], ids=repr)
@pytest.mark.parametrize("case", OPTIONS)
def test_batch_dims_is_an_int(case: str, value: Any) -> None:
    assert_error(TypeError, f"batch_dims must be an int, got {type(value).__name__}", call, case, batch_dims=value)


@pytest.mark.parametrize("value", [-1, 3, 10**20])
@pytest.mark.parametrize("case", OPTIONS)
def test_batch_dims_in_range(case: str, value: int) -> None:
    message = f"batch_dims must be between 0 and 2, the number of dimensions of (2, 3), got {value}"
    if case == "ELBOLoss" and value < 0:  # where the module is made, which knows no shape
        message = f"batch_dims must be at least 0, got {value}"
    assert_error(ValueError, message, call, case, batch_dims=value)


def test_batch_dims_of_a_number() -> None:
    message = "batch_dims must be between 0 and 0, the number of dimensions of (), got 1"
    assert_error(ValueError, message, gaussian_kl, torch.tensor(0.5), 0.0)


def test_batch_dims_counts_the_axis_of_samples() -> None:
    """The caller's number, not the one that is left for the posterior."""
    recon = A.expand(5, 2, 3)
    message = "batch_dims must be at least 1, the number of axes of samples that recon has beyond x, got 0"
    assert_error(ValueError, message, elbo_loss, recon, A, A, 0.0, batch_dims=0)


@pytest.mark.parametrize("value", ["avg", "Mean", "", None, 0, ["mean"], {}], ids=repr)
@pytest.mark.parametrize("case", [case for case in OPTIONS if case not in ("ELBOLoss", "rsample_with_log_prob")])
def test_reduction(case: str, value: Any) -> None:
    message = f"reduction must be 'none', 'sum' or 'mean', got {value!r}"
    assert_error(ValueError, message, call, case, reduction=value)


@pytest.mark.parametrize("value", ["reparameterized", "Score", "", None, 0, ["score"]], ids=repr)
def test_gradient(value: Any) -> None:
    message = f"gradient must be 'pathwise' or 'sticking_the_landing' or 'score', got {value!r}"
    assert_error(ValueError, message, rsample_with_log_prob, A, A, gradient=value)


@pytest.mark.parametrize("value", ["weibull", "Gaussian", "", None, 0, ["gaussian"], {}], ids=repr)
def test_likelihood(value: Any) -> None:
    *names, last = map(repr, LIKELIHOODS)
    names = f"{', '.join(names)} or {last}, or an object of elbo_ext.likelihoods"
    message = f"likelihood must be {names}, got {value!r}"
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, likelihood=value)
    assert_error(ValueError, message, ELBOLoss, value)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.5, A])
def test_a_scale_for_the_bernoulli(form: str, value: Any) -> None:
    message = f"recon_{form} has no meaning for likelihood='bernoulli', which has no scale"
    scale = {"recon_" + form: value}
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, likelihood="bernoulli", **scale)
    assert_error(ValueError, message, ELBOLoss, "bernoulli", **scale)
    assert_error(ValueError, message, ELBOLoss("bernoulli"), A, A, kl=ROWS, **scale)


@pytest.mark.parametrize("function", [elbo_loss, ELBOLoss(), ELBOLoss("bernoulli")], ids=["function", "module", "bits"])
def test_kl_or_mu(function: Callable[..., Any]) -> None:
    message = "exactly one of kl and mu must be given, got {}"
    assert_error(ValueError, message.format("neither"), function, A, A)
    assert_error(ValueError, message.format("neither"), function, A, A, logvar=A)
    assert_error(ValueError, message.format("both"), function, A, A, A, A, kl=ROWS)
    assert_error(ValueError, message.format("both"), function, A, A, mu=A, kl=ROWS)


@pytest.mark.parametrize("function", [rsample_kl, rsample_with_log_prob, kl_of_elbo])
def test_kl_weight(function: Callable[..., Any]) -> None:
    function(mu=A, logvar=A, kl_weight=A > 0)
    message = DTYPE_MESSAGE.format(name="kl_weight", dtype="complex64")
    assert_error(TypeError, message, function, mu=A, logvar=A, kl_weight=A.to(torch.complex64))
    message = "kl_weight must be a torch.Tensor, got float"
    assert_error(TypeError, message, function, mu=A, logvar=A, kl_weight=0.5)
    for shape in ((3, 2), (4, 2, 3)):  # z would have no shape, or more than its parameters
        message = f"kl_weight of shape {shape} does not broadcast to the shape of posterior and prior, (2, 3)"
        assert_error(ValueError, message, function, mu=A, logvar=A[0], kl_weight=torch.ones(shape))
    message = "kl_weight has no use beside kl, which is computed already"
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, kl_weight=A)
    message = "all tensors must be on one device, got mu on cpu and kl_weight on meta"
    assert_error(ValueError, message, function, mu=A, logvar=A, kl_weight=A.to("meta"))


@pytest.mark.parametrize("name", [*FORMS, *FLOORS, "prior_mu", *(f"prior_{form}" for form in (*FORMS, *FLOORS))])
def test_what_has_no_use_beside_kl(name: str) -> None:
    message = f"{name} has no use beside kl, which is computed already"
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, **{name: A})
    assert_error(ValueError, message, ELBOLoss(), A, A, kl=ROWS, **{name: 1.0})


def test_several_that_have_no_use_beside_kl() -> None:
    message = "logvar and prior_mu have no use beside kl, which is computed already"
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, logvar=A, prior_mu=0.0)


@pytest.mark.parametrize("value", ["1", None, True, [1.0]], ids=repr)
def test_beta(value: Any) -> None:
    message = f"beta must be a torch.Tensor or a number, got {type(value).__name__}"
    assert_error(TypeError, message, elbo_loss, A, A, kl=ROWS, beta=value)


@pytest.mark.parametrize("value", [torch.ones(2, dtype=torch.int64), torch.ones((), dtype=torch.complex64)], ids=str)
def test_dtype_of_beta(value: Tensor) -> None:
    message = DTYPE_MESSAGE.format(name="beta", dtype=str(value.dtype).removeprefix("torch."))
    assert_error(TypeError, message, elbo_loss, A, A, kl=ROWS, beta=value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), np.float32("nan")], ids=repr)
def test_beta_is_finite(value: Any) -> None:
    message = f"beta must be a finite number, got {float(value)}"
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, beta=value)
    assert_error(ValueError, message, ELBOLoss, beta=value)
    elbo_loss(A, A, kl=ROWS, beta=torch.tensor(value))  # whose value is not looked at


def test_options_of_the_module_when_it_is_made() -> None:
    assert_error(TypeError, "beta must be a torch.Tensor or a number, got str", ELBOLoss, beta="1")
    assert_error(TypeError, "batch_dims must be an int, got float", ELBOLoss, batch_dims=1.0)


# ---- numbers of other kinds ----

KINDS = [
    np.float32,
    np.float64,
    np.float16,
    np.int64,
    np.uint8,
    np.array,
    torch.tensor,
    lambda v: torch.tensor(bool(v)),
]


@pytest.mark.parametrize("kind", KINDS, ids=["float32", "float64", "float16", "int64", "uint8", "0-dim", "int", "bool"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_numbers_of_other_kinds(kind: Callable[[int], Any], dtype: torch.dtype) -> None:
    """They are what the Python number is, in value and dtype."""
    a, one = A.to(dtype), kind(1)
    for function, arguments in (
        (rsample, dict(mu=a, noise=a, logvar=1)),
        (gaussian_kl, dict(mu=a, std=1, prior_mu=1, prior_var=1)),
        (gaussian_log_prob, dict(x=a, mean=1, log_std=1)),
        (laplace_log_prob, dict(x=a, mean=a, scale=1)),
        (elbo_loss, dict(recon=a, x=a, mu=a, var=1, beta=1, recon_var=1)),
        (elbo_loss, dict(recon=a, x=a, kl=1, beta=1, reduction="none")),
        (elbo_loss, dict(log_likelihood=a[:, 0], kl=1)),
        (bounds.free_bits, dict(kl=a, nats=1, per="example")),
        (bounds.capacity, dict(kl=a, nats=1, per="batch")),
        (bounds.LinearSchedule(4), dict(step=1)),
        (bounds.balanced_kl, dict(mu=a, std=1, posterior_weight=1, prior_weight=0.5)),
        (lambda beta: ELBOLoss(beta=beta)(a, a, kl=a[:, 0]), dict(beta=1)),
        (lambda scale: elbo_loss(a, a, kl=0, likelihood=likelihoods.Laplace(scale=scale)), dict(scale=1)),
    ):
        expected = function(**arguments)
        others = {name: one if isinstance(value, int) else value for name, value in arguments.items()}
        torch.testing.assert_close(function(**others), expected, rtol=1e-6, atol=0)


def test_schedules_of_numpy_numbers() -> None:
    schedule = bounds.CyclicalSchedule(bounds.LinearSchedule(np.int64(10), np.float32(0.5)), np.float64(20))
    for step in (np.int64(25), np.int32(25), torch.tensor(25)):
        value = schedule(step)
        assert type(value) is float and value == 0.75
    assert_error(TypeError, "step must be a number, got Tensor", schedule, torch.tensor(2.5))


def test_counts_of_numpy() -> None:
    for kind in (np.int64, np.uint8):
        z, kl = rsample_kl(A, A, num_samples=kind(3), batch_dims=kind(2))
        assert z.shape == (3, 2, 3) and kl.shape == (2, 3)


def test_a_kl_that_is_a_number() -> None:
    recon = A.clone().requires_grad_()
    for reduction in ("none", "sum", "mean"):
        got = elbo_loss(recon, A, kl=0.25, beta=2.0, reduction=reduction)
        expected = elbo_loss(recon, A, kl=torch.full((2,), 0.25), beta=2.0, reduction=reduction)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        assert torch.equal(*(torch.autograd.grad(e.loss.sum(), recon)[0] for e in (got, expected)))


def test_integer_weights() -> None:
    """Masks of 0 and 1, as tokenizers return them; NaN is left out by a zero."""
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    x = torch.where(mask == 1, A, float("nan"))
    for kind in (torch.int64, torch.uint8):
        assert torch.equal(gaussian_log_prob(x, A, weight=mask.to(kind)), gaussian_log_prob(x, A, weight=mask == 1))
        assert gaussian_log_prob(A.double(), A, weight=mask.to(kind)).dtype == torch.float64
        assert torch.equal(rsample_kl(x, 0.0, kl_weight=mask.to(kind))[1], gaussian_kl(x, 0.0, weight=mask == 1))


# ---- sampling ----


SAMPLERS = pytest.mark.parametrize("function", [rsample, rsample_kl, rsample_with_log_prob])


@SAMPLERS
@pytest.mark.parametrize("value", [2.0, "2", True, torch.tensor(2), np.float32(2)], ids=repr)
def test_num_samples_is_an_int(function: Callable[..., Any], value: Any) -> None:
    message = f"num_samples must be an int or None, got {type(value).__name__}"
    assert_error(TypeError, message, function, A, A, num_samples=value)


@SAMPLERS
def test_num_samples_is_not_negative(function: Callable[..., Any]) -> None:
    assert_error(ValueError, "num_samples must not be negative, got -1", function, A, A, num_samples=-1)


@SAMPLERS
@pytest.mark.parametrize("shape", [(3,), (2,), (1, 3), (2, 4), (1, 2, 3), ()])
def test_shape_of_noise(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    """Noise does not broadcast: repeated noise would be no independent noise."""
    message = f"noise must have the shape of the sample, (2, 3), got {shape}"
    assert_error(ValueError, message, function, A, A, noise=torch.zeros(shape))


@SAMPLERS
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (4, 1, 3)])
def test_shape_of_noise_of_samples(function: Callable[..., Any], shape: tuple[int, ...]) -> None:
    message = f"noise must have the shape of the sample, (4, 2, 3), got {shape}"
    assert_error(ValueError, message, function, A, A, noise=torch.zeros(shape), num_samples=4)


def test_shape_of_noise_is_that_of_posterior_and_prior() -> None:
    message = "noise must have the shape of the sample, (2, 3), got (3,)"
    assert_error(ValueError, message, rsample_kl, A[0], 0.0, A, noise=A[0])


@SAMPLERS
def test_noise_and_generator(function: Callable[..., Any]) -> None:
    message = "noise and generator were both given; noise leaves nothing to draw"
    assert_error(ValueError, message, function, A, A, noise=A, generator=torch.Generator())


@SAMPLERS
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_dtype_of_noise(function: Callable[..., Any], dtype: torch.dtype) -> None:
    message = DTYPE_MESSAGE.format(name="noise", dtype=str(dtype).removeprefix("torch."))
    assert_error(TypeError, message, function, A, A, noise=A.to(dtype))


@SAMPLERS
@pytest.mark.parametrize("value", [0.5, [0.5], np.zeros((2, 3)), "normal"], ids=repr)
def test_noise_is_a_tensor(function: Callable[..., Any], value: Any) -> None:
    message = f"noise must be a torch.Tensor, got {type(value).__name__}"
    assert_error(TypeError, message, function, A, A, noise=value)


@SAMPLERS
def test_device_of_noise(function: Callable[..., Any]) -> None:
    message = "all tensors must be on one device, got mu on cpu and noise on meta"
    assert_error(ValueError, message, function, A, A, noise=A.to("meta"))


@SAMPLERS
@pytest.mark.parametrize("value", [3, "cpu", A], ids=["int", "str", "Tensor"])
def test_generator_is_a_generator(function: Callable[..., Any], value: Any) -> None:
    message = f"generator must be a torch.Generator, a list of them, or None, got {type(value).__name__}"
    assert_error(TypeError, message, function, A, A, generator=value)
    message = f"generator must be a list of torch.Generator, got one of {type(value).__name__}"
    assert_error(TypeError, message, function, A, A, generator=[torch.Generator(), value])


@SAMPLERS
@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_generator_for_each_example(function: Callable[..., Any], count: int) -> None:
    message = f"generator must be a list of one for each example of the joint shape (2, 3), got {count} of them"
    assert_error(ValueError, message, function, A[0], A, generator=[torch.Generator()] * count)
    message = f"generator must be a list of one for each example of the joint shape (), got {count} of them"
    assert_error(ValueError, message, rsample, A[0, 0], 0.0, generator=[torch.Generator()] * count)


# ---- layouts that the kernels do not know ----


@pytest.mark.parametrize("case", VALID)
def test_sparse_tensors(case: str) -> None:
    for name in (name for c, name in OPERANDS if c == case):
        message = (
            f"{name} must be a dense tensor, got layout sparse_coo; "
            f"convert it first, for example with {name}.to_dense()"
        )
        assert_error(TypeError, message, call, case, **{name: VALID[case][1][name].to_sparse()})


# ---- the module ----


@pytest.mark.parametrize("value", ["avg", None, ["mean"]], ids=repr)
def test_reduction_of_the_module(value: Any) -> None:
    message = f"reduction must be 'none', 'sum' or 'mean', got {value!r}"
    assert_error(ValueError, message, ELBOLoss, reduction=value)
    assert_error(ValueError, message, ELBOLoss(), A, A, kl=ROWS, reduction=value)


def test_batch_dims_of_the_module() -> None:
    """A module knows no shapes when it is made: the range is checked on the call."""
    message = "batch_dims must be between 0 and 2, the number of dimensions of (2, 3), got 3"
    assert_error(ValueError, message, ELBOLoss(batch_dims=3), A, A, kl=ROWS)


def test_arguments_nobody_knows() -> None:
    with pytest.raises(TypeError, match=re.escape("unexpected keyword argument 'recon_sigma'")):
        ELBOLoss(recon_sigma=1.0)
    with pytest.raises(TypeError, match=re.escape("unexpected keyword argument 'sigma'")):
        ELBOLoss()(A, A, kl=ROWS, sigma=1.0)


# ---- memory ----


@pytest.mark.parametrize("contiguous", [True, False])
def test_more_memory_than_there_is(contiguous: bool) -> None:
    """The words by which accelerate and Lightning, looking for the largest batch that fits, know such an error."""
    count = 2**45  # x 6 float32: more than a process can address, however generous the system
    with pytest.raises(RuntimeError) as raised:
        if contiguous:
            rsample(A, A, num_samples=count)
        else:
            rsample(torch.zeros(()).expand(count, 2, 3), 0.0)
    (message,) = raised.value.args
    assert f"elbo_ext could not allocate 786432 GiB on the CPU, for float32 of shape [{count}, 2, 3]: " in message
    assert " out of memory." in message
    assert "DefaultCPUAllocator: can't allocate memory" in message


# ---- nothing happens before the error ----


@pytest.mark.parametrize("bad", [dict(num_samples=-1), dict(noise=A[0]), dict(logvar=A[:, :2]), dict(batch_dims=9)])
def test_a_refused_call_draws_nothing(bad: dict[str, Any]) -> None:
    """The generator stands where it stood: a caught error must not shift the draws that follow."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with pytest.raises(ValueError):
        rsample_kl(**{"mu": A, "logvar": A, **bad})
    assert torch.equal(torch.get_rng_state(), before)


# ---- tensors that are not dense ----


def test_nested_masked_and_quantized_tensors() -> None:
    """Each is told what to do, where torch would speak of an internal error."""
    rows = [torch.ones(2), torch.ones(3)]
    pad = "must be a dense tensor, got a nested tensor; pad it, for example with torch.nested.to_padded_tensor({0}, 0.0), and "
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor(rows, layout=layout)
        message = f"x {pad.format('x')}mask what is padded with weight="
        assert_error(TypeError, message, gaussian_log_prob, nested, 0.0)
        message = f"mu {pad.format('mu')}mask what is padded with weight="
        for function in (rsample, partial(bounds.balanced_kl, posterior_weight=1.0, prior_weight=1.0)):
            assert_error(TypeError, message, function, nested, 0.0)
    masked = torch.masked.masked_tensor(A, A > 0)
    message = "x must be a dense tensor, got a masked tensor; pass x.get_data(), and its mask, x.get_mask(), in weight="
    assert_error(TypeError, message, gaussian_log_prob, masked, 0.0)
    message = (
        "logits must have dtype float32, float64, bfloat16 or float16, got quint8; "
        "convert it first, for example with logits.dequantize()"
    )
    assert_error(TypeError, message, bernoulli_log_prob, A, torch.quantize_per_tensor(A, 0.1, 0, torch.quint8))


@pytest.mark.parametrize("elbo_loss", [elbo_loss, reference.elbo_loss])
def test_results_are_no_views_of_the_arguments(elbo_loss: Callable[..., elbo_ext.ELBO]) -> None:
    kl, log_likelihood = torch.ones(2), torch.zeros(2)
    result = elbo_loss(log_likelihood=log_likelihood, kl=kl, reduction="none")
    kl.zero_()
    log_likelihood.fill_(3.0)
    assert result.kl.tolist() == [1.0, 1.0] and result.log_likelihood.tolist() == [0.0, 0.0]
    result = elbo_loss(A, A, kl=kl, reduction="none")
    result.kl.fill_(5.0)
    assert kl.tolist() == [0.0, 0.0]


# ---- likelihood objects ----


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        (dict(std=1.0), TypeError, "std is no parameter of the laplace likelihood, which takes log_scale, scale"),
        (dict(scale=None), TypeError, "scale must be a torch.Tensor or a number, got NoneType"),
        (dict(scale="a"), TypeError, "scale must be a torch.Tensor or a number, got str"),
        (dict(scale=-1.0), ValueError, "scale must be positive, got -1.0"),
        (
            dict(log_scale=0.0, scale=A),
            ValueError,
            "exactly one of log_scale, scale must be given, got log_scale and scale",
        ),
    ],
)
def test_parameters_of_a_likelihood(parameters: dict[str, Any], error: type[Exception], message: str) -> None:
    """Refused where the object is made, by either way."""
    assert_error(error, message, likelihoods.Laplace, **parameters)
    assert_error(error, message, likelihoods.LikelihoodWithParameters, likelihoods.Laplace, parameters)


BINS = [
    (dict(low=None), ValueError, "low and high must be given both, or be None both, got low=None and high=1.0"),
    (dict(high=None), ValueError, "low and high must be given both, or be None both, got low=-1.0 and high=None"),
    (dict(low="a"), TypeError, "low must be a number, got str"),
    (dict(low=True), TypeError, "low must be a number, got bool"),
    (dict(high=A), TypeError, "high must be a number, got Tensor"),
    (dict(low=float("-inf")), ValueError, "low must be a finite number, got -inf"),
    (dict(low=0.0, high=0.0), ValueError, "high must be a finite number above 0, got 0.0"),
    (dict(bins=1), ValueError, "bins must be at least 2, got 1"),
    (dict(bins=8.0), TypeError, "bins must be an int, got float"),
    (dict(width=1.0), ValueError, "width has no use beside low and high, between which bins says it, got 1.0"),
    (dict(low=None, high=None, width=0.0), ValueError, "width must be a finite number above 0, got 0.0"),
    (dict(low=None, high=None, width="1"), TypeError, "width must be a number, got str"),
]


@pytest.mark.parametrize(("options", "error", "message"), BINS)
@pytest.mark.parametrize("family", ["logistic", "gaussian"])
def test_bins(family: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """In the functions, and where a likelihood object is made."""
    assert_error(error, message, getattr(elbo_ext, f"discretized_{family}_log_prob"), A, A, **options)
    assert_error(error, message, getattr(likelihoods, f"Discretized{family.title()}"), **options)


def test_parameters_of_a_likelihood_with_bins() -> None:
    known = "log_scale, scale, low, high, bins, width"
    message = f"half_bin is no parameter of the discretized_logistic likelihood, which takes {known}"
    assert_error(TypeError, message, likelihoods.DiscretizedLogistic, half_bin=0.5)
    message = (
        "recon_std has no meaning for likelihood='discretized_logistic'; "
        "pass likelihoods.DiscretizedLogistic(log_scale=...) instead"
    )
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, likelihood="discretized_logistic", recon_std=1.0)


def test_a_scale_beside_a_likelihood_object() -> None:
    message = "recon_std has no meaning for likelihood='laplace'; pass likelihoods.Laplace(log_scale=...) instead"
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, likelihood="laplace", recon_std=1.0)
    message = "recon_std has no use beside likelihoods.Gaussian(var=2.0), which has its parameters already"
    assert_error(ValueError, message, elbo_loss, A, A, kl=ROWS, likelihood=likelihoods.Gaussian(var=2.0), recon_std=1.0)


def test_what_has_no_use_beside_a_log_likelihood() -> None:
    computed = "has no use beside log_likelihood, which is computed already"
    for name, value in {"recon": A, "x": A, "weight": A, "recon_std": 1.0, "likelihood": "laplace"}.items():
        assert_error(ValueError, f"{name} {computed}", elbo_loss, log_likelihood=ROWS, kl=ROWS, **{name: value})
    message = "batch_dims must be between 0 and 1, the number of dimensions of (2,), got 2"
    assert_error(ValueError, message, elbo_loss, log_likelihood=ROWS, kl=ROWS, batch_dims=2)
    message = "batch_dims must be an int, got str"
    assert_error(TypeError, message, elbo_loss, log_likelihood=ROWS, kl=ROWS, batch_dims="1")
