"""The metrics of all replicas as one text, each series with the label `replica`.

They are not summed: a new replica's series begin at 0 under its own name, so every counter only
rises, and a replica that has more to do than the others is seen. Prometheus sums them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


def merged(texts: Mapping[str, str]) -> bytes:
    """`texts` by replica, as Prometheus reads them."""
    families: dict[str, Metric] = {}
    for replica, text in texts.items():
        for family in text_string_to_metric_families(text):
            metric = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            for sample in family.samples:
                labels = {**sample.labels, "replica": replica}
                metric.samples.append(sample._replace(labels=labels))
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(families))
    return generate_latest(registry)


@dataclass(eq=False)
class _Families(Collector):
    families: Mapping[str, Metric]

    def collect(self) -> Iterator[Metric]:
        yield from self.families.values()
