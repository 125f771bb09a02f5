"""What a client is told when a request fails, in OpenAI's form."""

from model.errors import ContextError, InputError

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    503: "unavailable_error",
    504: "timeout_error",
}


TOO_LONG = "context_length_exceeded"  # clients that shorten a conversation look for it


class ApiError(Exception):
    """A failed request.

    param: the field that is wrong, such as "messages[0].content"; None if it is none in particular
    code: a name for programs, such as "context_length_exceeded"
    retry_after: seconds after which the client should try again
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = str(InputError(message))  # one printable line
        self.retry_after = retry_after

    @property
    def body(self) -> dict:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else TYPES[400])
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def refused(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """An error of the client's: what is wrong, and what would be right."""
    return ApiError(400, message, param=param, code=code)


def of_input(error: InputError, param: str) -> ApiError:
    """A mistake in what the client sent in a field."""
    return refused(str(error), param, TOO_LONG if isinstance(error, ContextError) else None)
