"""tokenizer.json of a checkpoint or a bundle."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trio_deploy.errors import TrioError
from trio_deploy.files import brief, read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENIZER = 1 << 27  # Gemma's, the longest in use, has 33 MB
_MAX_GROWTH = 64
_MAX_PIECES = 256
_MAX_TOKEN = 1 << 12  # characters; long runs of spaces have a few hundred


def load_tokenizer(file: Path, remedy: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
        remedy: what to do about a bad file, for messages.

    Raises:
        TrioError: there is none, it is too large, or it is no tokenizer.
    """
    from tokenizers import Tokenizer

    try:
        content = read_bytes(file, remedy, MAX_TOKENIZER)
    except FileNotFoundError:
        raise TrioError(f"there is no {file}: {remedy}") from None
    try:
        tokenizer = Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # Exception, or a panic of Rust, which derives from none
        raise TrioError(f"{file} is no tokenizer ({brief(str(error))}): {remedy}") from None
    if fault := _multiplier(tokenizer):
        raise TrioError(f"{file} {fault}: {remedy}")
    return tokenizer


def _multiplier(tokenizer: Tokenizer) -> str | None:
    """What of a tokenizer could make a short text use up the memory; None: nothing."""
    for name, part in (("normalizer", tokenizer.normalizer), ("decoder", tokenizer.decoder)):
        if part is not None and _growth(_json(part)) > _MAX_GROWTH:
            return f"has a {name} that makes a text more than {_MAX_GROWTH} times as long"
    pieces = _json(tokenizer.post_processor) if tokenizer.post_processor else {}
    if _pieces(pieces) > _MAX_PIECES:
        return f"has a post-processor that adds more than {_MAX_PIECES} tokens or texts"
    model = tokenizer.model
    affixes = ("continuing_subword_prefix", "end_of_word_suffix")
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    longest = max(longest, *(len(getattr(model, each, None) or "") for each in affixes))
    if longest > _MAX_TOKEN:
        return f"has a token of more than {_MAX_TOKEN} characters"
    return None


def _json(part: Any) -> Any:
    return json.loads(part.__getstate__())


def _growth(part: dict[str, Any]) -> float:
    """At most how many times as long a step, or a sequence of steps, makes a text.

    Left out is what Unicode's own forms may add, which applying them again does not.
    """
    kind = part["type"]
    if kind == "Sequence":
        steps = part.get("normalizers") or part.get("decoders") or []
        return math.prod(map(_growth, steps))
    if kind == "Replace":
        # An expression may match nothing at all, at every place.
        found = len(part["pattern"].get("String", ""))
        added = len(part["content"])
        return max(1.0, added / found) if found else 1.0 + added
    if kind == "Prepend":  # before every piece between special tokens, which has a character
        return 1.0 + len(part["prepend"])
    return {"ByteLevel": 4.0, "BertNormalizer": 3.0}.get(kind, 1.0)


def _pieces(part: dict[str, Any]) -> int:
    """Tokens and texts that a post-processor puts together."""
    if part.get("type") == "Sequence":
        return sum(map(_pieces, part["processors"]))
    ids = sum(len(token["ids"]) for token in (part.get("special_tokens") or {}).values())
    return ids + len(part.get("single") or ()) + len(part.get("pair") or ())
