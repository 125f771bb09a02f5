"""What the engine counts, as metrics: read when a scrape asks for it."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from model.kv_cache import PAGE_SIZE, page_bytes
from pacore_sched.serve.metrics import PREFIX
from pacore_sched.serve.service import Service
from pacore_sched.sim.cost_model import StepWork


class EngineMetrics(Collector):
    """What a service and its engine count. `bandwidth` is the device's, in bytes/s, for the MBU."""

    def __init__(self, service: Service, bandwidth: float | None = None) -> None:
        self._service, self._labels = service, service.metrics.labels
        self._bandwidth = bandwidth
        self._hits = 0
        self._last = (0, 0.0)  # bytes read and seconds, at the last scrape
        self._mbu = 0.0

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        service, engine = self._service, self._service.engine
        scheduler, stats = engine.scheduler, engine.stats
        counts, tree = scheduler.counts, scheduler.tree
        cache, decoder = engine.executor.cache, service.model.config.decoder
        kv_token_bytes = page_bytes(decoder, cache.k.dtype) / PAGE_SIZE
        # A prompt is prefilled before its rollouts start, which then count as hits.
        self._hits = max(self._hits, counts.prefix_hits - counts.prefilled)
        yield self._gauge(
            "num_requests_running", "Requests on the engine.", len(service.jobs) - service.waiting
        )
        yield self._gauge("num_requests_waiting", "Requests not started.", service.waiting)
        yield self._gauge("num_rollouts_running", "Rollouts that decode.", len(scheduler.running))
        yield self._gauge(
            "kv_cache_usage_perc", "Share of KV pages in use.", 1 - tree.free_pages / tree.num_pages
        )
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens that rollouts needed.", counts.prefix_hits
        )
        yield self._counter(
            "prefix_cache_hits", "Those whose KV another rollout had written.", self._hits
        )
        yield self._counter(
            "prompt_tokens_prefilled", "Prompt tokens whose KV was computed.", counts.prefilled
        )
        yield self._counter(
            "prompt_tokens_found", "Prompt tokens whose KV was there.", counts.found
        )
        yield self._counter("num_preemptions", "Rollouts preempted.", counts.preemptions)
        yield self._counter("generation_tokens", "Tokens generated.", stats.generated)
        yield self._counter("engine_steps", "Steps of the decoder.", stats.steps)
        saved = (stats.kv_read_unshared - stats.kv_read) * kv_token_bytes
        yield self._counter(
            "shared_prefix_bytes_saved", "KV bytes that decoding did not read again.", saved
        )
        work = StepWork(decoder)
        weights = (work.layer_values + work.head_values) * service.model.dtype.itemsize
        read = int(stats.steps * weights + stats.kv_read * kv_token_bytes)
        yield self._counter("device_read_bytes", "Bytes of weights and KV read by steps.", read)
        seconds = engine.executor.stats.device_s
        yield self._counter("device_seconds", "Time in which the device computed steps.", seconds)
        if self._bandwidth:
            before, self._last = self._last, (read, seconds)
            if seconds > before[1]:
                self._mbu = (read - before[0]) / (seconds - before[1]) / self._bandwidth
            yield self._gauge(
                "mbu", "Achieved share of the device's bandwidth since the last scrape.", self._mbu
            )

    def _gauge(self, name: str, help: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(f"{PREFIX}:{name}", help, labels=tuple(self._labels))
        family.add_metric([*self._labels.values()], value)
        return family

    def _counter(self, name: str, help: str, value: float) -> CounterMetricFamily:
        family = CounterMetricFamily(f"{PREFIX}:{name}", help, labels=tuple(self._labels))
        family.add_metric([*self._labels.values()], value)
        return family
