"""Files of users are read within bounds, and what is wrong with them is said."""

from __future__ import annotations

import pytest

from trio_deploy import TrioError, files
from trio_deploy.files import read_json, read_yaml

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
    ("kind", "text"), [("json", "[NaN]"), ("json", "[1e999]"), ("yaml", "[.inf]"), ("yaml", ".nan")]
)
def test_numbers_are_finite(kind, text, tmp_path):
    file = tmp_path / "file"
    file.write_text(text)
    with pytest.raises(TrioError, match="not a finite number"):
        READERS[kind](file, "do this")


@pytest.mark.parametrize("kind", READERS)
def test_a_large_file_is_not_read(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(files, f"MAX_{kind.upper()}", 8)
    file = tmp_path / "file"
    file.write_text("[1, 2, 3, 4]")
    with pytest.raises(TrioError, match="file is larger than 8 B: do this"):
        READERS[kind](file, "do this")


def test_aliases_do_not_grow_without_bound(tmp_path):
    file = tmp_path / "file"
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    file.write_text("\n".join(lines))
    with pytest.raises(TrioError, match="more than"):
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
