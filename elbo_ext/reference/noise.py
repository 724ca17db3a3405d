"""The noise in NumPy: a pure function of the seed and the element's index.

Sources:
    Salmon, Moraes, Dror & Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    Box & Muller, "A Note on the Generation of Random Normal Deviates", Ann. Math. Statist. 29, 1958.
"""

import numpy as np

__all__ = ["gumbel_noise", "normal_noise", "philox4x32_10"]

_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT32 = np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_WEYL = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint64)  # golden ratio and sqrt(3) - 1, times 2^32


def philox4x32_10(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds of Philox-4x32, a keyed bijection of 128 bit counters (Salmon et al. 2011).

    With (hi, lo) the two halves of a 64 bit product, one round maps::

        (c0, c1, c2, c3)  ->  (hi(M1 c2) ^ c1 ^ k0,  lo(M1 c2),  hi(M0 c0) ^ c3 ^ k1,  lo(M0 c0))

    and between rounds the key advances by the Weyl constants, (k0, k1) += (W0, W1) mod 2^32.

    Args:
        counter: uint32 array ``[..., 4]``.
        key: uint32 array ``[..., 2]``; its leading dimensions broadcast with the counter's.

    Returns:
        uint32 array ``[..., 4]``.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter).astype(np.uint64), -1, 0)
    key = np.asarray(key).astype(np.uint64)
    for _ in range(10):
        k0, k1 = np.moveaxis(key, -1, 0)
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT32) ^ c1 ^ k0, p1 & _MASK32, (p0 >> _SHIFT32) ^ c3 ^ k1, p0 & _MASK32
        key = (key + _WEYL) & _MASK32
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def _words32(value: np.ndarray) -> np.ndarray:
    """(low, high) 32 bit words of a uint64 array ``[...]``, as uint32 ``[..., 2]``."""
    return np.stack([value & _MASK32, value >> _SHIFT32], axis=-1).astype(np.uint32)


def _words_of(seed: int, n: int, offset: int) -> np.ndarray:
    """The random words ``[blocks, 4]`` of the blocks of four that the elements offset, ..., offset + n - 1 belong to."""
    first, last = offset // 4, -((offset + n) // -4)
    block = np.uint64(first) + np.arange(last - first, dtype=np.uint64)
    counter = np.concatenate([_words32(block), np.zeros((last - first, 2), np.uint32)], axis=-1)
    return philox4x32_10(counter, _words32(np.asarray(seed % 2**64, dtype=np.uint64)))


def normal_noise(seed: int, n: int, offset: int = 0) -> np.ndarray:
    """Standard normal noise as a pure function of the seed and the element index (Box & Muller 1958).

    Four elements share one Philox block (w0, w1, w2, w3), and two of them one pair of words
    (a, b), which is (w0, w1) for elements 0 and 1 of the block and (w2, w3) for elements 2 and 3::

        counter = (lo32(i // 4), hi32(i // 4), 0, 0),    key = (lo32(seed), hi32(seed))
        u       = (floor(a / 2) + 1/2) 2^-31             in (0, 1), never 0 or 1
        theta   = 2 pi b 2^-32
        eps_i   = sqrt(-2 ln u) cos(theta)  for even i,  sqrt(-2 ln u) sin(theta)  for odd i

    u has at most 32 significant bits, so float64 holds u and u - 1 exactly, and ln u = log1p(u - 1) keeps its
    relative precision as u -> 1. The largest value possible is sqrt(64 ln 2) = 6.66.

    Args:
        seed: any 64 bit integer; negative ones stand for their two's complement.
        n: number of values.
        offset: index i of the first value.

    Returns:
        float64 array ``[n]`` with eps_offset, ..., eps_(offset + n - 1).
    """
    words = _words_of(seed, n, offset)
    a, b = words[:, 0::2], words[:, 1::2]  # [blocks, 2]: one column per pair
    u_minus_1 = ((a >> 1) + (0.5 - 2.0**31)) * 2.0**-31
    theta = 2.0 * np.pi * (b * 2.0**-32)
    radius = np.sqrt(-2.0 * np.log1p(u_minus_1))
    eps = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=-1)
    return eps.reshape(-1)[offset % 4 : offset % 4 + n]


def gumbel_noise(seed: int, n: int, offset: int = 0) -> np.ndarray:
    """Standard Gumbel noise as a pure function of the seed and the element index: -ln(-ln u), u as in :func:`normal_noise` of
    word i % 4 of block i // 4 (Gumbel 1954).

    Args:
        seed, n, offset: as in :func:`normal_noise`.

    Returns:
        float64 array ``[n]``.
    """
    words = _words_of(seed, n, offset)
    u_minus_1 = ((words >> 1) + (0.5 - 2.0**31)) * 2.0**-31
    noise: np.ndarray = -np.log(-np.log1p(u_minus_1))
    return noise.reshape(-1)[offset % 4 : offset % 4 + n]
