"""Content vectors from text, without a network or a large model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from h2rec.ops._checks import first_few

_PLACEHOLDER = "unknown"


def embed_texts(texts: Sequence[str]) -> np.ndarray:
    """Embed texts with WordLlama, whose weights come with its wheel: unit vectors, float32 ``[N, 256]``.

    Unit vectors, because WordLlama's norms differ fivefold, the short texts having the long vectors, and k-means would
    spend its codewords on those few.

    Empty texts have no vector of their own; they are embedded as ``"unknown"``, and a warning says how many
    they are.

    Raises:
        ValueError: no texts, or none that is not empty.
        TypeError: something that is not a string.
        ModuleNotFoundError: wordllama is not installed; the message says how to install it.
    """
    if isinstance(texts, str):
        raise TypeError("texts: expected a sequence of strings, got one string")
    texts = list(texts)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts: expected strings, got {type(text).__name__} in row {row}")
    empty = [row for row, text in enumerate(texts) if not text.strip()]
    if len(empty) == len(texts):
        raise ValueError(f"texts: expected at least one that is not empty, got {len(texts)} empty ones")
    if empty:
        rows = first_few("row", empty, len(empty))
        warnings.warn(f"{len(empty)} of {len(texts)} texts are empty ({rows})", stacklevel=2)
    model = _load_model()
    return np.asarray(
        model.embed([text if text.strip() else _PLACEHOLDER for text in texts], norm=True), dtype=np.float32
    )


def _load_model():
    try:
        import wordllama
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "embedding text needs wordllama: pip install 'h2rec[text]', or bring vectors of your own"
        ) from error
    folder = Path(wordllama.__file__).parent
    return wordllama.WordLlama.load(cache_dir=folder, disable_download=True)
