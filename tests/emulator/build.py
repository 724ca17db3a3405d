"""Compiles csrc/cuda with the C++ compiler, against the CUDA of this folder, into build/emulator:

    elbo_ext/      the package, its operators handing CPU tensors to the CUDA kernels
    plain.so       the kernels
    sanitized.so   the same under AddressSanitizer and UndefinedBehaviorSanitizer
    *.faults.so    kernels with errors, for the tests of the emulator itself

``python tests/emulator/build.py`` makes all of it, ``... plain`` the package and one of the two.
"""

import fcntl
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent.resolve()
sys.path.append(str(HERE.parent))  # where this runs as a script

from interface import interface_number  # noqa: E402

ROOT = HERE.parents[1]
WORK = ROOT / "build" / "emulator"

# no_cpu_kernels.cpp stands in for the CPU's.
OPERATORS = [
    "module",
    *sorted(f"ops/{path.stem}" for path in (ROOT / "csrc/ops").glob("*.cpp") if path.stem != "cpu_device"),
]
KERNELS = {
    "library": ("library", ['-DELBO_CUDA_ARCHITECTURES="emulator"']),
    **{name: (name, []) for name in ("fold", "importance", "latent_list", "noise", "stored_gradients")},
    **{f"{name}.{real}": (name, [f"-DELBO_REAL={real}"])
       for name in ("term_sum", "latent", "sample_log_prob", "categorical") for real in ("float", "double")},
}  # fmt: skip

# __CUDACC__ is what nvcc defines. The kernels are written for its rules: unused functions of headers, pragmas for it.
FLAGS = [
    "-std=c++20",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
]
KERNEL_FLAGS = ["-O1", "-g1", "-D__CUDACC__", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized",
                "-Wno-sign-compare"]  # fmt: skip
# Without the checks that double the time to compile, of what AddressSanitizer sees as well.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr,pointer-overflow",
              "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]  # fmt: skip
OUTLINED = ["--param", "asan-instrumentation-with-call-threshold=0"]  # which halves it once more; g++'s spelling
VARIANTS = {"plain": [], "sanitized": [*SANITIZERS, "-DELBO_EMULATOR_SANITIZED"]}


def compiler() -> str:
    return os.environ.get("CXX", "").strip() or "c++"


def interface(sources: Path = ROOT / "csrc") -> str:
    return f"-DELBO_INTERFACE={interface_number(sources)}"


def escape(path: Path | str) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(*words: Path | str) -> str:
    return shlex.join(map(str, words)).replace("$", "$$")


class Ninja:
    """A build file of objects and the libraries linked from them."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.lines = [
            "rule compile", f"  command = {compiler()} -MMD -MF $out.d $flags -c $in -o $out", "  depfile = $out.d",
            "  deps = gcc", "  description = $out",
            "rule link", f"  command = {compiler()} -shared $in -o $out $flags", "  description = $out",
        ]  # fmt: skip

    def compile(self, source: Path, to: str, flags: list[str]) -> str:
        self.lines += [f"build {escape(to)}: compile {escape(source)}", f"  flags = {shell(*flags)}"]
        return to

    def link(self, objects: list[str | Path], to: str, flags: list[str]) -> None:
        self.lines += [f"build {escape(to)}: link {' '.join(map(escape, objects))}", f"  flags = {shell(*flags)}"]

    def run(self, *targets: str) -> None:
        file = self.work / "build.ninja"
        text = "\n".join(self.lines) + "\n"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        run = subprocess.run([sys.executable, "-m", "ninja", "-C", str(self.work), *jobs, *targets], text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        if run.returncode != 0:
            raise RuntimeError(f"the emulator could not be compiled:\n{run.stdout}")


def kernel_flags(variant: str, sources: Path = ROOT / "csrc") -> list[str]:
    outlined = OUTLINED if variant == "sanitized" and sanitizer_runtime() else []
    return [*FLAGS, *KERNEL_FLAGS, *VARIANTS[variant], *outlined, "-I", str(HERE / "include"), interface(sources)]


def sanitizer_runtime() -> str:
    """What a Python that loads the sanitized library has to load before anything else; empty if this is not g++'s."""
    commands = ([*compiler().split(), f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so"))
    libraries = [subprocess.run(command, capture_output=True, text=True).stdout.strip() for command in commands]
    return " ".join(libraries) if all(Path(library).is_absolute() for library in libraries) else ""


def build(*variants: str) -> Path:
    """Brings the package and the libraries of kernels up to date; returns the folder. One process builds at a time."""
    import pybind11
    import torch

    package = WORK / "elbo_ext"
    package.mkdir(parents=True, exist_ok=True)
    with open(WORK / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for old in filter(Path.is_symlink, package.iterdir()):
            old.unlink()
        for part in (ROOT / "elbo_ext").iterdir():  # modules, and packages such as bounds
            if part.suffix == ".py" or (part / "__init__.py").exists():
                (package / part.name).symlink_to(part)
        (WORK / "exports").write_text("{ global: PyInit__C; local: *; };\n")
        ninja = Ninja(WORK)
        torch_dir = Path(torch.__file__).parent
        includes = [word for path in (pybind11.get_include(), torch_dir / "include", sysconfig.get_path("include"))
                    for word in ("-isystem", str(path))]  # fmt: skip
        about = ['-DELBO_COMPILER="the emulator\'s"', '-DELBO_FLAGS=""', f'-DELBO_TORCH_VERSION="{torch.__version__}"']
        flags = [
            *FLAGS,
            "-O1",
            "-DELBO_EMULATOR",
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            *about,
            interface(),
            *includes,
        ]
        objects = [
            ninja.compile(ROOT / "csrc" / f"{name}.cpp", f"{name.replace('/', '_')}.o", flags) for name in OPERATORS
        ]
        objects.append(ninja.compile(HERE / "no_cpu_kernels.cpp", "no_cpu_kernels.o", flags))
        module = "elbo_ext/_C" + sysconfig.get_config_var("EXT_SUFFIX")
        ninja.link(
            objects, module, ["-Wl,--version-script=exports", "-L", str(torch_dir / "lib"), "-ltorch_cpu", "-ldl"]
        )
        for variant in VARIANTS:
            objects = compile_kernels(ninja, variant)
            ninja.link(objects, f"{variant}.so", [*VARIANTS[variant], "-ldl"])
            faults = ninja.compile(HERE / "faults.cu", f"{variant}.faults.o", ["-x", "c++", *kernel_flags(variant)])
            ninja.link([faults, objects[0]], f"{variant}.faults.so", [*VARIANTS[variant], "-ldl"])
        ninja.run(
            module, *(f"{name}.so" for variant in variants or VARIANTS for name in (variant, variant + ".faults"))
        )
    return WORK


def compile_kernels(ninja: Ninja, variant: str) -> list[str | Path]:
    flags = kernel_flags(variant)
    objects: list[str | Path] = [ninja.compile(HERE / "runtime.cpp", f"{variant}.runtime.o", flags)]
    for name, (source, defines) in KERNELS.items():
        path = ROOT / "csrc" / "cuda" / f"{source}.cu"
        objects.append(ninja.compile(path, f"{variant}.{name}.o", ["-x", "c++", *flags, *defines]))
    return objects


if __name__ == "__main__":
    try:
        print(build(*sys.argv[1:]))
    except RuntimeError as failure:
        sys.exit(str(failure))
