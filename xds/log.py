"""Structured logs for all commands: one line an event, `event` a noun phrase that never changes, the rest in fields.

docs/logs.md lists every event. No line per request. A traceback has no local variables: those are prompts and keys, and
writing out a body of 40 MB takes seconds.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog

FORMATS = ("auto", "console", "json")
LEVELS = ("debug", "info", "warning", "error")


def configure(fmt: str = "auto", level: str = "info", stream: TextIO | None = None) -> None:
    """Send every event to `stream` (standard error when None): for people when it is a terminal, else JSON lines."""
    out = stream if stream is not None else sys.stderr
    readable = fmt == "console" or (fmt == "auto" and out.isatty())
    renderer: list[structlog.typing.Processor] = (
        [
            structlog.dev.ConsoleRenderer(
                colors=out.isatty(),
                pad_event_to=26,
                exception_formatter=structlog.dev.plain_traceback,
            )
        ]
        if readable
        else [
            structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False)),
            structlog.processors.JSONRenderer(),
        ]
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,  # which worker of several says it
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if readable else "iso", utc=not readable),
            *renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(out),  # a line at once: several workers write to one stream
        cache_logger_on_first_use=False,
    )
