"""``coded=true``: bits that entropy coding saves on blocks of real weights, and the cost of decoding them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from benchmarks.context import Context
from benchmarks.encoding import Encoder, Parts, decode_all, encode_all, parse_type, totals
from benchmarks.inputs import minilm_matrices, whisper
from benchmarks.models import Model, thinned
from benchmarks.report import Row, Section, at_least
from benchmarks.timing import interleaved, processor_seconds

#: types, and the target for the bits per weight of MiniLM; their decoders do not depend on the search
_WANTED = {"q4_0:search=naive": 4.12, "q4_1:search=naive": 4.5, "q5_0": None, "q5_1": None, "q8_0": 8.0, "nlm": None}
_SEARCHED = ("q4_0", "q4_1")  # with their default search, which uses more codes
_ABOUT = 0.02  # bits


def _coded(text: str) -> str:
    return f"{text}{',' if ':' in text else ':'}coded=true"


def _sizes(name: str, tensors: Mapping[str, np.ndarray], *, judged: bool) -> Section:
    kinds = [*_WANTED, *_SEARCHED]
    every = totals(tensors, [*kinds, *map(_coded, kinds)])
    rows = []
    for kind in kinds:
        plain, small = every[kind], every[_coded(kind)]
        if small.squares != plain.squares or small.entropy_bpw is None:
            raise RuntimeError(f"{_coded(kind)} does not decode to what {kind} does")
        target = _WANTED.get(kind) if judged else None
        against = f"plain {plain.bpw:.3f}, entropy {small.entropy_bpw:.3f}"
        met = None if target is None else small.bpw <= target + _ABOUT
        wanted = "" if target is None else f"<= {target} + {_ABOUT}"
        rows.append(Row(_coded(kind), f"{small.bpw:.3f} bits", against, small.bpw / plain.bpw, wanted, met, 3))
    notes = ["All decode to the same weights as without coded=true. The entropy is that of the streams, order 0."]
    return Section(f"Coded blocks: bits for each weight of {name}, everything included", rows, notes)


def _encoded(encoder: Encoder, model: Model, out: np.ndarray) -> list[tuple[Parts, np.ndarray]]:
    """Return the bytes of every chunk, and the array for its weights."""
    work = []
    start = 0
    for _, array in model.tensors:
        for chunk, parts in encode_all(encoder, array):
            stop = start + chunk.rows * chunk.cols
            work.append((parts, out[start:stop].reshape(chunk.rows, chunk.cols)))
            start = stop
    return work


def _speeds(context: Context, model: Model) -> Section:
    out = np.zeros(model.weights, np.float32)
    tasks: dict[str, Callable[[], object]] = {}
    for kind in _WANTED:
        for text in (kind, _coded(kind)):
            codec = parse_type(text)
            tasks[text] = partial(decode_all, codec, _encoded(codec, model, out))
    seconds = interleaved({text: processor_seconds(run) for text, run in tasks.items()}, context.rounds(5))
    rates = {text: model.weights / value / 1e6 for text, value in seconds.items()}
    rows = [at_least(_coded(kind), rates[_coded(kind)], rates[kind], "Mw/s", "plain") for kind in _WANTED]
    return Section(f"Coded blocks: decoding {model.name} to float32, one thread", rows)


def run(context: Context) -> Iterator[Section]:
    """Measure sizes, then speeds."""
    models = [Model("MiniLM", list(minilm_matrices().items())), Model("Whisper-base", list(whisper().items()))]
    for model in [thinned(model, 1 << 15) for model in models] if context.quick else models:
        yield _sizes(model.name, dict(model.tensors), judged=model.name == "MiniLM" and not context.quick)
        yield _speeds(context, model)
