"""The types that are measured. Types unknown to this version are left out, with a note."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.encoding import ChunkEncoder, parse_type
from qformat.errors import TypeSpecError

#: four bits in blocks, the searches of each from the quickest to the best
Q4_0 = ("q4_0:search=naive", "q4_0:search=table", "q4_0:search=exact")
Q4_1 = ("q4_1:search=naive", "q4_1:search=als", "q4_1:search=best")
#: GGUF's types as its own quantizers make them
GGUF = {"q4_0": Q4_0[0], "q4_1": Q4_1[0], "q5_0": "q5_0", "q5_1": "q5_1", "q8_0": "q8_0"}
NLM = {block: f"nlm:block={block}" for block in (32, 64, 128)}
NLM_MAX = {block: f"{text},optimize=max" for block, text in NLM.items()}
LUT_LLOYD = "lut:scope=tensor,fit=lloyd"
LUT = (
    LUT_LLOYD,
    "lut:scope=tensor,fit=percentile",
    "lut:scope=tensor,fit=gauss",
    "lut:scope=tensor,scale=row",
    "lut:scope=block,block=128",
    "lut:scope=block,block=256",
)
AFFINE = (
    *(f"affine:bits=4,group={group},sym={sym}" for sym in ("true", "false") for group in (32, 64, 128)),
    "affine:bits=8,group=row,sym=true",
    "affine:bits=3,group=64,sym=false",
    "affine:bits=2,group=64,sym=false",
)
#: entropy-coded
CODED = (
    "ternary",
    "ternary:scale=group,bpw=1.3",
    "levels:n=7,scale=tensor",
    "levels:sparsity=0.5",
    "lossless",
    "scm",
    "scm:bpw=2.7",
    "scm:max_rmse=0.01",
    *(f"{kind}:coded=true" for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "nlm")),
)
EVERY = (*Q4_0, *Q4_1, "q5_0", "q5_1", "q8_0", *NLM.values(), *NLM_MAX.values(), *LUT, *AFFINE)


def available(texts: Iterable[str]) -> tuple[dict[str, ChunkEncoder], list[str]]:
    """Return the codecs by type string, and a list with a note on unknown types, if there are any."""
    codecs: dict[str, ChunkEncoder] = {}
    unknown = []
    for text in texts:
        try:
            codecs[text] = parse_type(text)
        except TypeSpecError:
            unknown.append(text)
    return codecs, [f"Left out, because this version has no such type: {'; '.join(unknown)}."] if unknown else []
