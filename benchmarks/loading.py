"""Weights into torch, against safetensors with the source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch

from benchmarks.context import Context
from benchmarks.inputs import minilm
from benchmarks.report import Row, Section, figure
from benchmarks.timing import interleaved
from qformat.readers import torch as reader


def run(context: Context) -> Section:
    """Measure it; for information."""
    source, file = minilm() / "model.safetensors", context.minilm_container

    def touched(load: Callable[[Path], dict[str, torch.Tensor]], path: Path) -> None:
        for tensor in load(path).values():
            tensor.clone()

    seconds = interleaved(
        {
            "qformat": lambda: reader.load_file(file) and None,
            "safetensors": lambda: safetensors.torch.load_file(source) and None,
            "qformat, read": lambda: touched(reader.load_file, file),
            "safetensors, read": lambda: touched(safetensors.torch.load_file, source),
            "unverified": lambda: reader.load_file(file, verify=False) and None,
        },
        context.rounds(9),
    )

    def row(name: str, own: str, peer: str) -> Row:
        against = f"safetensors, float32: {figure(1e3 * seconds[peer], 'ms')}"
        return Row(name, figure(1e3 * seconds[own], "ms"), against, seconds[own] / seconds[peer])

    rows = [
        row("load_file, checked against SHA-256", "qformat", "safetensors"),
        row("load_file, unchecked", "unverified", "safetensors"),
        row("load_file, then copy every tensor", "qformat, read", "safetensors, read"),
    ]
    return Section("Load: MiniLM from the page cache into torch, q4_0 to float32", rows)
