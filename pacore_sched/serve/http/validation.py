"""Errors of pydantic and of the framework, in OpenAI's form and with the name of the field."""

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.exceptions import HTTPException

from pacore_sched.serve.errors import ApiError


def of_body(errors: Sequence[Mapping[str, Any]], body: object) -> ApiError:
    """The first error of a body that is not valid."""
    error = errors[0]
    kind, message, context = error["type"], str(error["msg"]), error.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, f"the body is not JSON: {context.get('error', message)}")
    if isinstance(body, bytes):
        return ApiError(400, "the body is not read: send Content-Type: application/json")
    path = _path(error["loc"][1:], body, missing=kind == "missing")
    if key := context.get("key"):
        path = f"{path}.{_short(key)}".removeprefix(".")
    if kind == "not_implemented":
        message = f"{path} is not implemented; it may only be {context['values']}"
        return ApiError(400, message, param=path, code="unsupported_parameter")
    if kind == "unknown":
        return ApiError(400, f"there is no parameter {path}", param=path, code="unknown_parameter")
    if kind == "missing":
        return ApiError(400, f"{path or 'the body'} is missing", param=path or None)
    message = message.removeprefix("Input ")
    name = path or "the body"
    return ApiError(400, f"{name}: {message[:1].lower()}{message[1:]}", param=path or None)


def of_http(error: HTTPException) -> ApiError:
    """An error of the framework, such as an unknown path."""
    if error.detail == "There was an error parsing the body":
        return ApiError(400, "the body is not JSON in UTF-8, or nested too deep")
    texts = {404: "there is no such path", 405: "the path does not take this method"}
    return ApiError(error.status_code, texts.get(error.status_code, str(error.detail)))


def _path(location: Sequence[str | int], body: object, *, missing: bool) -> str:
    """The name of a place in a body, such as messages[0].content, whose last part may be `missing`.

    pydantic's location also has the names of the unions' members that were tried, which the body
    does not have.
    """
    path, value = "", body
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if isinstance(part, int):
            if isinstance(value, list) and part < len(value):
                path, value = f"{path}[{part}]", value[part]
        elif isinstance(value, dict) and (part in value or (last and missing)):
            path, value = f"{path}.{_short(part)}".removeprefix("."), value.get(part)
    return path


def _short(key: str) -> str:
    """A key of the client's, which may have any length."""
    return key if len(key) <= 80 else f"{key[:80]}..."
