"""Runs commands on damaged input of every kind and prints the time and memory that each took.

    python scripts/damaged_input.py [--only WORD]

Each runs in a child with limits on memory and processor time. It fails, and so does the script,
unless it ends with one error (or works, where the input can be read after all) within the limits.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.checkpoints import make_llava
from tests.support.limited import Completed, run_limited
from tests.support.pictures import make_picture
from trio_deploy import export_model

NESTED = "[" * 100_000 + "]" * 100_000
DIGITS = "1" * 5_000
HUGE = "9" * 30
LAUGHS = "\n".join(
    ["a0: &a0 [1, 1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]
)
MERGED = "a0: &a0 {k0: 1}\n" + "\n".join(
    f"a{i}: &a{i} {{k{i}: 1, <<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 12)
)


@dataclass(frozen=True)
class Case:
    """A damaged input: the words of its row, and the command that meets it."""

    kind: str
    damage: str
    command: list[Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="kinds of input that contain this word")
    args = parser.parse_args()
    print("| input | damage | s of processor time | peak MiB | ends with |\n|---|---|---|---|---|")
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        for case in cases(Path(name)):
            if args.only not in case.kind:
                continue
            done = run_limited(*case.command)
            words, fine = verdict(done)
            failed += not fine
            time, peak = ("–" if x is None else f"{x:.1f}" for x in (done.cpu_s, done.peak_mib))
            print(f"| {case.kind} | {case.damage} | {time} | {peak} | {words} |", flush=True)
    return 1 if failed else 0


def verdict(done: Completed) -> tuple[str, bool]:
    """How a command ended, in words, and whether it may end so."""
    if done.rc == 0:
        return "works", True
    try:
        message = done.one_error()
    except AssertionError:
        last = (done.err.strip().splitlines() or [""])[-1]
        return f"**status {done.rc}: {last[:120]}**", False
    return message.replace("|", "/")[:160], True


def cases(folder: Path) -> Iterator[Case]:
    """Every kind of input with each of its damages; the files are made in `folder`."""
    checkpoint = make_llava(folder / "checkpoint")
    bundle = export_model("tiny", folder / "bundle", progress=False).path
    picture = folder / "picture.png"
    make_picture().save(picture)
    yield from _checkpoints(folder, checkpoint)
    yield from _bundles(folder, bundle, picture)
    yield from _small_files(folder, bundle)
    yield from _pictures(folder, bundle)


def _copy(folder: Path, source: Path) -> Path:
    target = Path(tempfile.mkdtemp(dir=folder)) / source.name
    shutil.copytree(source, target, copy_function=os.link)
    return target


def _changed(folder: Path, source: Path, name: str, content: bytes | None) -> Path:
    """A copy with one file replaced; None: by a link to itself."""
    copy = _copy(folder, source)
    (copy / name).unlink(missing_ok=True)
    if content is None:
        (copy / name).symlink_to(name)
    else:
        (copy / name).write_bytes(content)
    return copy


def _texts(file: Path) -> dict[str, bytes | None]:
    """Damages that any JSON file may have."""
    return {
        "nested 100,000 deep": NESTED.encode(),
        "a number of 5,000 digits": f'{{"a": {DIGITS}}}'.encode(),
        "cut in the middle": file.read_bytes()[: file.stat().st_size // 2],
        "no Unicode": b'{"a": "\xff\xfe"}',
        "half a surrogate pair": b'{"a": "\\ud800"}',
        "a list": b"[]",
        "70 MB of blanks": b" " * 70_000_000,
        "20 million lists": b"[" + b"[]," * 20_000_000 + b"[]]",
        "a link to itself": None,
    }


def _checkpoints(folder: Path, checkpoint: Path) -> Iterator[Case]:
    def export(source: Path) -> list[Any]:
        return ["export", "--model", source, "--out", folder / "out", "--budget", "0.5", "--force"]

    for name in ("config.json", "processor_config.json", "tokenizer.json"):
        for damage, content in _texts(checkpoint / name).items():
            yield Case(name, damage, export(_changed(folder, checkpoint, name, content)))
    raw = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for key, value in {
        "num_hidden_layers": 10**9,
        "hidden_size": 10**12,
        "vocab_size": -1,
        "rms_norm_eps": "x",
        "rope_theta": float("nan"),
    }.items():
        text = json.dumps({**raw, "text_config": {**raw["text_config"], key: value}})
        copy = _changed(folder, checkpoint, "config.json", text.encode())
        yield Case("config.json", f"{key} {value}", export(copy))
    whole = (checkpoint / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")

    def with_entry(**changes: Any) -> bytes:
        text = json.dumps({**header, first: {**header[first], **changes}}).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :]

    for damage, content in {
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + whole[8:],
        "a header longer than the file": struct.pack("<Q", len(whole)) + whole[8:],
        "a header nested 100,000 deep": struct.pack("<Q", 200_000) + NESTED.encode(),
        "a shape of 10^18 x 10^18": with_entry(shape=[10**18, 10**18]),
        "a shape of 100,000 sizes": with_entry(shape=[2**62] * 100_000),
        "negative offsets": with_entry(data_offsets=[-4, 0]),
        "overlapping tensors": with_entry(data_offsets=[0, 2**20]),
        "cut in the middle": whole[: len(whole) // 2],
    }.items():
        copy = _changed(folder, checkpoint, "model.safetensors", content)
        yield Case("model.safetensors", damage, export(copy))


def _bundles(folder: Path, bundle: Path, picture: Path) -> Iterator[Case]:
    def run(source: Path) -> list[Any]:
        return ["run", source, "--image", picture, "--prompt", "what color is the circle ?"]

    for name in ("manifest.json", "tokens.json", "preprocessor.json", "tokenizer.json"):
        for damage, content in _texts(bundle / name).items():
            source = _changed(folder, bundle, name, content)
            if name != "manifest.json" and content is not None:
                _resize(source, name)
            yield Case(f"{name} of a bundle", damage, run(source))
    raw = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    for key, value in {"files": [], "stages": {"a": 1}, "schedule": "x", "threshold": HUGE}.items():
        text = json.dumps({**raw, key: value}).encode()
        source = _changed(folder, bundle, "manifest.json", text)
        yield Case("manifest.json of a bundle", f"{key} {json.dumps(value)}", run(source))


def _resize(bundle: Path, name: str) -> None:
    """Enter the new size of a file into the manifest, so that its content is read."""
    file = bundle / "manifest.json"
    raw = json.loads(file.read_text(encoding="utf-8"))
    raw["files"][name] = {"size": (bundle / name).stat().st_size, "sha256": None}
    file.unlink()
    file.write_text(json.dumps(raw), encoding="utf-8")


def _small_files(folder: Path, bundle: Path) -> Iterator[Case]:
    commands: dict[str, Callable[[Path], list[Any]]] = {
        "recipe": lambda file: ["plan", "--model", file],
        "target": lambda file: ["plan", "--model", "tiny", "--target", file],
        "limits": lambda file: [
            "triton",
            bundle,
            "--out",
            folder / "models",
            "--force",
            "--settings",
            file,
        ],
    }
    damages = {
        "nested 100,000 deep": b"[" * 100_000,
        "aliases of aliases": LAUGHS.encode(),
        "merged aliases": MERGED.encode(),
        "a number of 5,000 digits": f"threshold: {DIGITS}".encode(),
        "a Python object": b"a: !!python/object/apply:os.system ['true']",
        "no Unicode": b"description: \xff\xfe",
        "200 kB": b"# " + b"x" * 200_000,
    }
    for kind, command in commands.items():
        for damage, content in damages.items():
            file = Path(tempfile.mkdtemp(dir=folder)) / f"{kind}.yaml"
            file.write_bytes(content)
            yield Case(kind, damage, command(file))
    for damage, content in {
        "nested 100,000 deep": b'{"question_id": 1, "text": ' + NESTED.encode() + b"}",
        "a number of 5,000 digits": f'{{"question_id": {DIGITS}, "text": "?"}}'.encode(),
        "half a surrogate pair": b'{"question_id": 1, "text": "\\ud800"}',
        "no Unicode": b'{"question_id": 1, "text": "\xff"}',
        "an object for the picture": b'{"question_id": 1, "text": "?", "image": {}}',
        "conversations of text": b'{"id": 1, "conversations": ["x"]}',
    }.items():
        file = Path(tempfile.mkdtemp(dir=folder)) / "questions.jsonl"
        file.write_bytes(content)
        out = folder / "eval"
        yield Case("question file", damage, ["eval", bundle, "--questions", file, "--out", out])


def _pictures(folder: Path, bundle: Path) -> Iterator[Case]:
    whole = (folder / "picture.png").read_bytes()
    header = whole[12:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + whole[24:29]
    wide = whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]
    for damage, content in {
        "cut in the middle": whole[: len(whole) // 2],
        "2^31 pixels wide": wide,
        "text": b"no picture",
        "empty": b"",
    }.items():
        file = Path(tempfile.mkdtemp(dir=folder)) / "picture.png"
        file.write_bytes(content)
        command = ["run", bundle, "--image", file, "--prompt", "what color is the circle ?"]
        yield Case("picture", damage, command)


if __name__ == "__main__":
    sys.exit(main())
