"""One thread of torch in each of pytest's parallel workers; tests of several threads set their number themselves."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def one_thread():
    """For small arrays and networks: a second thread mostly waits, and on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
