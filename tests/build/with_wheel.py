"""Runs the whole suite with the wheel in a folder, in a virtual environment of its own, without the sources.

python tests/build/with_wheel.py dist [options of pytest]     make test-wheel
"""

import shutil
import sys
from pathlib import Path

from with_torch import ROOT, environment, install, suite


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit("with_wheel: the folder of the wheel is missing")
    folder, *options = sys.argv[1:]
    wheels = [*Path(folder).glob("elbo_ext-*.whl")]
    if len(wheels) != 1:
        sys.exit(f"with_wheel: one wheel is expected in {folder}, got {len(wheels)}; run 'make wheel' first")
    pin = next(line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("torch=="))
    python = environment("wheel", pin)
    install(python, "--force-reinstall", "--no-deps", str(wheels[0]))
    work = ROOT / "build" / "with-wheel"
    shutil.rmtree(work, ignore_errors=True)
    for name in ("tests", "benchmarks"):
        shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml", "constraints.txt"):
        shutil.copy2(ROOT / name, work)
    return suite(python, work, wheels[0].name, options)


if __name__ == "__main__":
    sys.exit(main())
