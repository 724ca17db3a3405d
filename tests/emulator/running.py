"""Runs Python, and the tests, with the emulated package in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

from build import HERE, ROOT, WORK, build, sanitizer_runtime

TESTS = ROOT / "tests"


def python(
    words: list[str], variant: str = "plain", library: Path | None = None, **environment: str
) -> tuple[int, str]:
    """Exit status and output. ``environment``: ``order=``, ``seed=``, ``multiprocessors=`` of the emulator, ``core=``."""
    build(variant)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "ELBO_"))}
    own = {f"ELBO_EMULATOR_{name.upper()}": value for name, value in environment.items()}
    if variant == "sanitized":
        # The sanitizers want to come first; what torch never gives back is not ours.
        own |= {
            "LD_PRELOAD": sanitizer_runtime(),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    own |= {"ELBO_EMULATOR_LIBRARY": str(library or WORK / f"{variant}.so"), "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(map(str, (WORK, HERE)))}  # fmt: skip
    # In the folder of the emulated package, which Python and pytest look into first.
    run = subprocess.run([sys.executable, *words], cwd=WORK, env=clean | own, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    return run.returncode, run.stdout


def path_of(test: str) -> str:
    """Of test_values.py::test_values, say: file names are unique."""
    file, *function = test.split("::")
    (path,) = TESTS.rglob(file)
    return "::".join([str(path), *function])


def run_tests(*words: str, variant: str = "plain", library: Path | None = None, **environment: str) -> tuple[int, str]:
    """``words``: names of files below tests/, and options of pytest."""
    arguments = [path_of(word) if word.startswith("test_") else word for word in words]
    # Nothing is captured in a run under sanitizers, whose last words would be lost with the process.
    show = ["--capture=no"] if variant == "sanitized" else []
    return python(["-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "emulated",
                   "-p", "no:cacheprovider", "-n", "0", "-q", "--no-header", "--tb=short", *show, *arguments],
                  variant, library, **environment)  # fmt: skip
