"""What a service accepts: size and length of recordings, and how much waits or is computed at the same time."""

from dataclasses import dataclass

from hubert_lightning.errors import UserError, within


@dataclass(frozen=True)
class Limits:
    """Limits of a service, which bound its memory and its disk space.

    Args:
        max_upload: Megabytes of an upload.
        max_duration: Seconds of a recording.
        max_waiting: Seconds of all recordings that wait or are computed. Each second takes 64 kB of memory.
        max_requests: Number of requests that are received, wait or are computed.
        max_streams: Number of streams.
        patience: Seconds without a byte after which an upload or a stream is given up; for the head of a request, too.

    Raises:
        UserError: A limit is out of range, or a recording of `max_duration` would never be accepted.
    """

    max_upload: float = 100.0
    max_duration: float = 1800.0
    max_waiting: float = 3600.0
    max_requests: int = 128
    max_streams: int = 8
    patience: float = 30.0

    def __post_init__(self) -> None:
        within(0.001, 1e6, max_upload=self.max_upload)
        within(0.1, 1e6, max_duration=self.max_duration, max_waiting=self.max_waiting, patience=self.patience)
        within(1, 100_000, max_requests=self.max_requests)
        within(0, 10_000, max_streams=self.max_streams)
        if self.max_waiting < self.max_duration:
            raise UserError(
                f"max_waiting is {self.max_waiting:g} s and max_duration {self.max_duration:g} s, so the longest "
                "recordings would always be refused; make max_waiting at least as long"
            )

    @property
    def max_bytes(self) -> int:
        """Bytes of an upload."""
        return round(self.max_upload * 1e6)
