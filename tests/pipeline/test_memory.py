"""Memory that runs out is one error, which names the stage and what takes less."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.bundles import Bundles
from tests.support.limited import limited_python
from trio_deploy import TrioError
from trio_deploy.errors import OutOfMemory
from trio_deploy.pipeline.batcher.events import Failed
from trio_deploy.pipeline.memory import memory_for
from trio_deploy.runtimes.failures import failure
from trio_deploy.runtimes.tensorrt.bindings import OutOfDeviceMemory

WORDS = [
    "std::bad_alloc",
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : bad allocation",
    "bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 9",
    "CUDA failure 2: out of memory ; GPU=0",
    "Check 'ptr' failed at src/cpu_memory.cpp:257:\nFailed to allocate 8 bytes of memory",
    "[CPU] Subgraph node with name 'MatMul_14146' can't alloc",
    "could not create a primitive: out_of_memory",
]


@pytest.mark.parametrize("words", WORDS)
def test_each_runtimes_own_words_for_it_are_known(words: str) -> None:
    assert isinstance(failure("it failed", RuntimeError(words)), OutOfMemory)
    says = "^out of memory in prefill_2: ask with a smaller budget"
    with pytest.raises(OutOfMemory, match=says), memory_for("prefill_2"):
        raise failure("it failed", RuntimeError(words))


def test_other_errors_stay_what_they_are() -> None:
    found = failure("it failed", RuntimeError("Incompatible shapes"))
    assert type(found) is TrioError and str(found) == "it failed: Incompatible shapes"
    with pytest.raises(KeyError), memory_for("prefill_2"):
        raise KeyError("x")


@pytest.mark.parametrize(
    ("stage", "helps"),
    [
        ("preprocess", "pass fewer or smaller pictures"),
        ("vision", "pass fewer pictures"),
        ("select_1", "ask with a smaller budget"),
        ("decode", "ask for fewer new tokens"),
        ("loading select_1", "--low-memory"),
    ],
)
def test_the_innermost_stage_is_named_with_what_helps_there(stage: str, helps: str) -> None:
    with pytest.raises(OutOfMemory) as caught, memory_for("decode"), memory_for(stage):
        raise MemoryError
    assert str(caught.value).startswith(f"out of memory in {stage}: ")
    assert helps in str(caught.value)
    device = "the GPU is out of memory: end other programs on it"
    with pytest.raises(OutOfDeviceMemory, match=f"^{device}$"), memory_for(stage):
        raise OutOfDeviceMemory(device)


def test_long_words_of_a_runtime_are_cut() -> None:
    with pytest.raises(OutOfMemory) as caught, memory_for("vision"):
        raise failure("it failed", RuntimeError("bad_alloc\n" * 1000))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


LIMITED = """
import json, resource, sys
from PIL import Image
from trio_deploy import Batcher, Pipeline, Request
from trio_deploy.errors import TrioError

_, most = resource.getrlimit(resource.RLIMIT_AS)

def allow(mib):  # more address space than now
    with open("/proc/self/status") as file:
        now = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmSize:"))
    resource.setrlimit(resource.RLIMIT_AS, (now + (mib << 20), most))

def message(action):
    try:
        action()
    except TrioError as error:
        return [type(error).__name__, str(error)]
    return ["none", ""]

options = json.loads(sys.argv[2])
pipeline = Pipeline.open(sys.argv[1], threads=1, **options)
small = Image.new("RGB", (64, 64), "red")
pipeline.generate(Request("what color is red ?", small, max_new_tokens=2))
Image.new("L", (9000, 9000)).save(sys.argv[3])
many = [Request("what color is red ? " * 8, small, max_new_tokens=200)] * 48
with Batcher(pipeline) as batcher:
    batcher.submit(many[0]).result()
    allow(40)
    picture = Request("what color is red ?", sys.argv[3], max_new_tokens=2)
    found = [message(lambda: pipeline.generate(picture))]
    found += [message(lambda: batcher.submit(picture).result())]
    allow(6)
    found += [message(lambda: pipeline.generate_batch(many))]
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    found += [message(lambda: batcher.submit(many[0]).result())]
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_process_with_too_little_memory_says_where_and_goes_on(
    bundles: Bundles, llava_checkpoint: Path, tmp_path: Path, runtime: str
) -> None:
    path = bundles.path(llava_checkpoint, schedule="1:0.4,2:0.2", dialect="primitive")
    done = limited_python(
        LIMITED, path, json.dumps({"runtime": runtime}), tmp_path / "large.png", memory_mib=1 << 20
    )
    assert done.rc == 0, done.err
    alone, queued, batch, afterwards = json.loads(done.out)
    helps = "out of memory in preprocess: pass fewer or smaller pictures, or fewer requests at once"
    assert alone == [OutOfMemory.__name__, helps] and queued == [Failed.__name__, helps]
    assert batch[0] == OutOfMemory.__name__
    assert batch[1].startswith("out of memory in ") and ": ask with a smaller budget" in batch[1]
    assert afterwards == ["none", ""]
