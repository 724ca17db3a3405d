"""README.md and the other texts stay true: their Python code runs, and what they name exists."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import elbo_ext
from elbo_ext import bounds, diagnostics

ROOT = Path(__file__).parents[2]
NAMES = ("README.md", "CONTRIBUTING.md", "tests/README.md", "benchmarks/NOTES.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
README = TEXTS["README.md"]
BOUNDS = Path(bounds.__file__)
ALL = "\n".join([*TEXTS.values(), bounds.__doc__])

# torch.func takes some derivatives from a script that it compiles on first use.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """Line number and content of each code block that begins at the margin."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in pattern.finditer(text)]


@pytest.mark.parametrize(("name", "at_least"), [("README.md", 4), ("tests/README.md", 2)])
def test_python_blocks_run(name: str, at_least: int) -> None:
    """One after the other, each with the names of those before it."""
    code = blocks(TEXTS[name], "python")
    assert len(code) >= at_least
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "readme"}
    for line, source in code:
        # Empty lines in front, so that a traceback shows the line of the text.
        exec(compile("\n" * line + source, str(ROOT / name), "exec"), names)


def test_no_python_goes_untested() -> None:
    """Only the texts of test_python_blocks_run have Python, and all of it at the margin."""
    for name, text in TEXTS.items():
        found = len(re.findall(r"```\s*py", text))
        assert found == (len(blocks(text, "python")) if name in ("README.md", "tests/README.md") else 0), name


def test_examples_of_the_bound_run() -> None:
    """Those in the docstring of elbo_ext.bounds."""
    torch.manual_seed(0)
    examples = doctest.DocTestParser().get_doctest(bounds.__doc__, {}, "elbo_ext.bounds", str(BOUNDS), 0)
    said: list[str] = []
    result = doctest.DocTestRunner(verbose=False).run(examples, out=said.append)
    assert result.attempted >= 15 and result.failed == 0, "".join(said)


def test_length() -> None:
    assert README.count("\n") <= 180


def test_public_names_are_listed() -> None:
    assert [name for name in elbo_ext.__all__ if not re.search(rf"`(elbo_ext\.)?{name}\b", README)] == []


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?<![\w/.])(?:csrc|elbo_ext|tests|benchmarks)/[-\w./]*\w", ALL)))
)
def test_paths_exist(path: str) -> None:
    """A module may be named without its .py."""
    assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists() or path == "csrc/terms/NAME.h"


@pytest.mark.parametrize(
    ("name", "link"), [(name, link) for name, text in TEXTS.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
)
def test_links_lead_somewhere(name: str, link: str) -> None:
    """Files next to the text, and headings in them as GitHub numbers them."""
    path, _, heading = link.partition("#")
    target = (ROOT / name).parent / path
    assert target.exists()
    if heading:
        lines = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert heading in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines]


NAMED_TESTS = re.findall(r"`([\w/]+\.py)::(\w+)`", ALL)


@pytest.mark.parametrize(("file", "test"), NAMED_TESTS)
def test_named_tests_exist(file: str, test: str) -> None:
    assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE)


def test_every_function_of_the_bound_has_an_equation_and_a_test() -> None:
    """The table of tests/README.md."""
    rows = re.findall(r"^\| .*? \| (`.*`) \| `[\w/]+\.py::\w+` \|$", TEXTS["tests/README.md"], re.MULTILINE)
    assert len(rows) == len(NAMED_TESTS) >= 19
    listed = set(re.findall(r"`(?:\w+\.)?(\w+)`", " ".join(rows)))
    functions = {name for name in diagnostics.__all__ if name.islower()} | set(bounds.__all__)
    assert listed == functions


def test_every_file_of_tests_is_listed() -> None:
    """In tests/README.md, in the row of its folder or in one of those after it."""
    table = TEXTS["tests/README.md"].split("## ")[0]
    listed, folder = set(), ""
    for cells in re.findall(r"^\| (`\w+/`|) ?\| (`.*?) \|", table, re.MULTILINE):
        folder = cells[0].strip("`") or folder
        listed |= {folder + file for file in re.findall(r"`(\w+\.py)`", cells[1])}
    tests = {path.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    assert {file for file in listed if "test_" in file} == tests
    assert all((ROOT / "tests" / file).exists() for file in listed)


def test_the_layout_names_every_module_and_folder() -> None:
    """Of the library, in CONTRIBUTING.md."""
    layout = TEXTS["CONTRIBUTING.md"].split("## How the code is laid out")[1]
    for path in (ROOT / "elbo_ext").iterdir():
        if (path.suffix == ".py" and path.name != "__init__.py") or (path / "__init__.py").exists():
            assert re.search(rf"elbo_ext/{path.stem}\b", layout), path
    for path in (ROOT / "csrc").iterdir():
        assert f"csrc/{path.name}" in layout, path


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make ([\w-]+)", "\n".join(source for _, source in blocks(README, "sh")), re.MULTILINE)
    assert {"demo", "test"} <= set(commands)
    for text in TEXTS.values():
        commands += re.findall(r"^make ([\w-]+)", "\n".join(source for _, source in blocks(text, "sh")), re.MULTILINE)
        commands += re.findall(r"`make ([\w-]+)", text)
    for target in commands:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
