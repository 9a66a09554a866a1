"""What the server does, for Prometheus: llama-server's names where the meaning is the same."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from edgelora.memory import memory_in_use
from edgelora.serve.counters import Stats
from edgelora.serve.server import Server

_MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Name, what it says, attribute of Stats. "llamacpp:..." are those of llama-server.
_COUNTERS = (
    ("llamacpp:prompt_tokens", "Prompt tokens computed", "prompt_tokens_total"),
    ("llamacpp:prompt_tokens_cached", "Prompt tokens taken from the cache", "cached_tokens_total"),
    ("llamacpp:prompt_seconds", "Seconds spent on prompts", "prompt_s"),
    ("llamacpp:tokens_predicted", "Tokens generated", "generated_tokens_total"),
    ("llamacpp:tokens_predicted_seconds", "Seconds spent on generating", "generated_s"),
    ("llamacpp:n_decode", "Calls of llama_decode", "decode_calls"),
    ("edgelora_decode_seconds", "Seconds in llama_decode", "decode_s_total"),
    ("edgelora_sample_seconds", "Seconds in llama.cpp's samplers", "sample_s_total"),
    ("edgelora_host_seconds", "Seconds of Python in the engine thread", "host_s_total"),
    ("edgelora_requests_rejected", "Requests refused by a full queue", "rejected_total"),
    ("edgelora_requests_cancelled", "Requests given up by their client", "cancelled_total"),
)
_GAUGES = (
    ("llamacpp:requests_processing", "Requests that are computed now", "running"),
    ("llamacpp:requests_deferred", "Requests that wait for a slot", "queued"),
    ("edgelora_slots", "Requests that can be computed at once", "n_slots"),
    ("edgelora_kv_cells_used", "KV cells that hold tokens", "cells_used"),
    ("edgelora_kv_cells", "KV cells in all", "cells_total"),
    ("edgelora_cached_sequences", "Finished requests whose KV cells are kept", "cached_sequences"),
)


def render(server: Server) -> tuple[bytes, str]:
    """The text of /metrics and its media type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Server(server))
    return generate_latest(registry), _MEDIA_TYPE


class _Server(Collector):
    """Reads the counters of a server at the moment of asking; before it is ready there are none
    but those of the process."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("edgelora_ready", "1 while the model can answer")
        ready.add_metric([], float(self._server.state == "ready"))
        yield ready
        rss = GaugeMetricFamily("edgelora_rss_anonymous_bytes", "Private memory of the process")
        rss.add_metric([], memory_in_use().size_bytes)
        yield rss
        if self._server.is_open:
            yield from _of_stats(self._server.scheduler.stats())
            yield from _of_models(self._server)


def _of_stats(stats: Stats) -> Iterator[Metric]:
    for name, text, key in _COUNTERS:
        counter = CounterMetricFamily(name, text)
        counter.add_metric([], getattr(stats, key))
        yield counter
    for name, text, key in _GAUGES:
        gauge = GaugeMetricFamily(name, text)
        gauge.add_metric([], getattr(stats, key))
        yield gauge
    ratio = GaugeMetricFamily("llamacpp:kv_cache_usage_ratio", "Share of KV cells in use")
    ratio.add_metric([], stats.cells_used / max(1, stats.cells_total))
    yield ratio
    ended = CounterMetricFamily(
        "edgelora_requests_ended", "Requests by their end", labels=["reason"]
    )
    for reason, n in sorted(stats.requests.items()):
        ended.add_metric([reason], n)
    yield ended


def _of_models(server: Server) -> Iterator[Metric]:
    asked = CounterMetricFamily("edgelora_requests_asked", "Requests by model", labels=["model"])
    for name, n in server.registry.counts().items():
        asked.add_metric([name], n)
    yield asked
    loaded = GaugeMetricFamily("edgelora_adapters_loaded", "Adapters in memory")
    names = [served.id for served in server.registry.adapters()]
    loaded.add_metric([], sum(map(server.registry.is_loaded, names)))
    yield loaded
