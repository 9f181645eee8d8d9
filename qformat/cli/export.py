"""``qformat export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from qformat.cli.common import PATH, echo_json, human_bytes, jobs_option, parse_size, progress_bar, quality_option, warn
from qformat.quality import Quality

if TYPE_CHECKING:
    from qformat.converters.exports.export import Format


@click.command()
@click.argument("src", type=PATH)
@click.argument("dst", type=PATH)
@click.option("--to", required=True, type=click.Choice(["gguf", "safetensors", "hf"]), help="What DST shall be.")
@click.option(
    "-t",
    "--dtype",
    metavar="TYPE",
    help="For quantized tensors that cannot be copied: f32, f16, bf16; for gguf also q4_0, q4_1, q5_0, q5_1, q8_0.  "
    "[default: what each tensor once was; for gguf f16]",
)
@quality_option("Of layered tensors, use no more than this needs")
@click.option(
    "--shard-size",
    default="5GB",
    show_default=True,
    metavar="SIZE",
    callback=parse_size,
    help="With hf, most bytes of tensors in one file.",
)
@click.option(
    "-f", "--force", is_flag=True, help="Replace DST if it exists; a directory only if nothing else is in it."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@jobs_option
def command(
    src: Path,
    dst: Path,
    to: Format,
    dtype: str | None,
    quality: Quality,
    shard_size: int,
    force: bool,
    as_json: bool,
    jobs: int | None,
) -> None:
    """Write what the .qf file SRC holds to DST in another format.

    gguf: the GGUF file that SRC was made of, byte for byte if no tensor has another type now; or a new one, of a Hugging Face
    model like Llama, Mistral or Qwen2 with a byte-level BPE tokenizer. Types that GGUF knows are copied and others become TYPE, f16
    unless it is given; if it is, matrices of plain numbers become it, too. One-dimensional tensors become f32.

    safetensors: a file of all tensors as numbers.

    hf: a directory with such files and those that were taken along (configuration, tokenizer), which transformers can load.

    In the latter two, tensors that are stored as numbers, or lossless, keep their dtype. Nothing stands at DST before it is
    complete.
    """
    from qformat.container.reader import ContainerReader
    from qformat.converters.exports.export import export

    with ContainerReader(src) as container:
        total = sum(record.elements for record in container.tensors)
    with progress_bar(f"exporting {src.name}", total) as advance:
        result = export(
            src,
            dst,
            to,
            dtype=dtype,
            quality=quality,
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
    click.echo(f"{dst} has {human_bytes(size)} ({size} bytes)")
    click.echo(f"{len(result.tensors)} tensors, {copied} of them copied as they are; in {result.seconds:.1f} s")
