"""The small files of a bundle: tokenizer, chat template, image preprocessing, special tokens.

transformers' releases put the same facts into different files; a bundle has one form of each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from trio_deploy.checkpoint.chat_template import ChatTemplate
from trio_deploy.checkpoint.conversation import check_template
from trio_deploy.checkpoint.folder import has_file, image_settings, read_object, read_template
from trio_deploy.checkpoint.generation_config import GENERATION_CONFIG, read_sampling
from trio_deploy.checkpoint.resolve import Source, settings_of
from trio_deploy.checkpoint.tokenizer import load_tokenizer
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.bounds import WHOLE, whole
from trio_deploy.families.preprocessing import Preprocessor, with_max_pixels
from trio_deploy.files import brief, read_text, require_unicode, user_path

TOKENIZER = "tokenizer.json"
TOKENS = "tokens.json"
PREPROCESSOR = "preprocessor.json"
CHAT_TEMPLATE = "chat_template.jinja"
NO_TEMPLATE = "none"
"""What `--chat-template` says for a model that takes raw prompts alone."""

# Files that transformers makes a tokenizer.json of.
_SLOW_TOKENIZERS = ("tokenizer.model", "vocab.json", "spiece.model", "vocab.txt")
# What a template may write, where there is no tokenizer yet. A model's own have other texts, but
# what is said about a template does not depend on these.
_PLANNED_TOKENS = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "image_token": "<image>",
}
_MAX_IDS = 256  # tokens that end an answer


class GenerationInfo(msgspec.Struct, frozen=True):
    """Token ids that end or fill a sequence, and how tokens are chosen if a request says nothing.

    Attributes:
        sampling: options of `SamplingOptions` by name, from generation_config.json.
    """

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    sampling: dict[str, Any] = msgspec.field(default_factory=dict)


@dataclass(frozen=True)
class Assets:
    """Small files by name in the bundle, token ids and sampling options.

    Attributes:
        notes: what the export says about them, a sentence each.
    """

    files: dict[str, bytes]
    generation: GenerationInfo
    notes: tuple[str, ...] = ()


def planned_assets(found: Source, config: ModelConfig, max_pixels: int | None = None) -> Assets:
    """Small files of a bundle without weights: the recipe's preprocessing and template.

    Args:
        max_pixels: as of `settings_of`.
    """
    files: dict[str, bytes] = {}
    notes: list[str] = []
    own: Mapping[str, Any] | None = None
    if found.recipe is not None:
        template = found.recipe.chat_template
        if template:
            files[CHAT_TEMPLATE] = template.encode()
            notes = _template_notes(template, _PLANNED_TOKENS)
    elif found.folder is not None:
        own = image_settings(found.folder)
    if raw := settings_of(found, own, config, max_pixels):
        files[PREPROCESSOR] = _json_bytes(Preprocessor.from_json(raw, config).to_json())
    return Assets(files, _generation(found.raw_config, None, None), tuple(notes))


def checkpoint_assets(
    folder: Path,
    config: ModelConfig,
    raw_config: Mapping[str, Any],
    *,
    preprocessing: Mapping[str, Any] | None,
    chat_template: str | None,
    max_pixels: int | None = None,
    chosen_template: str | None = None,
) -> Assets:
    """Read all of a checkpoint folder but its weights, in the bundle's own form.

    Args:
        preprocessing, chat_template: a recipe's or an earlier bundle's, for a folder without.
        max_pixels: most pixels that a picture is resized to; None: as the settings say.
        chosen_template: what `read_chosen_template` gives; it counts before all others.

    Raises:
        TrioError: one of them is missing or damaged.
    """
    path = folder / TOKENIZER
    if not has_file(path):
        raise TrioError(f"{folder} has no tokenizer.json: {_tokenizer_advice(folder)}")
    files = {TOKENIZER: path.read_bytes()}
    raw = image_settings(folder) or preprocessing
    if not raw:
        raise TrioError(
            f"{folder} has neither preprocessor_config.json nor an image_processor in "
            "processor_config.json: copy one of them from the model's repository"
        )
    raw = with_max_pixels(raw, config, max_pixels)
    files[PREPROCESSOR] = _json_bytes(Preprocessor.from_json(raw, config).to_json())
    template = chosen_template
    if template is None:
        template = read_template(folder) or chat_template
    if template is None:
        raise TrioError(
            f"{folder} has no chat template (chat_template.jinja, or chat_template in "
            "tokenizer_config.json): pass --chat-template FILE with the one that the model was "
            "trained with, or --chat-template none for a base model, which takes raw prompts alone"
        )
    tokens, ids = _tokens(folder, config)
    notes = []
    if template:
        files[CHAT_TEMPLATE] = require_unicode(template, "the chat template").encode()
        notes = _template_notes(template, tokens)
    files[TOKENS] = _json_bytes(tokens)
    settings = read_object(folder / GENERATION_CONFIG)
    info = _generation(raw_config, settings, ids)
    place = GENERATION_CONFIG
    if settings is None:  # then transformers looks into config.json, as older checkpoints need it
        place, settings = "config.json", _settings_inside(raw_config)
    options, unsupported = read_sampling(settings, place)
    info = msgspec.structs.replace(info, sampling=options.to_json())
    notes += [
        f"{place} asks for {setting}, which is not supported and has no effect: "
        "answers differ from transformers'"
        for setting in unsupported
    ]
    return Assets(files, info, tuple(notes))


def _template_notes(template: str, tokens: Mapping[str, Any]) -> list[str]:
    """What the export says about a chat template.

    Raises:
        TrioError: it does not parse, or leaves out questions about pictures.
    """
    known = {key: token for key, token in tokens.items() if isinstance(token, str)}
    note = check_template(ChatTemplate(template, known), known["image_token"])
    return [note] if note else []


def _settings_inside(raw_config: Mapping[str, Any]) -> dict[str, Any]:
    """Generation settings of config.json: those at the top, else those of text_config."""
    text = raw_config.get("text_config")
    sections = (text if isinstance(text, Mapping) else {}, raw_config)
    return {
        key: value for section in sections for key, value in section.items() if value is not None
    }


def read_chosen_template(given: str | os.PathLike[str] | None) -> str | None:
    """The template that `--chat-template` names: its source; empty for `none`.

    None where the option is not given.

    Raises:
        TrioError: there is no such file, or nothing is in it.
    """
    if given is None or os.fspath(given) == NO_TEMPLATE:
        return given if given is None else ""
    file = user_path(given)
    remedy = "pass a jinja2 file as --chat-template"
    try:
        source = read_text(file, remedy)
    except FileNotFoundError:
        raise TrioError(f"there is no file {file}: {remedy}, or none") from None
    if not source.strip():
        raise TrioError(f"{file} is empty: {remedy}, or none")
    return source


def _tokenizer_advice(folder: Path) -> str:
    if not any(has_file(folder / name) for name in _SLOW_TOKENIZERS):
        return "copy it from the model's repository"
    return (
        'make one with python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def _tokens(folder: Path, config: ModelConfig) -> tuple[dict[str, Any], dict[str, int | None]]:
    """Special tokens as strings, and the ids of those that generation may need."""
    tokenizer = load_tokenizer(folder / TOKENIZER, "download it again")
    own = read_object(folder / "tokenizer_config.json") or {}
    shared = read_object(folder / "special_tokens_map.json") or {}
    tokens: dict[str, Any] = {}
    ids: dict[str, int | None] = {}
    for key in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = own.get(key) or shared.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and not isinstance(text, str):
            raise TrioError(f"tokenizer_config.json: {key} must be a text, not {brief(text)}")
        tokens[key] = text
        ids[key] = tokenizer.token_to_id(text) if text else None
    image = tokenizer.id_to_token(config.image_token_id)
    if image is None:
        raise TrioError(
            f"tokenizer.json in {folder} has no token {config.image_token_id}, which config.json "
            "calls the image token: the two files belong to different checkpoints"
        )
    tokens["image_token"] = image
    tokens["image_token_id"] = config.image_token_id
    return tokens, ids


def _generation(
    raw_config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    ids: Mapping[str, int | None] | None,
) -> GenerationInfo:
    """End, pad and start ids: generation_config.json, else config.json, else the tokenizer's.

    Raises:
        TrioError: an id is no whole number that a token can have; names the file and the key.
    """
    text = raw_config.get("text_config") or {}
    places = {
        GENERATION_CONFIG: generation or {},
        "config.json": raw_config,
        "config.json: text_config": text if isinstance(text, dict) else {},
    }

    def find(kind: str) -> list[int]:
        key = f"{kind}_id"
        for place, settings in places.items():
            if settings.get(key) is not None:
                return _token_ids(settings[key], f"{place}: {key}")
        known = (ids or {}).get(kind)
        return [] if known is None else [known]

    ends = tuple(find("eos_token"))
    pad, start = (next(iter(find(kind)), None) for kind in ("pad_token", "bos_token"))
    return GenerationInfo(ends, pad, start)


def _token_ids(value: Any, name: str) -> list[int]:
    """One id or a list of them; some configurations say -1 for none."""
    given = value if isinstance(value, list) else [value]
    if len(given) > _MAX_IDS:
        raise TrioError(f"{name} has {len(given)} entries: at most {_MAX_IDS} are supported")
    least, most = -1, WHOLE["vocab_size"][1]
    return [number for item in given if (number := whole(item, name, (least, most))) >= 0]
