"""Blocks as streams: what stands at the same place of each block together (spec/codecs.md, "Coded blocks")."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qformat.codecs.layout import Buffer
from qformat.entropy.streams import StreamReader, StreamWriter
from qformat.kernels import load

U8 = NDArray[np.uint8]

_SCALE_AND_MINIMUM = 4  # bytes before the codes


def pack(blocks: U8, header: int, base: int, elements: int) -> tuple[bytes, float]:
    """Return the chunk of some blocks, and the entropy of its streams in bits.

    Parameters
    ----------
    blocks
        An array of shape (number of blocks, bytes of a block).
    header
        Bytes of a block before its codes.
    base
        How many different codes there are. Those of 5 bits are taken out of the blocks one by one, others stay in their bytes.
    elements
        How many elements the chunk is for, without those that fill up rows.
    """
    writer = StreamWriter()
    numbers = np.ascontiguousarray(blocks[:, :header])
    if (
        header == _SCALE_AND_MINIMUM
    ):  # the minimum is about -8 scales, so the difference of their patterns varies little
        numbers.view("<u2")[:, 1] -= numbers.view("<u2")[:, 0]
    for at in range(header):
        writer.stream(np.ascontiguousarray(numbers[:, at]))
    if base == 32:
        codes = np.empty(32 * len(blocks), np.uint8)
        load("codes_5").unpack(blocks.reshape(-1), blocks.shape[1], header, codes)
    else:
        codes = np.ascontiguousarray(blocks[:, header:]).reshape(-1)
    writer.stream(codes, base)
    return writer.chunk(elements), writer.entropy


def unpack(chunk: Buffer, blocks: U8, header: int, base: int, elements: int) -> None:
    """Do the opposite of `pack`, into an array of the blocks' shape.

    Raises
    ------
    ValueError
        If no encoder can have written the chunk.
    """
    reader = StreamReader(chunk)
    numbers = np.empty((len(blocks), header), np.uint8)
    for at in range(header):
        numbers[:, at] = reader.stream(len(blocks))
    if header == _SCALE_AND_MINIMUM:
        numbers.view("<u2")[:, 1] += numbers.view("<u2")[:, 0]
    blocks[:, :header] = numbers
    if base == 32:
        codes = reader.stream(32 * len(blocks), base)
        load("codes_5").pack(codes, blocks.reshape(-1), blocks.shape[1], header)
    else:
        codes = reader.stream(len(blocks) * (blocks.shape[1] - header), base)
        blocks[:, header:] = codes.reshape(len(blocks), -1)
    reader.end(elements)
