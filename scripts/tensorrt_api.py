"""List the names in TensorRT's Python bindings, per version.

PyPI has the bindings of every version, but the libraries they load only of a few, and those are
large. Classes, methods and enumerations are defined by the bindings themselves: with empty
libraries from a C compiler in place of TensorRT's, the bindings load and their names can be read.
No TensorRT code runs here, and no GPU is needed.

    python scripts/tensorrt_api.py --bindings /tmp/bindings      # download and read again

writes tests/runtimes/tensorrt/tensorrt_api.json, with which the tests compare the adapter and the
simulated TensorRT. `TRIO_TENSORRT_BINDINGS=/tmp/bindings pytest
tests/runtimes/tensorrt/test_bindings.py` then also loads the adapter's own classes into each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

OUT = Path(__file__).parent.parent / "tests" / "runtimes" / "tensorrt" / "tensorrt_api.json"

#: The first and last version of each kind that the adapter distinguishes, and JetPack 6's two.
WHEELS = (
    "tensorrt_bindings==8.6.1",
    "tensorrt-cu12-bindings==10.0.1",
    "tensorrt-cu12-bindings==10.3.0",
    "tensorrt-cu12-bindings==10.15.1.29",
    "tensorrt-cu12-bindings==11.0.0.114",
    "tensorrt-cu12-bindings==11.4.0.106",
)
PLATFORMS = ("manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
CLASSES = (
    "Builder IBuilderConfig BuilderFlag NetworkDefinitionCreationFlag INetworkDefinition ILayer "
    "ITensor IOptimizationProfile IProgressMonitor ITimingCache MemoryPoolType OnnxParser "
    "ParserError PreviewFeature TacticSource LayerType DataType ILogger Runtime ICudaEngine "
    "IExecutionContext ExecutionContextAllocationStrategy TensorIOMode TensorLocation"
).split()
# Symbols that the bindings import from the libraries; those of version 8 have C++ names.
_STUBS = """
#define STUB(name) void *name(void) { return 0; }
STUB(createInferBuilder_INTERNAL) STUB(createInferRefitter_INTERNAL)
STUB(createInferRuntime_INTERNAL) STUB(createNvOnnxParser_INTERNAL)
STUB(createNvOnnxParserRefitter_INTERNAL) STUB(getBuilderPluginRegistry) STUB(getPluginRegistry)
STUB(getNvOnnxParserVersion) STUB(initLibNvInferPlugins) STUB(getInferLibVersion)
STUB(_ZN11nvuffparser15createUffParserEv) STUB(_ZN14nvcaffeparser117createCaffeParserEv)
STUB(_ZN14nvcaffeparser123shutdownProtobufLibraryEv)
STUB(_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi)
"""
_LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin", "libnvparsers")
_READ = """
import inspect, json, sys
import tensorrt_bindings as trt
names = {}
for kind in sys.argv[1:]:
    there = getattr(trt, kind, None)
    if inspect.isclass(there):
        names[kind] = [n for n in dir(there) if not n.startswith("_")]
print(json.dumps([trt.__version__, names]))
"""


def main() -> None:
    """Download the bindings, read their names and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bindings", type=Path, help="keep the bindings here, one folder each")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.bindings or Path(temporary)
        found = [read(download(wheel, folder)) for wheel in WHEELS]
    versions = [version for version, _ in found]
    classes = {
        kind: {
            name: "".join("x" if name in names.get(kind, ()) else "." for _, names in found)
            for name in sorted({n for _, names in found for n in names.get(kind, ())})
        }
        for kind in CLASSES
    }
    content = {"versions": versions, "classes": classes}
    args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out}: {len(CLASSES)} classes of {', '.join(versions)}")


def download(wheel: str, folder: Path) -> Path:
    """Unpack the bindings of one version, with empty libraries so that they load."""
    name, _, version = wheel.partition("==")
    place = folder / version
    if not place.is_dir():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        command += [
            "--only-binary=:all:",
            "--python-version",
            f"{sys.version_info.major}.{sys.version_info.minor}",
        ]
        for platform in PLATFORMS:
            command += ["--platform", platform]
        subprocess.run([*command, wheel], check=True)
        file = next(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))
        with zipfile.ZipFile(file) as archive:
            archive.extractall(place)
        file.unlink()
    major = version.split(".")[0]
    (place / "lib").mkdir(exist_ok=True)
    for library in _LIBRARIES:
        file = f"{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", f"-Wl,-soname,{file}"]
        out = ["-o", str(place / "lib" / file)]
        subprocess.run([*command, *out], input=_STUBS, text=True, check=True)
    return place


def environment(place: Path) -> dict[str, str]:
    """Environment in which `import tensorrt_bindings` finds what `download` unpacked."""
    return {**os.environ, "PYTHONPATH": str(place), "LD_LIBRARY_PATH": str(place / "lib")}


def read(place: Path) -> tuple[str, dict[str, list[str]]]:
    """Version and names of unpacked bindings."""
    command = [sys.executable, "-c", _READ, *CLASSES]
    out = subprocess.run(
        command, env=environment(place), capture_output=True, text=True, check=True
    )
    version, names = json.loads(out.stdout)
    return version, names


if __name__ == "__main__":
    main()
