"""Counts and durations of a service, in the text format of Prometheus."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the durations that are counted together."""


class Metrics:
    """Metrics of one service, in a registry of their own.

    Attributes:
        requests: Finished requests by endpoint and status.
        request_seconds: Time from the beginning of a request to the end of its answer, by endpoint.
        audio_seconds: Seconds of recordings that were answered, by endpoint.
        batch_requests: Number of requests whose recordings were computed together.
        batch_seconds: Time in which a batch was computed.
        open_requests: Requests that are received, wait or are computed.
        waiting_seconds: Seconds of the recordings that wait or are computed.
        streams: Streams that are open.
        stream_seconds: Seconds of audio that streams received, by output.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("hubert_requests", "Finished requests.", ["endpoint", "status"], registry=registry)
        self.request_seconds = Histogram(
            "hubert_request_seconds",
            "Time from the beginning of a request to the end of its answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.audio_seconds = Counter(
            "hubert_audio_seconds", "Seconds of recordings that were answered.", ["endpoint"], registry=registry
        )
        self.batch_requests = Histogram(
            "hubert_batch_requests",
            "Number of requests whose recordings were computed together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "hubert_batch_compute_seconds", "Time in which a batch was computed.", buckets=SECONDS, registry=registry
        )
        self.open_requests = Gauge(
            "hubert_open_requests", "Requests that are received, wait or are computed.", registry=registry
        )
        self.waiting_seconds = Gauge(
            "hubert_waiting_audio_seconds",
            "Seconds of the recordings that wait or are computed.",
            registry=registry,
        )
        self.streams = Gauge("hubert_streams", "Streams that are open.", registry=registry)
        self.stream_seconds = Counter(
            "hubert_stream_audio_seconds", "Seconds of audio that streams received.", ["output"], registry=registry
        )

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
