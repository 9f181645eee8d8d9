"""Make the layers of MLX, HQQ, quanto and torchao with these tools, and the digests of the values that they give in float32.

    python tests/data/quantized/make.py

Needs torch, safetensors, mlx, hqq, optimum-quanto and torchao.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
Tensors = dict[str, torch.Tensor]
Made = tuple[Tensors, dict[str, Any], Tensors]  # stored, files beside it, values


def weights(rows: int, cols: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) * 0.05


def mlx() -> Made:
    import mlx.core as mx
    import numpy as np

    stored: Tensors = {}
    values: Tensors = {}
    config: dict[str, Any] = {"group_size": 64, "bits": 4}
    cases = [(4, 64, "bfloat16"), *((bits, 32, "float16") for bits in (2, 3, 5, 6, 8)), (4, 128, "float32")]
    for number, (bits, group, dtype) in enumerate(cases):
        name = f"model.layers.{number}.mlp.up_proj"
        if number:
            config[name] = {"group_size": group, "bits": bits}
        each = [weights(6, 256, 10 * number + i) for i in range(3 if number == 1 else 1)]
        whole = torch.stack(each) if number == 1 else each[0]
        parts = mx.quantize(mx.array(whole.numpy()).astype(getattr(mx, dtype)), group, bits)
        exact = mx.dequantize(parts[0], *(part.astype(mx.float32) for part in parts[1:]), group, bits)
        values[f"{name}.weight"] = torch.from_numpy(np.array(exact))
        for role, part in zip(("weight", "scales", "biases"), parts, strict=True):
            wide = part if role == "weight" else part.astype(mx.float32)
            stored[f"{name}.{role}"] = torch.from_numpy(np.array(wide)).to(
                getattr(torch, str(part.dtype).split(".")[-1])
            )
    return (
        stored,
        {"config.json": {"model_type": "llama", "quantization": config, "quantization_config": config}},
        values,
    )


def hqq() -> Made:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    stored: Tensors = {}
    values: Tensors = {}
    cases = [(bits, 64, 1, False) for bits in (8, 4, 3, 2, 1)] + [
        (4, 16, 0, False),
        (3, 16, 0, False),
        (4, 32, 1, True),
    ]
    for number, (bits, group, axis, as_float) in enumerate(cases):
        name = f"model.layers.{number}.self_attn.q_proj"
        linear = torch.nn.Linear(64, 48, bias=number == 0)
        linear.weight.data = weights(48, 64, 200 + number)
        config = BaseQuantizeConfig(bits, group, axis=axis, view_as_float=as_float)
        layer = HQQLinear(linear, config, compute_dtype=torch.bfloat16 if number == 1 else torch.float16, device="cpu")
        exact = {**layer.meta, "compute_dtype": torch.float32}
        exact |= {key: layer.meta[key].float() for key in ("scale", "zero")}
        values[f"{name}.weight"] = Quantizer.dequantize(layer.W_q, exact)
        stored |= {f"{name}.{key}": value.data for key, value in layer.state_dict().items() if value is not None}
    return stored, {"config.json": {"model_type": "llama", "quantization_config": {"quant_method": "hqq"}}}, values


def quanto() -> Made:
    from optimum.quanto import freeze, qfloat8, qint2, qint4, qint8, quantization_map, quantize

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = torch.nn.Linear(256, 24, bias=False)
            self.k_proj = torch.nn.Linear(256, 16)
            self.v_proj = torch.nn.Linear(256, 16, bias=False)
            self.o_proj = torch.nn.Linear(80, 24, bias=False)
            self.up_proj = torch.nn.Linear(256, 24, bias=False)
            self.down_proj = torch.nn.Linear(192, 24, bias=False)
            self.conv = torch.nn.Conv2d(4, 6, 3)

    torch.manual_seed(1)
    model = Model()
    kinds = {"q_proj": qint4, "k_proj": qint2, "v_proj": qint8, "o_proj": qint4, "up_proj": qfloat8, "down_proj": qint4}
    for name, kind in (*kinds.items(), ("conv", qint8)):
        quantize(model, weights=kind, include=name)
    freeze(model)
    values = {f"{name}.weight": getattr(model, name).weight.dequantize().data for name in (*kinds, "conv")}
    config = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 192}
    stored = {name: tensor.data for name, tensor in model.state_dict().items()}
    return stored, {"config.json": config, "quanto_qmap.json": quantization_map(model)}, values


def torchao() -> Made:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerAxis,
        PerGroup,
        PerTensor,
        quantize_,
    )

    model = torch.nn.Sequential(*(torch.nn.Linear(96, 16, bias=number == 0) for number in range(6)))
    for number, linear in enumerate(model):
        linear.weight.data = weights(16, 96, 300 + number)
    model[2].to(torch.bfloat16)
    configs = [
        Float8WeightOnlyConfig(),
        Int8WeightOnlyConfig(version=2),
        Int8WeightOnlyConfig(version=2),
        IntxWeightOnlyConfig(torch.int4, PerGroup(32)),
        IntxWeightOnlyConfig(torch.int3, PerAxis(0)),
        Int8WeightOnlyConfig(version=2, granularity=PerTensor()),
    ]
    for linear, config in zip(model, configs, strict=True):
        quantize_(linear, config)
    state = model.state_dict()
    stored, header = flatten_tensor_state_dict(state)
    values = {
        name: exact(tensor) for name, tensor in state.items() if hasattr(tensor, "dequantize") and "weight" in name
    }
    method = {"quantization_config": {"quant_method": "torchao"}}
    return stored, {"config.json": method, "header": {**header, "format": "pt"}}, values


def exact(tensor: Any) -> torch.Tensor:
    """Return the values of a tensor of torchao, computed in float32."""
    if tensor.scale.dtype is not torch.float32:
        tensor.scale = tensor.scale.float()
    try:
        return tensor.dequantize(torch.float32)
    except TypeError:
        return tensor.dequantize().float()


def main() -> None:
    digests = json.loads((HERE / "expected.json").read_bytes())
    for make in (mlx, hqq, quanto, torchao):
        stored, files, values = make()
        folder = HERE / make.__name__
        folder.mkdir(exist_ok=True)
        save_file(
            {k: v.contiguous() for k, v in stored.items()}, folder / "model.safetensors", files.pop("header", None)
        )
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n")
        own = {name: value.detach().contiguous().numpy().tobytes() for name, value in values.items()}
        digests[make.__name__] = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(own.items())}
    (HERE / "expected.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
