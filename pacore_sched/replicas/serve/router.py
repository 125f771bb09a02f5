"""Ray Serve's request router for replicas that the front chooses (affinity.py).

There is one front, so it knows each replica's load and prefixes exactly; the router finds the
replica by its name, and tells the front which there are (running.py).
"""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from pacore_sched.replicas.serve import running


class TargetRouter(RequestRouter):
    """Routes a ForwardedRequest to its `replica`. A process has at most one such router."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The target first. Others refuse the request, which the front then sends elsewhere."""
        target = pending_request.args[0].replica if pending_request else None
        others = [r for r in candidate_replicas if r.replica_id.unique_id != target]
        targets = [r for r in candidate_replicas if r.replica_id.unique_id == target]
        return [rank for rank in (targets, others) if rank]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        running.names = tuple(sorted(r.replica_id.unique_id for r in replicas))
