"""The present figures as text, in one of the two formats that collectors read."""

from collections.abc import Iterable
from typing import Final

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ipc.messages import MetricsSnapshot
from workers.metrics.families import families

_OPENMETRICS: Final = "application/openmetrics-text"
# What is put in the place of an Accept header: the library believes whatever version one names.
_ASKS_FOR_OPENMETRICS: Final = f"{_OPENMETRICS}; version=1.0.0"
_ASKS_FOR_TEXT: Final = ""


class Page:
    """Made anew only when the figures have changed, however often it is asked for."""

    def __init__(self) -> None:
        self._collector: _Figures | None = None
        self._kept: dict[str, tuple[str, bytes]] = {}

    def use(self, snapshot: MetricsSnapshot) -> None:
        """Takes over new figures."""
        self._collector = _Figures(snapshot)
        self._kept.clear()

    def render(self, accept: str) -> tuple[str, bytes]:
        """Content type and body for an Accept header; only after figures are there.

        OpenMetrics 1.0.0 if that is among what is accepted, otherwise Prometheus's text format 0.0.4.
        """
        assert self._collector is not None
        wanted = _ASKS_FOR_OPENMETRICS if _OPENMETRICS in accept.lower() else _ASKS_FOR_TEXT
        if wanted not in self._kept:
            encode, content_type = choose_encoder(wanted)
            self._kept[wanted] = content_type, encode(self._collector)
        return self._kept[wanted]


class _Figures(Collector):
    def __init__(self, snapshot: MetricsSnapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterable[Metric]:
        return families(self._snapshot)
