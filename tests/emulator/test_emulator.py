"""The CUDA kernels, run on the CPU by the emulator, pass the tests of the CPU's kernels. See tests/README.md."""

import ctypes
import re

import pytest

from build import WORK, build, sanitizer_runtime
from running import HERE, python, run_tests

slow = pytest.mark.slow
needs_sanitizers = pytest.mark.skipif(not sanitizer_runtime(), reason="the compiler's sanitizers are not g++'s")

# What of tests/ runs in the emulator. The others test Python alone, the CPU's kernels as such (their threads, registers,
# bits and speed), the build, or what takes a GPU.
NUMBERS = [
    "test_values.py",
    "test_gradients.py",
    "test_lists.py",
    "test_noise.py",
    "test_numerics.py",
    "test_categorical.py",
]
BOUND = ["test_bounds.py", "test_estimators.py", "test_diagnostics.py", "test_linear_gaussian.py", "test_nn.py"]
OPERATORS = ["test_autograd_modes.py", "test_opcheck.py"]
# Each sum over threads, warps and blocks, for every order.
SAMPLES = ["test_values.py::test_values", "test_gradients.py::test_gradients", "test_gradients.py::test_many_samples",
           "test_bounds.py::test_iwae_is_the_log_of_the_mean_weight_along_its_axis",
           "test_lists.py::test_many_tensors", "test_lists.py::test_the_same_as_one_call_a_tensor",
           "test_bounds.py::test_iwae_of_very_many_samples", "test_numerics.py::test_sums_of_a_million_terms"]  # fmt: skip


def assert_passes(*words: str, launches: int, **options: str) -> None:
    status, output = run_tests(*words, **options)
    counted = re.search(r"emulated launches: (\d+)", output)
    assert status == 0 and counted, output[-8000:]
    assert int(counted[1]) >= launches, f"{counted[0]}; the tests did not reach the kernels"


# ---- the emulator itself ----

FAULTS = {
    "access_between": "access_between in block (0, 0): thread 0 accesses 8 bytes at .*, which is not aligned (faults.cu:12)",
    "skip_shuffle": "thread 32 waits at the shuffle faults.cu:15, but thread 37 has ended",
    "end_before_barrier": "waits at the barrier faults.cu:20, but thread 200 has ended",
    "part_at_barriers": "waits at the barrier faults.cu:26, but thread 63 waits at the barrier faults.cu:24",
    "shuffle_at_barrier": "thread 16 waits at the shuffle faults.cu:31, but thread 15 waits at the barrier faults.cu:30",
    "no_block": "there is no grid of (0, 1, 1) blocks of (256, 1, 1) threads",
    "too_many_blocks": "there is no grid of (2147483648, 1, 1) blocks",
    "too_many_rows": "there is no grid of (1, 65536, 1) blocks",
    "too_many_threads": "there is no grid of (1, 1, 1) blocks of (1025, 1, 1) threads",
}


@pytest.fixture(scope="module")
def run_fault():
    build("plain")
    library = ctypes.CDLL(str(WORK / "plain.faults.so"))
    library.run_fault.restype = ctypes.c_char_p
    memory = (ctypes.c_double * 64)()

    def run(name: str) -> tuple[str | None, ctypes.Array]:
        error = library.run_fault(name.encode(), memory)
        return error and error.decode(), memory

    return run


@pytest.mark.parametrize("name", FAULTS)
def test_fault(name: str, run_fault) -> None:
    for _ in range(2):  # and the next kernel is none the worse for it
        error, _ = run_fault(name)
        pattern = re.escape(FAULTS[name]).replace(r"\.\*", ".*")
        assert error is not None and re.search(f"the emulator stopped .*{pattern}", error), error
        assert run_fault("nothing")[0] is None


def test_shared_memory_of_a_block_is_nan(run_fault) -> None:
    error, memory = run_fault("read_unwritten_shared")
    assert error is None and memory[0] != memory[0]


def test_orders() -> None:
    """The turns that the 12 warps of 3 blocks take."""
    build("plain")
    program = (f"import ctypes; m = ctypes.create_string_buffer(16); "
               f"ctypes.CDLL({str(WORK / 'plain.faults.so')!r}).run_fault(b'order', m); print(*m.raw[1:13])")  # fmt: skip

    def turns(**order: str) -> list[int]:
        status, output = python(["-c", program], **order)
        assert status == 0, output
        return [int(turn) for turn in output.split()]

    assert turns() == turns(order="forward") == list(range(12))
    assert turns(order="reverse") != turns() == sorted(turns(order="reverse"))
    shuffled = [turns(order="shuffled", seed=seed) for seed in ("1", "1", "2")]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert all(sorted(some) == list(range(12)) for some in shuffled)


@slow
@needs_sanitizers
def test_sanitizer_sees_what_is_beyond() -> None:
    program = (f"import ctypes; m = ctypes.create_string_buffer(64 * 200); "
               f"ctypes.CDLL({str(WORK / 'sanitized.faults.so')!r}).run_fault(b'write_beyond', m)")  # fmt: skip
    status, output = python(["-c", program], variant="sanitized")
    assert status != 0 and "heap-buffer-overflow" in output and "write_beyond" in output, output


# ---- the kernels ----


def test_core() -> None:
    assert_passes(*SAMPLES[:5], core="1", order="shuffled", multiprocessors="3", launches=2000)


@slow
@pytest.mark.parametrize("files", [NUMBERS, BOUND, OPERATORS], ids=["numbers", "bound", "operators"])
def test_everything(files: list[str]) -> None:
    assert_passes(*files, launches=3000)


@slow
def test_in_reverse_on_a_large_device() -> None:
    assert_passes(*SAMPLES, order="reverse", multiprocessors="132", launches=3000)


@slow
@pytest.mark.parametrize("seed, multiprocessors", [("1", "1"), ("2", "2"), ("3", "3"), ("4", "132"), ("5", "132")])
def test_shuffled(seed: str, multiprocessors: str) -> None:
    """On the smallest device every thread takes several turns, on the largest one the blocks share what they can."""
    assert_passes(*SAMPLES, core="1", order="shuffled", seed=seed, multiprocessors=multiprocessors, launches=2000)


@slow
@pytest.mark.parametrize("multiprocessors", ["2", "132"])
def test_the_same_bits_in_every_order(multiprocessors: str) -> None:
    """Sums depend on the device and the shape, never on who comes first."""
    bits = []
    for order in ({"order": "forward"}, {"order": "reverse"}, {"order": "shuffled", "seed": "7"}):
        status, output = python([str(HERE / "bits.py")], **order, multiprocessors=multiprocessors)
        assert status == 0 and len(output.splitlines()) > 200, output[-2000:]
        bits.append(output)
    assert bits[0] == bits[1] == bits[2]


@slow
@needs_sanitizers
@pytest.mark.parametrize("multiprocessors", ["2", "132"])
def test_sanitized(multiprocessors: str) -> None:
    core = {"core": "1"} if multiprocessors == "132" else {}
    options = dict(variant="sanitized", order="shuffled", multiprocessors=multiprocessors, **core)
    assert_passes(*SAMPLES, "test_noise.py", **options, launches=2000)
