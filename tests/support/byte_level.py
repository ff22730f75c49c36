"""A LLaVA whose tokens have a form in bytes, as structured output needs: letters, digits, signs.

Its weights are random, so it would write nonsense; only a grammar makes it write anything else.
"""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.support.bundles import Bundles, made_once
from tests.support.checkpoints import IMAGE, SPECIAL, VOCAB_SIZE, make_llava


def byte_level_bundle(bundles: Bundles, run_folder: Path) -> Path:
    """Return the folder of a bundle with such a tokenizer."""
    return bundles.path(made_once(run_folder / "byte_level", _make), budget=0.5)


def _make(folder: Path) -> Path:
    make_llava(folder, max_positions=1024)
    _tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _tokenizer() -> Tokenizer:
    letters = [*string.ascii_lowercase, *string.digits, *'{}[]":,.-+\\_?E', "Ġ"]  # Ġ: a space
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    assert len(vocabulary) <= VOCAB_SIZE and vocabulary["<image>"] == IMAGE
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer
