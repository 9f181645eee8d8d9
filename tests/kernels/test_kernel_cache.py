"""Compiling, caching and falling back, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qformat

SCRIPT = """
import sys, numpy as np
from qformat.kernels import load
x = np.arange(-3200, 3200, dtype=np.float32) ** 3
blocks = np.zeros(x.size // 32 * 18, np.uint8)
load("q4_0").quantize(x, blocks, np.zeros(16))
import hashlib
print(load("q4_0").__name__, hashlib.sha256(blocks).hexdigest())
"""


def run(cache: Path | None = None, script: str = SCRIPT, **environment: str) -> tuple[str, str, str]:
    """Return (module, digest, stderr)."""
    env = os.environ | environment | ({} if cache is None else {"QFORMAT_CACHE_DIR": str(cache)})
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    module, digest = done.stdout.split()
    return module, digest, done.stderr


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    cache = tmp_path_factory.mktemp("cache")
    module, digest, stderr = run(cache)
    assert module == "qformat.kernels.numba.q4_0"
    assert stderr == "compiling kernels, which happens once and takes some seconds\n"
    return cache, digest


def files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.suffix in (".nbi", ".nbc"))


def test_machine_code_is_cached_and_reused(cached):
    cache, digest = cached
    before = {path: path.stat().st_mtime_ns for path in files(cache)}
    assert before
    assert run(cache) == ("qformat.kernels.numba.q4_0", digest, "")
    assert {path: path.stat().st_mtime_ns for path in files(cache)} == before
    assert all((path.stat().st_mode & 0o077) == 0 for path in cache.glob("kernels-*"))


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04 garbage", "half"])
def test_a_damaged_kernel_cache_is_rebuilt(cached, suffix, content):
    cache, digest = cached
    for path in files(cache):
        if path.suffix == suffix:
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert run(cache)[:2] == ("qformat.kernels.numba.q4_0", digest)
    assert run(cache)[:2] == ("qformat.kernels.numba.q4_0", digest)
    assert all(path.stat().st_size > 20 for path in files(cache))


def test_kernels_work_without_a_place_for_their_cache(cached, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    assert run(blocked)[:2] == ("qformat.kernels.numba.q4_0", cached[1])


def test_a_kernel_cache_writable_by_others_is_not_used(cached, tmp_path):
    run(tmp_path)
    (directory,) = tmp_path.glob("kernels-*")
    directory.chmod(0o777)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    for path in before:
        path.write_bytes(b"evil")
    _, digest, stderr = run(tmp_path)
    assert digest == cached[1]
    assert "not safe" in stderr
    assert all(path.read_bytes() == b"evil" for path in before)


def test_a_kernel_cache_that_cannot_be_written_is_read(cached, tmp_path):
    cache, digest = cached
    (directory,) = shutil.copytree(cache, tmp_path / "cache").glob("kernels-*")
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    forbidden = "import numba.core.caching as c; c.IndexDataCacheFile._open_for_write = None\n"
    assert run(tmp_path / "cache", forbidden + SCRIPT) == ("qformat.kernels.numba.q4_0", digest, "")
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_machine_code_is_shared_by_all_installations(cached, tmp_path):
    cache, digest = cached
    package = Path(qformat.__file__).parent
    shutil.copytree(package, tmp_path / "qformat", ignore=shutil.ignore_patterns("__pycache__"))
    before = {path: path.stat().st_mtime_ns for path in files(cache)}
    assert run(cache, PYTHONPATH=str(tmp_path)) == ("qformat.kernels.numba.q4_0", digest, "")
    assert {path: path.stat().st_mtime_ns for path in files(cache)} == before


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["NUMBA_ENABLE_AVX=0", "NUMBA_BOUNDSCHECK=1"])
def test_settings_of_numba_change_no_bytes(setting, cached, tmp_path):
    name, _, value = setting.partition("=")
    assert run(tmp_path, **{name: value})[:2] == ("qformat.kernels.numba.q4_0", cached[1])


def test_with_compilation_disabled_the_numpy_kernels_are_used(cached):
    module, digest, stderr = run(NUMBA_DISABLE_JIT="1")
    assert (module, digest) == ("qformat.kernels.numpy.q4_0", cached[1])
    assert stderr == "numba cannot be used (NUMBA_DISABLE_JIT is set): falling back to the slower numpy kernels\n"


def test_kernels_for_a_generic_processor_give_the_same_bytes(cached, tmp_path):
    assert run(tmp_path, NUMBA_CPU_NAME="generic", NUMBA_CPU_FEATURES="")[1] == cached[1]


def test_numpy_kernels_give_the_same_bytes(cached):
    assert run(QFORMAT_KERNELS="numpy") == ("qformat.kernels.numpy.q4_0", cached[1], "")


def test_without_numba_the_numpy_kernels_are_used_with_a_warning(cached):
    script = "import sys; sys.modules['numba'] = None\n" + SCRIPT
    module, digest, stderr = run(script=script)
    assert (module, digest) == ("qformat.kernels.numpy.q4_0", cached[1])
    assert "slower numpy kernels" in stderr


def test_forcing_numba_fails_if_it_is_missing():
    script = "import sys; sys.modules['numba'] = None\n" + SCRIPT
    with pytest.raises(subprocess.CalledProcessError):
        run(script=script, QFORMAT_KERNELS="numba")
