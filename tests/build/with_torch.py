"""Runs the whole suite with another torch, twice: with the binaries that ``make build`` made, against the torch of
constraints.txt, and with binaries built against the other torch itself.

    python tests/build/with_torch.py 2.11.0 [options of pytest]     also "oldest" and "newest"; make test-torch TORCH=...

The other torch goes into a virtual environment of its own, .venv-torch-VERSION, everything else as in constraints.txt.
"""

import argparse
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
BINARIES = ("elbo_ext/_C.*.so", "elbo_ext/_cuda.so")


def requirement(wish: str) -> str:
    """What pip is asked for."""
    if wish == "newest":
        return "torch"
    if wish == "oldest":
        return "torch==" + re.search(r'^OLDEST_TORCH = "(.+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)[1] + ".*"
    if not re.fullmatch(r"\d+\.\d+(\.\d+)?", wish):
        sys.exit(f"with_torch: TORCH must be a version such as 2.11.0, oldest or newest, got '{wish}'")
    return f"torch=={wish}"


def environment(name: str, torch: str) -> Path:
    """The Python of the virtual environment .venv-NAME with what constraints.txt says, but for torch."""
    folder = ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    others = folder / "requirements.txt"
    pins = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    others.write_text("".join(line for line in pins if not line.startswith("torch==")))
    install(python, "-r", str(others))
    # torch by itself, because it may ask for another version of something than the pinned torch does.
    install(python, *(["--upgrade"] if torch == "torch" else []), torch)
    return python


def install(python: Path, *words: str) -> None:
    if (
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
        ).returncode
        != 0
    ):
        sys.exit(f"{words[-1]} could not be installed; pip's message stands above")


def stage(folder: Path) -> Path:
    """A copy of the sources as they are now, without libraries."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for old in folder.glob("*"):  # but what has been compiled, whose objects may serve again
        if old.name != "build":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    for name in filter(None, files):
        source, target = ROOT / name, folder / name
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    return folder


def take_binaries(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for binary in ROOT.glob(pattern):
            shutil.copy2(binary, folder / binary.relative_to(ROOT))


def suite(python: Path, folder: Path, title: str, options: list[str]) -> int:
    print(f"== {title}", flush=True)
    subprocess.run([str(python), "-m", "elbo_ext", "info"], cwd=folder, check=True)
    return subprocess.run([str(python), "-m", "pytest", "-q", *options], cwd=folder).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="with_torch", description=__doc__.split("\n\n")[0])
    parser.add_argument("torch", help="a version such as 2.11.0, oldest or newest")
    wish, options = (known := parser.parse_known_args())[0].torch, known[1]
    requirement(wish)
    if not any(ROOT.glob(BINARIES[0])):
        sys.exit("with_torch: there is no build to test; run 'make build' first")
    python = environment(f"torch-{wish}", requirement(wish))
    work = ROOT / "build" / f"torch-{wish}"

    given = stage(work / "built-elsewhere")
    take_binaries(given, *BINARIES)
    failed = suite(python, given, f"torch {wish}, built against the torch of constraints.txt", options)

    own = stage(work / "own-build")
    build = [str(python), "setup.py", "-q", "egg_info", "build_ext", "--inplace"]
    # The CUDA library holds nothing of torch: there is nothing to build anew.
    if subprocess.run(["env", "ELBO_EXT_CUDA=0", *build], cwd=own).returncode != 0:
        sys.exit(f"with_torch: elbo_ext could not be built against torch {wish}")
    take_binaries(own, BINARIES[1])
    return suite(python, own, f"torch {wish}, built against it", options) or failed


if __name__ == "__main__":
    sys.exit(main())
