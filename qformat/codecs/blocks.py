"""Block formats: rows cut into blocks that hold all that their weights need (spec/codecs.md, "Blocks")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qformat.codecs import coded_blocks
from qformat.codecs.base import Codec, EncodedChunk, optional
from qformat.codecs.layout import Array, Buffer, Chunk, Chunks, Layout, Matrix
from qformat.codecs.quantized import Quantized, QuantizedCodec, check_length
from qformat.dtypes import Elements
from qformat.kernels import load


@dataclass(frozen=True)
class BlockCodec(QuantizedCodec):
    """A codec of blocks; subclasses give the layout's numbers and have a kernel module named like their id.

    The kernel module has ``quantize(x, blocks, lanes)``, ``dequantize(blocks, x)`` and, if there are codes worth
    counting, ``code_histogram(blocks, counts)``; see ``kernels/numba/q4_0.py``.

    Parameters
    ----------
    coded
        The blocks are stored entropy-coded (codecs.md, "Coded blocks").
    """

    #: number of different codes, or 0 if they are whole bytes, which are not counted
    codes: ClassVar[int] = 0
    #: bytes of a block before its codes
    header_bytes: ClassVar[int] = 2

    coded: bool = optional(False)

    @property
    def block_size(self) -> int:
        """Elements of a block."""
        return 32

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: its header, then its codes."""
        return self.header_bytes + self.block_size * ((self.codes or 256).bit_length() - 1) // 8

    @property
    def takes_bf16(self) -> bool:
        """Whether ``quantize`` accepts bfloat16 patterns; true of all block formats but `nlm`."""
        return True

    @property
    def kernels(self) -> ModuleType:
        """The kernel module."""
        return load(self.id)

    def chunk_alignment(self, matrix: Matrix) -> int:
        """Return the elements of a block."""
        return self.block_size

    def layout(self, matrix: Matrix) -> Layout:
        """Return the blocks, in chunks if they are entropy-coded; each row is padded to whole blocks."""
        return (Chunks(),) if self.coded else (Array("blocks", self.block_bytes, self.block_size),)

    def _quantize(self, values: NDArray[Any], cols: int, fitted: Any) -> Quantized:
        blocks = np.empty(values.size // self.block_size * self.block_bytes, np.uint8)
        lanes = np.zeros(load("blocks").LANES)
        return Quantized((blocks.data,), lanes, *self._fill(values.reshape(-1), blocks, lanes))

    def _fill(
        self, x: NDArray[Any], blocks: NDArray[np.uint8], lanes: NDArray[np.float64]
    ) -> tuple[int, int, int, int]:
        measured: tuple[int, int, int, int] = self.kernels.quantize(x, blocks, lanes)
        return measured

    def _dequantize(self, parts: Sequence[Buffer], out: NDArray[np.float32]) -> None:
        check_length(parts[0], out.size // self.block_size * self.block_bytes, "blocks")
        self.kernels.dequantize(np.frombuffer(parts[0], np.uint8), out.reshape(-1))

    def encode(self, elements: Elements, fitted: Any = None) -> EncodedChunk:
        """Quantize the rows of a chunk, and entropy-code the blocks if the type says so."""
        encoded = super().encode(elements, fitted)
        return self.entropy_coded(encoded, elements.data.size) if self.coded else encoded

    def entropy_coded(self, encoded: EncodedChunk, elements: int) -> EncodedChunk:
        """Entropy-code the plain blocks of a chunk; `elements` excludes padding."""
        blocks = np.frombuffer(encoded.parts[0], np.uint8).reshape(-1, self.block_bytes)
        chunk, entropy = coded_blocks.pack(blocks, self.header_bytes, self.codes or 256, elements)
        return replace(encoded, parts=(chunk,), entropy=entropy)

    def decode(self, parts: Sequence[Buffer], out: NDArray[Any]) -> None:
        """Decode the rows of a chunk."""
        self._decode_rows(self.plain(parts, *out.shape), out)

    def plain(self, parts: Sequence[Buffer], rows: int, cols: int) -> Sequence[Buffer]:
        """Return the parts of a chunk with plain blocks."""
        if not self.coded:
            return parts
        blocks = np.empty((rows * self.padded(cols) // self.block_size, self.block_bytes), np.uint8)
        coded_blocks.unpack(parts[0], blocks, self.header_bytes, self.codes or 256, rows * cols)
        return (blocks.reshape(-1).data,)

    def histograms(self, parts: Sequence[Buffer], chunk: Chunk) -> dict[str, NDArray[np.int64]]:
        """Return how often each code occurs, padding included, and what else the format chooses."""
        blocks = self.plain(parts, chunk.rows, chunk.cols)[0]
        return self._counts(np.frombuffer(blocks, np.uint8))

    def _counts(self, blocks: NDArray[np.uint8]) -> dict[str, NDArray[np.int64]]:
        if not self.codes:
            return {}
        counts = np.zeros(self.codes, np.int64)
        self.kernels.code_histogram(blocks, counts)
        return {"histogram": counts}


def plain(codec: Codec) -> Codec:
    """Return the codec of the same blocks without entropy coding; any other codec unchanged."""
    return replace(codec, coded=False) if isinstance(codec, BlockCodec) else codec


@dataclass(frozen=True)
class SearchedBlockCodec(BlockCodec):
    """A block codec whose scales may be chosen better than by the naive rule; subclasses have a field ``search``.

    For each search but ``naive`` there is a kernel module ``ID_SEARCH`` with a function ``choose``: it takes the weights and fills
    in an array of binary16 patterns for each of the block's `chosen` numbers. The codec's ``encode`` makes blocks of them.
    """

    #: how many binary16 numbers of a block a search chooses
    chosen: ClassVar[int] = 1

    @property
    def takes_bf16(self) -> bool:
        """True without a search: the searches take float32 only."""
        return self._search == "naive"

    @property
    def _search(self) -> str:
        return str(self.options()["search"])

    def _fill(
        self, x: NDArray[Any], blocks: NDArray[np.uint8], lanes: NDArray[np.float64]
    ) -> tuple[int, int, int, int]:
        if self._search == "naive":
            return super()._fill(x, blocks, lanes)
        numbers = [np.empty(x.size // self.block_size, np.uint16) for _ in range(self.chosen)]
        load(f"{self.id}_{self._search}").choose(x, *numbers)
        measured: tuple[int, int, int, int] = self.kernels.encode(x, *numbers, blocks, lanes)
        return measured
