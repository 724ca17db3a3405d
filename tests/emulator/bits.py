"""Prints a checksum of every result and gradient of every sample, as the emulator computes them."""

import ctypes
import os
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1].resolve()))

import torch

import elbo_ext
from samples import CORE, differentiable, run


def checksum(tensor: torch.Tensor) -> int:
    data = tensor.detach().clone(memory_format=torch.contiguous_format)
    return zlib.crc32(ctypes.string_at(data.data_ptr(), data.numel() * data.element_size()))


elbo_ext._C.load_cuda_library(os.environ["ELBO_EMULATOR_LIBRARY"])
torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
for sample in CORE:
    for dtype in (torch.float32, torch.float64):
        arguments = sample.make(dtype)
        leaves = [arguments[name].requires_grad_() for name in differentiable(arguments)]
        results = [result for result in run(sample, arguments).values() if result.requires_grad]
        gradients = torch.autograd.grad([result.sum() for result in results], leaves, allow_unused=True)
        sums = [checksum(t) for t in (*results, *gradients) if t is not None]
        print(sample.id, dtype, *sums)
