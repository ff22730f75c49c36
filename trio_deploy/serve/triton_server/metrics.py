"""A service's metrics on Triton's metrics endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trio_deploy.pipeline.batcher.metrics import Metrics
from trio_deploy.serve.metrics import FAMILIES, values

#: Without the gauge that is not 0 while nothing runs. The server keeps the metrics of an unloaded
#: model, so that it would have to be taken back as the model ends, and Triton 2.51 may abort when
#: metrics change at that point (measured: in 6 of 8 shutdowns).
_FAMILIES = [family for family in FAMILIES if family.name != "trio_vision_cache_bytes"]

#: Gauges last: each change is a message to the server, and whoever reads that nothing runs finds
#: what has ended counted.
_EXPORTED = sorted(_FAMILIES, key=lambda family: family.kind == "gauge")


class Exporter:
    """Keeps Triton's metrics at a service's values.

    Changes are added, to gauges too, so that several instances of one model sum up.
    """

    def __init__(self, utils: Any, labels: Mapping[str, str]) -> None:
        """Create the families; `utils` is `triton_python_backend_utils`.

        Raises:
            Exception: Triton's, if the server exports no metrics.
        """
        self._metrics: dict[tuple[str, str], Any] = {}
        self._values: dict[tuple[str, str], float] = {}
        self._families: dict[str, Any] = {}
        for family in _EXPORTED:
            # Triton 2.51 has no histograms: their sums and counts are counters.
            gauge = family.kind == "gauge"
            kind = utils.MetricFamily.GAUGE if gauge else utils.MetricFamily.COUNTER
            for name, label, _ in values(family, Metrics()):
                if name not in self._families:
                    self._families[name] = utils.MetricFamily(
                        name=name, description=family.description, kind=kind
                    )
                own = {**labels, family.label: label} if label else dict(labels)
                self._metrics[name, label] = self._families[name].Metric(labels=own)

    def update(self, metrics: Metrics) -> None:
        """Bring the families up to date."""
        for family in _EXPORTED:
            for name, label, value in values(family, metrics):
                change = value - self._values.get((name, label), 0.0)
                if change:
                    self._metrics[name, label].increment(change)
                    self._values[name, label] = value
