"""Logs as events with keys, one line per event on standard error: JSON, or text for people."""

import logging
import sys
from typing import Any, Literal

from servicekit import context
from servicekit.imports import hidden

with hidden("rich"):
    import structlog

LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _add_call(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    call = context.current()
    if call is not None:
        event["request_id"] = call.request_id
        event["trace_id"] = call.trace_id
        event["span_id"] = call.span_id
    return event


def configure(service: str, replica: str, *, fmt: LogFormat, level: LogLevel) -> None:
    """Sets up structlog, and routes warnings and errors of libraries through it."""
    numeric = getattr(logging, level.upper())
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if fmt == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_call,
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=service, replica=replica)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processor=renderer, foreign_pre_chain=shared))
    logging.basicConfig(handlers=[handler], level=max(numeric, logging.WARNING), force=True)


def get() -> structlog.typing.FilteringBoundLogger:
    """Returns the logger.

    A call's first argument is the event's name; keyword arguments are its keys.
    """
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger
