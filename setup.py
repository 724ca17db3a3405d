"""Builds elbo_ext._C: one shared library with the operators (LibTorch stable ABI) and the Python module (pybind11).

The files of csrc/cpu that hold kernels are compiled once per instruction set, against at::vec, which is a header and
needs no torch library; everything else sees only torch's stable ABI. The binary built here therefore serves every torch
from 2.11 on and every machine of the architecture. Environment: MAX_JOBS bounds the parallel compilers, CXX names the
compiler, ELBO_EXT_CUDA=0/1 is reserved for the CUDA library.
"""

import importlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = "2.11"
STABLE_ABI = "0x020b000000000000"  # TORCH_TARGET_VERSION of 2.11

OPERATOR_SOURCES = ["module.cpp", "cpu/dispatch.cpp", *(f"ops/{name}.cpp" for name in (
    "cpu_device", "cuda_device", "device", "latent", "schema", "space", "stored_gradients", "tensors", "term_sum"))]
KERNEL_SOURCES = ["cpu/term_sum.cpp", "cpu/latent.cpp"]

X86_SETS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
# No errno and no floating-point traps, so that sqrt and selects vectorize; this changes no result. No fast-math.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-Wall", "-Wextra", "-Werror=return-type"]
# What at::vec's own headers and gcc's intrinsics warn about.
KERNEL_WARNINGS = ["-Wno-unknown-pragmas", "-Wno-ignored-qualifiers", "-Wno-psabi", "-Wno-maybe-uninitialized",
                   "-Wno-uninitialized"]


def stop(sentence: str) -> None:
    sys.exit(f"elbo_ext: {sentence}")


def require(name: str, version: str = ""):
    """A module that building needs. Build isolation installs it; without isolation the user does."""
    try:
        return importlib.import_module(name)
    except ImportError:
        stop(f"building needs {name}{version}; install it, or drop --no-build-isolation.")


def import_torch():
    from packaging.version import Version

    torch = require("torch", f" >= {OLDEST_TORCH}")
    if Version(torch.__version__).release < Version(OLDEST_TORCH).release:
        stop(f"torch {torch.__version__} is too old to build with; {OLDEST_TORCH} or newer is needed.")
    return torch


def find_compiler() -> str:
    """The C++ compiler, tried on a C++20 program."""
    compiler = os.environ.get("CXX", "").strip() or "c++"
    if shutil.which(compiler.split()[0]) is None:
        stop(f"no C++ compiler: '{compiler}' was not found; install g++ 11 or clang 14 or newer, or set CXX.")
    program = "#include <concepts>\ntemplate <std::integral T> T f(T x) { return x; }\nint main() { return f(0); }\n"
    run = subprocess.run([*compiler.split(), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"], input=program, text=True,
                         capture_output=True)
    if run.returncode != 0:
        stop(f"the compiler '{compiler}' does not know C++20; install g++ 11 or clang 14 or newer, or set CXX.")
    return compiler


class Build(build_ext):
    """Compiles with ninja: files in parallel, and only those that changed."""

    def build_extension(self, ext: Extension) -> None:
        torch, pybind11, _ = import_torch(), require("pybind11"), require("ninja")
        compiler = find_compiler()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        work = (Path(self.build_temp) / "elbo_ext").resolve()
        work.mkdir(parents=True, exist_ok=True)

        torch_dir = Path(torch.__file__).parent
        includes = [f"-isystem {torch_dir / 'include'}", f"-isystem {pybind11.get_include()}",
                    *(f"-isystem {path}" for path in self.include_dirs)]
        sets = X86_SETS if platform.machine() in ("x86_64", "AMD64") else {}
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout.split("\n")[0]
        about = [f"-D{name}='\"{value}\"'" for name, value in {
            "ELBO_COMPILER": version, "ELBO_FLAGS": " ".join(FLAGS), "ELBO_TORCH_VERSION": torch.__version__}.items()]

        # Error messages name csrc/..., not the folder that the library happened to be built in.
        paths = f"-ffile-prefix-map={ROOT}/= -ffile-prefix-map={torch_dir / 'include'}/="
        (work / "exports").write_text("{ global: PyInit__C; local: *; };\n")
        lines = [
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d {paths} {' '.join(FLAGS)} {' '.join(includes)} $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = $out",
            "rule link",
            f"  command = {compiler} -shared $in -o $out -Wl,--version-script={work / 'exports'} "
            f"-L{torch_dir / 'lib'} -ltorch_cpu -ltorch -ldl",
            "  description = link $out",
        ]
        objects = []

        def compile_file(source: str, name: str, flags: list[str]) -> None:
            path = str(ROOT / "csrc" / source).replace(" ", "$ ").replace(":", "$:")
            objects.append(name)
            lines.extend([f"build {name}: compile {path}", f"  flags = {' '.join(flags)}"])

        for source in OPERATOR_SOURCES:
            flags = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", *(f"-DELBO_HAVE_{name}" for name in sets)]
            compile_file(source, source.replace("/", "_") + ".o", flags + (about if source == "module.cpp" else []))
        for name, options in {"DEFAULT": [], **sets}.items():
            for source in KERNEL_SOURCES:
                flags = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", *options, *KERNEL_WARNINGS]
                compile_file(source, f"{source.replace('/', '_')}.{name}.o", flags)
        library = str(target).replace(" ", "$ ").replace(":", "$:")
        lines.append(f"build {library}: link {' '.join(objects)}")
        (work / "build.ninja").write_text("\n".join(lines) + "\n")

        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(work), *jobs]).returncode != 0:
            stop("compiling failed; the compiler's message stands above.")


# `depends` puts the sources into the sdist.
DEPENDS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))
setup(ext_modules=[Extension("elbo_ext._C", sources=[], depends=DEPENDS)], cmdclass={"build_ext": Build})
