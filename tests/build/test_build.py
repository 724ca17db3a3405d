"""The build: what the library says of itself, what it imports and exports, what setup.py says when it cannot build."""

import ctypes
import itertools
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pybind11
import pytest
import torch

import elbo_ext
from elbo_ext import _C, build_info
from elbo_ext.__main__ import main

LIBRARY = Path(_C.__file__)
PACKAGE = Path(elbo_ext.__file__).parent
ROOT = Path(__file__).parents[2]
X86 = platform.machine() in ("x86_64", "AMD64")

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
x86_only = pytest.mark.skipif(not X86, reason="one instruction set on this architecture")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """This Python in a process of its own, with the same package; an empty value takes a variable away."""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    env = {name: value for name, value in env.items() if value}
    # From a folder without an elbo_ext of its own, which would come first.
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env, cwd="/", timeout=120)


# ---- build_info ----


def test_keys() -> None:
    assert list(build_info()) == [
        "version",
        "compiler",
        "flags",
        "instruction_sets",
        "instruction_set",
        "cuda_library",
        "cuda_architectures",
        "torch_built_against",
        "torch_running",
    ]


def test_version() -> None:
    """pyproject.toml has it, and nothing else does; everything else says the same."""
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert elbo_ext.__version__ == build_info()["version"] == declared
    assert "__version__" in elbo_ext.__all__


@pytest.mark.parametrize(
    "pyproject", ["", '[project]\nname = "elbo_ext"\nversion = "7.8.9"\n', '[project]\nname = "other"\n']
)
def test_version_of_a_folder(pyproject: str, tmp_path: Path) -> None:
    """A source folder's own, whatever is installed; the installed one where the package is none of a source folder's."""
    metadata = tmp_path / "installed" / "elbo_ext-1.2.3.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: elbo_ext\nVersion: 1.2.3\n")
    (tmp_path / "elbo_ext").mkdir()
    shutil.copy2(PACKAGE / "_version.py", tmp_path / "elbo_ext" / "__init__.py")
    if pyproject:
        (tmp_path / "pyproject.toml").write_text(pyproject)
    program = "import elbo_ext; print(elbo_ext.VERSION)"
    run = python("-c", program, PYTHONPATH=os.pathsep.join(map(str, (tmp_path, metadata.parent))))
    assert run.stdout.strip() == ("7.8.9" if "7.8.9" in pyproject else "1.2.3"), run.stderr


def test_versions() -> None:
    info = build_info()
    assert info["version"] == elbo_ext.__version__
    assert info["torch_running"] == torch.__version__
    assert isinstance(info["torch_built_against"], str)
    for version in (info["torch_built_against"], info["torch_running"]):
        major, minor = map(int, re.match(r"(\d+)\.(\d+)\.\d+", version).groups())
        assert (major, minor) >= (2, 11)


def test_compiler_and_flags() -> None:
    info = build_info()
    assert re.search(r"(?i)(g\+\+|c\+\+|gcc|clang).*\d+\.\d+", info["compiler"]), info["compiler"]
    flags = info["flags"].split()
    assert {"-std=c++20", "-O3", "-fvisibility=hidden"} <= set(flags)
    # Results must not depend on the machine that compiled, nor deviate from IEEE arithmetic.
    assert not {"-ffast-math", "-Ofast", "-funsafe-math-optimizations", "-march=native"} & set(flags)
    # The compiler left its name in the file itself.
    if sys.platform == "linux":
        identity = Elf(LIBRARY).section(".comment")
        assert b"GCC" in identity or b"clang" in identity


def test_instruction_sets() -> None:
    info = build_info()
    assert info["instruction_sets"] == (["DEFAULT", "AVX2", "AVX512"] if X86 else ["DEFAULT"])
    assert info["instruction_set"] in info["instruction_sets"]


# What the kernels of an instruction set use, in the words of /proc/cpuinfo.
NEEDED_FLAGS = {
    "AVX2": {"avx2", "fma", "f16c"},
    "AVX512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
}
BOUNDS = {"": "AVX512", "default": "DEFAULT", "avx2": "AVX2"}


@linux_only
@x86_only
@pytest.mark.parametrize("capability", BOUNDS)
def test_instruction_set_in_use(capability: str) -> None:
    """The widest one that the machine has and ATEN_CPU_CAPABILITY, torch's own variable, allows."""
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[1].split())
    order = ["DEFAULT", "AVX2", "AVX512"]
    possible = [name for name in order if NEEDED_FLAGS.get(name, set()) <= flags]
    expected = [name for name in possible if order.index(name) <= order.index(BOUNDS[capability])][-1]
    program = "import elbo_ext; print(elbo_ext.build_info()['instruction_set'])"
    run = python("-c", program, ATEN_CPU_CAPABILITY=capability)
    assert (run.returncode, run.stdout.strip()) == (0, expected), run.stderr


def printed_info(text: str) -> dict[str, str]:
    lines = (re.match(r"(.{22}) (.*)$", line).groups() for line in text.splitlines())
    return {name.strip(): value for name, value in lines}


def test_info_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    expected = {}
    for name, value in build_info().items():
        expected[name.replace("_", " ")] = (", ".join(value) or "none") if isinstance(value, list) else value
    assert printed_info(capsys.readouterr().out) == expected
    run = python("-m", "elbo_ext", "info")
    assert (run.returncode, run.stderr) == (0, "")
    assert printed_info(run.stdout) == expected


@pytest.mark.parametrize("arguments", [[], ["nonsense"]])
def test_unknown_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m elbo_ext")


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    """A source folder without a build, or a library for another Python: one sentence says what to do."""
    copy = tmp_path / "elbo_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run = python("-c", "import elbo_ext", PYTHONPATH=str(tmp_path))
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: elbo_ext's compiled library could not be loaded with torch {torch.__version__} ("
    )
    assert last.endswith("); reinstall with 'pip install .' from the source folder; torch >= 2.11 is needed")


# ---- the shared library, read byte by byte ----


class Symbol(NamedTuple):
    name: str
    binding: int  # 0 local, 1 global, 2 weak, 10 unique
    kind: int  # 0 none, 1 object, 2 function, 4 file, 6 thread-local
    section: int  # 0 undefined
    address: int


class Elf:
    """As much of a 64 bit little-endian ELF file as is needed here: sections, symbols, the dynamic table."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        assert self.data[:6] == b"\x7fELF\x02\x01", f"{path} is no 64 bit little-endian ELF file"
        offset, size, count, names = struct.unpack_from("<Q10xHHH", self.data, 40)
        headers = [struct.unpack_from("<IIQQQQIIQQ", self.data, offset + i * size) for i in range(count)]
        name_table = self.data[headers[names][4] :]
        self.headers = {_text(name_table, header[0]): header for header in headers}
        self.order = headers

    def section(self, name: str) -> bytes:
        if name not in self.headers:
            return b""
        _, _, _, _, offset, size, *_ = self.headers[name]
        return self.data[offset : offset + size]

    def symbols(self, table: str) -> list[Symbol]:
        strings = self.section(".dynstr" if table == ".dynsym" else ".strtab")
        found = []
        for name, info, _, section, address, _ in struct.iter_unpack("<IBBHQQ", self.section(table)):
            found.append(Symbol(_text(strings, name), info >> 4, info & 15, section, address))
        return found[1:]

    def dynamic(self, tag: int) -> list[str]:
        strings = self.section(".dynstr")
        return [_text(strings, value) for t, value in struct.iter_unpack("<qQ", self.section(".dynamic")) if t == tag]


def _text(table: bytes, start: int) -> str:
    return table[start : table.index(b"\0", start)].decode()


DT_NEEDED, DT_RPATH, DT_RUNPATH = 1, 15, 29
GLOBAL, WEAK = 1, 2
FUNCTION = 2

SYSTEM_LIBRARIES = ("libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1")
LOADERS = ("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1")
# at::vec's mathematical functions, for vectors of 4 doubles and 8 floats (AVX2), 8 and 16 (AVX-512), 2 and 4 (NEON).
SLEEF = {
    True: {
        *("Sleef_expd4_u10", "Sleef_expf8_u10", "Sleef_expd8_u10"),
        *("Sleef_logd4_u10", "Sleef_logf8_u10", "Sleef_logd8_u10"),
        *("Sleef_log1pd4_u10", "Sleef_log1pf8_u10", "Sleef_log1pd8_u10"),
    },
    False: {f"Sleef_{f}{width}_u10" for f in ("exp", "log", "log1p") for width in ("d2", "f4")},
}[X86]
# Asked for by every shared library that gcc links, and absent from all of them.
HARMLESS_WEAK = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}


def loaded_path(library: str) -> Path:
    """Where this process, which uses them all, has a system library from."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(library):  # libstdc++.so.6 is a link to libstdc++.so.6.0.30
            return Path(path)
    raise AssertionError(f"{library} is not loaded")


def defined(path: Path) -> set[str]:
    return {s.name for s in Elf(path).symbols(".dynsym") if s.section != 0 and s.binding in (GLOBAL, WEAK, 10)}


def undefined(path: Path) -> list[Symbol]:
    return [s for s in Elf(path).symbols(".dynsym") if s.section == 0]


@linux_only
def test_outside_symbols() -> None:
    """One binary serves every torch from 2.11 on because it imports torch's stable C functions and nothing mangled."""
    system = set().union(*(defined(loaded_path(name)) for name in (*SYSTEM_LIBRARIES, *loaders())))
    unknown = []
    for symbol in undefined(LIBRARY):
        allowed = (
            re.fullmatch(r"(aoti_torch|torch)_[a-z0-9_]+", symbol.name)
            or re.fullmatch(r"_?Py[A-Za-z]*_\w+", symbol.name)
            or symbol.name in SLEEF
            or symbol.name in HARMLESS_WEAK
            or symbol.name in system
        )
        if not allowed:
            unknown.append(symbol.name)
    assert unknown == []


@linux_only
def test_nothing_mangled_comes_from_torch() -> None:
    """Said without the system's libraries: imported C++ names belong to the C++ runtime, std and __cxxabiv1."""
    mangled = [s.name for s in undefined(LIBRARY) if s.name.startswith("_Z")]
    assert mangled
    foreign = [name for name in mangled if re.search(r"2at|3c10|5torch|8pybind11|8elbo_ext", name)]
    assert foreign == []


def loaders() -> list[str]:
    return [name for name in Elf(LIBRARY).dynamic(DT_NEEDED) if name in LOADERS]


@linux_only
def test_sleef_symbols_are_those_listed() -> None:
    """Exactly: one that is listed and no longer needed would hide a mistake."""
    assert {s.name for s in undefined(LIBRARY) if s.name.startswith("Sleef")} == SLEEF


@linux_only
def test_torch_has_what_is_imported() -> None:
    torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    # A weak symbol is one that the library does without.
    needed = [s for s in undefined(LIBRARY) if s.binding != WEAK]
    names = [s.name for s in needed if re.match(r"aoti_torch_|torch_|Sleef_", s.name)]
    assert len(names) > 30
    assert [name for name in names if not hasattr(torch_cpu, name)] == []


@linux_only
def test_needed_libraries() -> None:
    """libtorch_cpu alone of torch: libtorch is an empty shell around it, and libtorch_python, libc10 and libtorch_cuda
    change from build to build; and no libpython, whose name holds a version."""
    assert set(Elf(LIBRARY).dynamic(DT_NEEDED)) <= {"libtorch_cpu.so", *SYSTEM_LIBRARIES, *LOADERS}
    assert "libtorch_cpu.so" in Elf(LIBRARY).dynamic(DT_NEEDED)


@linux_only
def test_no_path_of_the_building_machine() -> None:
    """torch has loaded its libraries before ours: no search path is needed, and none may point to a build folder."""
    assert Elf(LIBRARY).dynamic(DT_RPATH) + Elf(LIBRARY).dynamic(DT_RUNPATH) == []


@linux_only
def test_no_source_path() -> None:
    """Messages of the C++ code name their place in the sources, csrc/..., not in a folder that only the builder had."""
    absolute = set(re.findall(rb"/[^\0\n]*/csrc/[\w/.]+", LIBRARY.read_bytes()))
    assert absolute == set()


@linux_only
def test_exported_symbols() -> None:
    """Only Python's entry. What else is exported could be bound to by other libraries, or replaced by theirs."""
    exported = [s.name for s in Elf(LIBRARY).symbols(".dynsym") if s.section != 0 and s.binding != 0]
    assert exported == ["PyInit__C"]


# ---- no code of a wider instruction set outside of its kernels ----

# at::vec's functions carry the instruction set in their names as ours do, those that the compiler did not inline.
OWN_NAMESPACE = re.compile(r"_ZZ*NK?(8elbo_ext(12_GLOBAL__N_1|4AVX2|6AVX512)|2at3vec(4AVX2|6AVX512))")


@linux_only
@x86_only
@pytest.mark.skipif(shutil.which("objdump") is None, reason="disassembles with objdump")
def test_wide_instructions_stay_in_their_kernels() -> None:
    """A function that several files have, inline or a template, is kept once, from any of them. If a kernel file had
    such a function, its AVX copy could be the one that is kept, and crash an older machine that calls it elsewhere.

    Every AVX instruction has a mnemonic that begins with v. They may stand only in functions that the linker cannot
    share: those of an anonymous namespace, and the entries that carry the instruction set in their names.
    """
    if not Elf(LIBRARY).section(".symtab"):
        pytest.skip("the library is stripped: no names to tell kernels from the rest")
    listing = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    wide: dict[str, str] = {}
    function = "?"
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line[line.index("<") + 1 : -2]
        elif re.search(r"\t(v(?!err|erw)\w+)", line):
            wide.setdefault(function, line.strip())
    assert sum("12_GLOBAL__N_1" in name for name in wide) > 10  # the kernels are there to be seen
    assert {name: line for name, line in wide.items() if not OWN_NAMESPACE.match(name)} == {}
    # Nor do the kernels of two instruction sets share their anonymous functions: those are local symbols, which the
    # linker never merges.
    shared = [s.name for s in Elf(LIBRARY).symbols(".symtab") if "12_GLOBAL__N_1" in s.name and s.binding != 0]
    assert shared == []


@linux_only
@x86_only
def test_each_instruction_set_has_its_kernels() -> None:
    symbols = Elf(LIBRARY).symbols(".symtab")
    if not symbols:
        pytest.skip("the library is stripped")
    for name in build_info()["instruction_sets"]:
        mangled = f"_ZN8elbo_ext{len(name)}{name}"
        entries = {s.name for s in symbols if s.kind == FUNCTION and s.name.startswith(mangled)}
        for kernel in ("8term_sum", "6latent", "15latent_backward", "11categorical", "5noise"):
            assert any(kernel in entry for entry in entries), f"{name} has no {kernel.lstrip('0123456789')}"


# ---- what setup.py says when it cannot build ----

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the tests lie apart from the sources")


def run_setup(
    tmp_path: Path, stub: tuple[str, str] | None = None, root: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A build of the sources in ``root``, with everything that it writes below ``tmp_path``.

    ``stub`` is a package that stands before the installed one of its name, and its source. torch would take seconds to
    import, and is stood in for by one that says no more than its version. What setup.py reads of the environment is not
    taken from that of the tests; without a wish there is no CUDA library.
    """
    folder = tmp_path / "stubs"
    for name, source in dict([("torch", "__version__ = '2.99.0'"), *([] if stub is None else [stub])]).items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "__init__.py").write_text(source + "\n")
    unset = dict.fromkeys(("CXX", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "ELBO_EXT_STRICT"), "")
    apart = {**unset, "ELBO_EXT_CUDA": "0", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(folder)}
    return subprocess.run(
        [sys.executable, str(root / "setup.py"), "build_ext", "--build-lib", str(tmp_path / "lib"),
         "--build-temp", str(tmp_path / "temp")],
        capture_output=True, text=True, env={**os.environ, **apart, **environment}, cwd=root, timeout=120,
    )  # fmt: skip


def build(tmp_path: Path, stub: tuple[str, str] | None = None, **environment: str) -> tuple[int, list[str]]:
    """Exit code and last words of a build that has to stop before it compiles anything."""
    run = run_setup(tmp_path, stub, **environment)
    assert not [*tmp_path.rglob("*.o"), *tmp_path.rglob("*.so"), *tmp_path.rglob("build.ninja")]
    return run.returncode, run.stderr.strip().splitlines()


ADVICE = "install g++ 11 or clang 14 or newer, or set CXX."


@needs_sources
@pytest.mark.parametrize("compiler", ["/nonexistent/c++", "no-such-compiler", "no-such-compiler -O2"])
def test_no_compiler(tmp_path: Path, compiler: str) -> None:
    sentence = f"elbo_ext: no C++ compiler: '{compiler}' was not found; {ADVICE}"
    assert build(tmp_path, CXX=compiler) == (1, [sentence])


@needs_sources
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_name_of_a_compiler(tmp_path: Path, value: str) -> None:
    """An empty variable is as good as none."""
    sentence = f"elbo_ext: no C++ compiler: 'c++' was not found; {ADVICE}"
    assert build(tmp_path, CXX=value, PATH=str(tmp_path)) == (1, [sentence])


def old_compiler(complaint: str) -> Callable[[Path], str]:
    def make(path: Path) -> str:
        script = path / "old-c++"
        script.write_text(f"#!/bin/sh\necho '{complaint}' >&2\nexit 1\n")
        script.chmod(0o755)
        return str(script)

    return make


@needs_sources
@pytest.mark.parametrize("complaint", ["unrecognized command line option -std=c++20", "concepts: No such file"])
def test_a_compiler_without_cpp20(tmp_path: Path, complaint: str) -> None:
    compiler = old_compiler(complaint)(tmp_path)
    sentence = f"elbo_ext: the compiler '{compiler}' does not know C++20; {ADVICE}"
    assert build(tmp_path, CXX=compiler) == (1, [sentence])


@needs_sources
@pytest.mark.parametrize("version", ["2.10.1", "1.13.1+cu117", "2.9.0a0+git123"])
def test_an_old_torch(tmp_path: Path, version: str) -> None:
    sentence = f"elbo_ext: torch {version} is too old to build with; 2.11 or newer is needed."
    assert build(tmp_path, ("torch", f"__version__ = {version!r}")) == (1, [sentence])


@needs_sources
@pytest.mark.parametrize("version", ["76.1.0", "68.0", "59.6.0.post1"])
def test_an_old_setuptools(tmp_path: Path, version: str) -> None:
    """Which cannot read how pyproject.toml names the license, and would complain of that."""
    stub = (
        "setuptools",
        f"""__version__ = {version!r}
Extension = setup = None
import sys, types
command = types.ModuleType('setuptools.command')
command.build_ext = types.ModuleType('setuptools.command.build_ext')
command.build_ext.build_ext = object
sys.modules |= {{'setuptools.command': command, 'setuptools.command.build_ext': command.build_ext}}""",
    )
    sentence = f"elbo_ext: setuptools {version} is too old to build with; 77 or newer is needed."
    assert build(tmp_path, stub) == (1, [sentence])


@needs_sources
def test_no_torch(tmp_path: Path) -> None:
    sentence = "elbo_ext: building needs torch >= 2.11; install it, or drop --no-build-isolation."
    assert build(tmp_path, ("torch", "raise ModuleNotFoundError('torch')")) == (1, [sentence])


@needs_sources
@pytest.mark.parametrize("name", ["pybind11", "ninja"])
def test_no_build_tool(tmp_path: Path, name: str) -> None:
    """pip install --no-build-isolation does not install them."""
    sentence = f"elbo_ext: building needs {name}; install it, or drop --no-build-isolation."
    assert build(tmp_path, (name, f"raise ModuleNotFoundError({name!r})")) == (1, [sentence])


# ---- what setup.py tells the compilers ----


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# A compiler whose output is the words that it was called with.
WRITES_ITS_WORDS = """
before=
for word; do
  [ "$before" = -o ] && printf '%s\\n' "$@" > "$word"
  before=$word
done
exit 0
"""


@needs_sources
def test_folders_with_a_space(tmp_path: Path) -> None:
    """Sources, torch, and the folders that are built in: each path reaches the compiler as one word."""
    folder = tmp_path / "a folder for $5"
    sources = folder / "sources"
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    write_script(folder / "bin" / "plain-c++", WRITES_ITS_WORDS)
    run = run_setup(
        folder, root=sources, CXX="plain-c++ -m64", PATH=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    )
    assert run.returncode == 0, run.stdout + run.stderr
    objects = [*(folder / "temp").rglob("*.o")]
    assert len(objects) > 10
    for path in objects:
        words = path.read_text().splitlines()
        assert {"-m64", f"-ffile-prefix-map={sources}/="} <= set(words)
        assert words[words.index("-c") + 1].startswith(f"{sources}/csrc/")
        included = [word for before, word in itertools.pairwise(words) if before == "-isystem"]
        # pybind11's own headers before the copy of them that torch has.
        assert included.index(f"{folder}/stubs/torch/include") > included.index(pybind11.get_include())
    (library,) = (folder / "lib").rglob("*.so")
    words = library.read_text().splitlines()
    assert words[words.index("-o") + 1] == str(library)
    assert words[words.index("-L") + 1] == f"{folder}/stubs/torch/lib"


# ---- what a wheel holds besides the libraries ----


@needs_sources
def test_a_wheel_holds_every_module_and_no_other_file(tmp_path: Path) -> None:
    """pyproject.toml names the packages one by one: a folder that it leaves out would be missing where it is installed."""
    sources, built = tmp_path / "sources", tmp_path / "built"
    for name in ("csrc", "elbo_ext"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(built)]
    environment = {**os.environ, "ELBO_EXT_CUDA": "0"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=sources, env=environment, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    held = {path.relative_to(built) for path in built.rglob("*") if path.is_file()}
    modules = {path.relative_to(ROOT) for path in (ROOT / "elbo_ext").rglob("*.py")}
    of_types = {Path("elbo_ext/py.typed"), Path("elbo_ext/_C.pyi")}
    assert Path("elbo_ext/demo/__main__.py") in modules and held == modules | of_types


# ---- when make builds ----


@needs_sources
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_another_setting_builds_anew(tmp_path: Path) -> None:
    """And the same one does not. The build is stood in for by a Python that does nothing."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    write_script(tmp_path / ".venv/bin/python", "exit 0")
    for folder in ("csrc", "elbo_ext"):
        (tmp_path / folder).mkdir()
    for name in (
        "setup.py",
        "pyproject.toml",
        "constraints.txt",
        "elbo_ext/_C.abi.so",
        ".venv/created",
        ".venv/requirements",
    ):
        (tmp_path / name).touch()
    names = ("CXX", "CUDA_HOME", "CUDA_PATH", "ELBO_EXT_CUDA", "ELBO_EXT_STRICT", "TORCH_CUDA_ARCH_LIST", "MAKEFLAGS")
    plain = {name: value for name, value in os.environ.items() if name not in names}

    def compiles(**environment: str) -> bool:
        run = subprocess.run(
            ["make", "build"], cwd=tmp_path, env={**plain, **environment}, capture_output=True, text=True
        )
        assert (run.returncode, run.stderr) == (0, "")
        return "Compiling" in run.stdout

    assert compiles() and not compiles()
    for name, value in {"CXX": "clang++ -m64", "CUDA_HOME": "/opt/cuda", "CUDA_PATH": "/opt/cuda", "ELBO_EXT_CUDA": "0",
                        "ELBO_EXT_STRICT": "0", "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}.items():  # fmt: skip
        assert compiles(**{name: value}), name
        assert not compiles(**{name: value}), name
    assert compiles() and not compiles()
    (tmp_path / "csrc/new.cpp").touch()
    assert compiles() and not compiles()
