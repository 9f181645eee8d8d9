"""Meta's directories: small random models, split as Meta splits them, come together again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qformat.converters.convert import convert
from qformat.converters.sources.detect import open_checkpoint
from qformat.errors import SourceError
from qformat.pipeline.recipe import Recipe
from qformat.pipeline.source import Checkpoint
from qformat.readers.torch import load_file

DIM, HEADS, FFN, VOCAB, LAYERS = 32, 8, 48, 40, 2
HEAD_DIM = DIM // HEADS
Tensors = dict[str, torch.Tensor]


def model(kv_heads: int = HEADS, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        "tok_embeddings.weight": weights(VOCAB, DIM),
        "norm.weight": weights(DIM),
        "output.weight": weights(VOCAB, DIM),
    }
    for i in range(LAYERS):
        kv = kv_heads * HEAD_DIM
        shapes = {"wq": (DIM, DIM), "wk": (kv, DIM), "wv": (kv, DIM), "wo": (DIM, DIM)}
        tensors |= {f"layers.{i}.attention.{name}.weight": weights(*shape) for name, shape in shapes.items()}
        shapes = {"w1": (FFN, DIM), "w2": (DIM, FFN), "w3": (FFN, DIM)}
        tensors |= {f"layers.{i}.feed_forward.{name}.weight": weights(*shape) for name, shape in shapes.items()}
        tensors |= {f"layers.{i}.{name}.weight": weights(DIM) for name in ("attention_norm", "ffn_norm")}
    return tensors


def split(
    tensors: Tensors, count: int, *, embeddings: int, kv_heads: int = HEADS, spread: bool = False
) -> list[Tensors]:
    """Return the tensors of each GPU; if there are fewer key heads than GPUs, neighbours share them, or GPUs far apart."""
    shards = []
    for i in range(count):
        shard = {"rope.freqs": torch.ones(HEAD_DIM // 2)}
        if embeddings == 1:  # the first Llama
            shard["layers.0.attention.inner_attention.rope.freqs"] = torch.ones(HEAD_DIM // 2)
        for name, tensor in tensors.items():
            kind = name.split(".")[-2]
            if tensor.ndim == 1:
                part = tensor
            elif kind in ("wk", "wv") and kv_heads < count:
                part = tensor.chunk(kv_heads)[i % kv_heads if spread else i * kv_heads // count]
            else:
                dim = {"tok_embeddings": embeddings, "wo": 1, "w2": 1}.get(kind, 0)
                part = tensor.chunk(count, dim)[i]
            shard[name] = part.clone()
        shards.append(shard)
    return shards


def write(directory: Path, shards: Sequence[Tensors], **params: Any) -> Path:
    directory.mkdir(exist_ok=True)
    for i, shard in enumerate(shards):
        torch.save(shard, directory / f"consolidated.{i:02}.pth")
    known = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "vocab_size": -1, "norm_eps": 1e-5} | params
    (directory / "params.json").write_text(json.dumps(known))
    return directory


def check(checkpoint: Checkpoint, expected: Tensors, step: int = 10**9) -> None:
    assert sorted(tensor.name for tensor in checkpoint.tensors) == sorted(expected)
    for tensor in checkpoint.tensors:
        theirs = expected[tensor.name]
        count = theirs.numel()
        assert tensor.shape == tuple(theirs.shape)
        data = b"".join(tensor.read(slice(i, min(i + step, count))).data.tobytes() for i in range(0, count, step))
        assert data == theirs.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), tensor.name
        assert tensor.read(slice(3, 3)).data.size == 0


def refused(directory: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert str(directory) in message
    assert message.isprintable()
    return message


@pytest.mark.parametrize("step", [1, 5, 33, 10**9])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("embeddings", [0, 1], ids=["Llama 3", "Llama 2"])
def test_meta_shards_join_to_the_whole_tensors(tmp_path, count, embeddings, step):
    tensors = model()
    params = {"vocab_size": VOCAB} if embeddings == 0 else {}
    source = write(tmp_path, split(tensors, count, embeddings=embeddings), **params)
    checkpoint = open_checkpoint(source)
    check(checkpoint, tensors, step)
    assert checkpoint.warnings == []


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize(("count", "kv_heads"), [(2, 2), (4, 2), (8, 2), (8, 4), (8, 1), (2, 4)])
def test_key_and_value_heads_shared_by_meta_shards_are_taken_once(tmp_path, count, kv_heads, spread):
    tensors = model(kv_heads)
    shards = split(tensors, count, embeddings=0, kv_heads=kv_heads, spread=spread)
    check(open_checkpoint(write(tmp_path, shards, n_kv_heads=kv_heads, vocab_size=VOCAB)), tensors, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_converting_a_meta_checkpoint_keeps_names_and_assets(tmp_path, dtype):
    tensors = model(2, dtype)
    source = write(tmp_path / "m", split(tensors, 4, embeddings=0, kv_heads=2), n_kv_heads=2)
    (source / "tokenizer.model").write_bytes(b"tokens")
    (source / "checklist.chk").write_bytes(b"sums")
    checkpoint = open_checkpoint(source)
    assert set(checkpoint.assets) == {"checklist.chk", "params.json", "tokenizer.model"}
    assert {path.name for path in checkpoint.files} >= {"consolidated.00.pth", "consolidated.03.pth", "params.json"}
    convert(checkpoint, tmp_path / "x.qf", Recipe.parse(None))
    stored = load_file(tmp_path / "x.qf")
    assert stored.keys() == tensors.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def test_a_meta_checkpoint_in_one_file_without_a_number_is_read(tmp_path):
    tensors = model()
    torch.save(tensors | {"vision_model.conv.weight": torch.ones(2, 2)}, tmp_path / "consolidated.pth")
    (tmp_path / "params.json").write_text(json.dumps({"dim": DIM}))
    check(open_checkpoint(tmp_path), tensors | {"vision_model.conv.weight": torch.ones(2, 2)})


def test_a_meta_checkpoint_in_one_file_needs_no_params(tmp_path):
    tensors = model()
    torch.save(tensors, tmp_path / "consolidated.00.pth")
    check(open_checkpoint(tmp_path), tensors)


def test_hugging_face_files_are_preferred_to_meta_shards(tmp_path):
    source = write(tmp_path, split(model(), 2, embeddings=1))
    torch.save({"a": torch.ones(3)}, source / "pytorch_model.bin")
    assert [tensor.name for tensor in open_checkpoint(source).tensors] == ["a"]


def test_a_tokenizer_in_the_folder_above_a_meta_checkpoint_is_mentioned(tmp_path):
    source = write(tmp_path / "7B", split(model(), 1, embeddings=1))
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    (warning,) = open_checkpoint(source).warnings
    assert "tokenizer.model of the parent directory" in warning


def missing(number: int) -> Callable[[Path], object]:
    return lambda directory: (directory / f"consolidated.{number:02}.pth").unlink()


def changed(change: Callable[[Tensors], object], number: int = 2) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        path = directory / f"consolidated.{number:02}.pth"
        shard = torch.load(path, weights_only=True)
        change(shard)
        torch.save(shard, path)

    return edit


def in_all(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    return lambda directory: [changed(change, i)(directory) for i in range(4)]


def params(text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "params.json").write_text(text)


WQ = "layers.1.attention.wq.weight"
WK = "layers.1.attention.wk.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (missing(2), ["consolidated.02.pth is missing"]),
        (missing(0), ["consolidated.00.pth is missing"]),
        (missing(3), ["tok_embeddings.weight", "3 shards", "dim 32", "shards are missing"]),
        (changed(lambda s: s.pop(WQ)), [WQ, "is in consolidated.00.pth, but not in consolidated.02.pth"]),
        (
            changed(lambda s: s.update(x=torch.ones(1))),
            ["'x'", "is in consolidated.02.pth, but not in consolidated.00.pth"],
        ),
        (changed(lambda s: s.update({WQ: s[WQ][:-1]})), [WQ, "bf16 8x32 in consolidated.00.pth, but bf16 7x32"]),
        (changed(lambda s: s.update({WQ: s[WQ].half()})), [WQ, "bf16 8x32", "f16 8x32"]),
        (in_all(lambda s: s.update(x=torch.ones(2, 2))), ["'x'", "is not known", "4 shards"]),
        (in_all(lambda s: s.update({WQ: torch.ones(2)})), [WQ, "is not known"]),
        (in_all(lambda s: s.update({WK: s[WK][:3]})), [WK, "bf16 3x32", "does not fit"]),
        (in_all(lambda s: s.update({WK: s[WK][:0]})), [WK, "does not fit"]),
        (lambda d: (d / "params.json").unlink(), ["params.json: is missing"]),
        (params("[]"), ["params.json", "not a JSON object"]),
        (params("{"), ["params.json", "not a JSON object"]),
        (params("{}"), ["params.json", "'dim'"]),
        (params('{"dim": 32}'), ["params.json", "'n_heads'"]),
        (params('{"dim": -32, "n_heads": 8}'), ["params.json", "'dim'"]),
        (params('{"dim": "32", "n_heads": 8}'), ["params.json", "'dim'"]),
        (params('{"dim": 32, "n_heads": 8, "n_kv_heads": true}'), ["params.json", "'n_kv_heads'"]),
        (params('{"dim": 32, "n_heads": 8, "vocab_size": 50}'), ["tok_embeddings.weight", "vocab_size 50"]),
        (params('{"dim": 64, "n_heads": 8}'), ["tok_embeddings.weight", "dim 64"]),
        (lambda d: (d / "consolidated.01.pth").write_bytes(b"PK\3\4"), ["consolidated.01.pth", "cut short"]),
    ],
)
def test_meta_shards_that_do_not_fit_together_are_refused(tmp_path, change, says):
    source = write(tmp_path / "m", split(model(), 4, embeddings=1))
    change(source)
    message = refused(source)
    for text in says:
        assert text in message


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.ffn_norm.weight", "layers.0.attention.wv.weight"])
def test_replicated_tensors_that_differ_between_meta_shards_are_refused_when_read(tmp_path, name):
    source = write(tmp_path / "m", split(model(1), 4, embeddings=1, kv_heads=1), n_kv_heads=1)
    changed(lambda shard: shard[name].view(-1)[-1:].add_(1))(source)
    with pytest.raises(SourceError, match=f"'{name}' in the shards differ"):
        convert(open_checkpoint(source), tmp_path / "x.qf", Recipe.parse(None))
    assert not (tmp_path / "x.qf").exists()


def test_ambiguous_replicated_heads_of_meta_shards_are_refused(tmp_path):
    source = write(tmp_path / "m", split(model(2), 4, embeddings=1, kv_heads=2), n_kv_heads=2)
    changed(lambda shard: shard[WK][0].add_(1))(source)
    assert WK in refused(source)
