"""How much of a layered tensor to read: up to some bits per weight, an error bound, or everything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qformat.errors import QualityError
from qformat.records import Layer, TensorRecord

#: error metrics, all relative to the range of the tensor: its largest element less its smallest one
Metric = Literal["max_rmse", "max_abs", "mean_abs"]
METRICS: tuple[Metric, ...] = ("max_rmse", "max_abs", "mean_abs")
# A tensor stored at up to this many bits has no lossless layer: without one, a larger file read at these bits gives the same values
_MOST_LOSSY = 8
_HINT = "give bits per weight such as 3.5, a bound such as max_rmse=0.01, max_abs=0.05 or mean_abs=0.01, or lossless"


@dataclass(frozen=True)
class Quality:
    """The quality at which layered tensors are read; by default all layers.

    Attributes
    ----------
    bits
        The most bits per weight of each tensor. The first layer is read even if it has more, and a lossless layer only if this is
        above 8.
    metric, bound
        The largest error allowed, relative to the tensor's range; the fewest layers within it are read. (Tensors of range 0 have no
        such error, and all their layers are read.)
    lossless
        Whether all layers are required to restore the source bit for bit.
    """

    bits: float | None = None
    metric: Metric | None = None
    bound: float = 0.0
    lossless: bool = False

    @classmethod
    def parse(cls, value: float | str | Quality | None) -> Quality:
        """Return a quality from a user's value.

        Parameters
        ----------
        value
            Bits per weight; ``"METRIC=BOUND"`` with one of `METRICS`; ``"lossless"``; or None for all layers.

        Raises
        ------
        QualityError
            If it is anything else.
        """
        if value is None or isinstance(value, Quality):
            return value or cls()
        if value == "lossless":
            return cls(lossless=True)
        text = str(value)
        for metric in METRICS:
            if text.startswith(f"{metric}="):
                return cls(metric=metric, bound=_number(text.removeprefix(f"{metric}="), text, least=0.0))
        bits = _number(text, text, least=math.ulp(0.0))
        return cls(bits=bits)

    def of(self, record: TensorRecord) -> TensorRecord:
        """Return the record of a tensor with only the layers needed; one without layers is returned unchanged.

        Raises
        ------
        QualityError
            If the tensor is layered but its layers do not reach this quality.
        """
        layers = record.layers
        return record.up_to(self._needed(record, layers)) if layers else record

    def _needed(self, record: TensorRecord, layers: tuple[Layer, ...]) -> int:
        if self.bits is not None:
            lossy = layers[:-1] if record.error is None and self.bits <= _MOST_LOSSY else layers
            return max(1, sum(within(layer.nbytes, record.elements, self.bits) for layer in lossy))
        if self.metric is not None:
            for count, layer in enumerate(layers, 1):
                if relative(layer, record, self.metric) <= self.bound:
                    return count
            if not record.range:  # relative errors are infinite
                return len(layers)
            best = relative(layers[-1], record, self.metric)
            raise QualityError(
                f"{record.label}: no layer reaches {self.metric}={self.bound:g}; the file holds it at {layers[-1].bpw:.2f} "
                f"bits/weight, with {self.metric}={best:.3g}"
            )
        if self.lossless and record.error is not None and record.elements:
            raise QualityError(
                f"{record.label}: the file does not hold it losslessly; its last layer has {layers[-1].bpw:.2f} bits/weight"
            )
        return len(layers)


def within(nbytes: int, elements: int, bits: float) -> bool:
    """Return whether `nbytes` are no more than `bits` per weight."""
    return not elements or 8 * nbytes / elements <= bits


def room(bits: float, elements: int) -> int:
    """Return the most bytes that are `within` `bits` per weight."""
    most = int(bits * elements / 8) + 1  # rounding may be off by one
    while most and not within(most, elements, bits):
        most -= 1
    return most


def relative(layer: Layer, record: TensorRecord, metric: Metric) -> float:
    """Return an error of a layer divided by the range of its tensor (0 / 0 is 0)."""
    error = {"max_rmse": layer.error.rmse, "max_abs": layer.error.maximum, "mean_abs": layer.error.mean or 0.0}[metric]
    if not error:
        return 0.0
    return error / record.range if record.range else math.inf


def _number(text: str, whole: str, *, least: float) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number < math.inf:
        raise QualityError(f"quality {whole!r}: {_HINT}")
    return number
