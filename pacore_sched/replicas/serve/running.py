"""The names of the replicas that take requests, as Ray Serve last told this process's router.

In a module of its own, because Serve gives every process a copy of the router's module.
"""

names: tuple[str, ...] = ()
