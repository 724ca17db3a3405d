"""The sources compile against the headers of the oldest torch that README names, so that nothing newer is used."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from test_build import ROOT, needs_sources, run_setup, write_script

pytestmark = [pytest.mark.download, needs_sources]

# A compiler that reads everything and writes nothing but the names of what it would have written.
ONLY_READS = """
output=
for word; do
  [ "$before" = -o ] && output=$word
  before=$word
done
case " $* " in
  *" -c "*) "$REAL_CXX" -fsyntax-only "$@" || exit 1;;
  *" -shared "*) ;;
  *) exec "$REAL_CXX" "$@";;
esac
touch "$output"
"""


@pytest.fixture(scope="module")
def oldest_torch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The headers of the oldest torch, and its version. The wheel for macOS has the same ones as that for Linux and, without
    CUDA, a sixth of its size."""
    folder = tmp_path_factory.mktemp("torch")
    oldest = re.search(r'^OLDEST_TORCH = "(.+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)[1]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--platform=macosx_11_0_arm64",
         "--python-version=3.11", "--dest", str(folder), f"torch=={oldest}.0"], check=True,
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith("torch/include/")])
    # But for one that is generated for the processor, with the vector functions that test_build.py lists by name.
    shutil.copy2(Path(torch.__file__).parent / "include" / "sleef.h", folder / "torch" / "include")
    return folder / "torch", f"{oldest}.0"


def compile_all(
    folder: Path, headers: Path, version: str, root: Path = ROOT
) -> tuple[subprocess.CompletedProcess[str], int]:
    """What setup.py says, and how many files were compiled."""
    compiler = shutil.which(os.environ.get("CXX", "").strip() or "c++")
    write_script(folder / "bin" / "only-reads-c++", ONLY_READS)
    (folder / "stubs").mkdir()
    (folder / "stubs" / "torch").symlink_to(headers)
    run = run_setup(folder, ("torch", f"__version__ = {version!r}"), root=root, REAL_CXX=compiler, CXX="only-reads-c++",
                    PATH=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")  # fmt: skip
    return run, len([*(folder / "temp").rglob("*.o")])


def test_every_file_compiles(tmp_path: Path, oldest_torch: tuple[Path, str]) -> None:
    run, files = compile_all(tmp_path, *oldest_torch)
    assert run.returncode == 0, run.stdout + run.stderr
    assert files >= 25


def test_something_newer_would_be_seen(tmp_path: Path, oldest_torch: tuple[Path, str]) -> None:
    """STABLE_TORCH_ERROR_CODE_CHECK came after torch 2.11."""
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    newer = sources / "csrc" / "ops" / "device.cpp"
    newer.write_text(newer.read_text().replace("TORCH_ERROR_CODE_CHECK", "STABLE_TORCH_ERROR_CODE_CHECK"))
    run, _ = compile_all(tmp_path, *oldest_torch, root=sources)
    assert run.returncode == 1 and "STABLE_TORCH_ERROR_CODE_CHECK" in run.stdout
