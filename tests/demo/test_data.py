"""Loading images: every format, and one clear sentence for everything that can be wrong with a file."""

import gzip
import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from elbo_ext.demo.data import DataError, Images, check_likelihood, images_from_array, load_images, split

RNG = np.random.default_rng(0)
BYTES = RNG.integers(0, 256, (12, 5, 4), dtype=np.uint8)
FLOATS = RNG.normal(size=(12, 20)).astype(np.float64)


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape) + array.tobytes()


def write_npz(path, **arrays):
    with open(path, "wb") as stream:  # np.savez would append .npz to the name
        np.savez(stream, **arrays)


def npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


# --- what is read -------------------------------------------------------------------------------------------


def test_digits():
    images = load_images()
    assert images.values.shape == (1797, 64) and images.values.dtype == torch.float32
    assert images.shape == (8, 8) and (images.low, images.high) == (0, 1)
    assert images.scaling == "divided by 16"


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
@pytest.mark.parametrize("encode", [idx_bytes, npy_bytes], ids=["idx", "npy"])
def test_uint8_is_divided_by_255(tmp_path, encode, compress):
    path = tmp_path / "no-telling-suffix"
    path.write_bytes(compress(encode(BYTES)))
    images = load_images(path)
    assert images.shape == (5, 4) and images.scaling == "divided by 255"
    torch.testing.assert_close(images.values, torch.from_numpy(BYTES.reshape(12, 20) / np.float32(255)))


@pytest.mark.parametrize("code, dtype", [(9, ">i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")])
def test_idx_types(tmp_path, code, dtype):
    values = (10 * FLOATS).astype(dtype)
    (tmp_path / "x").write_bytes(idx_bytes(values, code))
    images = load_images(tmp_path / "x")
    assert images.scaling == "used as they are"
    np.testing.assert_array_equal(images.values.numpy(), values.astype(np.float32))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", "i8", "u2", "?"])
def test_other_numbers_are_used_as_they_are(tmp_path, dtype):
    values = (10 * np.abs(FLOATS)).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    images = load_images(tmp_path / "x.npy")
    assert images.scaling == "used as they are"
    np.testing.assert_array_equal(images.values.numpy(), values.astype(np.float32))


def test_fortran_order(tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(FLOATS))
    np.testing.assert_array_equal(load_images(tmp_path / "x.npy").values.numpy(), FLOATS.astype(np.float32))


@pytest.mark.parametrize(
    "arrays, wanted",
    [
        ({"anything": FLOATS}, FLOATS),
        ({"y": np.zeros(12), "x": FLOATS}, FLOATS),
        ({"images": FLOATS, "labels": np.zeros(12)}, FLOATS),
        ({"arr_0": FLOATS, "arr_1": np.zeros(12)}, FLOATS),
        ({"x_train": FLOATS, "y_train": np.zeros(12), "x_test": FLOATS[:2]}, FLOATS),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path, save, arrays, wanted):
    save(tmp_path / "x.npz", **arrays)
    np.testing.assert_array_equal(load_images(tmp_path / "x.npz").values.numpy(), wanted.astype(np.float32))


# --- what is refused ----------------------------------------------------------------------------------------


def object_array(path):
    with open(path, "wb") as stream:
        np.save(stream, np.array([[{}, None]] * 12, dtype=object), allow_pickle=True)


def npz_object_array(path):
    write_npz(path, x=np.array([[{}, None]] * 12, dtype=object))


def zip_of_text(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def corrupt_npz(path):
    write_npz(path, x=FLOATS)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def huge_npy(path):
    path.write_bytes(npy_bytes(FLOATS).replace(b"(12, 20)", b"(12, 9999999999999)")[:-8])


NPY, IDX = npy_bytes(FLOATS), idx_bytes(BYTES)
BAD_FILES = {
    "empty": (b"", "is empty"),
    "text": (b"1,2,3\n", r"is none of .npy, .npz and MNIST's idx \(it begins with the bytes 31 2c 32 2c\)"),
    "png": (b"\x89PNG\r\n\x1a\n", "is none of"),
    "one byte": (b"\x00", "is none of"),
    "npy in the header": (NPY[:40], "is damaged or truncated"),
    "npy truncated": (NPY[:-8], "is damaged or truncated"),
    "npy version": (NPY[:6] + b"\x09" + NPY[7:], "is damaged or truncated"),
    "npy of garbage": (NPY[:10] + b"\xff" * 200, "is damaged or truncated"),
    "npy too large": (huge_npy, "is damaged or truncated|asks for more memory"),
    "npy objects": (object_array, "holds pickled Python objects, which are never loaded"),
    "npy complex": (npy_bytes(FLOATS * 1j), "holds complex128 values, but images must be real numbers"),
    "npy text": (npy_bytes(np.array([["a", "b"]])), "holds <U1 values"),
    "npy records": (npy_bytes(np.zeros((3, 2), [("a", "f4")])), "must be real numbers"),
    "npy scalar": (npy_bytes(np.float32(1)), r"has shape \[\], but images need at least two dimensions"),
    "npy vector": (npy_bytes(FLOATS[0]), r"has shape \[20\], but images need at least two dimensions"),
    "no image": (npy_bytes(FLOATS[:0]), r"has shape \[0, 20\]: there is no image in it"),
    "no pixel": (npy_bytes(FLOATS[:, :0]), r"has shape \[12, 0\]: there is no image in it"),
    "nan": (npy_bytes(np.where(FLOATS == FLOATS[3, 4], np.nan, FLOATS)), "holds 1 value that is NaN.* 3$"),
    "inf": (npy_bytes(np.where(FLOATS > 0, np.inf, FLOATS)), "values that are NaN, infinite or too large"),
    "too large for float32": (npy_bytes(FLOATS * 1e300), "too large for float32"),
    "npz truncated": (lambda path: (write_npz(path, x=FLOATS), path.write_bytes(path.read_bytes()[:-30])),
                      "is damaged or truncated"),
    "npz corrupt": (corrupt_npz, "is damaged or truncated"),
    "npz objects": (npz_object_array, "holds pickled Python objects"),
    "npz of strange names": (lambda path: write_npz(path, b=FLOATS, a=FLOATS),
                             r"holds several arrays \(a, b\) and none is called x, images, arr_0 or x_train"),
    "zip of text": (zip_of_text, "is a zip file without a NumPy array in it"),
    "zip of nothing": (lambda path: zipfile.ZipFile(path, "w").close(), "is a zip file without"),
    "idx type": (b"\0\0\x07\x03" + IDX[4:], r"is not a valid idx file \(.* is 00 00 07 03\)"),
    "idx without dimensions": (b"\0\0\x08\x00" + IDX[4:], "is not a valid idx file"),
    "idx of three bytes": (b"\0\0\x08", "is not a valid idx file"),
    "idx in the header": (IDX[:10], "is truncated: it ends within the idx header"),
    "idx truncated": (IDX[:-1], "is truncated: .* announces 12 x 5 x 4 values, 240 bytes, but 239 follow"),
    "idx too long": (IDX + b"\0", "is too long: .* announces 12 x 5 x 4 values, 240 bytes, but 241 follow"),
    "idx labels": (idx_bytes(BYTES[:, 0, 0].copy()), r"has shape \[12\].*\(are these labels\?\)"),
    "idx huge": (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 2**31), "is truncated"),
    "gz truncated": (gzip.compress(IDX)[:-12], "is damaged or truncated"),
    "gz corrupt": (gzip.compress(IDX)[:-8] + b"\0" * 8, "is damaged or truncated"),
    "gz of nothing": (gzip.compress(b""), "is none of"),
    "gz of text": (gzip.compress(b"hello"), "is none of"),
    "not gz": (b"\x1f\x8b" + b"\xff" * 30, "is damaged or truncated"),
}  # fmt: skip


@pytest.mark.parametrize("content, message", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_file(tmp_path, content, message):
    path = tmp_path / "bad.file"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_images(path)
    assert repr(str(path)) in str(caught.value) and "\n" not in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="^cannot read '.*missing.npy': No such file or directory$"):
        load_images(tmp_path / "missing.npy")
    with pytest.raises(DataError, match="is not a regular file$"):
        load_images(tmp_path)


@pytest.mark.parametrize("values", [[[-0.1, 0.5]], [[0.5, 1.1]]])
def test_likelihood(values):
    images = images_from_array(np.array(values), "x")
    check_likelihood(images, "gaussian")
    with pytest.raises(DataError, match="--likelihood bernoulli needs values between 0 and 1, but those of 'x' run"):
        check_likelihood(images, "bernoulli")


# --- the split ----------------------------------------------------------------------------------------------


def rows(count: int) -> Images:
    return images_from_array(np.arange(count * 3.0).reshape(count, 3), "rows")


def test_split_is_a_partition_that_depends_on_the_seed():
    images = rows(100)
    train, test = split(images, 10, seed=1)
    assert (len(train), len(test)) == (80, 20)
    assert sorted(torch.cat([train, test])[:, 0].tolist()) == images.values[:, 0].tolist()
    assert torch.equal(split(images, 10, seed=1)[1], test)
    assert not torch.equal(split(images, 10, seed=2)[1], test)


@pytest.mark.parametrize("batch_size, needed", [(1, 2), (4, 5), (8, 10), (64, 80)])
def test_too_few_images(batch_size, needed):
    train, test = split(rows(needed), batch_size, seed=0)
    assert len(train) >= batch_size and len(test) >= 1
    with pytest.raises(DataError, match=f"batches of {batch_size} need at least {needed} "):
        split(rows(needed - 1), batch_size, seed=0)


def test_nothing_to_learn():
    with pytest.raises(DataError, match="every value of 'flat' is 7: there is nothing to learn"):
        split(images_from_array(np.full((20, 3), 7), "flat"), 4, seed=0)
