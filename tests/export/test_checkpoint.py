"""Checkpoints that lie about their sizes: one error each, before anything is built."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.limited import limited_python, run_limited

#: Section, key, value, and what the error says where there are weights.
LIES = [
    ("text_config", "num_hidden_layers", 10**9, "num_hidden_layers"),
    ("text_config", "num_hidden_layers", 512, "the weights hold 4 of language_model"),
    ("vision_config", "num_hidden_layers", 10**9, "num_hidden_layers"),
    ("vision_config", "num_hidden_layers", 512, "the weights hold 3 of vision_tower.encoder"),
    ("text_config", "num_attention_heads", 10**9, "num_attention_heads"),
    ("text_config", "num_attention_heads", 4096, "q_proj.weight"),
    ("text_config", "num_key_value_heads", 10**9, "num_key_value_heads"),
    ("text_config", "head_dim", 4096, "q_proj.weight"),
    ("text_config", "vocab_size", 10**9, "vocab_size"),
    ("text_config", "vocab_size", 4_000_000, "embed_tokens.weight"),
    ("text_config", "hidden_size", 1 << 16, "weight"),
    ("text_config", "intermediate_size", 1 << 20, "weight"),
    ("vision_config", "intermediate_size", 1 << 20, "fc1.weight"),
    ("vision_config", "image_size", 10**9, "image_size"),
    ("vision_config", "image_size", 4096, "position_embedding.weight"),
    ("vision_config", "patch_size", 1, "weight"),
    ("text_config", "max_position_embeddings", 10**30, "max_position_embeddings"),
]

# Exports each folder, and prints what came of it.
_CHILD = """
import json, sys
from pathlib import Path
from trio_deploy import TrioError, export_model, plan
for folder in sorted(Path(sys.argv[1]).iterdir()):
    said = {}
    for name, options in (("export", {}), ("graphs", {"graphs_only": True})):
        try:
            export_model(folder, Path(sys.argv[2]) / "b", budget=0.5, progress=False, **options)
            said[name] = "exported"
        except TrioError as error:
            said[name] = str(error)
    try:
        plan(folder)
        said["plan"] = "planned"
    except TrioError as error:
        said["plan"] = str(error)
    print(json.dumps([folder.name, said]), flush=True)
"""


def test_sizes_that_the_headers_contradict_are_refused_at_once(llava_checkpoint, tmp_path):
    checkpoints = tmp_path / "c"
    for number, (part, key, value, _) in enumerate(LIES):
        folder = Path(shutil.copytree(llava_checkpoint, checkpoints / f"{number:02}"))
        raw = json.loads((folder / "config.json").read_text())
        raw[part][key] = value
        (folder / "config.json").write_text(json.dumps(raw))
    done = limited_python(_CHILD, checkpoints, tmp_path, cpu_s=40)
    assert done.rc == 0, (done.out[-300:], done.err[-2000:])
    said = dict(map(json.loads, done.out.splitlines()))
    for number, (_, key, value, words) in enumerate(LIES):
        answers = said[f"{number:02}"]
        assert words in answers["export"], (key, value, answers)
        assert words in answers["graphs"], (key, value, answers)
        assert len(answers["export"]) < 600
        if value >= 10**9 or "hold" in words:
            assert words in answers["plan"], (key, value, answers)


def test_without_weights_there_is_a_bound(llava_checkpoint, tmp_path):
    folder = tmp_path / "c"
    folder.mkdir()
    raw = json.loads((llava_checkpoint / "config.json").read_text())
    raw["text_config"]["num_hidden_layers"] = 10**9
    (folder / "config.json").write_text(json.dumps(raw))
    options = ["--graphs-only", "--budget", "0.5"]
    done = run_limited("export", "--model", folder, "--out", tmp_path / "b", *options)
    assert done.one_error() == (
        "config.json: text_config.num_hidden_layers must be a whole number from 1 to 512, not "
        "1000000000"
    )
    assert not (tmp_path / "b").exists()
