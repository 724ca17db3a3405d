"""Data for the demo: scikit-learn's handwritten digits, or a .npy, .npz or MNIST idx file.

A file is recognised by its first bytes, not by its name, and every way in which it can be wrong
(missing, truncated, pickled, not finite, the wrong shape) raises `DataError` with one sentence.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import os
import zipfile
import zlib
from typing import IO, BinaryIO

import numpy as np
import torch

NPZ_NAMES = ("x", "images", "arr_0", "x_train")
"""Array names looked for, in this order, in an .npz file that holds more than one array."""

IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
"""Type code (third byte of an idx file) -> NumPy dtype; idx is big-endian."""

Stream = BinaryIO | IO[bytes] | gzip.GzipFile

_DAMAGE = (
    ValueError,
    EOFError,
    KeyError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    zlib.error,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
)


class DataError(ValueError):
    """The data cannot be used; the message is one sentence for the user."""


@dataclasses.dataclass(frozen=True)
class Images:
    """N examples as rows of float32.

    values: [N, D], D = product of `shape`; shape: of one example, e.g. (28, 28);
    source: what to call the data; scaling: what was done to the numbers, in words; noun: what an example is.
    """

    values: torch.Tensor
    shape: tuple[int, ...]
    source: str
    scaling: str
    noun: str = "image"

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def low(self) -> float:
        return self.values.min().item()

    @property
    def high(self) -> float:
        return self.values.max().item()


def load_images(path: str | os.PathLike[str] | None = None) -> Images:
    """Images from `path` (.npy, .npz, idx; .npy and idx may be gzipped), or the digits for None.

    uint8 is divided by 255; every other numeric type is used as it is. Raises DataError.
    """
    if path is None:
        return _digits()
    array = read_array(path)
    images = images_from_array(array, os.fspath(path))
    if array.dtype == np.uint8:
        return dataclasses.replace(images, values=images.values / 255, scaling="divided by 255")
    return images


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in a .npy, .npz or idx file, as it is stored; raises DataError."""
    source = os.fspath(path)
    try:
        return _read(source)
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{source!r} asks for more memory than there is") from None
    except _DAMAGE as error:
        raise DataError(f"{source!r} is damaged or truncated ({_first_line(error)})") from None
    except OSError as error:
        raise DataError(f"cannot read {source!r}: {error.strerror or _first_line(error)}") from None


def images_from_array(array: np.ndarray, source: str, noun: str = "image") -> Images:
    """Check a numeric array [N, ...] and turn it into Images of the same numbers; raises DataError."""
    if array.dtype.kind not in "buif":
        raise DataError(f"{source!r} holds {array.dtype} values, but {noun}s must be real numbers")
    if array.ndim < 2:
        parts = "pixels" if noun == "image" else "features"
        raise DataError(
            f"{source!r} has shape {_shape(array)}, but {noun}s need at least two dimensions, "
            f"[{noun}s, {parts}] (are these labels?)"
        )
    if array.size == 0:
        raise DataError(f"{source!r} has shape {_shape(array)}: there is no {noun} in it")
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.array(array, dtype=np.float32).reshape(len(array), -1)
    finite = np.isfinite(values)
    if not finite.all():
        first = int(np.argmin(finite.all(axis=1)))
        bad = finite.size - int(finite.sum())
        raise DataError(
            f"{source!r} holds {bad} {'value that is' if bad == 1 else 'values that are'} NaN, infinite "
            f"or too large for float32, the first in {noun} {first}"
        )
    return Images(torch.from_numpy(values), array.shape[1:], source, "used as they are", noun)


def check_likelihood(images: Images, likelihood: str) -> None:
    """Raise DataError unless the values are possible under `likelihood`."""
    if likelihood == "bernoulli" and not (images.low >= 0 and images.high <= 1):
        raise DataError(
            f"--likelihood bernoulli needs values between 0 and 1, but those of {images.source!r} "
            f"run from {images.low:.6g} to {images.high:.6g}; use --likelihood gaussian"
        )


def split(images: Images, batch_size: int, seed: int, held_out: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffle by `seed` and hold out a fraction, at least one example: (train [N1, D], test [N2, D]).

    Raises DataError if N1 < batch_size, or if every value in the training part is the same.
    """
    count = len(images)
    test_count = max(1, round(held_out * count))
    if count - test_count < batch_size:
        needed = next(
            n for n in range(batch_size + 1, 2 * batch_size + 3) if n - max(1, round(held_out * n)) >= batch_size
        )
        raise DataError(
            f"{images.source!r} holds {count} {images.noun}{'s' * (count != 1)}, but batches of {batch_size} need at "
            f"least {needed} ({held_out:.0%} are held out for the test); choose a smaller --batch-size"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    train, test = images.values[order[test_count:]], images.values[order[:test_count]]
    if not train.std(unbiased=False) > 0:
        raise DataError(f"every value of {images.source!r} is {train[0, 0].item():.6g}: there is nothing to learn")
    return train, test


def _digits() -> Images:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the default data, the handwritten digits, come with scikit-learn: "
            "install it (pip install scikit-learn) or name a file with --data"
        ) from None
    pixels = load_digits().images.astype(np.float32) / 16
    return Images(
        torch.from_numpy(pixels.reshape(len(pixels), -1)),
        pixels.shape[1:],
        "scikit-learn's digits",
        "divided by 16",
    )


def _read(path: str) -> np.ndarray:
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"{path!r} is not a regular file")
    with open(path, "rb") as stream:
        head = _peek(stream, 4)
        if not head:
            raise DataError(f"{path!r} is empty")
        if head.startswith(b"PK"):
            return _read_npz(stream, path)
        if head.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=stream) as plain:
                return _read_plain(plain, path)
        return _read_plain(stream, path)


def _read_plain(stream: Stream, path: str) -> np.ndarray:
    head = _peek(stream, 4)
    if head.startswith(b"\x93NUM"):
        return _read_npy(stream, path)
    if head[:2] == b"\0\0":
        return _read_idx(stream, path)
    raise DataError(f"{path!r} is none of .npy, .npz and MNIST's idx (it begins with the bytes {head.hex(' ')})")


def _read_npy(stream: Stream, path: str) -> np.ndarray:
    try:
        return np.lib.format.read_array(stream, allow_pickle=False)
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise DataError(f"{path!r} holds pickled Python objects, which are never loaded") from None
        raise


def _read_npz(stream: BinaryIO, path: str) -> np.ndarray:
    with zipfile.ZipFile(stream) as archive:
        members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
        if not members:
            raise DataError(f"{path!r} is a zip file without a NumPy array in it")
        if len(members) == 1:
            name = next(iter(members))
        else:
            name = next((name for name in NPZ_NAMES if name in members), "")
            if not name:
                raise DataError(
                    f"{path!r} holds several arrays ({', '.join(sorted(members))}) and none is called "
                    f"{', '.join(NPZ_NAMES[:-1])} or {NPZ_NAMES[-1]}"
                )
        with archive.open(members[name]) as member:
            return _read_npy(member, path)


def _read_idx(stream: Stream, path: str) -> np.ndarray:
    """MNIST's format: 0, 0, type code, number of dimensions; the sizes as big-endian uint32; the values."""
    head = stream.read(4)
    if len(head) < 4 or head[2] not in IDX_DTYPES or head[3] == 0:
        raise DataError(f"{path!r} is not a valid idx file (its magic number is {head.hex(' ')})")
    dtype, ndim = np.dtype(IDX_DTYPES[head[2]]), head[3]
    sizes = stream.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise DataError(f"{path!r} is truncated: it ends within the idx header")
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    expected = math.prod(shape) * dtype.itemsize
    body = stream.read()
    if len(body) != expected:
        raise DataError(
            f"{path!r} is {'truncated' if len(body) < expected else 'too long'}: its idx header announces "
            f"{' x '.join(map(str, shape))} values, {expected} bytes, but {len(body)} follow"
        )
    return np.frombuffer(body, dtype).reshape(shape)


def _peek(stream: Stream, count: int) -> bytes:
    peek = getattr(stream, "peek", None)
    return peek(count)[:count] if peek else b""


def _shape(array: np.ndarray) -> str:
    return "[" + ", ".join(map(str, array.shape)) + "]"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0].rstrip(".") if text else type(error).__name__
