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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what an emulation cannot do; with ELBO_EMULATOR_CORE also the samples that are not of the core."""
    import samples

    def wanted(item: pytest.Item) -> bool:
        arguments = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        sample = arguments.get("sample")
        of_core = not isinstance(sample, samples.Sample) or sample.core
        # More than 2^31 elements; "cuda" needs a GPU.
        return "beyond_32_bits" not in item.name and arguments.get("device") != "cuda" and (
            of_core or not os.environ.get("ELBO_EMULATOR_CORE"))  # fmt: skip

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)


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
