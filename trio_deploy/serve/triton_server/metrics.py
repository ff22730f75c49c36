"""A service's metrics on Triton's metrics endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trio_deploy.pipeline.batcher.metrics import Metrics
from trio_deploy.serve.metrics import COUNTERS, GAUGES, OUTCOMES, metric_values


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
        self._families = []
        for kind, families in (
            (utils.MetricFamily.COUNTER, COUNTERS),
            (utils.MetricFamily.GAUGE, GAUGES),
        ):
            for name, description in families.items():
                family = utils.MetricFamily(name=name, description=description, kind=kind)
                self._families.append(family)
                for outcome in OUTCOMES if name == "trio_requests_total" else ("",):
                    own = {**labels, "outcome": outcome} if outcome else dict(labels)
                    self._metrics[name, outcome] = family.Metric(labels=own)

    def update(self, metrics: Metrics) -> None:
        """Bring the families up to date."""
        for name, outcome, value in metric_values(metrics):
            change = value - self._values.get((name, outcome), 0.0)
            if change:
                self._metrics[name, outcome].increment(change)
                self._values[name, outcome] = value
