"""Options of the commands that read a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from qformat.cli.common import quality_option, root_option
from qformat.converters.sources.options import SourceOptions


def source_options(quality_purpose: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return a decorator that adds the options and passes them to the command as one `options`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @quality_option(quality_purpose)
        @click.option(
            "--state-dict-key",
            metavar="KEY",
            help="State dict to read from a torch checkpoint: nested keys joined by dots; . reads all of them.",
        )
        @click.option(
            "--gptq-format",
            type=click.Choice(["v1", "v2"]),
            help="How a GPTQ checkpoint stores its zeros, if its own statement is wrong.",
        )
        @root_option
        @wraps(command)
        def with_options(*, quality: Any, state_dict_key: Any, gptq_format: Any, root: Any, **others: Any) -> None:
            command(options=SourceOptions(quality, state_dict_key, gptq_format, root), **others)

        return with_options

    return decorate
