"""A pytest plugin for runs of the tests in the emulator: gives the package its kernels, and counts what has run.

It belongs to the process that test_emulator.py starts, whose folder has the emulated package.
"""

import ctypes
import os
from pathlib import Path

import pytest
import torch

import elbo_ext

LIBRARY = os.environ["ELBO_EMULATOR_LIBRARY"]


def pytest_configure(config: pytest.Config) -> None:
    if elbo_ext.build_info()["instruction_set"] != "CUDA emulator":
        raise pytest.UsageError(f"{Path(elbo_ext.__file__).parent} is not the emulated package")
    elbo_ext._C.load_cuda_library(LIBRARY)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def memory_full_of_nan():
    """What a kernel leaves out of its results, or takes for granted in its working memory, is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty and all that is made like it
    yield
    torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    launches = ctypes.CDLL(LIBRARY).elbo_emulator_launches
    launches.restype = ctypes.c_int64
    terminalreporter.write_line(f"emulated launches: {launches()}")
