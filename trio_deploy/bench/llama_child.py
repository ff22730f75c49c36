"""Answer with llama.cpp, once per line read: the number that seeds a prompt of random tokens.

A program for another Python environment, which has xllamacpp and gguf, so it imports nothing of
this package; `contenders/llama_cpp.py` starts it. The weights are written first, unless they are
there.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_STD = 0.02
_PARALLEL = 1
_FIRST = 259  # below are special tokens and bytes
_START_S = 300


def main() -> None:
    options = json.loads(sys.argv[1])
    file = Path(options["file"])
    if not file.is_file():
        write(file, options["weights"], options["sizes"])
    opened = native if options["server"] else bound
    with opened(options) as (complete, peak, version):
        for line in sys.stdin:
            draw = random.Random(int(line))
            count, vocabulary = options["prompt_tokens"], options["sizes"]["vocab_size"]
            prompt = [draw.randrange(_FIRST, vocabulary) for _ in range(count)]
            start = time.perf_counter()
            answer = complete(
                {
                    "prompt": prompt,
                    "n_predict": options["new_tokens"],
                    "ignore_eos": True,
                    "cache_prompt": False,
                    "temperature": 0,
                    "samplers": [],
                }
            )
            wall = time.perf_counter() - start
            times = answer["timings"]
            # Tokens per second count the first token too, which comes with the prompt.
            after = times["predicted_n"] - 1
            reply = {
                "prompt_s": times["prompt_ms"] / 1000,
                "tokens_per_s": 1000 * after / times["predicted_ms"] if after else 0.0,
                "wall_s": wall,
                "prompt_tokens": times["prompt_n"],
                "new_tokens": times["predicted_n"],
                "peak_mib": peak(),
                "version": version,
            }
            print(json.dumps(reply), flush=True)


def write(file: Path, weights: str, sizes: dict[str, Any]) -> None:
    """Write a GGUF of a Llama with random weights; its head is in 8 bit whatever the others are."""
    import gguf
    import numpy as np

    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(unfinished), "llama")
    writer.add_context_length(sizes["max_positions"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["num_layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_heads"])
    writer.add_head_count_kv(sizes["num_kv_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_rope_freq_base(sizes["rope_theta"])
    writer.add_layer_norm_rms_eps(sizes["rms_norm_eps"])
    writer.add_vocab_size(sizes["vocab_size"])
    writer.add_file_type(getattr(gguf.LlamaFileType, f"MOSTLY_{weights}"))
    _add_tokenizer(writer, gguf, sizes["vocab_size"])
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int, kind: str = weights) -> None:
        values = rng.standard_normal((rows, columns), np.float32) * np.float32(_STD)
        coded = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, coded), raw_dtype=coded)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(sizes["hidden_size"], np.float32))

    width, mlp = sizes["hidden_size"], sizes["intermediate_size"]
    heads, kv_heads = (sizes[key] * sizes["head_dim"] for key in ("num_heads", "num_kv_heads"))
    matrix("token_embd", sizes["vocab_size"], width)
    for layer in range(sizes["num_layers"]):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        for name, rows, columns in (
            ("attn_q", heads, width),
            ("attn_k", kv_heads, width),
            ("attn_v", kv_heads, width),
            ("attn_output", width, heads),
            ("ffn_gate", mlp, width),
            ("ffn_up", mlp, width),
            ("ffn_down", width, mlp),
        ):
            matrix(f"{block}.{name}", rows, columns)
    norm("output_norm")
    matrix("output", sizes["vocab_size"], width, "Q8_0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(file)


def _add_tokenizer(writer: Any, gguf: Any, count: int) -> None:
    """As many tokens as the head has rows: special ones, bytes, and names for the rest."""
    kinds = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
    more = count - len(tokens)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *(f"\u2581t{number}" for number in range(more))])
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([*types, *[kinds.NORMAL] * more])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(False)


_Opened = Iterator[tuple[Callable[[dict[str, Any]], dict[str, Any]], Callable[[], Any], str]]


@contextlib.contextmanager
def bound(options: dict[str, Any]) -> _Opened:
    """The build inside the wheel xllamacpp, in this process."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = options["file"]
    params.n_ctx, params.n_parallel = options["context"], _PARALLEL
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    kinds = llama.llama_flash_attn_type
    flash = "ENABLED" if options["flash"] else "DISABLED"
    params.flash_attn_type = getattr(kinds, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    params.cache_ram_mib, params.port = 0, _free_port()
    server = llama.Server(params)
    yield _posting(server.listening_address), lambda: _peak_mib("self"), llama.__version__


@contextlib.contextmanager
def native(options: dict[str, Any]) -> _Opened:
    """A llama-server of another build, in a process of its own."""
    port = _free_port()
    given = {
        "model": options["file"],
        "ctx-size": options["context"],
        "threads": options["threads"],
        "threads-batch": options["threads"],
        "flash-attn": "on" if options["flash"] else "off",
        "parallel": _PARALLEL,
        "cache-ram": 0,
        "host": "127.0.0.1",
        "port": port,
    }
    process = subprocess.Popen(
        [options["server"], *(text for name in given for text in (f"--{name}", str(given[name])))],
        stdout=subprocess.DEVNULL,  # this program's own holds its answers
    )
    address = f"http://127.0.0.1:{port}"
    told = subprocess.run([options["server"], "--version"], capture_output=True, text=True)
    version = next((line for line in told.stderr.splitlines() if "version" in line), "")
    try:
        _wait(address, process)
        yield _posting(address), lambda: _peak_mib(process.pid), version
    finally:
        process.terminate()
        process.wait()


def _wait(address: str, process: subprocess.Popen[bytes]) -> None:
    """Until the server has loaded the model."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health"):
            return
        time.sleep(0.1)
    raise RuntimeError("llama-server did not start")


def _posting(address: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def complete(body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request) as reply:
                return dict(json.load(reply))
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")) from None

    return complete


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _peak_mib(process: object) -> float | None:
    """Peak resident memory, VmHWM of /proc/<process>/status; None on other systems."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    main()
