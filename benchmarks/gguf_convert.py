"""Convert a Hugging Face checkpoint of bfloat16 to q4_0 with gguf-py: ``python gguf_convert.py DIRECTORY OUTPUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quant_shape_to_byte_shape, quantize


def main() -> None:
    """Convert."""
    directory, output = map(Path, sys.argv[1:])
    writer = GGUFWriter(output, "llama")
    sources = []
    for path in sorted(directory.glob("*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, stop = entry["data_offsets"]
                sources.append((name, entry["shape"], path, 8 + length + start, stop - start))
    for name, shape, *_ in sources:
        kind = GGMLQuantizationType.Q4_0 if len(shape) > 1 else GGMLQuantizationType.F32
        stored = quant_shape_to_byte_shape(shape, kind) if len(shape) > 1 else tuple(shape)
        dtype = np.dtype(np.uint8 if len(shape) > 1 else np.float32)
        writer.add_tensor_info(name, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, path, offset, size in sources:
        with path.open("rb") as file:
            file.seek(offset)
            bits = np.fromfile(file, np.uint16, size // 2).reshape(shape)
        values = (bits.astype(np.uint32) << 16).view(np.float32)
        writer.write_tensor_data(quantize(values, GGMLQuantizationType.Q4_0) if len(shape) > 1 else values)
    writer.close()


if __name__ == "__main__":
    main()
