"""Parameters of a model, from the strings of its config.pbtxt."""

from __future__ import annotations

import pytest

from trio_deploy import RuntimeOptions, TrioError
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.triton_server.settings import Settings, check_settings


def test_settings_are_read_from_strings() -> None:
    given = {"bundle": "1/bundle", "max_tokens": "64", "warm_up": "False", "budget": "0.2"}
    given |= {"threads": "2", "max_rows": "3"}
    parsed = Settings.parse(given | {"target": ""})
    assert parsed == Settings(
        "1/bundle",
        warm_up=False,
        options=RuntimeOptions(threads=2),
        limits=ServiceLimits(
            max_tokens=64, default_max_tokens=64, budget=0.2, batcher=BatcherLimits(max_rows=3)
        ),
    )
    assert check_settings(given) == given


@pytest.mark.parametrize("provider", ["cpu", "CUDA", "CUDAExecutionProvider"])
def test_providers_are_called_as_trio_run_calls_them(provider: str) -> None:
    given = {"bundle": "b", "runtime": "onnxruntime", "provider": provider}
    assert Settings.parse(given).options.provider == provider


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "'bundle' must name"),
        ({"bundle": "b", "max_image": "3"}, "unknown parameter 'max_image'"),
        ({"bundle": "b", "max_rows": "0"}, "max_rows must be 1 or more"),
        ({"bundle": "b", "max_rows": "1.5"}, "max_rows must be a whole number"),
        ({"bundle": "b", "prefillers": "-1"}, "prefillers must be 0 or more"),
        ({"bundle": "b", "budget": "nan"}, "a budget of nan is not possible"),
        ({"bundle": "b", "budget": "2"}, "a budget of 2 is not possible: .* did you mean 0.02"),
        ({"bundle": "b", "warm_up": "yes"}, "warm_up must be true or false"),
        ({"bundle": "b", "max_image_pixels": "999999999"}, "max_image_pixels must be at most"),
        ({"bundle": "b", "default_max_tokens": "2000"}, "default_max_tokens must be at most"),
        ({"bundle": "b", "max_queue_bytes": "0"}, "max_queue_bytes must be 1 or more"),
        ({"bundle": "b", "max_rows": "5000"}, "max_rows must be at most 4096, got 5000"),
        ({"bundle": "b", "max_queue": "1000000"}, "max_queue must be at most 65536"),
        ({"bundle": "b", "threads": "9999"}, "threads must be at most 1024"),
        ({"bundle": "b", "max_timeout_s": "1e9"}, "max_timeout_s must be at most 86400"),
        ({"bundle": "b", "provider": "gpu"}, "unknown provider 'gpu'.*: choose cpu, cuda"),
        ({"bundle": "b", "precision": "fp8"}, "unknown precision 'fp8'"),
        ({"bundle": "b", "runtime": "tensorflow"}, "unknown runtime 'tensorflow'"),
        (
            {"bundle": "b", "runtime": "tensorrt", "threads": "2"},
            "threads is no option of TensorRT",
        ),
    ],
)
def test_wrong_settings_are_named(parameters: dict[str, str], message: str) -> None:
    with pytest.raises(TrioError, match=message):
        Settings.parse(parameters)
