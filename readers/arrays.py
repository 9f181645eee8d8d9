"""Read a container file into numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from qformat.codecs.levels import LevelCodec
from qformat.container.reader import ContainerReader
from qformat.dtypes import DTYPES, DType
from qformat.errors import QualityError
from qformat.parallel import default_jobs, for_each
from qformat.quality import Quality
from qformat.readers.decoder import Decoders, TensorDecoder
from qformat.records import TensorRecord

# Of tensors whose bytes are kept for the next read, rows of an embedding say
_KEPT_BYTES = 64 << 20


class Codes(NamedTuple):
    """A tensor of few levels: its weights are ``levels[codes + len(levels) // 2]``, times the scale of their row or group.

    Attributes
    ----------
    codes
        int8 in the tensor's shape, from -(n - 1) / 2 to (n - 1) / 2; 0 means that the weight is 0.
    levels
        float32: the n levels.
    scales
        float32 of shape (rows, groups): of each row, the first dimension (a vector is one row), the scale of each group of columns,
        which are all others; of shape (1, 1), and 1, if there are no scales.
    """

    codes: NDArray[np.int8]
    levels: NDArray[np.float32]
    scales: NDArray[np.float32]


class safe_open:  # noqa: N801  named after the function of safetensors that it stands in for
    """A container file opened for reading, as a context manager.

    What is decoded is a copy of the file's bytes, and it is the copy that is compared with the digests: a file that is changed or
    cut short while it is open ends in `IntegrityError`. A handle can be used in forked processes, and pickled: it is opened again
    by its path.

    Parameters
    ----------
    path
        The file; or an open binary file object that can seek, of which no more is read than is needed.
    quality
        How much to read of layered tensors (type ``scm``): bits for each weight such as 3 or 3.5; a bound such as
        ``"max_rmse=0.01"``, ``"max_abs=0.05"`` or ``"mean_abs=0.01"`` for an error relative to the range of the tensor;
        ``"lossless"``; None is everything that there is. See `qformat.quality.Quality`.
    verify
        Compare the bytes of a tensor with their SHA-256 whenever they are read from the file.
    jobs
        Threads that decode one tensor; None is one for each processor.
    root
        The root that the file must have, as `root` or ``qformat inspect`` give it: that of a file which was verified before. The
        root of a head covers its shards.
    max_bytes
        The most bytes that one tensor or asset may take in memory. None is 256 MiB, or 256 times the bytes that it has in the file
        if that is more: a small file cannot ask for all memory.

    Raises
    ------
    FormatError
        If the file is damaged or no container.
    IntegrityError
        If its root is not `root`.
    QualityError
        If the quality is malformed, or the file has no layered tensors. (When a tensor is read: if its layers do not reach it.)

    Examples
    --------
    >>> with qformat.safe_open("model.qf") as f:  # doctest: +SKIP
    ...     weight = f.get_tensor(f.keys()[0])
    """

    def __init__(
        self,
        path: str | bytes | os.PathLike[str] | BinaryIO,
        *,
        quality: float | str | Quality | None = None,
        verify: bool = True,
        jobs: int | None = None,
        root: str | None = None,
        max_bytes: int | None = None,
    ) -> None:
        chosen = Quality.parse(quality)
        self._container = ContainerReader(path, root=root)
        try:
            self._decoders = Decoders(
                self._container, chosen, verify=verify, keep_bytes=_KEPT_BYTES, max_bytes=max_bytes
            )
        except QualityError:
            self._container.close()
            raise
        self._jobs = jobs or default_jobs()
        self._path = Path(
            self._container.path
        ).absolute()  # the working directory may change before the handle is pickled
        self._options = {"quality": chosen, "verify": verify, "jobs": jobs, "max_bytes": max_bytes}

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._container.has_path:
            raise TypeError(
                f"{self._container.path} was opened as a file object, which cannot be pickled; open it by its path"
            )
        return _reopen, (self._path, {**self._options, "root": self.root})

    @property
    def root(self) -> str:
        """SHA-256 of the file's index in hexadecimal: it identifies the content."""
        return self._container.root

    @property
    def metadata(self) -> Mapping[str, str]:
        """The strings stored along."""
        return self._container.index.metadata

    def keys(self) -> list[str]:
        """Return the names of the tensors, sorted."""
        return [tensor.name for tensor in self._container.tensors]

    def info(self, name: str) -> TensorRecord:
        """Return what the file says of a tensor: shape, dtype, codec, error, segments.

        Raises
        ------
        KeyError
            If there is no tensor of this name.
        """
        return self._container.tensor(name)

    def assets(self) -> list[str]:
        """Return the names of the files stored along."""
        return [asset.name for asset in self._container.index.assets]

    def get_asset(self, name: str) -> bytes:
        """Return the contents of an asset.

        Raises
        ------
        KeyError
            If there is no asset of this name.
        FormatError
            If it is damaged.
        """
        record = self._container.asset_record(name)
        self._decoders.check_amount(record.label, record.size, record.segment.length)
        return self._container.asset(name)

    def get_tensor(self, name: str, dtype: DTypeLike | None = None, *, copy: bool = True) -> NDArray[Any]:
        """Return a tensor.

        Parameters
        ----------
        name
            Its name.
        dtype
            float16, float32 or float64 for a floating tensor. None is the stored dtype for raw tensors, and float32 for
            quantized ones and for those that numpy has no dtype for (bfloat16, float8).
        copy
            If False, a tensor that is stored in the requested dtype is returned as a read-only view of the bytes that were read.

        Raises
        ------
        KeyError
            If there is no tensor of this name.
        FormatError
            If it is damaged, or needs a newer version.
        TypeError
            If it cannot be given as `dtype`.
        """
        decoder = self._decoder(name)
        target = _target(decoder, dtype)
        shape = decoder.record.shape
        if not copy and target is decoder.decoded:
            view = decoder.view()
            if view is not None:
                return view.reshape(shape)
        decoder.check_amount(target)
        flat = np.empty(decoder.matrix.elements, target.storage)
        decoder.decode_all(flat, target, self._jobs)
        return flat.reshape(shape)

    def get_rows(
        self,
        name: str,
        rows: int | slice | Sequence[int] | NDArray[np.integer[Any]],
        dtype: DTypeLike | None = None,
    ) -> NDArray[Any]:
        """Return some rows of a tensor, decoding nothing else: ``get_tensor(name)[rows]``.

        With ``verify=True`` the first call checks all bytes of the tensor.

        Parameters
        ----------
        name
            Its name.
        rows
            Along the first dimension: a number, a slice, or numbers in any order.
        dtype
            As in `get_tensor`.

        Raises
        ------
        KeyError
            If there is no tensor of this name.
        IndexError
            If a row does not exist, or the tensor has fewer than two dimensions.
        FormatError
            If it is damaged, or needs a newer version.
        TypeError
            If it cannot be given as `dtype`.
        """
        decoder = self._decoder(name)
        target = _target(decoder, dtype)
        shape = decoder.record.shape
        if len(shape) < 2:
            raise IndexError(f"tensor {name!r} of shape {shape} has no rows")
        _ = decoder.segments  # also if no row is chosen
        chosen, lead = _choose(rows, shape[0])
        return decoder.rows(np.asarray(chosen, np.intp), target).reshape(lead + shape[1:])

    def get_codes(self, name: str) -> Codes:
        """Return a tensor of type ``ternary`` or ``levels`` as it is stored, for code that computes with codes.

        Parameters
        ----------
        name
            Its name.

        Raises
        ------
        KeyError
            If there is no tensor of this name.
        FormatError
            If it is damaged, or needs a newer version.
        TypeError
            If it is of another type.
        """
        decoder = self._decoder(name)
        if not isinstance(decoder.codec, LevelCodec):
            raise TypeError(f"tensor {name!r} of type {decoder.codec.id} has no codes that name levels")
        decoder.check_amount(DTYPES["i8"])
        codec, flat = decoder.codec, np.empty(decoder.matrix.elements, np.int8)
        for_each(lambda chunk: decoder.decode_codes(codec, flat, chunk), decoder.chunks(), self._jobs)
        return Codes(flat.reshape(decoder.record.shape), *decoder.levels(codec))

    def _decoder(self, name: str) -> TensorDecoder:
        return self._decoders.of(self._container.tensor(name))

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reopen(path: Path, options: Mapping[str, Any]) -> safe_open:
    return safe_open(path, **options)


def _target(decoder: TensorDecoder, dtype: DTypeLike | None) -> DType:
    if dtype is None:
        return decoder.natural
    name = np.dtype(dtype).name
    for known in DTYPES.values():
        fits = known is decoder.decoded or (known.floating and decoder.decoded.floating)
        if known.native and known.storage == name and fits:
            return known
    raise TypeError(f"tensor {decoder.record.name!r} holds {decoder.decoded.name} and cannot be given as {name}")


def _choose(rows: Any, count: int) -> tuple[range | NDArray[np.intp], tuple[int, ...]]:
    """Return the chosen row numbers, none negative, and the shape that they have in the result."""
    if isinstance(rows, slice):
        numbers = range(count)[rows]
        return numbers, (len(numbers),)
    array = np.asarray(rows)
    if array.dtype == np.bool_ and array.shape == (count,):
        array = np.flatnonzero(array)
    if array.size == 0:
        array = array.astype(np.intp)
    if not np.issubdtype(array.dtype, np.integer):
        raise IndexError(f"rows have to be integers or a slice, not {array.dtype}")
    if array.size and not (-count <= int(array.min()) and int(array.max()) < count):
        raise IndexError(f"a row is out of range for {count} rows")
    flat: NDArray[np.intp] = array.reshape(-1).astype(np.intp)
    return np.where(flat < 0, flat + count, flat), array.shape
