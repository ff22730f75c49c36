"""The manifests for KServe against KServe's own schema, of which kserve_schema.json is an extract.

scripts/kserve_schema.py made it.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from trio_deploy.cli.main import parser
from trio_deploy.pipeline.batcher.metrics import Metrics
from trio_deploy.serve import metrics
from trio_deploy.serve.limits import read_settings
from trio_deploy.serve.metrics import prometheus_text
from trio_deploy.serve.openai.gate import Doors
from trio_deploy.serve.openai.keys import API_KEY
from trio_deploy.serve.openai.settings import Settings

ROOT = Path(__file__).parents[3]
SCHEMA = json.loads((Path(__file__).parent / "kserve_schema.json").read_text())
KSERVE = ROOT / "deploy" / "kserve"
MANIFEST = yaml.safe_load((KSERVE / "inferenceservice.yaml").read_text())
SERVER, MONITOR = yaml.safe_load_all((KSERVE / "server.yaml").read_text())

SCALARS = {"str": str, "int": int, "bool": bool, "float": float}
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
# Kubernetes writes quantities ("16Gi") and ports as text or numbers.
LOOSE = {"object", "V1beta1MetricQuantity", "ResourceQuantity"}


def check(value: Any, kind: str, where: str = "") -> list[str]:
    """What is wrong with a value of the manifest, each with the place it is at."""
    if kind.startswith("list["):
        if not isinstance(value, list):
            return [f"{where} must be a list"]
        return [e for i, item in enumerate(value) for e in check(item, kind[5:-1], f"{where}[{i}]")]
    if kind.startswith(("dict(str, ", "dict[str, ")):
        if not isinstance(value, dict):
            return [f"{where} must be a mapping"]
        return [
            e for key, item in value.items() for e in check(item, kind[10:-1], f"{where}.{key}")
        ]
    if kind in SCALARS:
        right = type(value) is SCALARS[kind]
        return [] if right else [f"{where} must be {kind}, not {value!r}"]
    if kind in LOOSE:
        return [] if isinstance(value, str | int) else [f"{where} must be text or a number"]
    model = SCHEMA["types"].get(kind)
    if model is None:
        return [f"{where} is a {kind}, which the extract does not hold: run kserve_schema.py"]
    if not isinstance(value, dict):
        return [f"{where} must be a mapping"]
    errors = [f"{where}.{name} is missing" for name in model["required"] if name not in value]
    for name, inner in value.items():
        if name not in model["fields"]:
            errors.append(f"{where}.{name} is unknown to {kind}")
        else:
            errors += check(inner, model["fields"][name], f"{where}.{name}")
    return errors


@pytest.mark.parametrize("manifest", [MANIFEST, SERVER], ids=["triton", "server"])
def test_a_manifest_follows_kserves_schema(manifest):
    assert check(manifest, SCHEMA["start"]) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "predictor", "autoscaling"), {}, "autoscaling is unknown"),
        (("spec", "predictor", "maxReplicas"), "8", "maxReplicas must be int"),
        (("spec", "predictor", "model", "modelFormat"), None, "modelFormat must be a mapping"),
        (("spec", "predictor", "volumes"), {}, "volumes must be a list"),
    ],
)
def test_the_check_finds_mistakes(path, value, message):
    manifest = copy.deepcopy(MANIFEST)
    place = manifest
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    assert any(message in error for error in check(manifest, SCHEMA["start"]))


def test_a_missing_metric_is_found():
    manifest = copy.deepcopy(MANIFEST)
    del manifest["spec"]["predictor"]["autoScaling"]["metrics"][0]["external"]["metric"]
    assert any("metric is missing" in error for error in check(manifest, SCHEMA["start"]))


def queries() -> list[str]:
    metrics = MANIFEST["spec"]["predictor"]["autoScaling"]["metrics"]
    return [metric["external"]["metric"]["query"] for metric in metrics]


def test_it_scales_on_metrics_that_the_model_reports():
    for query in queries():
        names = set(re.findall(r"trio_\w+(?=\{)", query))
        assert len(names) >= 2 and names <= {
            name for family in metrics.FAMILIES for name, *_ in metrics.values(family, Metrics())
        }
    outcomes = set(re.findall(r'outcome=~"([\w|]+)"', queries()[1])[0].split("|"))
    assert outcomes == {"refused", "deadline"} and outcomes <= set(metrics.OUTCOMES)


def test_values_are_of_all_pods_since_keda_divides_them_by_their_number():
    assert all(query.startswith("count(trio_num_requests_running{") for query in queries())


def test_a_pod_may_take_longer_to_end_than_the_server_waits_for_its_requests():
    predictor = MANIFEST["spec"]["predictor"]
    arguments = dict(text.split("=", 1) for text in predictor["model"]["args"])
    waits = int(arguments["--exit-timeout-secs"])
    assert waits < predictor["terminationGracePeriodSeconds"]


def test_the_server_ends_in_time_in_spite_of_streams_that_stay_open_and_no_answer_is_cut():
    text = (ROOT / "deploy" / "kserve" / "inferenceservice.yaml").read_text()
    longest = int(re.findall(r"--set max_timeout_s=(\d+)", text)[0])
    arguments = dict(text.split("=", 1) for text in MANIFEST["spec"]["predictor"]["model"]["args"])
    age = int(arguments["--grpc-max-connection-age"]) / 1000 * 1.1  # gRPC adds up to a tenth
    grace = int(arguments["--grpc-max-connection-age-grace"]) / 1000
    assert grace > longest
    assert age + grace < int(arguments["--exit-timeout-secs"])


def container() -> dict[str, Any]:
    (found,) = SERVER["spec"]["predictor"]["containers"]
    return found


def test_the_plain_servers_command_and_limits_are_taken():
    command = container()["command"] + container()["args"]
    assert command[:2] == ["trio", "serve"]
    parsed = parser().parse_args(command[1:])
    settings = Settings.parse(read_settings(None, parsed.set))
    assert parsed.drain_s > settings.service.max_timeout_s
    grace = SERVER["spec"]["predictor"]["terminationGracePeriodSeconds"]
    assert grace > parsed.drain_s + parsed.drain_delay_s
    probe = container()["readinessProbe"]
    assert parsed.drain_delay_s > probe["periodSeconds"] * probe["failureThreshold"]
    ports = {container()[name]["httpGet"]["port"] for name in PROBES}
    assert ports == {parsed.port} == {container()["ports"][0]["containerPort"]}
    assert {container()[name]["httpGet"]["path"] for name in PROBES} == set(Doors().open) - {"/"}


def test_the_plain_server_scales_on_its_own_metrics_and_is_asked_with_its_key():
    (metric,) = SERVER["spec"]["predictor"]["autoScaling"]["metrics"]
    query = metric["external"]["metric"]["query"]
    names = set(re.findall(r"trio_\w+(?=\{)", query))
    assert len(names) == 2 and names <= set(re.findall(r"trio_\w+", prometheus_text(Metrics())))
    rows = Settings().service.batcher.max_rows
    assert int(metric["external"]["target"]["value"]) == rows
    (key,) = [env["valueFrom"] for env in container()["env"] if env["name"] == API_KEY]
    (endpoint,) = MONITOR["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"] == key["secretKeyRef"]
    assert endpoint["port"] == container()["ports"][0]["name"]
    pods = f"{SERVER['metadata']['name']}-predictor-"
    assert query.count(pods) == 2
