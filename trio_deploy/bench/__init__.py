"""`trio bench`: what a budget costs in time and memory, beside no pruning and other pipelines."""

from trio_deploy.bench.command import bench
from trio_deploy.bench.runner import Options, measure, sweep

__all__ = ["Options", "bench", "measure", "sweep"]
