"""The tests in the emulator can fail: each of these changes to the kernels makes them, in the way that it should.

A mutant compiles one file of csrc/cuda once more, of a copy of csrc with one change, and is run in several orders until
one of them finds it.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from build import HERE, KERNELS, ROOT, VARIANTS, WORK, build, compiler, kernel_flags, sanitizer_runtime
from running import run_tests

ORDERS = [
    {"order": "forward"},
    {"order": "reverse"},
    *({"order": "shuffled", "seed": str(seed)} for seed in range(1, 6)),
]
STOPPED = "the emulator stopped {kernel}.* in block .*"
WRONG = "times the allowed error|AssertionError"  # a wrong number

SAMPLE_LOG_PROB = ("test_values.py::test_values", "test_gradients.py::test_gradients", "-k", "log_prob")
RSAMPLE_KL = ("test_values.py::test_values", "test_gradients.py::test_gradients", "-k", "rsample_kl")
IMPORTANCE = ("test_bounds.py", "-k", "iwae_of_very_many or axis")


@dataclass(frozen=True)
class Mutant:
    id: str
    file: str  # of csrc
    old: str  # stands there once
    new: str
    compiled: str  # what of KERNELS shows it
    tests: Sequence[str]
    found: str  # a regular expression
    variant: str = "plain"
    multiprocessors: Sequence[str] = field(default=("2",))


MUTANTS = [
    Mutant("no-barrier-before-block-sum", "cuda/sums.cuh", "  __syncthreads();  // the sum before this one has been read\n", "",
           "sample_log_prob.float", SAMPLE_LOG_PROB, WRONG, multiprocessors=("2", "132")),
    Mutant("no-barrier-in-block-sum", "cuda/sums.cuh", "per_warp[threadIdx.x / kWarp] = number;\n  __syncthreads();\n",
           "per_warp[threadIdx.x / kWarp] = number;\n", "sample_log_prob.float", SAMPLE_LOG_PROB, WRONG),
    Mutant("no-barrier-in-sums-of-a-block", "cuda/sums.cuh",
           "per_warp[k][threadIdx.x / kWarp] = of_warp;\n  }\n  __syncthreads();\n",
           "per_warp[k][threadIdx.x / kWarp] = of_warp;\n  }\n", "latent.float", RSAMPLE_KL, WRONG),
    Mutant("no-barrier-in-sums-of-columns", "cuda/term_sum_columns.cuh",
           "of_warp[warp][lane * V + i] = column_sum[k][i];\n    __syncthreads();\n",
           "of_warp[warp][lane * V + i] = column_sum[k][i];\n", "term_sum.float",
           ("test_gradients.py::test_gradients", "-k", "shared-theta"), WRONG),
    Mutant("no-barrier-before-the-last-block", "cuda/sums.cuh", "    __syncthreads();\n    if (!is_last) return false;\n",
           "    if (!is_last) return false;\n", "latent.float", RSAMPLE_KL,
           STOPPED.format(kernel="") + "waits at the|" + WRONG),
    Mutant("no-barrier-before-a-gather", "cuda/gather.cuh", "    __syncthreads();\n    per_thread[place] = sum[k];\n",
           "    per_thread[place] = sum[k];\n", "sample_log_prob.float", SAMPLE_LOG_PROB, WRONG, multiprocessors=("2", "132")),
    Mutant("no-barrier-in-a-gather", "cuda/gather.cuh", "      __syncthreads();\n      if (y < half)", "      if (y < half)",
           "sample_log_prob.float", SAMPLE_LOG_PROB, WRONG),
    Mutant("no-barrier-in-the-importance-weighted-bound", "cuda/importance.cu",
           "    __syncthreads();\n    if (threadIdx.x < half)", "    if (threadIdx.x < half)", "importance", IMPORTANCE, WRONG),
    Mutant("a-barrier-that-some-skip", "cuda/gather.cuh", "    __syncthreads();\n    per_thread[place] = sum[k];\n",
           "    if (inside) __syncthreads();\n    per_thread[place] = sum[k];\n", "sample_log_prob.float", SAMPLE_LOG_PROB,
           STOPPED.format(kernel="gather_kernel") + r"waits at the barrier gather\.cuh"),
    Mutant("a-shuffle-that-some-skip", "cuda/sums.cuh", ": warp_sum(sum[k], team);",
           ": unit < units.count ? warp_sum(sum[k], team) : 0.0;", "sample_log_prob.float", SAMPLE_LOG_PROB,
           STOPPED.format(kernel="sample_log_prob_kernel") + r"waits at the shuffle sums\.cuh:\d+, but thread \d+"),
    Mutant("no-mask-beyond-the-end", "cuda/layout.cuh", "(group + i >= first && group + i < end ? 1u : 0u)",
           "(group + i >= first ? 1u : 0u)", "sample_log_prob.float", SAMPLE_LOG_PROB, WRONG),
    Mutant("no-mask-beyond-the-end-under-sanitizers", "cuda/layout.cuh", "(group + i >= first && group + i < end ? 1u : 0u)",
           "(group + i >= first ? 1u : 0u)", "sample_log_prob.float", SAMPLE_LOG_PROB, "heap-buffer-overflow",
           variant="sanitized"),
    Mutant("no-check-of-alignment", "cuda/plan.h",
           "return reinterpret_cast<uintptr_t>(data) % bytes == 0 && base_step % width == 0;",
           "return bytes != 0 && base_step % width == 0;", "sample_log_prob.float", SAMPLE_LOG_PROB,
           STOPPED.format(kernel="") + r"bytes at .*, which is not aligned \(vector\.cuh"),
    Mutant("operands-swapped", "cuda/latent.cu", "standard_deviation(form, in[kScale]);\n      for (",
           "standard_deviation(form, in[kMu]);\n      for (", "latent.float", RSAMPLE_KL, WRONG),
    Mutant("a-sum-goes-on-into-the-next", "cuda/sums.cuh",
           "write(plan.out[k], unit, unit_sum);\n      sum[k] = 0.0;\n", "write(plan.out[k], unit, unit_sum);\n",
           "sample_log_prob.float", SAMPLE_LOG_PROB, WRONG, multiprocessors=("1",)),
    Mutant("arrivals-not-zero-at-the-start", "cuda/plan.h",
           "return message(cudaMemsetAsync(memory, 0, sizeof(unsigned), static_cast<cudaStream_t>(call.stream)));",
           "return nullptr;", "latent.float", RSAMPLE_KL, WRONG),
    Mutant("a-sum-of-each-layer-of-the-grid", "cuda/latent.cu", "if (blockIdx.y == 0) total_sums<1u>(p.kl, sum);",
           "total_sums<1u>(p.kl, sum);", "latent.float", RSAMPLE_KL, WRONG, multiprocessors=("132",)),
]  # fmt: skip


def compile_mutant(mutant: Mutant, folder: Path) -> Path:
    build(mutant.variant)
    sources = folder / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    path = sources / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, (
        f"the text of {mutant.id} stands {text.count(mutant.old)} times in {mutant.file}"
    )
    path.write_text(text.replace(mutant.old, mutant.new))

    source, defines = KERNELS[mutant.compiled]
    flags = kernel_flags(mutant.variant, sources)
    ours, library = folder / "mutant.o", folder / "mutant.so"
    others = [WORK / f"{mutant.variant}.{name}.o" for name in ("runtime", *KERNELS) if name != mutant.compiled]
    for command in (
        ["-x", "c++", *flags, *defines, "-c", sources / "cuda" / f"{source}.cu", "-o", ours],
        ["-shared", ours, *others, "-o", library, *VARIANTS[mutant.variant], "-ldl"],
    ):
        run = subprocess.run([*compiler().split(), *map(str, command)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    return library


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_mutant(mutant: Mutant, tmp_path: Path) -> None:
    if mutant.variant == "sanitized" and not sanitizer_runtime():
        pytest.skip("the compiler's sanitizers are not g++'s")
    library = compile_mutant(mutant, tmp_path)
    for multiprocessors in mutant.multiprocessors:
        for order in ORDERS:
            # A sanitizer ends the process; it may have to wait for a tensor that ends after a part of a vector.
            stop = [] if mutant.variant == "sanitized" else ["-x"]
            status, output = run_tests(*mutant.tests, *stop, variant=mutant.variant, library=library,
                                       multiprocessors=multiprocessors, **order)  # fmt: skip
            assert status not in (2, 3, 4, 5), output[-4000:]  # pytest itself could not run
            if status != 0:
                assert re.search(mutant.found, output), output[-4000:]
                caught = next(line for line in output.splitlines() if re.search(mutant.found, line))
                print(f"{mutant.id}: {order}, {multiprocessors} multiprocessors: {caught.strip()[:300]}")
                return
    pytest.fail(f"no order found {mutant.id}")


def test_the_texts_of_the_mutants() -> None:
    """Those that the sources no longer have are found at once, not with the slow tests."""
    for mutant in MUTANTS:
        assert (ROOT / "csrc" / mutant.file).read_text().count(mutant.old) == 1, mutant.id
        assert mutant.old != mutant.new and mutant.compiled in KERNELS and (HERE / "runtime.cpp").exists()
