"""The library does without its demo: nothing of elbo_ext.demo, nor what that alone needs, is imported by anything else."""

import os
import pkgutil
import subprocess
import sys

import pytest

import elbo_ext

THE_DEMO_ALONE = ("elbo_ext.demo", "matplotlib", "sklearn", "tqdm")
LIBRARY = [
    module.name
    for module in pkgutil.walk_packages(elbo_ext.__path__, "elbo_ext.")
    if not f"{module.name}.".startswith("elbo_ext.demo.") and module.name != "elbo_ext._cuda"  # which is no module
]

# torch itself imports tqdm where there is one, so that the names are not looked for but taken away.
PROGRAM = f"""
import importlib, sys
sys.modules |= dict.fromkeys({THE_DEMO_ALONE})
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def import_without_the_demo(*names: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(elbo_ext.__path__[0])}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True, cwd="/", env=environment, timeout=120
    )


def test_the_library_does_without_the_demo() -> None:
    assert {"elbo_ext.bounds", "elbo_ext.diagnostics", "elbo_ext.functional", "elbo_ext.reference"} <= set(LIBRARY)
    done = import_without_the_demo(*LIBRARY)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["elbo_ext.demo.vae", *THE_DEMO_ALONE])
def test_what_is_taken_away_is_missed(name: str) -> None:
    """Otherwise the test above would prove nothing."""
    done = import_without_the_demo(name)
    assert done.returncode == 1 and "ModuleNotFoundError" in done.stderr
