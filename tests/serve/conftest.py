"""The tiny models that judge, from `tiny_judges.py`."""

import pytest
import tiny_judges


@pytest.fixture(scope="session")
def words():
    """What the tokenizers of the tiny models know."""
    return tiny_judges.WORDS


@pytest.fixture(scope="session")
def save_llama():
    """Writes a decoder with a chat template into a folder and returns its name."""
    return tiny_judges.save_llama


@pytest.fixture(scope="session")
def save_bert():
    """Writes an encoder without a chat template into a folder and returns its name."""
    return tiny_judges.save_bert
