"""One thread of torch in each of pytest's parallel workers; tests of several threads set their number themselves."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
