"""csrc/terms/special.h alone, compiled for the registers of this machine, against mpmath."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import elbo_ext

mp = mpmath.mp
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TORCH = Path(torch.__file__).parent
SETS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}

pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="needs the sources"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
]

# In the order of special.cpp: the function, and its derivatives by x and t times these.
FUNCTIONS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "lgamma": (lambda x, t: mp.loggamma(x), lambda x, t: x * abs(mp.digamma(x))),
    "digamma": (lambda x, t: mp.digamma(x), lambda x, t: x * mp.psi(1, x)),
    "lgamma_difference": (
        lambda x, t: mp.loggamma(x + t) - mp.loggamma(t),
        lambda x, t: x * abs(mp.digamma(x + t)) + t * abs(mp.digamma(x + t) - mp.digamma(t)),
    ),
    "digamma_difference": (
        lambda x, t: mp.digamma(x + t) - mp.digamma(t),
        lambda x, t: x * mp.psi(1, x + t) + t * abs(mp.psi(1, x + t) - mp.psi(1, t)),
    ),
}
# Units in the last place of the value. The differences are 0 at places that are no numbers of the dtype, as x = 2,
# t = 0.618: of them what counts is the larger of the value and of what a rounding of x or t changes.
LIMITS = {np.float32: 2.3, np.float64: 4.0}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    capability = str(elbo_ext.build_info()["instruction_set"])
    target = tmp_path_factory.mktemp("special") / "special.so"
    command = ["c++", "-std=c++20", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-w"]
    command += [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}", *SETS.get(capability, [])]
    command += [f"-I{ROOT / 'csrc'}", "-isystem", f"{TORCH / 'include'}", f"{HERE / 'special.cpp'}"]
    command += ["-o", str(target), f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    subprocess.run(command, check=True, timeout=300)
    return ctypes.CDLL(str(target))


def evaluate(library: ctypes.CDLL, name: str, x: np.ndarray, t: np.ndarray) -> np.ndarray:
    result = np.empty_like(x)
    function = library.evaluate_float if x.dtype == np.float32 else library.evaluate_double
    arrays = [ctypes.c_void_p(a.ctypes.data) for a in (x, t, result)]
    function(list(FUNCTIONS).index(name), *arrays, ctypes.c_int64(x.size))
    return result


def check(library: ctypes.CDLL, name: str, dtype: Any, x: np.ndarray, t: np.ndarray) -> float:
    """The largest error in units in the last place, which is within its limit."""
    x, t = np.ascontiguousarray(x, dtype), np.ascontiguousarray(t, dtype)
    function, change = FUNCTIONS[name]
    worst = 0.0
    with mp.workdps(40):
        for a, b, actual in zip(x.tolist(), t.tolist(), evaluate(library, name, x, t).tolist(), strict=True):
            a, b = mp.mpf(a), mp.mpf(b)
            truth = function(a, b)
            size = max(abs(truth), change(a, b) if "difference" in name else 0)
            if size == 0:
                assert actual == 0
                continue
            unit = mp.mpf(2) ** mp.floor(mp.log(size, 2)) * float(np.finfo(dtype).eps)
            error = float(abs(actual - truth) / unit)
            assert error <= LIMITS[dtype], (name, float(a), float(b), actual, float(truth))
            worst = max(worst, error)
    return worst


GRID = np.array(
    [1e-6, 1e-3, 0.02, 0.3, 0.61803, 0.999, 1, 1.001, 1.4616321, 1.5, 1.999, 2, 2.001, 3, 3.3, 7.5, 30, 1e3, 1e5, 1e6]
)


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_grid(library: ctypes.CDLL, name: str, dtype: Any) -> None:
    x, t = np.meshgrid(np.concatenate([GRID, np.arange(1, 40)]), GRID if "difference" in name else np.ones(1))
    assert check(library, name, dtype, x.ravel(), t.ravel()) > 0  # rounding is seen


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_numbers(library: ctypes.CDLL, name: str, dtype: Any, data: st.DataObject) -> None:
    exponents = st.lists(st.floats(-18, 18), min_size=16, max_size=16)
    x, t = (np.exp(np.array(data.draw(exponents))) for _ in range(2))
    check(library, name, dtype, x, t)


@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: dtype.__name__)
def test_ends(library: ctypes.CDLL, dtype: Any) -> None:
    x, t = np.zeros(3, dtype), np.array([0.3, 1, 1e5], dtype)
    assert evaluate(library, "lgamma", x, t).tolist() == [np.inf] * 3
    assert evaluate(library, "lgamma", np.array([1, 2, 1], dtype), t).tolist() == [0.0] * 3
    assert evaluate(library, "lgamma_difference", x, t).tolist() == [0.0] * 3
    assert evaluate(library, "digamma_difference", x, t).tolist() == [0.0] * 3
