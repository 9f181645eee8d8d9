"""Other types of GGUF, which are copied, and decoded by the gguf package (spec/codecs.md, "ggml")."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import Array, Buffer, Layout, Matrix
from qformat.codecs.quantized import RowCodec, check_length
from qformat.codecs.registry import register
from qformat.errors import MissingDecoderError, install_hint

#: elements and bytes of a block of each type
GGML_BLOCKS = {
    "q8_1": (32, 36),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "q8_k": (256, 292),
    "iq1_s": (256, 50),
    "iq1_m": (256, 56),
    "iq2_xxs": (256, 66),
    "iq2_xs": (256, 74),
    "iq2_s": (256, 82),
    "iq3_xxs": (256, 98),
    "iq3_s": (256, 110),
    "iq4_nl": (32, 18),
    "iq4_xs": (256, 136),
    "tq1_0": (256, 54),
    "tq2_0": (256, 66),
    "mxfp4": (32, 17),
    "nvfp4": (64, 36),
    "q1_0": (128, 18),
}


@register
@dataclass(frozen=True)
class Ggml(RowCodec):
    """Blocks of a GGUF type that has no codec of its own here, such as the K-quants.

    Parameters
    ----------
    type
        GGUF's name for the type, in lower case.
    """

    id: ClassVar[str] = "ggml"

    type: str = "q4_k"

    def __post_init__(self) -> None:
        if self.type not in GGML_BLOCKS:
            raise ValueError(f"there is no ggml type {self.type[:40]!r} that this version knows")

    @property
    def block_size(self) -> int:
        """Elements of a block."""
        return GGML_BLOCKS[self.type][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return GGML_BLOCKS[self.type][1]

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return the elements of a block."""
        return self.block_size

    def layout(self, matrix: Matrix) -> Layout:
        """Return the one segment; each row is padded to whole blocks."""
        return (Array("blocks", self.block_bytes, self.block_size),)

    def _dequantize(self, parts: Sequence[Buffer], out: NDArray[np.float32]) -> None:
        check_length(parts[0], out.size // self.block_size * self.block_bytes, "blocks")
        if not out.size:  # which gguf does not expect
            return
        blocks = np.frombuffer(parts[0], np.uint8).reshape(len(out), -1)
        with np.errstate(all="ignore"):  # callers handle infinity and NaN
            out[:] = _decoder(self.type)(blocks)


@cache
def _decoder(type_: str) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Return the function that decodes rows of blocks of a type."""
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise MissingDecoderError(
            f"type ggml:type={type_} is decoded by the gguf package, which is missing: {install_hint('gguf')}"
        ) from None
    try:
        number = GGMLQuantizationType[type_.upper()]
        dequantize(np.zeros((1, GGML_BLOCKS[type_][1]), np.uint8), number)
    except (KeyError, ValueError, NotImplementedError):
        raise MissingDecoderError(
            f"type ggml:type={type_} can be stored and exported, but the gguf package that is installed cannot decode it"
        ) from None
    return lambda blocks: dequantize(blocks, number)
