"""Counts for the demo: words of scikit-learn's docstrings, its digits, or a .npy, .npz or idx file of whole numbers."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from ..data import DataError, Images, images_from_array, load_images, read_array, split

WORDS = 100
"""So many words are counted, those that are the most frequent in all docstrings."""
FEWEST = 20
"""A docstring with fewer of these words is left out: most of those are one line."""


def load_counts(data: str) -> Images:
    """ "words", "digits", or the name of a file of counts [N, ...]; raises DataError."""
    if data == "words":
        return _words()
    if data == "digits":
        digits = load_images()  # of which 16 is the number of dots in a pixel's block
        return Images(digits.values * 16, digits.shape, digits.source, "dots in blocks of 4 x 4", "image")
    counts = images_from_array(read_array(data), data, noun="example")
    if counts.low < 0 or not torch.equal(counts.values, counts.values.round()):
        wrong = ((counts.values < 0) | (counts.values != counts.values.round())).any(dim=1)
        first = int(wrong.int().argmax())
        raise DataError(f"{data!r} does not hold counts, which are whole and not negative: see its example {first}")
    return counts


def split_in_three(counts: Images, batch_size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffled by `seed`: 70 % for training, 10 % to choose the epoch by, 20 % to report; raises DataError."""
    train, held_out = split(counts, batch_size, seed, held_out=0.3)
    validation = len(held_out) // 3
    if not validation:
        raise DataError(f"{counts.source!r} holds {len(counts)} {counts.noun}s, of which too few can be held out")
    return train, held_out[:validation], held_out[validation:]


def _words() -> Images:
    """How often each of the most frequent words stands in each docstring: [docstrings, WORDS].

    The sources are read, not imported. A docstring that stands in several places counts once.
    """
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise DataError(
            "the default data, docstrings, come with scikit-learn: install it (pip install scikit-learn) or name a "
            "file with --data"
        )
    from sklearn.feature_extraction.text import CountVectorizer

    docstrings = set()
    for path in Path(spec.origin).parent.rglob("*.py"):
        if "tests" not in path.parts:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    docstrings.add(ast.get_docstring(node) or "")
    vectorizer = CountVectorizer(max_features=WORDS, token_pattern="[a-z]{2,}")
    counts = vectorizer.fit_transform(sorted(docstrings)).toarray()
    counts = counts[counts.sum(axis=1) >= FEWEST]
    return Images(
        torch.from_numpy(counts).float(),
        counts.shape[1:],
        "scikit-learn's docstrings",
        f"its {WORDS} most frequent words",
        "docstring",
    )
