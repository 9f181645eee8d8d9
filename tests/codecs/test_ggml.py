"""The codec `ggml`; that every type decodes as the gguf package does it is in test_gguf.py."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from qformat import safe_open
from qformat.codecs.ggml import GGML_BLOCKS, Ggml
from qformat.codecs.registry import codec_of, parse_type
from qformat.converters.convert import convert
from qformat.errors import FormatError, TypeSpecError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.records import MeasuredError, Segment, TensorRecord
from tests.helpers.codecs import chunks_of, decode, part_of
from tests.helpers.gguf import random_blocks
from tests.helpers.quantized import Codes

RECORD = TensorRecord(
    "t",
    (3, 256),
    "f32",
    "ggml",
    {"type": "q4_k"},
    (Segment("blocks", 64, 3 * 144, "0" * 64),),
    error=MeasuredError(0.0, 0.0),
)


def replaced(**changes):
    return TensorRecord(**({name: getattr(RECORD, name) for name in RECORD.__dataclass_fields__} | changes))


def test_ggml_is_refused_as_a_type_for_weights():
    for text in ("ggml", "ggml:type=q4_k"):
        with pytest.raises(TypeSpecError, match="ggml holds only tensors that are quantized already"):
            parse_type(text)


def test_impossible_ggml_records_are_refused():
    assert codec_of(RECORD) == Ggml("q4_k")
    for params in ({}, {"type": "Q4_K"}, {"type": "q4_0"}, {"type": 12}, {"type": "q4_k", "coded": True}):
        with pytest.raises(FormatError, match="codec ggml"):
            codec_of(replaced(params=params))
    for shape, dtype in (((3, 257), "f32"), ((2, 256), "f32"), ((3, 256), "i32")):
        with pytest.raises(FormatError):
            codec_of(replaced(shape=shape, dtype=dtype))
    with pytest.raises(FormatError, match="an error is recorded where none can be, or missing"):
        codec_of(replaced(error=None))


@pytest.mark.parametrize("name", ["q4_k", "iq4_nl", "nvfp4"])
def test_ggml_rows_that_end_within_a_block_are_read(tmp_path, name):
    unit = GGML_BLOCKS[name][0]
    data = random_blocks(name, 3, 3)
    values = dequantize(data, GGMLQuantizationType[name.upper()])
    path = tmp_path / "a.qf"
    convert(Checkpoint([Codes("w", (3, 3 * unit - 5), Ggml(name), (data.tobytes(),))]), path, Recipe())
    with safe_open(path) as file:
        assert np.array_equal(file.get_tensor("w"), values[:, :-5])
        assert np.array_equal(file.get_rows("w", [2]), values[2:, :-5])


def test_ggml_chunks_hold_whole_blocks():
    codec = Ggml("q6_k")
    for shape in ((5000, 512), (3, 1_000_192), (256,)):
        blocks = np.random.default_rng(0).bytes(codec.nbytes(shape))
        parts = [part_of(codec, shape, chunk, [blocks])[0] for chunk in chunks_of(codec, shape)]
        assert b"".join(parts) == blocks
        assert all(len(part) % 210 == 0 for part in parts)


def test_commands_that_do_not_decode_do_not_import_gguf(tmp_path):
    path = tmp_path / "a.qf"
    convert(Checkpoint([Codes("w", (1, 256), Ggml("q4_k"), (bytes(144),))]), path, Recipe())
    code = f"""if True:
        import sys, subprocess
        from click.testing import CliRunner
        from qformat.cli import cli
        for arguments in (["--help"], ["export", "--help"], ["inspect", {str(path)!r}], ["verify", {str(path)!r}]):
            assert CliRunner().invoke(cli, arguments).exit_code == 0, arguments
        print([name for name in ("gguf", "torch", "numba") if name in sys.modules])
    """
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_empty_ggml_tensor_decodes():
    assert decode(Ggml("q4_k"), (b"",), (1, 0)).size == 0
