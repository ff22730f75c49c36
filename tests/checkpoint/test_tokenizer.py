"""A tokenizer that could make a short text fill the memory is refused, at export and on opening."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE, WordLevel

from tests.support.bundles import Bundles
from trio_deploy import Bundle, TrioError
from trio_deploy.checkpoint.processor_files import checkpoint_assets
from trio_deploy.checkpoint.resolve import from_folder
from trio_deploy.checkpoint.tokenizer import load_tokenizer
from trio_deploy.families.registry import parse_config
from trio_deploy.pipeline.prepare import RequestPreparer

REPLACE = normalizers.Replace
NORMALIZERS = {
    "many": normalizers.Sequence([REPLACE("a", "aaaaaaaa")] * 9),
    "nested": normalizers.Sequence([normalizers.Sequence([REPLACE("a", "aaaaaaaaaa")] * 2)] * 4),
    "long": REPLACE("a", "a" * 100),
    "of nothing": REPLACE("", "b" * 100),
    "of an expression": normalizers.Sequence([normalizers.Replace("", "bbb")] * 4),
    "in front": normalizers.Prepend("b" * 100),
    "of bytes": normalizers.Sequence([normalizers.ByteLevel()] * 8),
    "of signs": normalizers.Sequence([normalizers.BertNormalizer()] * 8),
}


def word_level(**vocabulary: int) -> Tokenizer:
    return Tokenizer(WordLevel({"<unk>": 0, "a": 1, **vocabulary}, unk_token="<unk>"))


def refusal(tokenizer: Tokenizer, file: Path) -> str:
    tokenizer.save(str(file))
    with pytest.raises(TrioError, match=": export again$") as refused:
        load_tokenizer(file, "export again")
    return str(refused.value)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_a_normalizer_that_multiplies_text_is_refused(name: str, tmp_path: Path) -> None:
    tokenizer = word_level()
    tokenizer.normalizer = NORMALIZERS[name]
    assert "normalizer that makes a text more than 64 times" in refusal(tokenizer, tmp_path / "t")


def test_a_decoder_that_multiplies_text_is_refused(tmp_path: Path) -> None:
    tokenizer = word_level()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("a", "aaaa")] * 4)
    assert "decoder that makes a text more than 64 times" in refusal(tokenizer, tmp_path / "t")


def test_long_tokens_and_many_added_ones_are_refused(tmp_path: Path) -> None:
    assert "token of more than" in refusal(word_level(**{"b" * 5000: 2}), tmp_path / "t")
    affixed = Tokenizer(BPE({"a": 0}, [], end_of_word_suffix="b" * 5000))
    assert "token of more than" in refusal(affixed, tmp_path / "t")
    repeating = word_level()
    repeating.post_processor = processors.TemplateProcessing(
        single=" ".join(["$A"] * 300), pair="$A $B", special_tokens=[]
    )
    assert "post-processor" in refusal(repeating, tmp_path / "t")


def test_what_known_tokenizers_have_is_taken(tmp_path: Path) -> None:
    tokenizer = word_level()
    for normalizer in (
        normalizers.Sequence([normalizers.Prepend("▁"), REPLACE(" ", "▁")]),  # Llama
        normalizers.Sequence([normalizers.NFC(), REPLACE("  ", " "), normalizers.Lowercase()]),
        normalizers.BertNormalizer(),
        normalizers.Sequence([REPLACE("``", '"'), normalizers.NFKD(), normalizers.StripAccents()]),
    ):
        tokenizer.normalizer = normalizer
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        tokenizer.save(str(tmp_path / "t"))
        assert load_tokenizer(tmp_path / "t", "").get_vocab_size() == 2


def test_it_is_refused_at_export_and_on_opening(
    llava_checkpoint: Path, bundles: Bundles, tmp_path: Path
) -> None:
    small = shutil.ignore_patterns("*.safetensors")
    checkpoint = Path(shutil.copytree(llava_checkpoint, tmp_path / "c", ignore=small))
    multiply(checkpoint / "tokenizer.json")
    raw = from_folder(checkpoint).raw_config
    with pytest.raises(TrioError, match="normalizer that makes a text more"):
        checkpoint_assets(checkpoint, parse_config(raw), raw, preprocessing=None, chat_template="")
    folder = Path(shutil.copytree(bundles.path("tiny"), tmp_path / "bundle"))
    size = multiply(folder / "tokenizer.json")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["tokenizer.json"]["size"] = size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(TrioError, match="normalizer that makes a text more"):
        RequestPreparer(Bundle.load(folder))


def multiply(file: Path) -> int:
    """Give a tokenizer a normalizer that multiplies; returns the file's size."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.normalizer = NORMALIZERS["many"]
    tokenizer.save(str(file))
    return file.stat().st_size
