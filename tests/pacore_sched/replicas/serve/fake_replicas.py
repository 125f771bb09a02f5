"""Replicas in this process, for tests of the front: scripted services without Ray."""

import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from starlette.types import Message

from pacore_sched.replicas.serve.forwarding import ForwardedRequest, answer
from pacore_sched.replicas.serve.front import Front, ReplicaLost
from pacore_sched.serve.api.context import Context
from pacore_sched.serve.api.names import Names
from pacore_sched.serve.engine_metrics import EngineMetrics
from pacore_sched.serve.http.app import make_routes
from pacore_sched.serve.http.guard import Guard
from pacore_sched.serve.http.server import Server, bound_socket, url_of
from pacore_sched.serve.service import Service
from tests.pacore_sched.serve.serving import Running, request


class FakeReplicas:
    """`lost` are those that end when they are asked: before the answer, or in the middle of it,
    after `messages_before_loss` messages."""

    def __init__(self, services: dict[str, Service]) -> None:
        self.services = services
        self.lost: set[str] = set()
        self.messages_before_loss = 0
        self.asked: list[str] = []
        self._apps = {}
        for name, service in services.items():
            service.metrics.registry.register(EngineMetrics(service))
            self._apps[name] = make_routes(Context(service, Names(["scripted"])))

    def running(self) -> list[str]:
        return [*self.services]

    async def call(self, request: ForwardedRequest) -> AsyncGenerator[list[Message], None]:
        service = self.services[request.replica]
        if not hasattr(service, "thread"):
            service.start()
        self.asked.append(request.replica)
        if request.replica in self.lost and not self.messages_before_loss:
            raise ReplicaLost
        sent = 0
        async for part in answer(self._apps[request.replica], request):
            if request.replica not in self.lost:
                yield part
                continue
            for message in part:
                yield [message]
                sent += 1
                if sent == self.messages_before_loss:
                    raise ReplicaLost


class RunningFront(Running):
    """A running server: its URL, its front and its replicas."""

    def __init__(self, url: str, front: Front, server: Server, replicas: FakeReplicas) -> None:
        super().__init__(url, next(iter(replicas.services.values())), server)
        self.front, self.replicas = front, replicas


@contextmanager
def running_front(
    services: dict[str, Service], *, keys: tuple[str, ...] = (), drain_s: float = 5.0
) -> Iterator[RunningFront]:
    """Serve in a thread until the end of the context."""
    replicas = FakeReplicas(services)
    front = Front(replicas, next(iter(services.values())).limits)
    with bound_socket("127.0.0.1", 0) as listener:
        server = Server(Guard(front, front, keys), front, drain_s)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        url = url_of(listener)
        assert request(url + "/health").status == 200
        try:
            yield RunningFront(url, front, server, replicas)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
            for service in services.values():
                if hasattr(service, "thread"):
                    service.close()
