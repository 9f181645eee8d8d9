"""The errors that `quantize-stats` measures, against those of gguf's decoded weights."""

from __future__ import annotations

import json
import math

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.cli import invoke

Q4_0 = gguf.GGMLQuantizationType.Q4_0


def test_measured_errors_of_minilm_are_those_of_gguf(minilm):
    stats = json.loads(invoke("quantize-stats", minilm, "-t", "q4_0:search=naive", "--json", "-").stdout)
    measured = {result["tensor"]: result for result in stats["results"]}
    source = {name: x for name, x in load_file(minilm / "model.safetensors").items() if name in measured}
    assert len(source) == len(measured) == 40
    everything, errors = [], []
    for name, x in source.items():
        error = x.astype(np.float64) - gguf.quants.dequantize(gguf.quants.quantize(x, Q4_0), Q4_0)
        assert measured[name]["rel_rmse"] == pytest.approx(math.sqrt(np.mean(error**2)) / x.std(dtype=float), rel=1e-9)
        everything.append(x.reshape(-1).astype(np.float64))
        errors.append(error.reshape(-1))
    rmse = math.sqrt(np.mean(np.concatenate(errors) ** 2))
    (total,) = stats["totals"]
    assert total["rel_rmse"] == pytest.approx(rmse / np.concatenate(everything).std(), rel=1e-9)
    assert total["rmse"] == pytest.approx(rmse, rel=1e-9)
