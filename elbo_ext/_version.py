"""The version of the package, which stands in pyproject.toml and nowhere else."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["VERSION"]


def _read() -> str:
    """In a source folder from pyproject.toml next to the package, as something else may be installed; else as installed."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        found = re.search(r'^name = "elbo_ext"\nversion = "(.+)"$', project.read_text(encoding="utf-8"), re.MULTILINE)
        if found is not None:
            return found[1]
    try:
        return version("elbo_ext")
    except PackageNotFoundError:  # a copy of the folder elbo_ext alone
        return "0+unknown"


VERSION = _read()
