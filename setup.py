"""Builds elbo_ext._C, one shared library with the operators (LibTorch stable ABI) and the Python module (pybind11), and,
where nvcc is installed, _cuda.so next to it, the CUDA kernels.

The files of csrc/cpu that hold kernels are compiled once per instruction set, against at::vec, which is a header and
needs no torch library; everything else sees only torch's stable ABI, and csrc/cuda sees no torch at all. The binaries
built here therefore serve every torch from 2.11 on and every machine of the architecture.

Environment:
  CXX                   the C++ compiler
  MAX_JOBS              how many compilers may run at once
  ELBO_EXT_CUDA         0: no CUDA library; 1: stop if there is no nvcc; unset: whether there is one decides;
                        reuse: keep elbo_ext/_cuda.so if it was built from these sources, wherever that was; else as 1
  CUDA_HOME             where CUDA is installed, if nvcc is not on the PATH; or CUDA_PATH
  TORCH_CUDA_ARCH_LIST  the GPUs to compile for, by number: "8.0;9.0+PTX"
  ELBO_EXT_STRICT       1: warnings, spilled registers and local memory in a CUDA kernel are errors (make build)
"""

import hashlib
import importlib
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_SETUPTOOLS = "77"  # the first that reads pyproject.toml's form of the license
OLDEST_TORCH = "2.11"
STABLE_ABI = "0x020b000000000000"  # TORCH_TARGET_VERSION of 2.11

OPERATOR_SOURCES = ["module.cpp", "cpu/dispatch.cpp", *(f"ops/{name}.cpp" for name in (
    "categorical", "cpu_device", "cuda_device", "device", "importance", "latent", "noise",
    "schema", "space", "stored_gradients", "tensors", "term_sum", "terms"))]  # fmt: skip
KERNEL_SOURCES = [
    "cpu/term_sum.cpp",
    "cpu/latent.cpp",
    "cpu/sample_log_prob.cpp",
    "cpu/importance.cpp",
    "cpu/categorical.cpp",
    "cpu/noise.cpp",
]

X86_SETS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
# No errno and no floating-point traps, so that sqrt and selects vectorize; this changes no result. No fast-math.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-Wall", "-Wextra", "-Werror=return-type"]  # fmt: skip
# What at::vec's own headers and gcc's intrinsics warn about.
KERNEL_WARNINGS = ["-Wno-unknown-pragmas", "-Wno-ignored-qualifiers", "-Wno-psabi", "-Wno-maybe-uninitialized",
                   "-Wno-uninitialized"]  # fmt: skip


def stop(sentence: str) -> None:
    sys.exit(f"elbo_ext: {sentence}")


def require(name: str, version: str = ""):
    """A module that building needs. Build isolation installs it; without isolation the user does."""
    try:
        return importlib.import_module(name)
    except ImportError:
        stop(f"building needs {name}{version}; install it, or drop --no-build-isolation.")


def check_setuptools() -> None:
    if int(setuptools.__version__.split(".")[0]) < int(OLDEST_SETUPTOOLS):
        stop(f"setuptools {setuptools.__version__} is too old to build with; {OLDEST_SETUPTOOLS} or newer is needed.")


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
    run = subprocess.run(
        [*compiler.split(), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"],
        input=program,
        text=True,
        capture_output=True,
    )
    if run.returncode != 0:
        stop(f"the compiler '{compiler}' does not know C++20; install g++ 11 or clang 14 or newer, or set CXX.")
    return compiler


# ---- CUDA ----

LAUNCHERS = {"ccache", "distcc", "env", "icecc", "sccache"}  # words such as CXX="ccache g++" begins with
OLDEST_CUDA = (12, 0)  # the first that knows C++20
# The first of each generation, whose code runs on the others as well, of those that nvcc knows; and PTX of 9.0, which
# every newer GPU compiles for itself, 11.0 and those to come among them.
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
PTX = {"9.0": "+PTX"}
CUDA_FLAGS = [
    "-std=c++20",
    "-O3",
    "--expt-relaxed-constexpr",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas",
]  # fmt: skip  the pragmas are for device code
# Spilled registers and arrays in local memory would cost a kernel the bandwidth that it is for.
STRICT_CUDA_FLAGS = ["-Werror=all-warnings", "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror"]


CUDA_LIBRARY = ROOT / "elbo_ext" / "_cuda.so"


def cuda_sources_id() -> bytes:
    """20 bytes of all that the CUDA library is compiled from, which are its build ID."""
    folders = (path for name in ("cuda", "terms") for path in (ROOT / "csrc" / name).rglob("*.*"))
    digest = hashlib.sha1()
    for path in sorted([*folders, ROOT / "csrc" / "problem.h"]):
        digest.update(f"{path.relative_to(ROOT)}\n{path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.digest()


def is_from_these_sources(library: Path) -> bool:
    """By its build ID, an ELF note: times of files say nothing where the library came from another machine."""
    note = struct.pack("=III", 4, 20, 3) + b"GNU\0" + cuda_sources_id()
    return library.exists() and note in library.read_bytes()


def find_nvcc() -> str | None:
    """CUDA's compiler, or None where no CUDA library should be built."""
    wish = os.environ.get("ELBO_EXT_CUDA", "").strip()
    if wish not in ("", "0", "1", "reuse"):
        stop(f"ELBO_EXT_CUDA must be 0, 1 or reuse, got '{wish}'.")
    if wish == "0":
        return None
    if wish == "reuse":
        if is_from_these_sources(CUDA_LIBRARY):
            return None
        reason = "was built from other sources" if CUDA_LIBRARY.exists() else "is not there"
        print(f"elbo_ext: elbo_ext/{CUDA_LIBRARY.name} {reason}. Building it.", file=sys.stderr)
        wish = "1"
    named = {name: f"{os.environ[name]}/bin/nvcc" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)}
    nvcc = next(filter(None, map(shutil.which, [*named.values(), "nvcc", "/usr/local/cuda/bin/nvcc"])), None)
    for name, place in named.items():
        if nvcc == place:
            break
        sentence = f"{name} is '{os.environ[name]}', but there is no {place}."
        if wish == "1":
            stop(f"{sentence} Set it to where the CUDA toolkit is, or unset it.")
        print(f"elbo_ext: {sentence} Building {f'with {nvcc}' if nvcc else 'without CUDA'}.", file=sys.stderr)
    if nvcc is None:
        if wish == "1":
            stop(
                f"ELBO_EXT_CUDA={os.environ['ELBO_EXT_CUDA'].strip()}, but nvcc was not found; install the CUDA toolkit, or "
                "set CUDA_HOME to where it is."
            )
        return None
    version = nvcc_version(nvcc)
    if version < OLDEST_CUDA:
        stop(
            f"{nvcc} is of CUDA {version[0]}.{version[1]}; {OLDEST_CUDA[0]}.{OLDEST_CUDA[1]} or newer is needed. "
            "ELBO_EXT_CUDA=0 builds without CUDA."
        )
    return nvcc


def nvcc_version(nvcc: str) -> tuple[int, int]:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_generation(torch) -> None:
    """Says so where the kernels will need a newer driver than torch does."""
    major, minor = nvcc_version(NVCC)
    of_torch = getattr(getattr(torch, "version", None), "cuda", None)  # None: a torch without CUDA
    if of_torch is not None and int(of_torch.split(".")[0]) < major:
        print(
            f"elbo_ext: nvcc is of CUDA {major}.{minor}, torch {torch.__version__} of CUDA {of_torch}: the CUDA kernels need a "
            f"driver of CUDA {major}, which this torch does not.",
            file=sys.stderr,
        )


def cuda_architectures(nvcc: str) -> dict[str, str]:
    """What nvcc has to generate, by the name of the result: sm_90 is machine code, compute_90 is PTX."""
    wishes = [item for item in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")) if item]
    if not wishes:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()
        wishes = [a + PTX.get(a, "") for a in DEFAULT_ARCHITECTURES if f"sm_{a.replace('.', '')}" in known]
    if not wishes:
        stop(
            f"{nvcc} knows none of {', '.join(DEFAULT_ARCHITECTURES)}; name what to compile for in TORCH_CUDA_ARCH_LIST."
        )
    generate, too_old = {}, []
    for item in wishes:
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", item)
        if match is None:
            stop(f"TORCH_CUDA_ARCH_LIST has '{item}'; numbers such as 9.0 or 9.0+PTX are understood.")
        major, minor, variant, ptx = match.groups()
        number = f"{major}{minor}{variant}"
        if int(major) < 8:
            too_old.append(item)
            continue
        generate[f"sm_{number}"] = f"-gencode=arch=compute_{number},code=sm_{number}"
        if ptx:
            generate[f"compute_{number}"] = f"-gencode=arch=compute_{number},code=compute_{number}"
    if too_old:
        reason = f"TORCH_CUDA_ARCH_LIST has {', '.join(too_old)}; the kernels need compute capability 8.0 or newer."
        if not generate:
            stop(f"{reason} ELBO_EXT_CUDA=0 builds without CUDA.")
        print(f"elbo_ext: {reason} Building for the others.", file=sys.stderr)
    return generate


# ---- the build ----


def escape(path: Path | str) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def shell(*words: Path | str) -> str:
    """Words of a command, for the shell that ninja runs it in: a folder may have a space in its name."""
    return shlex.join(map(str, words)).replace("$", "$$")


class Ninja:
    """A build file: objects compiled from files of csrc, and a library linked from them."""

    def __init__(self, work: Path, compile_command: str, link_command: str) -> None:
        self.work = work
        self.objects: list[str] = []
        self.lines = [
            *(
                "rule compile",
                f"  command = {compile_command}",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = $out",
            ),
            *("rule link", f"  command = {link_command}", "  description = link $out"),
        ]

    def compile(self, source: str, name: str, flags: list[str]) -> None:
        self.objects.append(name)
        self.lines += [f"build {name}: compile {escape(ROOT / 'csrc' / source)}", f"  flags = {shell(*flags)}"]

    def run(self, library: Path, advice: str = "") -> None:
        """Compiles in parallel, and only what changed."""
        self.lines.append(f"build {escape(library)}: link {' '.join(self.objects)}")
        (self.work / "build.ninja").write_text("\n".join(self.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(self.work), *jobs]).returncode != 0:
            stop(f"compiling failed; the compiler's message stands above.{advice}")


def only_export(work: Path, name: str) -> str:
    """The linker's option for a library that exports one symbol."""
    (work / "exports").write_text(f"{{ global: {name}; local: *; }};\n")
    return "--version-script=exports"  # commands run in `work`


class Build(build_ext):
    """Builds the two libraries with ninja."""

    def get_ext_filename(self, name: str) -> str:
        # The CUDA library is no Python module, and serves any Python.
        return os.path.join(*name.split(".")) + ".so" if name.endswith("_cuda") else super().get_ext_filename(name)

    def run(self) -> None:
        built = Path(self.build_lib) / "elbo_ext" / CUDA_LIBRARY.name
        if NVCC is None and not REUSED:  # a CUDA library of an earlier build would not be left out
            for library in (built, *([CUDA_LIBRARY] if self.inplace else [])):
                library.unlink(missing_ok=True)
        super().run()
        if REUSED:
            shutil.copy2(CUDA_LIBRARY, built)

    def build_extension(self, ext: Extension) -> None:
        require("ninja")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        work = (Path(self.build_temp) / ext.name.replace("._C", "").replace(".", "")).resolve()
        work.mkdir(parents=True, exist_ok=True)
        (self.build_cuda if ext.name.endswith("_cuda") else self.build_operators)(target, work)

    def build_operators(self, target: Path, work: Path) -> None:
        torch, pybind11 = import_torch(), require("pybind11")
        compiler = find_compiler()
        torch_dir = Path(torch.__file__).parent
        # pybind11 first: torch brings a copy of its own, which in 2.11 refuses TORCH_TARGET_VERSION.
        includes = [
            word
            for path in (pybind11.get_include(), torch_dir / "include", *self.include_dirs)
            for word in ("-isystem", path)
        ]
        sets = X86_SETS if platform.machine() in ("x86_64", "AMD64") else {}
        version = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True).stdout.split("\n")[0]
        about = [
            f'-D{name}="{value}"'
            for name, value in {
                "ELBO_COMPILER": version,
                "ELBO_FLAGS": " ".join(FLAGS),
                "ELBO_TORCH_VERSION": torch.__version__,
            }.items()
        ]
        # Error messages name csrc/..., not the folder that the library happened to be built in.
        headers = torch_dir / "include"  # with symbolic links the compiler may name either
        short = [f"-ffile-prefix-map={folder}/=" for folder in dict.fromkeys((ROOT, headers, headers.resolve()))]
        ninja = Ninja(
            work,
            f"{compiler} -MMD -MF $out.d {shell(*short, *FLAGS, *includes)} $flags -c $in -o $out",
            f"{compiler} -shared $in -o $out -Wl,{only_export(work, 'PyInit__C')} {shell('-L', torch_dir / 'lib')} "
            "-ltorch_cpu -ldl",
        )
        for source in OPERATOR_SOURCES:
            flags = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", *(f"-DELBO_HAVE_{name}" for name in sets)]
            own = {"module.cpp": about, "ops/cuda_device.cpp": [INTERFACE]}.get(source, [])
            ninja.compile(source, source.replace("/", "_") + ".o", flags + own)
        for name, options in {"DEFAULT": [], **sets}.items():
            for source in KERNEL_SOURCES:
                flags = [f"-DCPU_CAPABILITY={name}", f"-DCPU_CAPABILITY_{name}", *options, *KERNEL_WARNINGS]
                ninja.compile(source, f"{source.replace('/', '_')}.{name}.o", flags)
        ninja.run(target)

    def build_cuda(self, target: Path, work: Path) -> None:
        check_generation(import_torch())
        strict = os.environ.get("ELBO_EXT_STRICT") == "1"
        flags = [*CUDA_FLAGS, *(STRICT_CUDA_FLAGS if strict else []), *ARCHITECTURES.values()]
        # nvcc takes the C++ compiler without its options or a launcher before it.
        host = next(
            (word for word in find_compiler().split() if Path(word).name not in LAUNCHERS and "=" not in word), "c++"
        )
        nvcc = shell(NVCC, "-ccbin", host)
        ninja = Ninja(
            work,
            f"{nvcc} -MD -MF $out.d {shell(*flags)} $flags -c $in -o $out",
            f"{nvcc} -shared --no-device-link -cudart=static $in -o $out "
            f"-Xlinker={only_export(work, 'elbo_ext_cuda_kernels')},--build-id=0x{cuda_sources_id().hex()}",
        )
        for name in ("term_sum", "latent", "sample_log_prob", "categorical"):
            for real in ("float", "double"):
                ninja.compile(f"cuda/{name}.cu", f"{name}.{real}.o", [f"-DELBO_REAL={real}"])
        for name in ("fold", "importance", "latent_list", "noise", "stored_gradients"):
            ninja.compile(f"cuda/{name}.cu", f"{name}.o", [])
        names = " ".join(ARCHITECTURES)
        ninja.compile("cuda/library.cu", "library.o", [f'-DELBO_CUDA_ARCHITECTURES="{names}"', INTERFACE])
        lenient = " ELBO_EXT_STRICT=0 lets warnings, spilled registers and local memory pass." if strict else ""
        ninja.run(target, f"{lenient} ELBO_EXT_CUDA=0 builds without CUDA.")


# `depends` puts the sources into the sdist.
DEPENDS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*"))
# What tells two builds of the two libraries apart that would not understand each other.
INTERFACE = "-DELBO_INTERFACE=" + str(
    zlib.crc32(b"".join((ROOT / "csrc" / name).read_bytes() for name in ("problem.h", "cuda/interface.h")))
)
check_setuptools()
NVCC = find_nvcc()
REUSED = NVCC is None and os.environ.get("ELBO_EXT_CUDA", "").strip() == "reuse"
ARCHITECTURES = cuda_architectures(NVCC) if NVCC else {}
LIBRARIES = ["elbo_ext._C", *(["elbo_ext._cuda"] if NVCC else [])]
setup(ext_modules=[Extension(name, sources=[], depends=DEPENDS) for name in LIBRARIES], cmdclass={"build_ext": Build})
