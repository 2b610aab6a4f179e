import sys

import numpy as np
import pytest

from h2rec.data import embed_texts


def test_same_text_same_vector_near_texts_near_vectors():
    vectors = embed_texts(["red lipstick", "a drama about war", "crimson lipstick", "red lipstick"])
    assert vectors.shape == (4, 256)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[0], vectors[3], rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert vectors[0] @ vectors[2] > 0.5 > vectors[0] @ vectors[1]


def test_empty_texts_get_a_finite_vector_and_a_warning():
    with pytest.warns(UserWarning, match=r"2 of 3 texts are empty \(rows 0, 2\)"):
        vectors = embed_texts(["", "something", " \n"])
    np.testing.assert_allclose(vectors[[0, 2]], embed_texts(["unknown"] * 2), rtol=1e-6)


def test_refuses():
    with pytest.raises(ValueError, match="texts: expected at least one that is not empty, got 0 empty ones"):
        embed_texts([])
    with pytest.raises(ValueError, match="texts: expected at least one that is not empty, got 2 empty ones"):
        embed_texts(["", " "])
    with pytest.raises(TypeError, match="texts: expected strings, got NoneType in row 1"):
        embed_texts(["a", None])
    with pytest.raises(TypeError, match="texts: expected a sequence of strings, got one string"):
        embed_texts("abc")


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wordllama", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs wordllama: pip install 'h2rec\[text\]'"):
        embed_texts(["a"])
