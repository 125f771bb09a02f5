"""One replica: a model, its engine and the server's routes, in an actor of Ray Serve."""

from collections.abc import AsyncIterator, Callable

from ray import serve
from starlette.types import Message

from pacore_sched.replicas.serve.forwarding import ForwardedRequest, answer
from pacore_sched.replicas.serve.front import ReplicaLost
from pacore_sched.serve.api.context import Context
from pacore_sched.serve.http.app import make_routes


class Replica:
    """Answers forwarded requests."""

    async def __init__(self, make_context: Callable[[], Context], *, log_prompts: bool) -> None:  # type: ignore[misc]
        """`make_context` loads the model."""
        self._name = serve.get_replica_context().replica_id.unique_id
        context = make_context()
        self._service = context.service
        self._app = make_routes(context, log_prompts=log_prompts)
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()

    async def answer(self, request: ForwardedRequest) -> AsyncIterator[list[Message]]:
        if request.replica != self._name:
            raise ReplicaLost(request.replica)
        async for part in answer(self._app, request):
            yield part

    def kv_tokens(self, request: ForwardedRequest) -> int:
        """Capacity of the KV cache. The request only says which replica is asked."""
        executor = self._service.engine.executor
        return executor.num_pages * executor.page_size

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._service.failed:
            raise RuntimeError(f"the engine has failed: {self._service.thread.last_error}")
