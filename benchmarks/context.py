"""Options, inputs and files that the benchmarks of one run share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.ggml import Library
from benchmarks.inputs import Llama, minilm
from benchmarks.timing import QFORMAT, run_process


@dataclass
class Context:
    """One run.

    Parameters
    ----------
    workdir
        An empty directory for files.
    quick
        Small inputs, to check that everything runs; the figures mean little.
    full
        Also convert 4 GB.
    ggml
        Builds of ggml to compare with.
    """

    workdir: Path
    quick: bool = False
    full: bool = False
    ggml: Sequence[Library] = ()

    def rounds(self, count: int) -> int:
        """Return the number of rounds to run, normally `count`."""
        return min(count, 2) if self.quick else count

    @property
    def weights(self) -> int:
        """Number of weights for a kernel."""
        return 1 << 21 if self.quick else 1 << 25

    @cached_property
    def checkpoint(self) -> Llama:
        """The synthetic checkpoint of 1 GB, on disk."""
        layers, vocab = (1, 4000) if self.quick else (9, 32000)
        checkpoint = Llama(self.workdir / "llama", layers, vocab).written
        os.sync()
        return checkpoint

    @cached_property
    def container(self) -> Path:
        """The synthetic checkpoint as q4_0."""
        return self._convert(self.checkpoint.directory, "llama.qf")

    @cached_property
    def minilm_container(self) -> Path:
        """MiniLM as q4_0."""
        return self._convert(minilm(), "minilm.qf")

    def _convert(self, source: Path, name: str) -> Path:
        path = self.workdir / name
        run_process([QFORMAT, "convert", source, path])
        return path
