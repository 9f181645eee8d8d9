"""Error of each type on three models, beside GGUF's types."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from benchmarks.catalogue import AFFINE, EVERY, GGUF, LUT, NLM, NLM_MAX, Q4_0, Q4_1, available
from benchmarks.context import Context
from benchmarks.ggml import BLOCKS, NONE, SEARCHING
from benchmarks.models import Model, Score, models
from benchmarks.report import Row, Section
from benchmarks.scoring import amax_7, ggml_round_trip, gguf_bits, gguf_round_trip, score_codec, score_peer

_NAIVE, _TABLE, _EXACT = Q4_0
_AMAX, _AMAX_SMALL = "amax / 7, scale float32", "amax / 7, scale float16"
_SLOW = 8  # ggml's searches run on every eighth part
_NORMAL_KURTOSIS = (2.5, 3.5)  # it is 3 for normally distributed weights, and 1.5 for sines


@dataclass
class _Results:
    """A model and the scores of types, by name."""

    model: Model
    scores: dict[str, Score] = field(default_factory=dict)

    def rel_rmse(self, name: str, only: np.ndarray | None = None) -> float:
        return self.model.rel_rmse(self.scores[name], only)

    def row(self, name: str, peer: str, *, title: str = "") -> Row:
        """Return a row with a type's error, compared with a peer's if that is known."""
        score = self.scores[name]
        text = f"{self.rel_rmse(name):.6f}, mean of tensors {self.model.mean_rel_rmse(score):.6f}"
        title = f"{title or name} ({score.bits:.4g} bits)"
        if name == peer or peer not in self.scores:
            return Row(title, text)
        other = self.rel_rmse(peer, np.isfinite(score.squares))
        return Row(title, text, f"{peer} {other:.6f}", self.rel_rmse(name) / other, digits=4)

    def ratio(
        self, name: str, peer: str, limit: float | None = None, what: str = "", only: np.ndarray | None = None
    ) -> Iterator[Row]:
        """Yield the ratio of two errors on the weights that both were measured on, if both are known."""
        if name not in self.scores or peer not in self.scores:
            return
        both = np.isfinite(self.scores[name].squares) & np.isfinite(self.scores[peer].squares)
        both = both if only is None else both & only
        own, other = self.rel_rmse(name, both), self.rel_rmse(peer, both)
        title = f"{name} / {peer}{what}"
        target, met = ("", None) if limit is None else (f"<= {limit:g}", own / other <= limit)
        yield Row(title, f"{own:.6f}", f"{other:.6f}", own / other, target, met, digits=5)

    def identical(self, text: str, kind: str) -> Iterator[Row]:
        """Yield whether the bytes are those of gguf, if the type is known."""
        if text in self.scores:
            same = self.scores[text].as_expected
            name = f"{text}: bytes and decoded weights"
            blocks = f"gguf, {self.model.weights // 32:,} blocks of {kind.upper()}"
            yield Row(name, f"{same.sum()} of {same.size} parts equal", blocks, same.mean(), "all", bool(same.all()))


def _measured(context: Context, model: Model) -> _Results:
    results = _Results(model)
    scores = results.scores
    expected = {text: kind for kind, text in GGUF.items()}
    for text, codec in available(EVERY)[0].items():
        scores[text] = score_codec(codec, model, expected.get(text, ""))
    scores[_AMAX] = score_peer(amax_7, model, 5.0)
    scores[_AMAX_SMALL] = score_peer(partial(amax_7, scale=np.float16), model, 4.5)
    for kind, text in GGUF.items():
        if text in scores and scores[text].as_expected.all():
            scores[f"gguf {kind}"] = replace(scores[text], choices={})
        else:
            scores[f"gguf {kind}"] = score_peer(gguf_round_trip(kind), model, gguf_bits(kind))
    for library in context.ggml[:1]:
        for kind in SEARCHING:
            multiple = BLOCKS[kind][1]
            scores[kind] = score_peer(
                ggml_round_trip(library, kind),
                model,
                gguf_bits(kind),
                multiple=multiple,
                every=1 if context.quick else _SLOW,
                fill=multiple == 32,
            )
    return results


def _peers(context: Context, results: _Results) -> Iterator[Row]:
    yield from (results.row(name, _NAIVE) for name in (_AMAX, _AMAX_SMALL))
    yield from (results.row(f"gguf {kind}", _NAIVE) for kind in GGUF)
    if context.ggml:
        name = context.ggml[0].name
        yield from (results.row(kind, _NAIVE, title=f"{name} {kind}") for kind in SEARCHING)
        for own in (NLM[32], Q4_1[2]):
            for kind in SEARCHING:
                yield from results.ratio(own, kind)


def _targets(results: _Results) -> Iterator[Row]:
    judged = results.ratio
    model = results.model
    for kind, text in GGUF.items():
        yield from results.identical(text, kind)
    yield from judged(_EXACT, _NAIVE, 1)
    least, most = _NORMAL_KURTOSIS
    normal = (model.kurtosis >= least) & (model.kurtosis <= most)
    alike = model.parts_of(normal)
    if alike.any():
        count = int(normal.sum())
        where = "" if alike.all() else f", {count} near-normal tensors"
        yield from judged(_EXACT, _AMAX, 0.85, where, alike)
    yield from judged(_TABLE, _EXACT, 1.001)
    yield from judged(_TABLE, _EXACT, 1.01, ", as in llama.cpp's pull request 835")
    yield from judged(Q4_1[2], Q4_1[1], 1)
    yield from judged(Q4_1[1], Q4_1[0], 1)
    yield from judged(NLM[32], _NAIVE, 0.80)
    yield from judged(NLM[32], Q4_1[0], 1)


def _mappings(results: _Results) -> Iterator[str]:
    """Yield a note with the shares of the mappings of nlm."""
    for text in (*NLM.values(), *NLM_MAX.values()):
        counts = results.scores[text].choices.get("mappings") if text in results.scores else None
        if counts is not None:
            shares = ", ".join(f"{100 * count / counts.sum():.2f}" for count in counts)
            yield f"{text}: mappings linear, 1, 2, 3: {shares} %."


def run(context: Context) -> Iterator[Section]:
    """Measure every type on every model."""
    _, unknown = available(EVERY)
    for model in models(quick=context.quick):
        results = _measured(context, model)
        own = (*Q4_0, *Q4_1, *list(GGUF.values())[2:], *NLM.values(), *NLM_MAX.values(), *LUT, *AFFINE)
        rows = [results.row(text, _NAIVE) for text in own if text in results.scores]
        notes = [
            "Where bytes and decoded weights are gguf's, so is the error, and gguf's row repeats it.",
            "The error is rel_rmse, rmse / standard deviation: of all tensors as one, and the average of each one's own.",
            *unknown,
            *_mappings(results),
            *([_left_out(results)] if context.ggml else [NONE]),
        ]
        title = f"Formats: {model.name}, {model.weights / 1e6:.1f} million weights in {len(model.tensors)} tensors"
        yield Section(title, [*rows, *_peers(context, results), *_targets(results)], notes)


def _left_out(results: _Results) -> str:
    """Return a note on the part of the model that ggml's searches were measured on."""
    counts = results.model.counts
    taken = {kind: counts[np.isfinite(results.scores[kind].squares)].sum() / counts.sum() for kind in SEARCHING}
    shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in taken.items())
    return (
        "ggml's searches are slow, and those with blocks of 256 take no other rows; share of the weights that each got: "
        f"{shares}. They are compared on those weights."
    )
