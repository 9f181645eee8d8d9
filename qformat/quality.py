"""How much of a layered tensor to read: bits for each weight, a bound for an error, or everything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qformat.errors import QualityError
from qformat.records import Layer, TensorRecord

#: what errors are measured by; all are relative to the range of the tensor, its largest element less its smallest one
Metric = Literal["max_rmse", "max_abs", "mean_abs"]
METRICS: tuple[Metric, ...] = ("max_rmse", "max_abs", "mean_abs")
# What is stored for so many bits has no layer that makes it lossless, so that leaving out layers gives the same
_MOST_LOSSY = 8
_HINT = "give bits per weight such as 3.5, a bound such as max_rmse=0.01, max_abs=0.05 or mean_abs=0.01, or lossless"


@dataclass(frozen=True)
class Quality:
    """What layered tensors shall be read at. Without anything they are read as they are, to the last layer.

    Attributes
    ----------
    bits
        Bits for each weight at most, of each tensor; the first layer is read even if it has more, and the one that makes a tensor
        lossless only from more than 8 bits on.
    metric, bound
        The error that must not be exceeded, relative to the tensor's range; as few layers as fulfil that are read. (Tensors of
        range 0 have no such error and are read as they are.)
    lossless
        The last layer has to be the one that gives the source back bit for bit.
    """

    bits: float | None = None
    metric: Metric | None = None
    bound: float = 0.0
    lossless: bool = False

    @classmethod
    def parse(cls, value: float | str | Quality | None) -> Quality:
        """Return a quality from what a user gives.

        Parameters
        ----------
        value
            Bits for each weight; ``"METRIC=BOUND"`` with one of `METRICS`; ``"lossless"``; or None.

        Raises
        ------
        QualityError
            If it is none of these.
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
        """Return the record of a tensor with no more layers than are needed; one that has none is returned as it is.

        Raises
        ------
        QualityError
            If the tensor is layered, but its layers do not reach what is asked for.
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
            if not record.range:  # nothing to compare with
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
    """Return whether so many bytes are no more than some bits for each weight."""
    return not elements or 8 * nbytes / elements <= bits


def room(bits: float, elements: int) -> int:
    """Return how many bytes are just `within` some bits for each weight."""
    most = int(bits * elements / 8) + 1  # rounding may be off by one
    while most and not within(most, elements, bits):
        most -= 1
    return most


def relative(layer: Layer, record: TensorRecord, metric: Metric) -> float:
    """Return an error of a layer over the range of its tensor (0 over 0 is 0)."""
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
