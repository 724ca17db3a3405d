"""benchmarks/gpu_check.sh without a GPU: scripts stand in for Python, compute-sanitizer and the number of cores."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from test_build import write_script

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
# What the caller asks of a build is not taken over.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("ELBO_EXT_")}
STEPS = "build info tests quick memcheck racecheck synccheck benchmarks compiled".split()

pytestmark = pytest.mark.skipif(
    not SCRIPT.exists() or any(shutil.which(tool) is None for tool in ("bash", "timeout")),
    reason="the tests lie apart from the sources, or there is no bash or timeout",
)

# It has a torch that sees a GPU, writes down what it is told, and then does {does}.
PYTHON = """
case "$*" in -c*) exit 0;; esac
echo "$ELBO_EXT_CUDA|$PYTORCH_NO_CUDA_MEMORY_CACHING|$*" >> "$SEEN"
{does}
echo "said by $*"
"""
# As a benchmark that Ctrl-C ends: it writes what it has.
INTERRUPTED = """
case "$*" in *"-m benchmarks"*)
  for out; do :; done
  trap 'mkdir -p "$out"; touch "$out/results.json"; exit 130' INT
  for i in $(seq 200); do sleep 0.1; done;;
esac
"""


class Machine:
    def __init__(self, folder: Path, does: str = "") -> None:
        self.folder, self.out, self.seen = folder, folder / "out", folder / "seen"
        write_script(folder / "bin" / "fake-python", PYTHON.format(does=does))
        write_script(folder / "bin" / "compute-sanitizer", 'shift 4\nexec "$@"')
        write_script(folder / "bin" / "nproc", "echo 16")

    def check(self, *steps: str, **environment: str) -> subprocess.CompletedProcess[str]:
        settings = {"PYTHON": "fake-python", "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
                    "SEEN": str(self.seen)}  # fmt: skip
        return subprocess.run(
            ["bash", str(SCRIPT), str(self.out), *steps], capture_output=True, text=True, timeout=60,
            env={**CLEAN, "LIMIT": "300", **settings, **environment},
            # As in the background of a shell.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        )  # fmt: skip

    def commands(self) -> list[list[str]]:
        return [line.split("|") for line in self.seen.read_text().splitlines()]


def test_all_steps_in_their_order(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    run = machine.check()
    assert (run.returncode, run.stderr) == (0, "")
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == STEPS
    assert all(line.split()[1:3] == ["exit", "0"] and "said by" in line for line in lines)
    assert (machine.out / "steps.txt").read_text() == run.stdout
    cuda, caching, words = zip(*machine.commands(), strict=True)
    assert [value != "" for value in cuda] == [step == "build" for step in STEPS] and cuda[0] == "reuse"
    assert list(caching) == ["1" if step == "memcheck" else "" for step in STEPS]
    tests = words[STEPS.index("tests")]
    assert "-n 12 " in tests and "--ignore=tests/build" in tests and tests.endswith("-k cuda or gpu")
    assert all("benchmarks --device cuda" in words[STEPS.index(step)] for step in ("quick", "benchmarks", "compiled"))


def test_named_steps_are_added_to_what_was_done(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    for steps in (("info",), ("quick", "tests")):
        assert machine.check(*steps).returncode == 0
    done = (machine.out / "steps.txt").read_text().splitlines()
    assert [line.split()[0] for line in done] == ["info", "tests", "quick"]


def test_a_step_that_fails_stops_no_other(tmp_path: Path) -> None:
    broken = 'case "$*" in *"-m pytest"*) echo broken; exit 5;; esac'
    run = Machine(tmp_path, broken).check("tests", "quick")
    tests, quick = run.stdout.splitlines()
    assert run.returncode == 1
    assert tests.split()[:3] == ["tests", "exit", "5"] and tests.endswith("broken") and "exit 0" in quick


def test_the_limit_is_for_all_steps_together(tmp_path: Path) -> None:
    """Benchmarks that are cut off write what they have, and count as done; then no time is left."""
    machine = Machine(tmp_path, INTERRUPTED)
    run = machine.check("info", "quick", "benchmarks", LIMIT="13")
    info, quick, benchmarks = run.stdout.splitlines()
    assert "exit 0" in info and quick.split()[:3] == ["quick", "cut", "off"]
    assert (machine.out / "quick/results.json").exists()
    assert benchmarks == "benchmarks   not run: no time is left of 13 s" and run.returncode == 1
    assert machine.check("quick", LIMIT="12").returncode == 0
    run = machine.check("quick", "compiled", LIMIT="12")
    assert "compiled     not run" in run.stdout and run.returncode == 0


def test_no_sanitizer_is_said(tmp_path: Path) -> None:
    if Path("/usr/local/cuda/bin/compute-sanitizer").exists():
        pytest.skip("compute-sanitizer is where it always is")
    machine = Machine(tmp_path)
    (tmp_path / "bin" / "compute-sanitizer").unlink()
    if shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is on the PATH")
    run = machine.check("info", "racecheck")
    assert run.returncode == 1 and "racecheck    not run: there is no compute-sanitizer" in run.stdout


@pytest.mark.parametrize(
    ("words", "environment", "reason"),
    [
        (["out", "everything"], {}, f"there is no step 'everything'; there are {' '.join(STEPS)}"),
        (["--fast"], {}, "there is no option '--fast'"),
        (["out"], {"LIMIT": "soon"}, "LIMIT is seconds, a whole number above 0, not 'soon'"),
        (["out"], {"LIMIT": "0"}, "LIMIT is seconds, a whole number above 0, not '0'"),
        (["out"], {"PYTHON": "no-such-python"}, "there is no Python 'no-such-python'; set PYTHON to one"),
        (["out"], {"PYTHON": "false"}, "false has no torch that sees a CUDA GPU"),
        (["/dev/null/out"], {"PYTHON": "true"}, "the folder '/dev/null/out' cannot be written"),
    ],
)
def test_bad_input(tmp_path: Path, words: list[str], environment: dict[str, str], reason: str) -> None:
    run = subprocess.run(
        ["bash", str(SCRIPT), *(str(tmp_path / word) if word == "out" else word for word in words)],
        capture_output=True, text=True, timeout=60, env={**CLEAN, "LIMIT": "300", **environment},
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (2, "", f"gpu_check: {reason}.\n")
    assert list(tmp_path.iterdir()) == []


def test_help_is_the_head_of_the_file() -> None:
    run = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and "FOLDER is benchmark-results/gpu by default" in run.stdout
    assert "set -u" not in run.stdout
    assert all(f"\n  {step} " in run.stdout for step in STEPS)
