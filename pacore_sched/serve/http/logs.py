"""Logs as lines of JSON, each with the id of the request that it belongs to."""

import json
import logging
import sys
import time
from contextvars import ContextVar

from pacore_sched.serve.api.usage import Usage

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """A record's message as `event`, its `extra` fields, and the traceback of an error."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if id := request_id.get():
            line["request_id"] = id
        fields = vars(record).items()  # Ray adds some with an underscore
        line |= {key: value for key, value in fields if key not in _STANDARD and key[0] != "_"}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=_json)


def log_to_stderr() -> None:
    """Send the server's logs, and uvicorn's warnings, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name, level in (("pacore_sched.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _json(value: object) -> object:
    """What JSON has for a value of an `extra` field."""
    return value.record() if isinstance(value, Usage) else str(value)
