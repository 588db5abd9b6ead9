"""Prometheus text (version 0.0.4) from plain numbers, by prometheus-client; nothing is registered anywhere."""

from collections.abc import Iterable, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from loadstone.hold.latencies import Latencies


class Exposition(Collector):
    """One answer to a scrape: families are added in the order they shall stand in."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._families: list[Metric] = []

    def counter(self, name: str, text: str, values: Mapping[str, float], label: str = "") -> None:
        """A counter, ``name`` without its ``_total``; without ``label`` the only key is the empty text."""
        family = CounterMetricFamily(self._prefix + name, text, labels=_labels(label))
        self._add(family, values, label)

    def gauge(self, name: str, text: str, values: Mapping[str, float], label: str = "") -> None:
        """As ``counter``; with nothing in ``values`` the family is left out."""
        self._add(GaugeMetricFamily(self._prefix + name, text, labels=_labels(label)), values, label)

    def histogram(self, name: str, text: str, latencies: Latencies) -> None:
        family = HistogramMetricFamily(self._prefix + name, text, labels=())
        family.add_metric((), buckets=latencies.buckets(), sum_value=latencies.sum_s)
        self._families.append(family)

    def _add(self, family: CounterMetricFamily | GaugeMetricFamily, values: Mapping[str, float], label: str) -> None:
        for key, value in values.items():
            family.add_metric((key,) if label else (), value)
        if values:
            self._families.append(family)

    def collect(self) -> Iterable[Metric]:
        return self._families

    def text(self) -> bytes:
        """What a scrape is answered."""
        return generate_latest(self)

    def __repr__(self) -> str:
        return f"<Exposition {len(self._families)} families>"


def _labels(label: str) -> tuple[str, ...]:
    return (label,) if label else ()
