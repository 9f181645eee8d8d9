"""Convert a checkpoint directory, with the embeddings kept in bfloat16.

python examples/convert_checkpoint.py MODEL_DIRECTORY OUTPUT.qf
"""

from __future__ import annotations

import sys
from pathlib import Path

from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.pipeline.recipe import Recipe

source, output = (Path(argument) for argument in sys.argv[1:])

# Everything of two or more dimensions becomes q4_0; patterns override that, and the last one that matches wins.
recipe = Recipe.parse("q4_0", {"*_embeddings.weight": "bf16"})
result = convert(open_checkpoint(source), output, recipe)
print(f"{result.output}: {result.nbytes} bytes, {result.bpw:.2f} bits/weight, root {result.root}")
