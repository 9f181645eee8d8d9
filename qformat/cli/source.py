"""The options of commands that read a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from qformat.cli.common import quality_option
from qformat.converters.sources.options import SourceOptions


def source_options(about_quality: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options and hands them over as one `options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @quality_option(about_quality)
        @click.option(
            "--state-dict-key",
            metavar="KEY",
            help="Which state dict of a torch checkpoint to take, with dots between nested keys; . takes everything.",
        )
        @click.option(
            "--gptq-format",
            type=click.Choice(["v1", "v2"]),
            help="How the zeros of a GPTQ checkpoint are stored, if it says the wrong thing.",
        )
        @wraps(command)
        def with_options(*, quality: Any, state_dict_key: Any, gptq_format: Any, **others: Any) -> None:
            command(options=SourceOptions(quality, state_dict_key, gptq_format), **others)

        return with_options

    return decorate
