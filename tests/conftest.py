"""One thread of torch in each of pytest's parallel workers; tests of several threads set their number themselves. And which
tests are quick."""

import os

import pytest
import torch

# `make quick`: all of these, and of those that run the table of samples its core on the CPU.
QUICK_FILES = {"test_arguments.py", "test_registry.py", "test_samples.py"}
QUICK_SAMPLES = {"test_values.py", "test_gradients.py"}

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        core = item.path.name in QUICK_SAMPLES and getattr(parameters.get("sample"), "core", False)
        if item.path.name in QUICK_FILES or (core and parameters.get("device", "cpu") == "cpu"):
            item.add_marker("quick")


@pytest.fixture(scope="module")
def one_thread():
    """For small arrays and networks: a second thread mostly waits, and on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
