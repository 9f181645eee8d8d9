"""``qformat export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.common import (
    PATH,
    Command,
    echo_json,
    human_bytes,
    jobs_option,
    parse_size,
    progress_bar,
    quality_option,
    root_option,
    warn,
)
from qformat.quality import Quality

if TYPE_CHECKING:
    from qformat.converters.exports.export import Format


@click.command(cls=Command)
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option("--to", required=True, type=click.Choice(["gguf", "safetensors", "hf"]), help="Format of DST.")
@click.option(
    "-t",
    "--dtype",
    metavar="TYPE",
    help="Type of quantized tensors that cannot be copied: f32, f16, bf16; for gguf also q4_0, q4_1, q5_0, q5_1, q8_0.  "
    "[default: the source dtype of each tensor; for gguf f16]",
)
@quality_option("Quality at which layered tensors are read")
@root_option
@click.option(
    "--shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    callback=parse_size,
    help="Largest safetensors file that --to hf writes.",
)
@click.option(
    "-f", "--force", is_flag=True, help="Replace DST if it exists; a directory only if it holds nothing else."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@jobs_option
def command(
    src: Path,
    dst: Path,
    to: Format,
    dtype: str | None,
    quality: Quality,
    root: str | None,
    shard_size: int,
    force: bool,
    as_json: bool,
    jobs: int | None,
) -> None:
    """Write the contents of the .qf file SRC to DST in another format.

    gguf: the GGUF file that SRC was converted from, byte for byte as long as no tensor has changed its type; or a new GGUF file
    of a Hugging Face model (Llama, Mistral or Qwen2 with a byte-level BPE tokenizer). Types known to GGUF are copied; the others
    become TYPE, f16 by default. With --dtype, unquantized matrices become TYPE, too; what llama.cpp reads as floats stays as it is,
    and otherwise becomes f32.

    safetensors: one file with all tensors, decoded.

    hf: a directory with safetensors files and the assets of SRC (configuration, tokenizer), with the names that its library looks
    for, such as transformers, diffusers or PEFT.

    safetensors and hf keep the dtype of tensors that SRC holds unquantized or lossless. DST appears only when it is complete.
    """
    from qformat.container.reader import ContainerReader
    from qformat.converters.exports.export import export

    with ContainerReader(src, root=root) as container:
        total = sum(record.elements for record in container.tensors)
    with progress_bar(f"exporting {src.name}", total) as advance:
        result = export(
            src,
            dst,
            to,
            dtype=dtype,
            quality=quality,
            root=root,
            shard_size=shard_size,
            overwrite=force,
            jobs=jobs,
            progress=advance,
        )
    for warning in result.warnings:
        warn(warning)
    if as_json:
        echo_json(result.to_json())
        return
    size = sum(result.files.values())
    copied = sum(tensor.copied for tensor in result.tensors)
    click.echo(f"{dst} is {human_bytes(size)} ({size} bytes)")
    click.echo(f"{len(result.tensors)} tensors, {copied} of them copied unchanged; in {result.seconds:.1f} s")
