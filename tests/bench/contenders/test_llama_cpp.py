"""llama.cpp as a baseline: what it is asked, which way counts, and what is written for it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_for
from trio_deploy import TrioError
from trio_deploy.bench.case import Case
from trio_deploy.bench.contenders import llama_cpp
from trio_deploy.bench.contenders.llama_cpp import LlamaCpp, unlike
from trio_deploy.bench.workload import Inputs, Workload
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.families.registry import parse_config

WORK = Workload(1, 56, 56, "what ?", 4)

#: Answers as llama.cpp does; `FLASH_MS` without flash attention takes longer or less.
SERVING = """
import http.server, json, os, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *a): pass
    def do_GET(self): self.reply({})
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        open(os.path.join(HERE, "asked.json"), "w").write(json.dumps(body))
        timings = {"prompt_n": len(body["prompt"]), "prompt_ms": 500.0 if FLASH else WITHOUT_MS,
                   "predicted_n": body["n_predict"], "predicted_ms": 100.0}
        self.reply({"timings": timings})
    def reply(self, value):
        content = json.dumps(value).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(content)))
        self.end_headers(); self.wfile.write(content)
def serve(port):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    return server
"""
WHEEL = """
import types
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = (types.SimpleNamespace() for _ in "abc")
llama_flash_attn_type = types.SimpleNamespace(
    LLAMA_FLASH_ATTN_TYPE_ENABLED=True, LLAMA_FLASH_ATTN_TYPE_DISABLED=False)
class Server:
    def __init__(self, params):
        global FLASH
        FLASH = params.flash_attn_type
        server = serve(params.port)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.listening_address = f"http://127.0.0.1:{params.port}"
__version__ = "fake"
"""
GGUF = """
import json, types, numpy
LlamaFileType = types.SimpleNamespace(MOSTLY_Q4_0=2, MOSTLY_Q8_0=7)
GGMLQuantizationType = {"Q4_0": "Q4_0", "Q8_0": "Q8_0"}
TokenType = types.SimpleNamespace(UNKNOWN=2, CONTROL=3, BYTE=6, NORMAL=1)
quants = types.SimpleNamespace(quantize=lambda values, kind: values)
class GGUFWriter:
    def __init__(self, path, arch): self.path, self.told = path, {"arch": arch, "tensors": {}}
    def add_tensor(self, name, values, raw_dtype=None):
        self.told["tensors"][name] = [list(values.shape), raw_dtype]
    def __getattr__(self, name):
        return lambda *a: self.told.update({name: a[0] if a and not isinstance(a[0], list) else
                                            len(a[0]) if a else None})
    def close(self): open(self.path, "w").write(json.dumps(self.told))
"""
START = "import sys, runpy; sys.path.insert(0, {folder!r}); sys.argv = sys.argv[2:]; "


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes an interpreter whose llama.cpp takes so long without flash attention."""

    def write(without_ms: float) -> str:
        serving = f"HERE, FLASH, WITHOUT_MS = {str(tmp_path)!r}, True, {without_ms}\n{SERVING}"
        (tmp_path / "xllamacpp.py").write_text(serving + WHEEL)
        (tmp_path / "gguf.py").write_text(GGUF)
        start = START.format(folder=str(tmp_path))
        run = "runpy.run_path(sys.argv[0], run_name='__main__')"
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}{run}" "$@"\n')
        script.chmod(0o755)
        server = tmp_path / "llama-server"
        server.write_text(
            f"#!{sys.executable}\n{serving}\nimport sys\nargs = sys.argv[1:]\n"
            "if args == ['--version']: sys.exit(print('version: 0 (fake)', file=sys.stderr))\n"
            "at = dict(zip(args[::2], args[1::2]))\n"
            "FLASH = at['--flash-attn'] == 'on'\n"
            "open(os.path.join(HERE, 'server.json'), 'w').write(json.dumps([os.getpid(), at]))\n"
            "serve(int(at['--port'])).serve_forever()\n"
        )
        server.chmod(0o755)
        monkeypatch.setattr(llama_cpp, "missing", lambda python: None)
        return str(script)

    return write


def case(bundle, python: str, tmp_path: Path, **more) -> Case:
    cache = str(tmp_path / "cache" / "model")
    return Case(
        "x", "llama.cpp", str(bundle.path), checkpoint=cache, python=python, weights="Q4_0", **more
    )


@pytest.mark.parametrize(
    ("without_ms", "way", "seconds"), [(900.0, "on", 0.5), (200.0, "off", 0.2)]
)
def test_flash_attention_is_on_or_off_whichever_is_faster(
    random_bundle, python, tmp_path, without_ms, way, seconds
):
    with LlamaCpp(case(random_bundle, python(without_ms), tmp_path), WORK) as contender:
        run = contender(3)
    assert run.first_token_s == run.prefill_s == seconds
    assert f"flash attention {way}" in run.remark
    assert f"(0.50 s with, {without_ms / 1000:.2f} s without" in run.remark
    assert run.tokens_per_s == pytest.approx(30), "the first of 4 tokens comes with the prompt"
    assert run.precision == "Q4_0" and run.peak_mib is not None


def test_a_prompt_has_as_many_tokens_as_the_bundles_and_is_new_each_time(
    random_bundle, python, tmp_path
):
    asked = []
    with LlamaCpp(case(random_bundle, python(900.0), tmp_path), WORK) as contender:
        for seed in (1, 2, 1):
            run = contender(seed)
            asked.append(json.loads((tmp_path / "asked.json").read_text()))
    ours, _ = Inputs(random_bundle).encode(WORK.messages(), WORK.pictures(0))
    assert run.prompt_tokens == ours.length == len(asked[0]["prompt"])
    assert asked[0]["prompt"] == asked[2]["prompt"] != asked[1]["prompt"]
    assert asked[0]["n_predict"] == 4 and asked[0]["ignore_eos"] and not asked[0]["cache_prompt"]
    assert max(asked[0]["prompt"]) < random_bundle.config.text.vocab_size


def test_its_weights_are_of_the_bundles_sizes_and_written_once(random_bundle, python, tmp_path):
    with LlamaCpp(case(random_bundle, python(900.0), tmp_path), WORK):
        pass
    (file,) = (tmp_path / "cache").iterdir()
    assert file.name == f"{random_bundle.manifest.model.name}-Q4_0.gguf"
    told, text = json.loads(file.read_text()), random_bundle.config.text
    d, m, v = text.hidden_size, text.intermediate_size, text.vocab_size
    tensors = told["tensors"]
    assert tensors["token_embd.weight"] == [[v, d], "Q4_0"]
    assert tensors["output.weight"] == [[v, d], "Q8_0"], "ours is in 8 bit too"
    assert tensors["blk.0.ffn_down.weight"] == [[d, m], "Q4_0"]
    assert tensors["blk.0.attn_k.weight"] == [[text.num_kv_heads * text.head_dim, d], "Q4_0"]
    assert tensors["output_norm.weight"] == [[d], None]
    assert len(tensors) == 9 * text.num_layers + 3
    assert told["add_token_list"] == told["add_token_types"] == v
    assert told["add_rope_freq_base"] == text.rope.theta
    written = file.stat().st_mtime_ns
    with LlamaCpp(case(random_bundle, python(900.0), tmp_path), WORK):
        assert file.stat().st_mtime_ns == written


def test_another_build_is_a_server_that_ends_with_the_contender(random_bundle, python, tmp_path):
    interpreter = python(900.0)
    native = case(random_bundle, interpreter, tmp_path, server=str(tmp_path / "llama-server"))
    with LlamaCpp(native, WORK) as contender:
        run = contender(0)
    assert run.first_token_s == 0.5 and "version: 0 (fake)" in run.remark
    number, options = json.loads((tmp_path / "server.json").read_text())
    assert options["--flash-attn"] == "off", "the last that was tried"
    wait_for(lambda: not Path(f"/proc/{number}").exists() or os.name != "posix")


def test_a_build_that_fails_is_one_sentence(random_bundle, python, tmp_path):
    interpreter = python(900.0)
    (tmp_path / "llama-server").write_text("#!/bin/sh\nexit 3\n")
    native = case(random_bundle, interpreter, tmp_path, server=str(tmp_path / "llama-server"))
    with pytest.raises(TrioError, match=r"llama.cpp failed \(RuntimeError: llama-server did not"):
        LlamaCpp(native, WORK)


def test_models_of_another_form_are_refused(random_bundle):
    assert unlike(random_bundle.config) is None
    for recipe in ("qwen2.5-vl-3b", "qwen3-vl-2b"):
        assert "Llama's form" in str(unlike(parse_config(load_recipe(recipe).architecture)))


def test_an_interpreter_without_it_is_named():
    assert "pip install xllamacpp gguf" in str(llama_cpp.missing("/nowhere/python"))
