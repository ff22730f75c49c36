"""Targets: the shipped ones are sound, wrong ones are named to the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from trio_deploy import TrioError
from trio_deploy.config.target import list_targets, target_folder
from trio_deploy.runtimes.registry import load_target, runtime_spec
from trio_deploy.runtimes.tensorrt.target import dialects_of_version

_TENSORRT = 'runtime: tensorrt\ntensorrt: "10.3"\ndtype: float16\n'
_RTX = 'runtime: tensorrt-rtx\ndtype: float16\ncompute_capabilities: ["8.6"]\n'


class TestTargets:
    def test_the_shipped_ones(self):
        assert {"cpu", "cpu-openvino"} <= set(list_targets())
        cpu, openvino = load_target("cpu"), load_target("cpu-openvino")
        assert (cpu.runtime, cpu.dialect, cpu.dtype) == ("onnxruntime", "ort", "float32")
        assert (openvino.runtime, openvino.dialect) == ("openvino", "primitive")
        assert openvino.precision == "float32"
        assert load_target("cpu-openvino-bf16").precision == "bfloat16"
        assert all(load_target(name).description for name in list_targets())
        cuda = load_target("cuda")
        assert (cuda.runtime, cuda.provider, cuda.dtype) == ("onnxruntime", "cuda", "float16")
        assert (cpu.provider, openvino.provider) == ("cpu", None)
        for name in list_targets():
            target = load_target(name)
            assert target.dtype in runtime_spec(target.runtime).dtypes

    def test_targets_with_tensorrt_say_what_they_are_built_for(self):
        names = {name for name in list_targets() if load_target(name).runtime == "tensorrt"}
        assert names == {
            "a100",
            "h200",
            "jetson-agx-orin-64gb",
            "jetson-orin-nano-8gb",
            "jetson-orin-nx-16gb",
            "jetson-thor",
            "l4",
            "rtx-4090",
        }
        for target in map(load_target, names):
            assert target.usable_gib and 0 < target.usable_gib < target.memory_gib
            assert target.dialect in dialects_of_version(target.tensorrt)
            assert target.compute_capability and target.decode_layout in ("shared", "separate")
            assert target.limits.typical_visual_tokens <= target.limits.max_visual_tokens
        orin = load_target("jetson-agx-orin-64gb")
        assert (orin.tensorrt, orin.dialect, orin.compute_capability) == (
            "10.3",
            "primitive",
            "8.7",
        )
        assert load_target("h200").dialect == "onnx"

    def test_targets_with_tensorrt_rtx_are_compiled_for_any_card_of_their_series(self):
        names = [name for name in list_targets() if load_target(name).runtime == "tensorrt-rtx"]
        found = {name: load_target(name) for name in names}
        assert {name: target.compute_capabilities for name, target in found.items()} == {
            "rtx": ("8.6", "8.9", "12.0"),
            "rtx-30": ("8.6",),
            "rtx-40": ("8.9",),
            "rtx-50": ("12.0",),
        }
        for target in found.values():
            assert (target.dialect, target.decode_layout) == ("onnx", "separate")
            assert (target.dtype, target.weights) == ("float16", "inputs")
            assert target.tensorrt is None and target.compute_capability is None
        assert found["rtx"].memory_gib == 12
        assert found["rtx-30"].limits == found["rtx-40"].limits == found["rtx-50"].limits

    @pytest.mark.parametrize(
        ("version", "dialects"),
        [
            ("8.6", ("primitive",)),
            ("8.6.1.post1", ("primitive",)),
            ("10.14.1", ("primitive",)),
            ("10.15", ("onnx", "primitive")),
            ("11.0", ("onnx", "primitive")),
        ],
    )
    def test_the_dialect_follows_from_the_version(self, version, dialects, tmp_path: Path):
        assert dialects_of_version(version) == dialects
        file = tmp_path / "board.yaml"
        file.write_text(f'runtime: tensorrt\ntensorrt: "{version}"\ndtype: float16\n')
        target = load_target(file)
        assert target.dialect == dialects[0]
        assert target.decode_layout == ("separate" if dialects[0] == "onnx" else "shared")

    def test_what_is_typical_is_never_more_than_what_is_allowed(self, tmp_path: Path):
        file = tmp_path / "board.yaml"
        limits = "limits: {max_text_tokens: 32, max_visual_tokens: 0}\n"
        file.write_text(f'runtime: tensorrt\ntensorrt: "10.3"\ndtype: float16\n{limits}')
        assert load_target(file).limits.typical_text_tokens == 32
        assert load_target(file).limits.typical_visual_tokens == 0

    def test_a_copy_is_loaded_from_its_path(self, tmp_path: Path):
        copy = tmp_path / "board.yaml"
        copy.write_text((target_folder() / "cpu.yaml").read_text())
        assert load_target(copy).name == "board"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("runtime: onnxruntime\ndialect: ort\n", "'dtype' is missing"),
            ("runtime: onnxrutime\ndtype: float32\n", "did you mean 'onnxruntime'"),
            (
                "runtime: openvino\ndialect: ort\ndtype: float32\n",
                "does not read the ort dialect.*primitive",
            ),
            ("runtime: openvino\ndtipe: float32\n", "unknown key 'dtipe'.*'dtype'"),
            ("runtime: openvino\ndialect: primitive\ndtype: int8\n", "'int8'"),
            (
                "runtime: onnxruntime\nprovider: cude\ndialect: ort\ndtype: float16\n",
                "provider cannot be 'cude'.*did you mean 'cuda'",
            ),
            (
                "runtime: openvino\nprovider: cuda\ndialect: primitive\ndtype: float32\n",
                "provider belongs to ONNX Runtime",
            ),
            (
                "runtime: openvino\ntensorrt: '10.3'\ndialect: primitive\ndtype: float32\n",
                "tensorrt belongs to TensorRT, not OpenVINO",
            ),
            ("runtime: tensorrt\ndtype: float16\n", "'tensorrt' must give a version in quotes"),
            (
                "runtime: tensorrt\ntensorrt: 10.3\ndtype: float16\n",
                "version in quotes.*not 10.3",
            ),
            ("runtime: tensorrt\ntensorrt: new\ndtype: float16\n", "'new' is no version"),
            (_TENSORRT.replace("10.3", "8.5"), "8.5 is too old: 8.6 is the oldest"),
            (_TENSORRT + "provider: cuda\n", "provider belongs to ONNX Runtime"),
            (_TENSORRT + "dialect: onnx\n", "10.3 does not read the onnx dialect.*10.15"),
            (
                _TENSORRT.replace("10.3", "10.15") + "decode_layout: shared\n",
                "onnx dialect decodes with an engine of its own",
            ),
            (_TENSORRT + "decode_layout: split\n", "decode_layout cannot be 'split'"),
            (
                _TENSORRT + "compute_capability: 8.7\n",
                "must be a version in quotes",
            ),
            (
                _TENSORRT + 'compute_capability: "7.5"\n',
                "7.5 cannot run selections: .* no float32 .*; choose a GPU of 8.0 or later",
            ),
            (_TENSORRT + "memory_gib: lots\n", "memory_gib must be a number"),
            (_TENSORRT + "memory_gib: 4\nreserved_gib: 4\n", "leaves nothing of 4 GiB"),
            (
                _TENSORRT + "workspace_gib: 0\n",
                "workspace_gib 0 leaves no scratch memory: leave it",
            ),
            (
                _RTX.replace("tensorrt-rtx", "tensorrt"),
                "belongs to TensorRT-RTX, not TensorRT:",
            ),
            (_RTX.replace('["8.6"]', "[]"), "'compute_capabilities' must list the GPUs"),
            (
                _RTX.replace('["8.6"]', "[8.6]"),
                r"must be a list of versions .*not \[8.6\]",
            ),
            (_RTX.replace('["8.6"]', '"8.6"'), "must be a list of versions in quotes.*not '8.6'"),
            (_RTX.replace("8.6", "7.5"), "7.5 cannot run selections: .* no float32 .* 8.0, 8.6"),
            (_RTX.replace("8.6", "8.7"), "not compile for compute capability '8.7'.*: tensorrt`"),
            (_RTX.replace("8.6", "9.0"), "not compile for compute capability '9.0'"),
            (_RTX.replace("8.6", "11.0"), "not compile for compute capability '11.0'"),
            (_RTX + 'tensorrt: "10.15"\n', "tensorrt belongs to TensorRT, not TensorRT-RTX"),
            (_RTX + 'compute_capability: "8.6"\n', "belongs to TensorRT, not TensorRT-RTX"),
            (_RTX + "dialect: ort\n", "does not read the ort dialect"),
            (_RTX + "decode_layout: shared\n", "onnx dialect decodes with an engine of its own"),
            (_RTX + "dialect: primitive\nweights: inputs\n", "cannot take their weights as inputs"),
            (_TENSORRT + "limits: 4\n", "`limits` is not a mapping"),
            (_TENSORRT + "limits: {max_bach: 4}\n", "'max_bach'.*did you mean 'max_batch'"),
            (_TENSORRT + "limits: {max_batch: 0}\n", "max_batch must be a positive"),
            (
                _TENSORRT + "limits: {max_budget: 2}\n",
                "max_budget: a budget of 2 is not possible: .* did you mean 0.02",
            ),
            (
                _TENSORRT + "limits: {max_batch: 2, typical_batch: 3}\n",
                "typical_batch 3 exceeds max_batch 2",
            ),
        ],
    )
    def test_wrong_ones_are_named(self, tmp_path: Path, text, says):
        file = tmp_path / "board.yaml"
        file.write_text(text)
        with pytest.raises(TrioError, match=says):
            load_target(file)

    def test_unknown_target(self):
        with pytest.raises(TrioError, match="target called 'gpu'.*cpu"):
            load_target("gpu")

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("jetson-agx-orin", "'jetson-agx-orin-64gb'"),
            ("agx_orin", "'jetson-agx-orin-64gb'"),
            ("Orin", "'jetson-agx-orin-64gb' or 'jetson-orin-nano-8gb' or 'jetson-orin-nx-16gb'"),
            ("4090", "'rtx-4090'"),
            ("jetson-thro", "'jetson-thor'"),
        ],
    )
    def test_a_part_of_a_targets_name_finds_it(self, name: str, meant: str):
        with pytest.raises(TrioError, match=rf"did you mean {meant}\?"):
            load_target(name)

    def test_scratch_memory_has_no_ceiling_unless_a_target_says_so(self, tmp_path: Path):
        file = tmp_path / "board.yaml"
        file.write_text(_TENSORRT)
        assert load_target(file).workspace_gib is None
        file.write_text(_TENSORRT + "workspace_gib: 1.5\n")
        assert load_target(file).workspace_gib == 1.5
