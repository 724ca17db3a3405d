"""The CUDA library, as far as that can be seen without a GPU: what it imports and exports, what the compiler made of its
kernels, when it is loaded, and what setup.py and the package say when something is missing.

That it compiles without warnings, spilled registers or local memory is for the build: `make build` makes those errors.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import elbo_ext
from elbo_ext import _C, build_info
from elbo_ext.likelihoods import TERMS
from interface import interface_number
from test_build import (
    ADVICE,
    DT_NEEDED,
    DT_RPATH,
    DT_RUNPATH,
    PACKAGE,
    ROOT,
    WRITES_ITS_WORDS,
    Elf,
    build,
    defined,
    linux_only,
    loaded_path,
    needs_sources,
    run_setup,
    undefined,
    write_script,
)

LIBRARY = PACKAGE / "_cuda.so"
OPERATORS = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("elbo_ext::"))

needs_library = pytest.mark.skipif(
    not LIBRARY.exists(), reason="no nvcc, or ELBO_EXT_CUDA=0: no CUDA library was built"
)


# ---- the shared library ----

# Before glibc 2.34 libdl, librt and libpthread were libraries of their own.
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2", "librt.so.1",
                    "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # fmt: skip


@linux_only
@needs_library
def test_needed_libraries() -> None:
    """Nothing of torch, so that any torch will do; nothing of CUDA, whose runtime is inside and finds the driver itself."""
    assert set(Elf(LIBRARY).dynamic(DT_NEEDED)) <= SYSTEM_LIBRARIES
    assert Elf(LIBRARY).dynamic(DT_RPATH) + Elf(LIBRARY).dynamic(DT_RUNPATH) == []


@linux_only
@needs_library
def test_outside_symbols() -> None:
    system: set[str] = set()
    for name in Elf(LIBRARY).dynamic(DT_NEEDED):
        system |= defined(loaded_path(name))
    weak = {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable", "__gmon_start__"}
    assert [s.name for s in undefined(LIBRARY) if s.name not in system | weak] == []


@linux_only
@needs_library
def test_exported_symbols() -> None:
    exported = [s.name for s in Elf(LIBRARY).symbols(".dynsym") if s.section != 0 and s.binding != 0]
    assert exported == ["elbo_ext_cuda_kernels"]


# ---- what the compiler made of the kernels ----


def cuobjdump() -> str | None:
    """CUDA's disassembler: on the PATH, next to nvcc, the package of that name (the extra `test`), or Triton's."""
    places = [Path(nvcc).resolve().parent for nvcc in [shutil.which("nvcc")] if nvcc]
    places.append(Path("/usr/local/cuda/bin"))
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
        places += [Path(file.locate()).parent for file in files if file.name == "cuobjdump"]
    except importlib.metadata.PackageNotFoundError:
        pass
    try:
        import triton

        places.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin")
    except ImportError:
        pass
    found = (shutil.which("cuobjdump"), *(shutil.which("cuobjdump", path=str(place)) for place in places))
    return next(filter(None, found), None)


needs_cuobjdump = pytest.mark.skipif(
    cuobjdump() is None, reason="no cuobjdump: neither CUDA, its package nor Triton is installed"
)


@cache
def dump(*options: str) -> str:
    return subprocess.run([cuobjdump(), *options, str(LIBRARY)], capture_output=True, text=True, check=True).stdout


def machine_code() -> list[str]:
    return sorted(set(re.findall(r"\.(sm_\w+)\.cubin", dump("--list-elf"))))


@needs_library
@needs_cuobjdump
def test_architectures() -> None:
    """Machine code for each of the names that the library gives, and PTX for GPUs to come."""
    names = set(
        re.findall(
            rb"(?:sm|compute)_\d+[af]?", re.search(rb"(?:(?:sm|compute)_\d+[af]? ?)+\0", LIBRARY.read_bytes())[0]
        )
    )
    assert {name.decode() for name in names if name.startswith(b"sm_")} == set(machine_code())
    assert any(name.startswith(b"compute_") for name in names) == bool(dump("--list-ptx").strip())


@needs_library
@needs_cuobjdump
def test_no_local_memory() -> None:
    """Spilled registers and arrays in local memory would cost bandwidth, which is what the kernels live on."""
    kernels = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("--dump-resource-usage")
    )
    assert len(kernels) >= 30 * len(machine_code())
    assert [(name, stack, local) for name, _, stack, local in kernels if (stack, local) != ("0", "0")] == []


class DenseTerm(NamedTuple):
    """What a term's header in csrc/terms says of its kernels for dense tensors."""

    tensors: int
    gradients: int  # that they make: not the one by x for a term of counts (count.h)
    at_once: int  # elements that are worked on at once; values are stored so
    # 4 and, but for a term of counts or of many inputs, 8 elements of a thread, with gradients and without, for each class of
    # forms; and as many again for each set of inputs of the fast path (traits.h), in float32 and bfloat16
    kernels: int


def terms() -> dict[str, DenseTerm]:
    classes = {"OneForm": 1, "ManyForms": 1, "TwoForms": 2, "ScaleForms": 2}
    text = "".join(path.read_text() for path in (ROOT / "csrc" / "terms").glob("*.h"))
    bases = r"struct (\w+) : ([^{]*\b(\w+Forms?)\b[^{]*) {"
    declaration = (
        bases + r"\s+static constexpr int kInputs = (\d)(?:, kTensors = (\d))?(?:, kElementsAtOnce = (\d))?([^{]*)"
    )
    found = {}
    for name, inherited, forms, inputs, tensors, at_once, rest in re.findall(declaration, text):
        of_counts, count = "CountTerm" in inherited, int(tensors or inputs)
        fast, scale = (
            int(eval(value[1])) if (value := re.search(rf"{constant} = ([\w<|\s]+)", rest)) else 0  # 1 << 2 | 1 << 3
            for constant in ("kFastPathInputs", "kPrecomputedFrom")
        )
        kernels = (2 if of_counts or (int(inputs) > 3 and not fast) else 4) + 4 * len({fast, fast & ~scale} - {0})
        found[name] = DenseTerm(count, count - of_counts, int(at_once or 4), classes[forms] * kernels)
    return found


@needs_sources
@needs_library
@needs_cuobjdump
def test_wide_accesses() -> None:
    """The kernels for dense tensors read each operand, and write each result, 16 bytes at a time."""
    assert len(terms()) == len(_C.terms()) - sum(term.over_classes for term in TERMS.values())
    # Loads and stores. Those of the latent stage read mu, the scale, the prior's and, backward, the gradient of z.
    latent = {
        "latent_kernel": (4, 1),
        "latent_backward_kernel": (5, 4),
        "sample_log_prob_kernel": (4, 1),
        "sample_log_prob_backward_kernel": (5, 4),
        "latent_fast_path_kernel": (2, 1),
        "latent_backward_fast_path_kernel": (2, 2),
        "latent_list_kernel": (2, 1),
        "latent_list_backward_kernel": (2, 2),
    }
    seen: Counter[str] = Counter()
    for architecture in machine_code():
        functions = re.split(r"\n\s*Function : ", dump("--dump-sass", "-arch", architecture))[1:]
        for function in functions:
            name = function.split(maxsplit=1)[0]
            assert re.search(r"\b(LDL|STL)\b", function) is None, name
            dense = r"12dense_kernelINS0_\d+([A-Za-z]+)EfNS0_14SpecializationILi[48]ELj(\d+)ELNS_5DTypeE\dEEELb([01])E"
            if kernel := re.search(dense, name):
                term, inputs = terms()[kernel[1]], int(kernel[2]).bit_count()
                loads = inputs or term.tensors
                stores = (inputs or term.gradients) if kernel[3] == "1" else int(term.at_once == 4)
            elif kernel := re.search(r"\d([a-z_]+_kernel)I(?:fLb1E|LNS_5DTypeE0E)", name):  # of float, and dense
                loads, stores = latent[kernel[1]]
            else:
                continue
            seen[kernel[1]] += 1
            assert len(re.findall(r"\bLDG\.E[.\w]*\.128\b", function)) >= loads, name
            assert len(re.findall(r"\bSTG\.E[.\w]*\.128\b", function)) >= stores, name
    of_latent = {name: 4 if "fast_path" in name else 2 for name in latent}  # there with a KL and without
    expected = {name: term.kernels for name, term in terms().items()} | of_latent
    assert seen == {name: count * len(machine_code()) for name, count in expected.items()}


# ---- loading and registration ----


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "elbo_ext::draw_seed"])
def test_every_operator_has_a_cuda_kernel(name: str) -> None:
    for key in ("CPU", "CUDA"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def test_seeds_are_drawn_on_cuda() -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("elbo_ext::draw_seed", "CUDA")


def test_loaded_where_torch_has_cuda() -> None:
    """Also without a GPU; and only there."""
    loaded = build_info()["cuda_architectures"]
    assert bool(loaded) == (torch.version.cuda is not None and LIBRARY.exists())
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", name) for name in loaded)


@needs_library
@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA")
def test_a_torch_without_cuda_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"torch has not loaded libtorch_cuda\.so"):
        _C.load_cuda_library(str(LIBRARY))


@pytest.mark.skipif(torch.version.cuda is None, reason="a torch without CUDA")
def test_a_broken_library_is_named(tmp_path: Path) -> None:
    for content in (b"", b"nonsense"):
        broken = tmp_path / "_cuda.so"
        broken.write_bytes(content)
        with pytest.raises(RuntimeError, match=r"_cuda\.so"):
            _C.load_cuda_library(str(broken))


@linux_only
@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_a_library_that_was_cut_off_is_named(tmp_path: Path, part: float) -> None:
    """By an interrupted copy: to open it would kill the process. Any library will do; it is not opened."""
    whole = Path(_C.__file__).read_bytes()
    broken = tmp_path / "_cuda.so"
    broken.write_bytes(whole[: int(part * len(whole))])
    message = f"{broken} is cut off: {int(part * len(whole))} of "
    with pytest.raises(RuntimeError, match=rf"^{re.escape(message)}\d+ bytes$"):
        _C.load_cuda_library(str(broken))


@pytest.mark.skipif(bool(build_info()["cuda_architectures"]), reason="the CUDA library is loaded")
def test_cuda_tensors_without_the_library() -> None:
    """A meta tensor stands in for one on a GPU: neither is on the CPU."""
    x = torch.empty(2, 3, device="meta")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=r"elbo_ext was given CUDA tensors, but .+"):
        torch.ops.elbo_ext.term_sum.default.redispatch(keys, 0, [x, x, None, None], [0.0, 0.0, 0.0, 1.0], 0, 1, 0)


# ---- what setup.py says when it cannot build the CUDA library ----


def fake_nvcc(folder: Path, release: str, known: str = "sm_80 sm_90", compiles: str = "") -> str:
    """A CUDA_HOME whose nvcc says that it is of a release, which GPUs it knows, and does as it is told otherwise."""
    answers = f"""case $1 in
  --version) echo 'Cuda compilation tools, release {release}, V{release}.1'; exit;;
  --list-gpu-code) echo '{known}'; exit;;
esac"""
    write_script(folder / "bin" / "nvcc", f"{answers}\n{compiles}")
    return str(folder)


# What a build that gets past nvcc stops at in these tests.
NO_COMPILER = f"elbo_ext: no C++ compiler: 'no-such-compiler' was not found; {ADVICE}"


def test_an_old_nvcc(tmp_path: Path) -> None:
    home = fake_nvcc(tmp_path, "11.8")
    sentence = (
        f"elbo_ext: {home}/bin/nvcc is of CUDA 11.8; 12.0 or newer is needed. ELBO_EXT_CUDA=0 builds without CUDA."
    )
    assert build(tmp_path, CUDA_HOME=home, ELBO_EXT_CUDA="") == (1, [sentence])


@pytest.mark.parametrize("value", ["2", "yes"])
def test_a_wrong_wish(tmp_path: Path, value: str) -> None:
    assert build(tmp_path, ELBO_EXT_CUDA=value) == (
        1,
        [f"elbo_ext: ELBO_EXT_CUDA must be 0, 1 or reuse, got '{value}'."],
    )


@pytest.mark.skipif(shutil.which("nvcc", path="/usr/local/cuda/bin") is not None, reason="nvcc is where it always is")
def test_no_nvcc(tmp_path: Path) -> None:
    sentence = (
        "elbo_ext: ELBO_EXT_CUDA=1, but nvcc was not found; install the CUDA toolkit, or set CUDA_HOME to where it is."
    )
    assert build(tmp_path, ELBO_EXT_CUDA="1", PATH=str(tmp_path)) == (1, [sentence])


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH"])
@pytest.mark.parametrize("wish", ["", "1"])
def test_a_home_without_nvcc(tmp_path: Path, name: str, wish: str) -> None:
    """It is not passed over in silence. Another nvcc stands in for it, unless CUDA was insisted on."""
    missing, path = str(tmp_path / "missing"), f"{fake_nvcc(tmp_path, '13.0')}/bin"
    sentence = f"elbo_ext: {name} is '{missing}', but there is no {missing}/bin/nvcc. "
    code, words = build(tmp_path, **{name: missing}, ELBO_EXT_CUDA=wish, CXX="no-such-compiler", PATH=path)
    if wish == "1":
        expected = [f"{sentence}Set it to where the CUDA toolkit is, or unset it."]
    else:
        expected = [f"{sentence}Building with {path}/nvcc.", NO_COMPILER]
    assert (code, words) == (1, expected)


def test_a_home_with_nvcc_is_enough(tmp_path: Path) -> None:
    """CUDA_PATH is not looked at after it."""
    home = fake_nvcc(tmp_path, "13.0")
    result = build(tmp_path, CUDA_HOME=home, CUDA_PATH="/nonexistent", ELBO_EXT_CUDA="", CXX="no-such-compiler")
    assert result == (1, [NO_COMPILER])


@pytest.mark.parametrize(
    ("wish", "sentence"),
    [
        ("Hopper", "TORCH_CUDA_ARCH_LIST has 'Hopper'; numbers such as 9.0 or 9.0+PTX are understood."),
        ("7.0;7.5;", "TORCH_CUDA_ARCH_LIST has 7.0, 7.5; the kernels need compute capability 8.0 or newer. "
                     "ELBO_EXT_CUDA=0 builds without CUDA."),
    ],
)  # fmt: skip
def test_unknown_architectures(tmp_path: Path, wish: str, sentence: str) -> None:
    home = fake_nvcc(tmp_path, "13.0")
    result = build(tmp_path, CUDA_HOME=home, ELBO_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST=wish)
    assert result == (1, [f"elbo_ext: {sentence}"])


@pytest.mark.parametrize("separators", ["", ";", " , "])
def test_no_architecture(tmp_path: Path, separators: str) -> None:
    """Separators alone are as good as nothing: the usual ones are chosen, if nvcc knows any."""
    home = fake_nvcc(tmp_path, "19.0", known="sm_200")
    none = "none of 8.0, 9.0, 10.0, 12.0"
    sentence = f"elbo_ext: {home}/bin/nvcc knows {none}; name what to compile for in TORCH_CUDA_ARCH_LIST."
    assert build(tmp_path, CUDA_HOME=home, ELBO_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST=separators) == (1, [sentence])


# ---- what setup.py tells nvcc ----


def compile_with_fakes(
    folder: Path, nvcc: str, stub: tuple[str, str] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A build of both libraries, in which the compilers only write down what they are told."""
    tools = folder / "bin"
    write_script(tools / "plain-c++", WRITES_ITS_WORDS)
    write_script(tools / "ccache", 'exec "$@"')
    known = "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120"
    settings = {"CXX": "plain-c++", "CUDA_HOME": fake_nvcc(folder, "13.0", known, nvcc), "ELBO_EXT_CUDA": "1",
                "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    return run_setup(folder, stub, **{**settings, **environment})


def nvcc_words(folder: Path, **environment: str) -> list[list[str]]:
    """What nvcc was told for each object."""
    run = compile_with_fakes(folder, WRITES_ITS_WORDS, **environment)
    assert run.returncode == 0, run.stdout + run.stderr
    found = [path.read_text().splitlines() for path in (folder / "temp").glob("**/elbo_ext_cuda/*.o")]
    assert len(found) >= 7
    return found


@needs_sources
@pytest.mark.parametrize("compiler", ["plain-c++", "ccache plain-c++ -m64", "env NAME=value ccache plain-c++"])
def test_the_compiler_that_nvcc_calls(tmp_path: Path, compiler: str) -> None:
    """Without a launcher and options. Here in a folder with a space in its name."""
    for words in nvcc_words(tmp_path / "a folder", CXX=compiler):
        assert words[words.index("-ccbin") + 1] == "plain-c++"
        assert words[words.index("-c") + 1].startswith(f"{ROOT}/csrc/cuda/")


@needs_sources
def test_architectures_unless_they_are_named(tmp_path: Path) -> None:
    """Those of every generation from 8.0 on that nvcc knows, and PTX for the GPUs to come."""
    for words in nvcc_words(tmp_path):
        generated = [word.split(",code=")[1] for word in words if word.startswith("-gencode=")]
        assert generated == ["sm_80", "sm_90", "compute_90", "sm_100", "sm_120"]


@needs_sources
def test_named_architectures(tmp_path: Path) -> None:
    """What NVIDIA's containers ask for. GPUs that are too old are left out, and said to be."""
    wish = "7.5 8.6 9.0a 12.0+PTX"
    for words in nvcc_words(tmp_path, TORCH_CUDA_ARCH_LIST=wish):
        generated = [word.split(",code=")[1] for word in words if word.startswith("-gencode=")]
        assert generated == ["sm_86", "sm_90a", "sm_120", "compute_120"]


# ---- a library from elsewhere ----


def copy_of_the_sources(folder: Path) -> Path:
    sources = folder / "sources"
    shutil.copytree(ROOT / "csrc", sources / "csrc")
    (sources / "elbo_ext").mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    return sources


def build_id(words: list[str]) -> bytes:
    """The one that the linker was told."""
    (option,) = (word for word in words if word.startswith("-Xlinker="))
    return bytes.fromhex(option.split("--build-id=0x")[1])


@linux_only
@needs_sources
@pytest.mark.skipif(shutil.which("c++") is None, reason="no c++ to link with")
@pytest.mark.parametrize("change", [None, "csrc/cuda/latent.cuh", "csrc/terms/gaussian.h", "csrc/problem.h"])
def test_a_library_of_the_same_sources_is_kept(tmp_path: Path, change: str | None) -> None:
    """And one of other sources is built anew. It stands for both that the linker links nothing with their build ID."""
    sources = copy_of_the_sources(tmp_path)
    home = fake_nvcc(tmp_path, "13.0", compiles=WRITES_ITS_WORDS)
    write_script(tmp_path / "bin" / "plain-c++", WRITES_ITS_WORDS)
    settings = {"CXX": "plain-c++", "CUDA_HOME": home, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    first = run_setup(tmp_path / "first", root=sources, ELBO_EXT_CUDA="1", **settings)
    assert first.returncode == 0, first.stdout + first.stderr
    words = (tmp_path / "first/lib/elbo_ext/_cuda.so").read_text().splitlines()
    library = sources / "elbo_ext" / "_cuda.so"
    nothing = ["c++", "-shared", "-nostdlib", "-x", "c++", "/dev/null"]
    subprocess.run([*nothing, f"-Wl,--build-id=0x{build_id(words).hex()}", "-o", library], check=True)
    if change:
        (sources / change).write_text((sources / change).read_text() + "\n// changed\n")
    before = library.read_bytes()
    again = run_setup(tmp_path / "again", root=sources, ELBO_EXT_CUDA="reuse", **settings)
    assert again.returncode == 0, again.stdout + again.stderr
    assert library.read_bytes() == before
    built = (tmp_path / "again/lib/elbo_ext/_cuda.so").read_bytes()
    said = "elbo_ext: elbo_ext/_cuda.so was built from other sources. Building it." in again.stderr.splitlines()
    assert said == (change is not None)
    if change is None:
        assert built == before and not [*(tmp_path / "again/temp").rglob("library.o")]
    else:
        assert build_id(built.decode().splitlines()) != build_id(words)


@needs_sources
@pytest.mark.skipif(shutil.which("nvcc", path="/usr/local/cuda/bin") is not None, reason="nvcc is where it always is")
def test_nothing_to_reuse_and_no_nvcc(tmp_path: Path) -> None:
    run = run_setup(tmp_path, root=copy_of_the_sources(tmp_path), ELBO_EXT_CUDA="reuse", PATH=str(tmp_path))
    assert (run.returncode, run.stderr.strip().splitlines()) == (1, [
        "elbo_ext: elbo_ext/_cuda.so is not there. Building it.",
        "elbo_ext: ELBO_EXT_CUDA=reuse, but nvcc was not found; install the CUDA toolkit, or set CUDA_HOME to where it is.",
    ])  # fmt: skip


@needs_sources
@needs_library
def test_the_library_that_was_built_may_be_reused(tmp_path: Path) -> None:
    """nvcc's linker gave it the sources' build ID."""
    assert build(tmp_path, ELBO_EXT_CUDA="reuse", CXX="no-such-compiler") == (1, [NO_COMPILER])


@needs_sources
@pytest.mark.parametrize("strict", ["", "0", "1"])
def test_a_way_out_where_nvcc_fails(tmp_path: Path, strict: str) -> None:
    run = compile_with_fakes(tmp_path, "exit 1", ELBO_EXT_STRICT=strict)
    lenient = " ELBO_EXT_STRICT=0 lets warnings, spilled registers and local memory pass." if strict == "1" else ""
    sentence = f"elbo_ext: compiling failed; the compiler's message stands above.{lenient} ELBO_EXT_CUDA=0 builds without CUDA."
    assert (run.returncode, run.stderr.strip().splitlines()[-1]) == (1, sentence)


@needs_sources
@pytest.mark.parametrize(
    ("of_torch", "warns"), [("'12.6'", True), ("'13.2'", False), ("'14.0'", False), ("None", False)]
)
def test_an_nvcc_newer_than_torch(tmp_path: Path, of_torch: str, warns: bool) -> None:
    """Its kernels need a newer driver than torch does, and that is easily missed."""
    torch_stub = ("torch", f"import types\n__version__ = '2.99.0'\nversion = types.SimpleNamespace(cuda={of_torch})")
    run = compile_with_fakes(tmp_path, WRITES_ITS_WORDS, stub=torch_stub)
    sentence = (
        f"elbo_ext: nvcc is of CUDA 13.0, torch 2.99.0 of CUDA {of_torch[1:-1]}: the CUDA kernels need a driver of CUDA 13, "
        "which this torch does not."
    )
    assert (run.returncode, sentence in run.stderr.splitlines()) == (0, warns), run.stderr


# ---- the driver ----

# A driver of another version, as the CUDA runtime finds it by its name.
FAKE_DRIVER = """
int cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
int cuInit(unsigned flags) { return 100; } /* no device */
"""
COMPLAINT = """
import ctypes, sys
entry = ctypes.CDLL(sys.argv[1]).elbo_ext_cuda_kernels
entry.argtypes, entry.restype = [ctypes.c_int64], ctypes.POINTER(ctypes.c_void_p)
complaint = ctypes.CFUNCTYPE(ctypes.c_char_p)(entry(int(sys.argv[2]))[1])
print((complaint() or b'none').decode())
"""


@needs_library
@needs_sources
@linux_only
@pytest.mark.parametrize(("driver", "too_old"), [(0, False), (9020, True), (11080, True), (99000, False)])
def test_a_driver_that_is_too_old(tmp_path: Path, driver: int, too_old: bool) -> None:
    """It would fail at the first call, in CUDA's words; the library's generation is that of the nvcc that built it."""
    (tmp_path / "driver.c").write_text(FAKE_DRIVER)
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-DVERSION={driver}", "-o", str(library), str(tmp_path / "driver.c")],
        check=True,
    )
    run = subprocess.run(
        [sys.executable, "-c", COMPLAINT, str(LIBRARY), str(interface_number())], capture_output=True, text=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(tmp_path)},
    )  # fmt: skip
    expected = (
        r"it was built with CUDA (\d+) and needs an NVIDIA driver of that generation, but the driver here is of CUDA "
        rf"{driver // 1000}\.{driver % 1000 // 10}"
        if too_old
        else "none"
    )
    assert re.fullmatch(expected, run.stdout.strip()), run.stdout + run.stderr


def test_the_package_imports_without_it() -> None:
    """The CPU kernels never depend on it."""
    assert elbo_ext.gaussian_log_prob(torch.zeros(2, 3), torch.zeros(2, 3)).shape == (2,)
