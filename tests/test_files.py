"""Files of users are read within bounds, and what is wrong with them is said."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from tests.support.limited import limited_python
from trio_deploy import TrioError
from trio_deploy.checkpoint.chat_template import MAX_SOURCE
from trio_deploy.checkpoint.safetensors import MAX_HEADER
from trio_deploy.checkpoint.tokenizer import MAX_TOKENIZER
from trio_deploy.evaluation.questions import MAX_QUESTIONS
from trio_deploy.families.pixels import MAX_PIXELS
from trio_deploy.files import (
    MAX_JSON,
    MAX_VALUES,
    MAX_YAML,
    format_bytes,
    read_json,
    read_text,
    read_yaml,
    safe_path,
    write_atomically,
    write_together,
)
from trio_deploy.pipeline.fetch import FetchLimits

READERS = {"json": read_json, "yaml": read_yaml}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ("[" * 65 + "]" * 65, "nest deeper than 64"),
        ("[" * 5_000 + "]" * 5_000, "nest"),
        ('{"a": [', ""),
        ("\xff\xfe", ""),
    ],
)
def test_what_cannot_be_trusted_is_refused(kind, text, reason, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(TrioError, match=rf"file is not valid .*{reason}.*: do this"):
        READERS[kind](file, "do this")


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json", "[NaN]", "0: nan is not a finite number"),
        ("json", '{"a": {"b": [1, -Infinity]}}', "a.b.1: -inf is not a finite number"),
        ("json", "[1e999]", "not a finite number"),
        ("yaml", "[.inf]", "not a finite number"),
        ("yaml", ".nan", "not a finite number"),
        ("yaml", ".nan: 1", "not a finite number"),
        ("json", f"[1{'0' * 5000}]", "a number has too many digits"),
        ("yaml", f"[1{'0' * 5000}]", "a number has too many digits"),
        ("json", f"[1{'0' * 40}]", "a number has more than 128 bits"),
        ("yaml", f"[0x{'f' * 5000}]", "a number has more than 128 bits"),
        ("yaml", "1" + ":1" * 5000, "a number has more than 128 bits"),
        ("json", r'["\ud800"]', r"'\\ud800' is no Unicode"),
        ("json", r'{"\udfff": 1}', "is no Unicode"),
        ("yaml", r'"\ud800"', "is no Unicode"),
        ("yaml", "2026-11-30", "is a date: write it in quotes"),
        ("yaml", "!!set {a, b}", "is a set: write it in quotes"),
        ("yaml", "!!binary aGk=", "is a bytes: write it in quotes"),
    ],
)
def test_values_that_other_code_may_stumble_over_are_refused(kind, text, reason, tmp_path):
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(TrioError, match=f"{reason}.*: do this") as refused:
        READERS[kind](file, "do this")
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("kind", READERS)
def test_what_tokenizers_say_of_their_length_is_read(kind, tmp_path):
    file = tmp_path / "file"
    file.write_text(f"[{10**30}, -3, 0.5, true, null, 'ä']".replace("'", '"'))
    assert READERS[kind](file, "do this") == [10**30, -3, 0.5, True, None, "ä"]


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(file, "") == read_yaml(file, "") == [1]
    assert read_text(file, "") == "[1]"


def test_text_that_is_not_utf_8_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(TrioError, match="file is not UTF-8 text .*position 3.*: do this"):
        read_text(file, "do this")


@pytest.mark.parametrize("kind", READERS)
def test_a_pipe_is_not_waited_for(kind, tmp_path):
    os.mkfifo(tmp_path / "file")
    with pytest.raises(TrioError, match="is a pipe and no file: do this"):
        READERS[kind](tmp_path / "file", "do this")


@pytest.mark.parametrize(
    ("kind", "limit"), [("json", "64 MiB"), ("yaml", "128 KiB"), ("text", "1 MiB")]
)
def test_a_large_file_is_not_read(kind, limit, tmp_path):
    file = tmp_path / "file"
    with file.open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(TrioError, match=f"file is larger than {limit}: do this"):
        {**READERS, "text": read_text}[kind](file, "do this")


def test_aliases_do_not_grow_without_bound(tmp_path):
    file = tmp_path / "file"
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    file.write_text("\n".join(lines))
    with pytest.raises(TrioError, match="more than"):
        read_yaml(file, "do this")
    lines = ["a0: &a0 {x: 1, y: 1}"]
    lines += [f"a{i}: &a{i} {{'<<': [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 9)]
    file.write_text("\n".join(lines).replace("'<<'", "<<"))
    with pytest.raises(TrioError, match="merges more than"):
        read_yaml(file, "do this")
    lines = ["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 100))]
    file.write_text("\n".join(lines))
    with pytest.raises(TrioError, match="nest deeper than 64"):
        read_yaml(file, "do this")
    file.write_text("a: &a [*a]")
    with pytest.raises(TrioError, match="nest"):
        read_yaml(file, "do this")


@pytest.mark.parametrize("kind", READERS)
def test_a_missing_file_is_for_the_caller_to_explain(kind, tmp_path):
    (tmp_path / "file").touch()
    for file in (tmp_path / "none", tmp_path / "file" / "none"):
        with pytest.raises(FileNotFoundError):
            READERS[kind](file, "do this")
    with pytest.raises(TrioError, match="cannot read"):
        READERS[kind](tmp_path, "do this")


def test_yaml_may_merge_and_override(tmp_path):
    file = tmp_path / "file"
    file.write_text("base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3\n")
    assert read_yaml(file, "do this")["other"] == {"a": 1, "b": 3}


# What fits the limits on bytes and still asks for much: nesting, and as many values as possible.
LAVISH = {
    "json": [
        '"[" * 100_000 + "]" * 100_000',
        '"[" * (64 << 20)',
        "'{\"a\":' * 100_000 + '1' + '}' * 100_000",
        '"[" + "1" * 5_000 + "]"',
        '"[" + "1" * (8 << 20) + "]"',
        '"[" + "[]," * (8 << 20) + "[]]"',
        '"[" + "{}," * 490_000 + "{}]"',
        '"[" + ",".join("\\"k%d\\"" % i for i in range(999_000)) + "]"',
        "'\"' + 'x' * (16 << 20)",
        "'{' + ','.join('\"k%d\": 1' % (i % 400_000) for i in range(499_000)) + '}'",
    ],
    "yaml": [
        '"[" * 30_000',
        '"[" + "{}," * 20_000 + "1]"',
        '"- " * 65_000',
        '"? " * 65_000',
        '"a: &a [" + "*a," * 20_000 + "1]"',
        '"a: &a {b: 1}\\nc: {<<: [" + "*a," * 20_000 + "*a]}"',
        '"1" + ":1" * 30_000',
        '"0x" + "f" * 130_000',
        "'\"' + '\\\\x41' * 30_000 + '\"'",
        '"&a " * 40_000',
        '"%YAML 1." + "1" * 5_000 + "\\n--- a"',
        '"".join("k%d: &a%d {<<: *a%d, x%d: 1}\\n" % (i, i, i and i - 1, i) for i in range(3400))',
    ],
}


@pytest.mark.parametrize("kind", LAVISH)
def test_no_file_within_the_limits_takes_much_time_or_memory(kind, tmp_path):
    program = f"""
import time
from pathlib import Path
from trio_deploy import TrioError
from trio_deploy.files import read_json, read_yaml
file = Path({str(tmp_path / "file")!r})
for text in {LAVISH[kind]!r}:
    file.write_text(eval(text))
    start = time.process_time()
    try:
        read_{kind}(file, "do this")
        what = "read"
    except TrioError as error:
        assert len(str(error)) < 700, len(str(error))
        what = str(error).partition("file is")[2]
    taken = time.process_time() - start
    print(f"{{taken:5.2f}}", text, what)
    assert taken < 6, text
"""
    done = limited_python(program, memory_mib=1500, cpu_s=60)
    assert done.rc == 0, done.out + done.err
    assert done.peak_mib < 512, done.out


# ---------------------------------------------------------------------------------- paths


def test_a_link_that_leads_to_itself_or_nowhere_is_named(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone").symlink_to("nothing")
    for name in ("loop", "gone"):
        with pytest.raises(TrioError, match=f"{name} .* is a symbolic link that leads to no file"):
            safe_path(tmp_path, name)


@pytest.mark.parametrize("name", ["x" * 256, "ä" * 200, "/".join(["x" * 200] * 20)])
def test_a_path_longer_than_paths_can_be_is_refused(name, tmp_path):
    with pytest.raises(TrioError, match=r"longer than a path can be") as refused:
        safe_path(tmp_path, name)
    assert len(str(refused.value)) < 400


# ---------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.*make room"),
        (OSError(errno.EIO, "Input/output error"), r"Input/output error\): write elsewhere"),
        (KeyboardInterrupt(), ""),
    ],
)
@pytest.mark.parametrize("at", [1, 2])
def test_files_are_all_replaced_or_none_and_the_one_that_fails_is_named(
    error, words, at, tmp_path, monkeypatch
):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    calls = []
    fsync = os.fsync

    def fail(descriptor):
        calls.append(descriptor)
        if len(calls) == at:
            raise error
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    kind = TrioError if isinstance(error, OSError) else KeyboardInterrupt
    name = [first, second][at - 1].name
    match = rf"cannot write .*/{name} of 3 B \({words}" if words else None
    with pytest.raises(kind, match=match):
        write_together({first: b"new", second: b"new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"first": "old"}
    monkeypatch.undo()
    write_together({first: b"new", second: b"new"})
    assert first.read_text() == second.read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_in_the_place_of_a_file_leaves_all_files_as_they_were(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")
    second.mkdir()
    with pytest.raises(TrioError, match=r"cannot write .*/second: it is a folder"):
        write_together({first: b"new", second: b"new"})
    assert first.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [first, second] and not list(second.iterdir())


def test_a_folder_that_is_not_there_or_in_the_way_is_named(tmp_path):
    with pytest.raises(TrioError, match=r"cannot write .*/none/file .*No such file"):
        write_atomically(tmp_path / "none" / "file", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TrioError, match=r"cannot write .*/folder: it is a folder"):
        write_atomically(tmp_path / "folder", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


# ---------------------------------------------------------------------------------- documents


def test_the_limits_in_security_md_are_those_of_the_code():
    text = (Path(__file__).parents[1] / "SECURITY.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))
    fetch = FetchLimits()
    assert rows["JSON file"].startswith(f"{format_bytes(MAX_JSON)}, {MAX_VALUES:,} values")
    assert rows["YAML file"].startswith(format_bytes(MAX_YAML))
    assert rows["chat template"] == f"{MAX_SOURCE:,} characters"
    assert rows["tokenizer.json"] == format_bytes(MAX_TOKENIZER)
    assert rows["header of a .safetensors file"].startswith(f"{MAX_HEADER / 1e6:.0f} MB")
    assert rows["question file, annotations"].startswith(format_bytes(MAX_QUESTIONS))
    assert rows["picture"] == f"{MAX_PIXELS:,} pixels"
    assert rows["picture at a URL"] == (
        f"{format_bytes(fetch.max_bytes)}, {fetch.timeout_s:.0f} s, {fetch.max_redirects} "
        f"redirects; {format_bytes(fetch.max_request_bytes)} and {fetch.max_request_s:.0f} s per "
        "request"
    )
