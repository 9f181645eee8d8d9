"""Files that the tests of this folder damage."""

from __future__ import annotations

import numpy as np
import pytest

import qformat
from tests.helpers.checkpoints import weights
from tests.helpers.files import VOCABULARY, small_draft


@pytest.fixture(scope="session")
def small() -> bytes:
    """A small file, built from the text of the specification."""
    return small_draft().pack()


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file written by the package."""
    path = tmp_path_factory.mktemp("saved") / "saved.qf"
    tensors = {
        "b.weight": weights(0, 3, 40),
        "empty": np.zeros((0, 4), np.float32),
        "f32": weights(1, 6),
        "half": weights(2, 3).astype(np.float16),
        "flags": np.array([True, False, True]),
        "scalar": np.array(-5),
    }
    assets = {"config.json": b"{}", "tok/vocab.txt": VOCABULARY}
    qformat.save_file(tensors, path, "q4_0", metadata={"key": "välue"}, assets=assets)
    return path.read_bytes()
