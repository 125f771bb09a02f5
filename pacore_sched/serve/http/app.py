"""The web application: its routes."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from kernels import __version__
from pacore_sched.serve.api.chat import ChatAnswer
from pacore_sched.serve.api.completions import CompletionAnswer
from pacore_sched.serve.api.context import Context
from pacore_sched.serve.api.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from pacore_sched.serve.api.responses.answer import ResponseAnswer
from pacore_sched.serve.api.responses.body import ResponsesRequest
from pacore_sched.serve.api.tokens import detokenize, tokenize
from pacore_sched.serve.errors import ApiError
from pacore_sched.serve.http import validation
from pacore_sched.serve.http.guard import Guard
from pacore_sched.serve.http.responses import respond
from pacore_sched.serve.page.files import FILES, page_file
from pacore_sched.serve.page.status import ServerStatus, StatusReader

METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"
log = logging.getLogger(__name__)


def make_app(
    context: Context,
    *,
    keys: tuple[str, ...] = (),
    log_prompts: bool = False,
    debug: bool = False,
) -> ASGIApp:
    """The application of a server; `keys` are its API keys. It runs the context's service."""
    routes = make_routes(context, log_prompts=log_prompts, debug=debug)
    return Guard(routes, context.service, keys)


def make_routes(context: Context, *, log_prompts: bool = False, debug: bool = False) -> FastAPI:
    """The application without its Guard, for requests that another server's Guard has let in.

    debug: also /debug/integrity, for soak tests
    """
    service = context.service

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="PaCoRe",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    _handle_errors(app)

    _add_completions(app, context, log_prompts=log_prompts)
    _add_models(app, context)
    _add_status(app, context)
    _add_page(app, context)
    if debug:
        _add_debug(app, context)
    return app


def _add_completions(app: FastAPI, context: Context, *, log_prompts: bool) -> None:
    async def answer(
        request: Request, answer: ChatAnswer | CompletionAnswer | ResponseAnswer, *, stream: bool
    ) -> Response:
        if log_prompts:
            log.info("prompt", extra={"body": answer.body.model_dump(exclude_unset=True)})
        try:
            return await respond(request, answer, stream=stream)
        finally:
            request.scope["log"]["usage"] = answer.usage

    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await answer(request, ChatAnswer(context, body), stream=body.stream)

    @app.post("/v1/responses", response_model=None)
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await answer(request, ResponseAnswer(context, body), stream=body.stream)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await answer(request, CompletionAnswer(context, body), stream=body.stream)


def _add_models(app: FastAPI, context: Context) -> None:
    service, created = context.service, int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in context.names.listed]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        context.names.widths(model)
        return _model(model)

    def _model(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "pacore",
            "root": context.names.names[0],
            "max_model_len": service.model.config.decoder.max_positions,
        }

    @app.post("/tokenize")
    async def tokenize_route(body: TokenizeRequest) -> dict[str, Any]:
        return await service.text_thread(partial(tokenize, context, body))

    @app.post("/detokenize")
    async def detokenize_route(body: DetokenizeRequest) -> dict[str, Any]:
        return await service.text_thread(partial(detokenize, context, body))


def _add_status(app: FastAPI, context: Context) -> None:
    service = context.service

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Status 200 while the server takes requests, else 503; and why."""
        thread = service.thread
        record: dict[str, Any] = {
            "status": service.state,
            "engine_failures": thread.failures,
        }
        if thread.last_error:
            record["last_error"] = thread.last_error
        return JSONResponse(record, 200 if record["status"] == "ok" else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics", response_model=None)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=METRICS_TYPE)


def _add_page(app: FastAPI, context: Context) -> None:
    status = StatusReader(context.service, context.names.names[0])

    @app.get("/status", response_model=None, responses={200: {"model": ServerStatus}})
    async def status_route() -> Response:
        """What the server does now, as the page at / draws it."""
        return Response(await status.json(), media_type="application/json")

    for path in FILES:
        app.get(path, response_model=None, include_in_schema=False)(partial(page_file, path))


def _add_debug(app: FastAPI, context: Context) -> None:
    @app.get("/debug/integrity", include_in_schema=False)
    async def integrity() -> dict[str, Any]:
        service = context.service
        found = await asyncio.wrap_future(service.thread.integrity())
        return {"jobs": len(service.jobs), **found}


def _handle_errors(app: FastAPI) -> None:
    """Answer every error in OpenAI's form, without a traceback."""

    def answer(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> JSONResponse:
        request.scope["log"]["error"] = error.message
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await api_error(request, validation.of_body(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return await api_error(request, validation.of_http(error))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return answer(ApiError(500, "the server failed; its log says why"))
