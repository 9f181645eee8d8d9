"""The strings in headers of safetensors files are stored as metadata, and come back with an export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open as open_theirs
from safetensors.numpy import save_file

import qformat
from qformat.converters.sources import safetensors
from qformat.converters.sources.detect import open_checkpoint
from tests.helpers.checkpoints import weights
from tests.helpers.cli import invoke

LORA = {
    "ss_network_module": "networks.lora",
    "ss_network_alpha": "4",
    "modelspec.architecture": "x/lora \u2028",
    "format": "pt",
}


def theirs(path: Path) -> dict[str, str]:
    with open_theirs(path, "np") as file:
        found: dict[str, str] = file.metadata()
    return found


@pytest.mark.parametrize("folder", [False, True])
def test_a_header_makes_the_round_trip(folder: bool, tmp_path: Path) -> None:
    source = tmp_path / "m"
    source.mkdir()
    (source / "config.json").write_text("{}")
    save_file({"a.weight": weights(0, 8, 32)}, source / "model.safetensors", metadata=LORA)
    invoke("convert", source if folder else source / "model.safetensors", tmp_path / "m.qf", "-t", "f32")
    with qformat.safe_open(tmp_path / "m.qf") as file:
        assert file.metadata == {key: text for key, text in LORA.items() if key != "format"}
    invoke("export", tmp_path / "m.qf", tmp_path / "m.safetensors", "--to", "safetensors")
    assert theirs(tmp_path / "m.safetensors") == LORA
    invoke("export", tmp_path / "m.qf", tmp_path / "hf", "--to", "hf")
    assert theirs(tmp_path / "hf" / "model.safetensors") == LORA


@pytest.mark.parametrize("indexed", [False, True])
def test_the_headers_of_shards_are_merged_and_differences_named(indexed: bool, tmp_path: Path) -> None:
    headers = [{"format": "pt", "a": "1", "both": "x"}, {"format": "pt", "b": "2", "both": "y"}]
    places = {}
    for number, header in enumerate(headers, 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({f"w{number}": weights(0, 8)}, tmp_path / name, metadata=header)
        places[f"w{number}"] = name
    if indexed:
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.metadata == {"a": "1", "b": "2", "both": "x"}
    assert checkpoint.warnings[-1] == "metadata 'both' differs between the shards; taken from the first: 'x'"


def test_headers_that_are_too_long_for_an_index_lose_their_longest_strings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors, "_MAX_METADATA", 1 << 20)
    header = {"tags": "x" * (1 << 20), "more tags": "y" * (1 << 20), "dim": "8"}
    save_file({"a": weights(0, 8)}, tmp_path / "m.safetensors", metadata=header)
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    assert checkpoint.metadata == {"dim": "8"}
    assert list(checkpoint.warnings) == [
        "m.safetensors: metadata 'more tags' and 1 more left out, since all together is more than 1 MiB"
    ]
