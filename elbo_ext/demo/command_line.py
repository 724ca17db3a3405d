"""What the demo's commands share: output files, options, the device, and how a failure is told."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import elbo_ext

from .data import DataError
from .vae import DemoError

EXIT_CODES = (
    "exit codes: 0 all is well; 1 a check of the results failed; 2 the data, an option or the "
    "output folder cannot be used (one sentence says why, and nothing is written)."
)


class OutputFolder:
    """Files that appear in `path` all at once, at the end, or not at all.

    They are written to a temporary folder on the same file system, then moved into place one by one: no file
    is ever half-written, and files of other names in `path` stay as they are.
    """

    def __init__(self, path: str, names: Sequence[str] = ()) -> None:
        """`names`: of the files that are going to be written."""
        self.path = Path(path)
        try:
            if not path or (self.path.exists() and not self.path.is_dir()):
                raise DemoError(f"--out {path!r} is not a folder")
            for name in names:
                if (self.path / name).is_dir():
                    raise DemoError(f"--out {path!r} cannot be written: {name} in it is a folder")
            with self._staging():
                pass  # it can be written
        except OSError as error:
            raise DemoError(f"--out {path!r} cannot be written: {error.strerror or error}") from None

    def write(self, files: dict[str, bytes]) -> None:
        """Publish {name: content}; raises DemoError and leaves nothing new if that fails."""
        try:
            with self._staging() as staging:
                for name, content in files.items():
                    (staging / name).write_bytes(content)
                existed = self.path.exists()
                if existed:
                    for name in files:
                        os.replace(staging / name, self.path / name)
                else:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    ready = staging / self.path.name
                    ready.mkdir()  # with the user's permissions, not the temporary folder's
                    for name in files:
                        os.replace(staging / name, ready / name)
                    os.replace(ready, self.path)
        except OSError as error:
            raise DemoError(f"--out {str(self.path)!r} cannot be written: {error.strerror or error}") from None

    @contextlib.contextmanager
    def _staging(self) -> Iterator[Path]:
        """A temporary folder inside `path`, or in the nearest folder above it that exists."""
        parent = self.path.absolute()
        while not parent.exists():
            parent = parent.parent
        with tempfile.TemporaryDirectory(prefix=".elbo_demo_", dir=parent) as staging:
            yield Path(staging)


def versions() -> dict[str, Any]:
    """What ran: versions, machine and the package's build."""

    def of(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    build_info = getattr(elbo_ext, "build_info", None)
    return {
        "elbo_ext": getattr(elbo_ext, "__version__", None) or of("elbo_ext"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": of("scikit-learn"),
        "matplotlib": of("matplotlib"),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "build_info": build_info() if build_info else None,
    }


# --- options ------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise DemoError(message[:1].lower() + message[1:])


def number(kind: type, low: float, name: str, *, above: bool = False) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (value > low if above else value >= low) or value >= (2**63 if kind is int else math.inf):
            raise argparse.ArgumentTypeError(f"{text!r} is not {name}")
        return value

    return parse


def add_model_options(parser: argparse.ArgumentParser, *, epochs: int, latent: int, hidden: int, noun: str) -> None:
    """--epochs, --latent, --hidden, --batch-size and --learning-rate; `noun` is what an example is called."""
    positive = number(int, 1, "a whole number of 1 or more")
    parser.add_argument(
        "--epochs", type=positive, default=epochs, help=f"passes over the training {noun}s (default: %(default)s)"
    )
    parser.add_argument("--latent", type=positive, default=latent, help="dimensions of z (default: %(default)s)")
    parser.add_argument(
        "--hidden",
        type=positive,
        default=hidden,
        help="width of the two hidden layers each way (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=positive, default=64, help=f"{noun}s per step (default: %(default)s)")
    parser.add_argument(
        "--learning-rate",
        type=number(float, 0, "a finite number above 0", above=True),
        default=1e-3,
        help="of Adam (default: %(default)s)",
    )


def add_run_options(parser: argparse.ArgumentParser, *, threads: str, seed: str, out: str) -> None:
    """--device, --threads, --seed and --out; `threads` and `seed` complete their help, `out` is the default."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=number(int, 1, "a whole number of 1 or more"),
        metavar="N",
        help=f"CPU threads (default: {threads})",
    )
    parser.add_argument(
        "--seed",
        type=number(int, 0, "a whole number of 0 or more"),
        default=0,
        help=f"of {seed} (default: %(default)s)",
    )
    parser.add_argument("--out", metavar="FOLDER", default=out, help="where the results go (default: %(default)s)")


def check_run_options(options: argparse.Namespace) -> torch.device:
    """The device to run on; raises DemoError where it, the threads or a package that only the demo needs is not there."""
    try:
        import matplotlib  # noqa: F401
        import tqdm  # noqa: F401
    except ImportError as error:
        raise DemoError(f"the demo needs {error.name}: pip install 'elbo_ext[demo]'") from None
    processors = os.cpu_count() or 1
    if options.threads and options.threads > processors:
        raise DemoError(f"--threads {options.threads} is more than this machine's {processors} processors")
    return _device_of(options.device)


def _device_of(name: str) -> torch.device:
    """The device of that name, tried; raises DemoError."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DemoError(f"--device {name!r} is not a device; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise DemoError(f"--device {name!r} is not supported; use cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DemoError(f"--device {name!r} cannot be used: this PyTorch ({torch.__version__}) sees no CUDA GPU")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.index is not None and device.index >= count:
        raise DemoError(
            f"--device {name!r} does not exist: there {'is' if count == 1 else 'are'} {count}, counted from 0"
        )
    try:
        elbo_ext.rsample_kl(torch.zeros(1, 1, device=device), torch.zeros(1, 1, device=device))
    except (RuntimeError, NotImplementedError) as error:
        raise DemoError(f"--device {name!r} cannot be used: {first_line(error)}") from None
    return device


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# --- a run --------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """Print; a reader who has gone (`| head`) does not stop the work."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the end


def count_of_threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"


def as_json(results: dict[str, Any]) -> bytes:
    return (json.dumps(results, indent=1, allow_nan=False) + "\n").encode()


def exit_code(run: Callable[[], dict[str, Any]]) -> int:
    """Run it and tell in one sentence what went wrong: an error, or `checks` that failed among the results."""
    threads = torch.get_num_threads()
    try:
        results = run()
    except (DemoError, DataError) as error:
        print(f"elbo_ext.demo: error: {error}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("elbo_ext.demo: interrupted, nothing was written.", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
        if not out_of_memory:
            raise
        print("elbo_ext.demo: error: there is not enough memory for this model and data.", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    failed = [name for name, passed in results["checks"].items() if not passed]
    if failed:
        print(f"elbo_ext.demo: failed: {', '.join(failed).replace('_', ' ')}.", file=sys.stderr)
    return 1 if failed else 0
