"""README.md stays true: its Python code runs, and what it names exists."""

import re
from pathlib import Path

import pytest
import torch

import elbo_ext

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")

# torch.func takes some derivatives from a script that it compiles on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def blocks(language: str) -> list[tuple[int, str]]:
    """Line number and content of each code block that begins at the margin."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(TEXT.count("\n", 0, match.start(1)), match[1]) for match in pattern.finditer(TEXT)]


def test_python_blocks_run() -> None:
    """One after the other, each with the names of those before it."""
    code = blocks("python")
    assert len(code) >= 5
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "readme"}
    for line, source in code:
        # Empty lines in front, so that a traceback shows the line of README.md.
        exec(compile("\n" * line + source, str(README), "exec"), names)


def test_public_names_are_listed() -> None:
    assert [name for name in elbo_ext.__all__ if not re.search(rf"`(elbo_ext\.)?{name}\b", TEXT)] == []


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:csrc|elbo_ext|tests|benchmarks)/[-\w./]*\w", TEXT))))
def test_paths_exist(path: str) -> None:
    if path == "csrc/terms/laplace.h":  # the example of a likelihood to add
        return
    assert (ROOT / path).exists()


@pytest.mark.parametrize(("file", "test"), re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT))
def test_named_tests_exist(file: str, test: str) -> None:
    assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", "\n".join(source for _, source in blocks("sh")), re.MULTILINE)
    commands += re.findall(r"`make (\w+)", TEXT)
    assert {"demo", "test"} <= set(commands)
    for target in commands:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
