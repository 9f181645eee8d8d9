"""What new users type, and what they are told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import qformat
from qformat.codecs.registry import parse_type
from qformat.errors import TypeSpecError
from tests.helpers.cli import cli_environment, invoke, nothing_at, one_line, run_cli
from tests.helpers.gguf import random_blocks, write


@pytest.fixture
def file(tmp_path: Path) -> Path:
    qformat.save_file({"w": np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64)}, tmp_path / "x.qf", "f32")
    return tmp_path / "x.qf"


def test_an_option_given_twice_is_refused(file, tmp_path):
    result = invoke("convert", file, tmp_path / "m.qf", "-t", "q4_0", "--type", "q8_0", code=2)
    assert "Error: --type is given 2 times; give it once" in result.stderr
    nothing_at(tmp_path / "m.qf")


def test_inspect_takes_several_patterns(file):
    shown = invoke("inspect", file, "--tensor", "w", "--tensor", "[wx]").stdout
    assert "1 tensor" in shown
    message = invoke("inspect", file, "--tensor", "w", "--tensor", "v*", code=1).stderr
    assert message == f"Error: {file}: holds no tensor that matches 'v*'\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("-", "files cannot be written to stdout; give a name (./- for a file called -)"),
        (
            "m.safetensors",
            (
                "m.safetensors would be a .qf file; name it m.qf; "
                "qformat export --to safetensors makes .safetensors files of .qf files"
            ),
        ),
        ("m.GGUF", "m.GGUF would be a .qf file; name it m.qf; qformat export --to gguf makes .gguf files of .qf files"),
        ("m.bin", "m.bin would be a .qf file; name it m.qf"),
    ],
)
@pytest.mark.parametrize("command", [["convert"], ["truncate", "-q", "3"]])
def test_names_of_other_formats_are_refused_as_outputs(command, name, message, file):
    result = run_cli(command[0], file, name, *command[1:], cwd=file.parent)
    assert one_line(result, 2) == f"Invalid value for 'DST': {message}"
    nothing_at(file.parent / name)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("5", "5 would be bytes; give a unit, as in 5GB or 5MB"),
        ("many", "'many' is not a size such as 5GB or 500MiB"),
    ],
)
def test_a_shard_size_needs_a_unit(size, message, file, tmp_path):
    result = invoke("convert", file, tmp_path / "m.qf", "--shard-size", size, code=2)
    assert f"Invalid value for '--shard-size': {message}" in result.stderr


@pytest.mark.parametrize(
    ("text", "near"),
    {
        "Q4_0": "q4_0", "q40": "q4_0", "q4_K_M": "q4_0", "iq3_xxs": "affine:bits=3", "Q6_K": "q8_0", "int8": "q8_0", "fp16": "f16",
        "bfloat16": "bf16", "F32": "f32", "loseless": "lossless", "terinary": "ternary",
    }.items(),
)  # fmt: skip
def test_the_type_that_was_meant_is_suggested(text, near):
    with pytest.raises(
        TypeSpecError, match=f"type {text!r}: there is no codec {text!r}; did you mean {near}\\? the types "
    ):
        parse_type(text)
    parse_type(near)


def test_nothing_is_suggested_for_a_type_unlike_all_others():
    with pytest.raises(TypeSpecError, match="there is no codec 'xyz'; the types for weights are affine, bf16"):
        parse_type("xyz")


def test_quick_verification_does_not_call_tensors_good(file):
    assert invoke("verify", "--quick", file).stdout == f"{file}: index OK, tensors not checked\n"
    assert invoke("verify", file).stdout == f"{file}: OK\n"


def test_requantization_is_said(tmp_path):
    source = write(
        tmp_path / "m.gguf", {name: (random_blocks("q4_0", 4, 8), "q4_0") for name in ("a.weight", "b.weight")}
    )
    result = invoke("convert", source, tmp_path / "m.qf", "-t", "q8_0")
    assert (
        "Warning: tensor 'a.weight' and 1 more: quantized already, as q4_0; quantized again from the decoded values, which adds to "
        "the error; without a type for it, its codes are copied\n"
    ) in result.stderr
    assert "quantized already" not in invoke("convert", source, tmp_path / "n.qf").stderr


@pytest.mark.parametrize(
    ("name", "hint"), [("meta-llama/Llama-3.2-1B", True), ("no such file", False), ("a/b/c", False)]
)
def test_a_name_on_the_hub_gets_a_hint(name, hint, tmp_path):
    message = one_line(run_cli("convert", name, "m.qf", cwd=tmp_path))
    more = f"; for the model of that name on the Hugging Face Hub, give hf://{name} (with huggingface_hub installed)"
    assert message == f"{tmp_path / name}: there is no such file or directory{more if hint else ''}"


@pytest.mark.parametrize("stream", ["/dev/stdout", "/dev/fd/1", "/dev/null"])
def test_json_may_go_to_a_stream(stream, file):
    result = run_cli("quantize-stats", file, "-t", "q8_0", "--json", stream)
    assert result.code == 0, result.err
    assert result.out.startswith('{\n "results"') == (stream != "/dev/null")


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("command", ["convert {0} {1} -t q8_0", "verify {0}", "inspect {0}", "types"])
def test_a_closed_standard_stream_changes_nothing(number, command, file, tmp_path):
    words = command.format(file, tmp_path / "m.qf").split()
    done = subprocess.run(
        [sys.executable, "-m", "qformat", *words],
        env=cli_environment(), stdin=subprocess.DEVNULL, capture_output=True, check=False,
        preexec_fn=lambda: os.close(number),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    if command.startswith("convert"):
        invoke("verify", tmp_path / "m.qf")


def test_a_reader_that_goes_away_is_no_damage(file):
    done = subprocess.run(
        f"set -o pipefail; {sys.executable} -m qformat verify {' '.join([str(file)] * 400)} | head -1 > /dev/null",
        shell=True, executable="/bin/bash", env=cli_environment(), capture_output=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) in ((141, b""), (0, b""))
