"""Streams of symbols: the coder and its frequencies, against the independent reader and the library constriction."""

from __future__ import annotations

import ctypes
import math
import mmap
import struct
import sys

import constriction
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qformat.entropy import frequencies as fr
from qformat.entropy.streams import CODED, CODED_BY_DIGITS, CONSTANT, RAW, StreamReader, StreamWriter, symbol_count
from tests.helpers.kernels import FAMILIES, modules

NUMBA, NUMPY = modules("rans", "frequencies", "symbols")
every_family = pytest.mark.parametrize("kernels", [NUMBA, NUMPY], ids=FAMILIES)
BASES = (256, 32, 16, 7, 5, 4, 3)
GUARD = 64


def packed(symbols: np.ndarray, base: int = 256) -> bytes:
    writer = StreamWriter()
    writer.stream(symbols, base)
    return b"".join(writer.parts)


def mode(stream: bytes) -> int:
    return stream[4]


def drawn(shares: list[float], count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(shares), count, p=shares).astype(np.uint8)


def joined(digits: np.ndarray, base: int) -> np.ndarray:
    each = fr.digits_per_symbol(base)
    filled = np.pad(digits, (0, -digits.size % each))
    symbols = np.empty(filled.size // each, np.uint8)
    NUMBA["symbols"].join(filled, base, each, symbols)
    return symbols


# ---- streams


@pytest.mark.parametrize("count", [1, 2, 3, 17, 4095, 4096, 65535, 65536, 131071, 131072, 200_003])
@pytest.mark.parametrize("base", [256, 16, 5, 3])
def test_streams_of_every_length_are_read_by_both_readers(count, base, streams):
    size = base ** fr.digits_per_symbol(base)
    shares = np.exp(-np.arange(size) / (size / 9))
    symbols = drawn((shares / shares.sum()).tolist(), count)
    stream = packed(symbols, base)
    reader = StreamReader(stream)
    np.testing.assert_array_equal(reader.stream(count, base), symbols)
    reader.end(0)
    cursor = streams.Cursor(stream, "here")
    np.testing.assert_array_equal(streams.symbols(cursor, count, base), symbols)
    assert cursor.rest == b""
    assert count < 4000 or len(stream) < count


def test_a_stream_is_stored_in_the_shortest_mode():
    assert packed(np.zeros(0, np.uint8)) == bytes(4)
    assert packed(np.full(1000, 7, np.uint8)) == struct.pack("<IBB", 2, CONSTANT, 7)
    noise = drawn([1 / 256] * 256, 10_000)
    assert packed(noise) == struct.pack("<IB", 10_001, RAW) + noise.tobytes()
    assert mode(packed(drawn([0.9, 0.1], 10_000))) == CODED
    independent = joined(drawn([0.1, 0.8, 0.1], 100_000), 3)
    assert mode(packed(independent, 3)) == CODED_BY_DIGITS
    dependent = np.where(independent < 121, 0, 242).astype(np.uint8)  # each symbol has five equal digits
    assert mode(packed(dependent, 3)) == CODED


@pytest.mark.parametrize(
    ("shares", "most"),
    [([1 / 3] * 3, 1.593), ([0.05, 0.9, 0.05], 0.573), ([0.02, 0.08, 0.8, 0.08, 0.02], 1.072), ([0.2] * 5, 2.334)],
)
def test_streams_of_digits_take_at_most_half_a_percent_more_than_their_entropy(shares, most):
    digits = drawn(shares, 1 << 19)
    symbols = joined(digits, len(shares))
    bits = 8 * len(packed(symbols, len(shares))) / digits.size
    counts = np.bincount(digits)
    assert bits <= 1.005 * fr.entropy(counts) / digits.size
    assert bits <= most
    model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(digits.astype(np.int32), model)
    assert bits <= 1.005 * 32 * coder.get_compressed().size / digits.size


@pytest.mark.parametrize("spread", [0.02, 1.0, 12.0])
def test_streams_of_bytes_take_at_most_half_a_percent_more_than_their_entropy(spread):
    shares = np.exp(-np.arange(256) / spread)
    shares /= shares.sum()
    symbols = drawn(shares.tolist(), 600_000) if spread > 0.1 else drawn([0.99, 0.01], 600_000)
    size = len(packed(symbols))
    counts = np.bincount(symbols, minlength=256)
    assert 8 * size <= 1.005 * fr.entropy(counts) + 8 * 4 * 64
    model = constriction.stream.model.Categorical(np.maximum(counts, 1e-9) / counts.sum(), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), model)
    assert size <= 1.005 * 4 * coder.get_compressed().size + 4 * 64


def test_a_stream_writer_adds_up_the_entropy_of_its_streams():
    writer = StreamWriter()
    writer.stream(np.repeat(np.arange(4, dtype=np.uint8), 100))
    writer.stream(np.full(50, 9, np.uint8))
    writer.stream(np.zeros(0, np.uint8))
    assert writer.entropy == pytest.approx(800)


def test_a_chunk_is_padded_with_zeros_to_its_least_length():
    writer = StreamWriter()
    writer.stream(np.zeros(5, np.uint8))
    chunk = writer.chunk(20_000)
    assert len(chunk) == 20
    for wrong in (chunk + bytes(1), chunk[:-1] + b"\1", chunk[:-1]):
        reader = StreamReader(wrong)
        reader.stream(5)
        with pytest.raises(ValueError, match="more bytes than its elements need"):
            reader.end(20_000)


# ---- damage


@given(st.data())
def test_a_changed_stream_is_refused_or_decodes_to_valid_symbols(data):
    base = data.draw(st.sampled_from(BASES))
    count = data.draw(st.sampled_from([1, 40, 3000, 5000]))
    size = base ** fr.digits_per_symbol(base)
    symbols = np.random.default_rng(count).binomial(size - 1, 0.2, count).astype(np.uint8)
    stream = bytearray(packed(symbols, base))
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["flip", "cut", "more", "swap"]))
        at = data.draw(st.integers(0, max(0, len(stream) - 1)))
        if kind == "flip" and stream:
            stream[at] ^= data.draw(st.integers(1, 255))
        elif kind == "cut":
            del stream[at : at + 2]
        elif kind == "more":
            stream[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif len(stream) > at + 2:
            stream[at], stream[at + 1] = stream[at + 1], stream[at]
    try:
        reader = StreamReader(bytes(stream))
        found = reader.stream(count, base)
    except ValueError:
        return
    assert found.size == count
    assert found.max() < size


@given(st.binary(max_size=300), st.sampled_from([1, 5, 100, 5000]), st.sampled_from(BASES), st.integers(8, 15))
def test_any_bytes_are_refused_as_a_stream_or_decode_to_symbols(content, count, base, precision):
    for head in (b"", bytes([CODED, precision]), bytes([CODED_BY_DIGITS, precision])):
        stream = struct.pack("<I", len(head + content)) + head + content
        try:
            found = StreamReader(stream).stream(count, base)
        except ValueError:
            continue
        assert found.size == count


@pytest.mark.parametrize("base", [256, 16, 3])
@pytest.mark.parametrize("count", [3, 200])
def test_both_readers_agree_on_every_change_of_a_stream(base, count, streams):
    size = base ** fr.digits_per_symbol(base)
    symbols = np.random.default_rng(count).binomial(size - 1, 0.02, count).astype(np.uint8)
    good = packed(symbols, base)
    bad = [good[:at] + good[at + 1 :] for at in range(len(good))] + [good[:at] for at in range(len(good))]
    bad += [good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :] for at in range(len(good)) for mask in (1, 128, 255)]
    bad += [good[:at] + good[at + 1 : at + 2] + good[at : at + 1] + good[at + 2 :] for at in range(len(good) - 1)]
    bad += [struct.pack("<I", len(good) - 4 + more) + good[4:] + b"\x01" * more for more in (1, 2, 4)]
    for stream in (bad_one for bad_one in bad if bad_one != good):
        results = []
        for read in (
            lambda stream=stream: StreamReader(stream).stream(count, base),
            lambda stream=stream: streams.symbols(streams.Cursor(stream, "here"), count, base),
        ):
            try:
                results.append(read().tolist())
            except ValueError:
                results.append(None)
        assert results[0] == results[1], stream


def test_refused_streams_name_the_broken_rule():
    good = packed(drawn([0.5, 0.25, 0.25], 5000))
    changed = bytearray(good)
    changed[-1] ^= 1
    cases = [
        (good[:-2], 5000, 256, "too short"),
        (struct.pack("<I", len(good) - 6) + good[4:-2], 5000, 256, "does not end"),
        (bytes(changed), 5000, 256, "does not end"),
        (good, 5001, 256, "does not end"),
        (good, 0, 256, "another length"),
        (bytes(4), 1, 256, "another length"),
        (struct.pack("<IBB", 2, RAW, 243), 1, 3, "a symbol that is not below 243"),
        (struct.pack("<IBB", 2, CONSTANT, 243), 1, 3, "a symbol that is not below 243"),
        (struct.pack("<IBB", 2, 4, 0), 1, 256, "unknown mode"),
        (struct.pack("<IBB", 2, CODED_BY_DIGITS, 8), 1, 256, "unknown mode"),
        (struct.pack("<IBB", 2, CODED, 7), 1, 256, "precision 7"),
        (struct.pack("<IBBB", 3, CODED, 8, 0), 1, 256, "table of frequencies"),
    ]
    for stream, count, base, message in cases:
        with pytest.raises(ValueError, match=message):
            StreamReader(stream).stream(count, base)


# ---- frequencies


@given(st.lists(st.integers(0, 5000), min_size=2, max_size=256), st.integers(8, 15))
def test_normalized_frequencies_have_the_sum_of_their_precision(counts, precision):
    full = np.zeros(256, np.int64)
    full[: len(counts)] = counts
    if not full.any():
        return
    found = fr.normalized(full, precision)
    assert found.sum() == 1 << precision
    assert ((found > 0) == (full > 0)).all()


def test_normalized_frequencies_keep_one_for_each_rare_symbol():
    counts = np.ones(256, np.int64)
    assert fr.normalized(counts, 8).tolist() == [1] * 256
    counts[3] = 10**9
    assert fr.normalized(counts, 8).tolist() == [1] * 256
    assert fr.normalized(counts, 15)[3] == (1 << 15) - 255


@pytest.mark.parametrize("base", [3, 4, 5, 7, 16])
def test_frequencies_of_symbols_are_products_of_those_of_digits(base):
    counts = np.zeros(256, np.int64)
    counts[:base] = np.arange(1, base + 1) ** 3
    digits = fr.normalized(counts, 15)
    symbols = fr.symbol_frequencies(digits, base, 15)
    assert symbols.sum() == 1 << 15
    expected = np.ones(base ** fr.digits_per_symbol(base))
    for i in range(fr.digits_per_symbol(base)):
        expected *= digits[np.arange(expected.size) // base**i % base] / (1 << 15)
    wrong = np.abs(symbols[: expected.size] - expected * (1 << 15))
    assert np.delete(wrong, symbols.argmax()).max() <= 1
    assert fr.digit_counts(symbols.astype(np.int64), base)[:base].sum() == fr.digits_per_symbol(base) << 15


def test_fixed_point_logarithms_are_at_most_eight_units_low():
    numbers = np.concatenate([np.arange(1, 70_000), 2 ** np.arange(53), 2 ** np.arange(1, 53) - 1])
    exact = np.array([math.log2(n) for n in numbers.tolist()])
    low = exact * 65536 - fr.log2(numbers)
    assert low.min() > -1e-3
    assert low.max() < 7.5
    assert fr.log2(np.array([0, 1])).tolist() == [0, 0]


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=256), st.integers(8, 15))
def test_frequency_tables_round_trip(counts, precision):
    full = np.zeros(256, np.int64)
    full[: len(counts)] = counts
    full[0] += 1
    stored = fr.normalized(full, precision)
    table = np.zeros(1024, np.uint8)
    length = NUMBA["frequencies"].write_table(stored, len(counts), precision, table)
    again = np.zeros(1024, np.uint8)
    assert NUMPY["frequencies"].write_table(stored, len(counts), precision, again) == length
    np.testing.assert_array_equal(table, again)
    for kernels in (NUMBA, NUMPY):
        found = np.zeros(256, np.uint32)
        assert kernels["frequencies"].read_table(table, len(counts), precision, found) == length
        np.testing.assert_array_equal(found, stored)


@given(st.binary(max_size=200), st.integers(1, 256), st.integers(8, 15))
def test_any_frequency_table_is_refused_or_valid_alike_in_numba_and_numpy(content, entries, precision):
    results = []
    for kernels in (NUMBA, NUMPY):
        guarded = np.zeros(256 + GUARD, np.uint32)
        coded = np.frombuffer(content, np.uint8)
        length = kernels["frequencies"].read_table(coded, entries, precision, guarded[:256])
        assert not guarded[entries:].any()
        assert length < 0 or (length <= len(content) and guarded.sum() == 1 << precision)
        results.append((length, guarded.tolist() if length >= 0 else None))
    assert results[0] == results[1]


@given(st.integers(0, 2**32 - 1), st.sampled_from(BASES), st.integers(8, 15))
def test_symbol_frequencies_are_the_same_in_numba_and_numpy(seed, base, precision):
    rng = np.random.default_rng(seed)
    digits = rng.integers(0, 1 << precision, base).astype(np.uint32)
    if rng.random() < 0.7:
        counts = np.zeros(256, np.int64)
        counts[:base] = rng.integers(0, 1 + 10 ** rng.integers(0, 5), base)
        counts[rng.integers(base)] += 1
        digits = fr.normalized(counts, precision)[:base].copy()
    each = fr.digits_per_symbol(base)
    results = []
    for kernels in (NUMBA, NUMPY):
        guarded = np.zeros(base**each + GUARD, np.uint32)
        fits = kernels["frequencies"].symbol_frequencies(digits, base, each, precision, guarded[: base**each])
        assert not guarded[base**each :].any()
        assert not fits or digits.sum() != 1 << precision or guarded.sum() == 1 << precision
        results.append((bool(fits), guarded.tolist()))
    assert results[0] == results[1]


# ---- kernels


@given(st.data())
def test_the_rans_decoder_takes_any_bytes_alike_in_numba_and_numpy(data):
    precision = data.draw(st.integers(8, 15))
    lanes = data.draw(st.sampled_from([4, 16, 32, 64]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    counts = np.zeros(256, np.int64)
    some = rng.integers(2, 257)
    counts[rng.permutation(256)[:some]] = rng.integers(1, 1 + 10 ** rng.integers(0, 5), some)
    frequencies = fr.normalized(counts, precision) if some <= 1 << precision else fr.normalized(counts, 15)
    count = int(rng.integers(1, 3000))
    symbols = rng.choice(np.flatnonzero(frequencies), count).astype(np.uint8)
    coded = []
    for kernels in (NUMBA, NUMPY):
        room = np.zeros(2 * count + 4 * lanes, np.uint8)
        coded.append(room[kernels["rans"].encode(symbols, frequencies, precision, lanes, room) :].copy())
    np.testing.assert_array_equal(*coded)
    found = coded[0]
    change = data.draw(st.sampled_from(["none", "byte", "cut", "noise"]))
    if change == "byte":
        found[rng.integers(found.size)] ^= rng.integers(1, 256)
    elif change == "cut":
        found = found[: max(4 * lanes, found.size - 2 * int(rng.integers(1, 40)))].copy()
    elif change == "noise":
        found = rng.integers(0, 256, found.size).astype(np.uint8)
    results = []
    for kernels in (NUMBA, NUMPY):
        guarded = np.full(count + 2 * GUARD, 0xA5, np.uint8)
        refused = kernels["rans"].decode(found, frequencies, precision, lanes, guarded[GUARD:-GUARD])
        assert (guarded[:GUARD] == 0xA5).all()
        assert (guarded[-GUARD:] == 0xA5).all()
        results.append((refused, None if refused else guarded.tolist()))
    assert results[0] == results[1]
    if change == "none":
        assert results[0][1][GUARD:-GUARD] == symbols.tolist()


def test_the_rans_decoder_without_avx512_gives_the_same_symbols():
    rans = NUMBA["rans"]
    counts = np.bincount(drawn([0.3, 0.3, 0.4], 1000), minlength=256)
    frequencies = fr.normalized(counts, 12)
    symbols = drawn([0.3, 0.3, 0.4], 150_000, seed=1)
    for lanes in (32, 64):
        room = np.zeros(2 * symbols.size + 4 * lanes, np.uint8)
        coded = room[rans.encode(symbols, frequencies, 12, lanes, room) :]
        entries = (frequencies + ((np.cumsum(frequencies) - frequencies) << 16)).astype(np.uint32)
        slots = np.repeat(np.arange(256, dtype=np.uint8), frequencies)
        states = coded[: 4 * lanes].copy().view(np.uint32)
        found = np.zeros_like(symbols)
        start = (coded.copy(), np.uint64(4 * lanes), found, np.uint64(0), states, slots, entries, 12)
        _, stop = rans._rounds(*start)
        assert stop > symbols.size - 3000
        np.testing.assert_array_equal(found[: int(stop)], symbols[: int(stop)])


@every_family
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("count", [1, 7, 8, 9, 100, 4097])
def test_symbols_join_and_split_into_their_digits(base, count, kernels):
    each = fr.digits_per_symbol(base)
    digits = np.random.default_rng(count).integers(0, base, symbol_count(count, base) * each).astype(np.uint8)
    symbols = np.empty(digits.size // each, np.uint8)
    kernels["symbols"].join(digits, base, each, symbols)
    expected = digits.reshape(-1, each).astype(np.int64) @ (base ** np.arange(each))
    np.testing.assert_array_equal(symbols, expected)
    table = fr.digit_table(base).reshape(-1)
    for function, kind in ((kernels["symbols"].split, np.uint8), (kernels["symbols"].values, np.float32)):
        guarded = np.full(count + GUARD, 77, kind)
        function(symbols, table.astype(kind), each, guarded[:count])
        np.testing.assert_array_equal(guarded[:count], digits[:count])
        assert (guarded[count:] == 77).all()


@every_family
def test_the_histogram_kernel_counts_symbols(kernels):
    symbols = drawn([0.1, 0.2, 0.7], 10_001)
    counts = np.ones(256, np.int64)
    kernels["rans"].histogram(symbols, counts)
    np.testing.assert_array_equal(counts - 1, np.bincount(symbols, minlength=256))


class FencedRooms:
    """Memory that ends where none may be touched, so that a kernel that reads or writes beyond crashes."""

    def __init__(self, count: int) -> None:
        self._size = 64 * mmap.PAGESIZE
        self._rooms = [mmap.mmap(-1, self._size + mmap.PAGESIZE) for _ in range(count)]
        for room in self._rooms:
            place = ctypes.addressof(ctypes.c_char.from_buffer(room)) + self._size
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(place), mmap.PAGESIZE, 0) == 0

    def put(self, *arrays: np.ndarray) -> list[np.ndarray]:
        found = []
        for room, array in zip(self._rooms, arrays, strict=False):
            view = np.frombuffer(room, np.uint8)[self._size - array.nbytes : self._size].view(array.dtype)
            view[:] = array
            found.append(view)
        return found


@pytest.mark.skipif(sys.platform != "linux", reason="other systems protect memory in other ways")
def test_compiled_stream_kernels_stay_within_their_arrays():
    rooms = FencedRooms(4)
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        precision, lanes = int(rng.integers(8, 16)), int(rng.choice([4, 16, 32, 64]))
        count = int(rng.choice([1, 63, 64, 65, 127, 1000, 5000]))
        counts = np.zeros(256, np.int64)
        counts[: rng.integers(1, 257)] = 1 + rng.integers(10 ** rng.integers(0, 5))
        counts[0] += 3
        frequencies = fr.normalized(counts, precision)
        shares = frequencies / frequencies.sum()
        symbols = rng.choice(256, count, p=shares).astype(np.uint8)
        room, source, table = rooms.put(np.zeros(2 * count + 4 * lanes, np.uint8), symbols, frequencies)
        coded = room[NUMBA["rans"].encode(source, table, precision, lanes, room) :].copy()
        if rng.random() < 0.7:
            coded[int(rng.integers(coded.size)) :] = rng.integers(256)
        coded = coded[: max(4 * lanes, coded.size - int(rng.integers(0, 40)))]
        NUMBA["rans"].decode(
            *rooms.put(coded, frequencies), precision, lanes, rooms.put(coded, frequencies, symbols)[2]
        )
        noise = rng.integers(0, 256, int(rng.integers(0, 60))).astype(np.uint8)
        noise[: rng.integers(0, noise.size + 1)] = 255
        entries = int(rng.integers(1, 257))
        content, found = rooms.put(noise, np.zeros(entries, np.uint32))
        NUMBA["frequencies"].read_table(content, entries, precision, found)
        base = int(rng.choice(BASES))
        each = fr.digits_per_symbol(base)
        digits = np.zeros(int(rng.integers(1, 300)), np.uint8)
        some = rng.integers(0, 256, symbol_count(digits.size, base)).astype(np.uint8)
        digit_table = fr.digit_table(base).reshape(-1)
        few, numbers, out = rooms.put(some, digit_table, digits)
        NUMBA["symbols"].split(few, numbers, each, out)
        few, floats, out = rooms.put(some, digit_table.astype(np.float32), digits.astype(np.float32))
        NUMBA["symbols"].values(few, floats, each, out)
