"""Turn messages and images into token ids, positions and the index that `embed` gathers by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from trio_deploy.checkpoint.chat_template import ChatTemplate, Message
from trio_deploy.checkpoint.conversation import (
    NO_TEXT,
    Renderer,
    as_messages,
    contents,
    require_text,
    texts_of,
)
from trio_deploy.errors import PromptTooLong, TrioError
from trio_deploy.families.base import VISUAL_TOKEN, Layout
from trio_deploy.families.rope import Grid, grid_positions, plain_positions

_CHARACTERS_PER_TOKEN = 16  # the longest of many vocabularies' tokens
_WORDS = 8  # maximum number of words that a warning names, so that it stays one line


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt, each image placeholder expanded to the image's text and visual tokens.

    Attributes:
        ids: int64 [S]; the image token's id where `visual`.
        visual: bool [S], whether each token is a visual one.
        positions: int64 [axes, S], rotary positions along each axis that the model has.
    """

    ids: np.ndarray
    visual: np.ndarray
    positions: np.ndarray

    @property
    def length(self) -> int:
        """Number of tokens S."""
        return len(self.ids)

    @property
    def next_position(self) -> int:
        """Position of the first generated token, the same along all axes."""
        return int(self.positions.max(initial=-1)) + 1

    @property
    def visual_tokens(self) -> int:
        """Number of visual tokens N."""
        return int(self.visual.sum())


class PromptEncoder:
    """Tokenises prompts as transformers' processors do."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_token_id: int,
        tokens: Mapping[str, str],
        template: str | None = None,
        context: int | None = None,
        picture: str | None = None,
    ) -> None:
        """Args:
            tokens: `bos_token`, `eos_token`, … as strings.
            template: jinja2 source of the chat template; None or empty: there is none.
            context: tokens that the model takes; None: any number.
            picture: what a chat template writes for a picture (`HubLayout.picture`), if the
                tokenizer knows its tokens; None: the image token.

        Raises:
            TrioError: the tokenizer does not know the image token.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self._bos_token = tokens.get("bos_token")
        unknown = getattr(tokenizer.model, "unk_token", None) or tokens.get("unk_token")
        self._unknown_id = tokenizer.token_to_id(unknown) if unknown else None
        image_token = tokens.get("image_token") or tokenizer.id_to_token(image_token_id)
        if image_token is None or tokenizer.token_to_id(image_token) != image_token_id:
            raise TrioError(
                f"the tokenizer has no image token with the id {image_token_id} that the model's "
                "config names; take tokenizer and config from one checkpoint"
            )
        self.image_token = image_token
        self._around = self._tokens_around(picture or image_token)
        chat = ChatTemplate(template, tokens) if template else None
        self._renderer = Renderer(chat, image_token) if chat else None
        self._context = context
        # Unknown words and spaces apart, no text is longer than its tokens.
        longest = max(map(len, tokenizer.get_vocab()), default=0)
        self._longest = max(longest, _CHARACTERS_PER_TOKEN)

    def _tokens_around(self, picture: str) -> tuple[str, str]:
        """The tokens before and behind the image token of a picture; "" where there are none."""
        before, token, behind = picture.partition(self.image_token)
        known = all(
            self._tokenizer.token_to_id(each) is not None for each in (before, behind) if each
        )
        return (before, behind) if token and known else ("", "")

    def text(self, prompt: str | Sequence[Message], images: int, *, raw: bool = False) -> str:
        """The prompt's full text, one placeholder per image.

        A plain string becomes a user message after the images; where the bundle has no chat
        template or `raw` is set, it is taken as it is, with the images in front if it has no
        placeholder, in the tokens that the model was trained with around them.

        Raises:
            TrioError: nothing is said, or more than the context holds; messages without a chat
                template; placeholders that do not match the number of images.
        """
        token = self.image_token
        texts = texts_of(prompt)
        self._check_characters(sum(map(len, texts)))
        require_text(texts)
        if isinstance(prompt, str) and (raw or self._renderer is None):
            require_text(texts, token)
            if images and token not in prompt:
                before, behind = self._around
                prompt = f"{before}{token}{behind or chr(10)}" * images + prompt
            self._check_count(prompt.count(token), images)
            return prompt
        if self._renderer is None:
            raise TrioError(
                "this bundle has no chat template, so messages cannot be rendered; pass the whole "
                f"prompt as one string, with {token} where the image belongs"
            )
        messages = as_messages(prompt, images)
        placeholders = 0
        for message in messages:
            items, said = contents(message)
            placeholders += items + sum(text.count(token) for text in said)
            if any(token in text for text in said):
                raise TrioError(
                    f"a message's text contains the image placeholder {token} itself "
                    f"({placeholders} placeholders for {images} images); "
                    'name images by {"type": "image"} items instead'
                )
        advice = (
            'name each image by an item {"type": "image"} in the message\'s content (with '
            "plain-string content there is nowhere for the image)"
        )
        self._check_count(placeholders, images, None if placeholders else advice)
        return self._renderer.render(messages)

    def check_fits(self, text: str, visual: int, *, rendered: bool = True) -> None:
        """Check that the context holds a prompt, without tokenising more than it takes to tell.

        Args:
            text: the full text, one placeholder per image.
            visual: tokens that the images will have, or fewer.
            rendered: as of `encode`.

        Raises:
            TrioError: it does not.
        """
        if self._context is None or (not visual and len(text) <= self._context):
            return
        size, special = _CHARACTERS_PER_TOKEN * self._context, not self._is_begun(text, rendered)
        while True:
            ids = self._tokenizer.encode(text[:size], add_special_tokens=special).ids
            tokens = sum(token != self._image_token_id for token in ids)
            if size >= len(text):
                self._check_tokens(tokens + visual, visual)
                return
            # Where the text is cut, its last words may become more tokens than they are.
            if tokens > self._context + self._context // 4 + _CHARACTERS_PER_TOKEN:
                raise self._too_long(f"more than {self._context} tokens of text")
            size *= 2

    def _check_tokens(self, tokens: int, visual: int) -> None:
        if self._context is not None and tokens >= self._context:
            raise self._too_long(f"{tokens} tokens ({visual} of them visual)")

    def _check_characters(self, characters: int) -> None:
        if self._context is not None and characters > self._context * self._longest:
            raise self._too_long(f"{characters} characters, {self._longest} per token or more")

    def _too_long(self, size: str) -> PromptTooLong:
        return PromptTooLong(
            f"the prompt has {size}, but the model's context is {self._context}: shorten the text "
            "or pass fewer images"
        )

    def encode(
        self,
        text: str,
        images: Sequence[str],
        *,
        rendered: bool = True,
        grids: Sequence[Grid] | None = None,
    ) -> Prompt:
        """Tokenise `text` with the i-th placeholder replaced by `images[i]`, a `Layout.text`.

        Args:
            rendered: whether a chat template made the text.
            grids: those of the images, if tokens have a position along time, row and column each;
                None: they have one.

        Placeholders are replaced in the text, as transformers' processors do, since a tokenizer may
        join what replaces them with its neighbours.

        Special tokens (BOS) are added by the tokenizer's post-processor, except for text that a
        chat template (`rendered`) already began with BOS, as `apply_chat_template` does.

        Raises:
            TrioError: placeholders and images differ in number, there is no text at all, or the
                tokenizer makes another number of image tokens than the images have.
        """
        special = not self._is_begun(text, rendered)
        first, *rest = text.split(self.image_token)
        self._check_count(len(rest), len(images))
        shown = [image.replace(VISUAL_TOKEN, self.image_token) for image in images]
        pieces = [first]
        for image, piece in zip(shown, rest, strict=True):
            pieces += [image, piece]
        ids = np.array(
            self._tokenizer.encode("".join(pieces), add_special_tokens=special).ids,
            dtype=np.int64,
        )
        visual = ids == self._image_token_id
        if visual.all():
            raise TrioError(NO_TEXT)
        self._check_visual(int(visual.sum()), shown, grids)
        if grids is None:
            return Prompt(ids, visual, plain_positions(len(ids)))
        return Prompt(ids, visual, grid_positions(visual, grids))

    def _check_visual(self, found: int, shown: Sequence[str], grids: Sequence[Grid] | None) -> None:
        """Compare the visual tokens of a prompt with what its images have."""
        wanted = sum(image.count(self.image_token) for image in shown)
        placed = wanted if grids is None else sum(map(math.prod, grids))
        if not found == wanted == placed:
            raise TrioError(
                f"the prompt has {found} visual tokens, but its images have {wanted}"
                f"{f' in grids of {placed}' * (placed != wanted)}: the tokenizer must keep each "
                f"{self.image_token} as one token, so take tokenizer and config from one checkpoint"
            )

    def _is_begun(self, text: str, rendered: bool) -> bool:
        """Whether a chat template wrote BOS already."""
        return rendered and bool(self._bos_token) and text.startswith(self._bos_token or "")

    def answer(self, text: str) -> list[int]:
        """Token ids of an answer's text, without special tokens."""
        return self.tokens(text)

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of any text.

        Args:
            special: add those that the tokenizer begins or ends a text with (BOS).
        """
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def piece(self, token: int) -> str:
        """Text of a token within others, such as a word with its space."""
        once, twice = (self.decode([token] * count, special=True) for count in (1, 2))
        return twice[len(once) :]

    def names(self, ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary has them; empty for ids that it lacks."""
        return [self._tokenizer.id_to_token(each) or "" for each in ids]

    def warnings(
        self,
        prompt: str | Sequence[Message],
        encoded: Prompt,
        *,
        images: int = 0,
        raw: bool = False,
    ) -> list[str]:
        """What the asker should know about how a prompt was understood, a sentence each.

        Args:
            encoded: what `encode` made of the prompt.
            images, raw: as of `text`.
        """
        found = []
        as_it_is = isinstance(prompt, str) and (raw or self._renderer is None)
        if as_it_is and (bare := self._bare(str(prompt))):
            found.append(bare)
        if self._renderer is not None and not as_it_is:
            messages = as_messages(prompt, images)
            if left_out := self._renderer.left_out(messages):
                found.append(_left_out(messages, left_out))
        if self._unknown_id is not None and self._unknown_id in encoded.ids:
            words = dict.fromkeys(word for text in texts_of(prompt) for word in self.unknown(text))
            if words:
                found.append(_unknown_words(list(words), self._tokenizer.get_vocab_size()))
        return found

    def _bare(self, prompt: str) -> str | None:
        """A warning of placeholders without the tokens that the model was trained with."""
        before, behind = self._around
        picture = f"{before}{self.image_token}{behind}"
        if prompt.count(picture) == prompt.count(self.image_token):
            return None
        return (
            f"the placeholder {self.image_token} stands without the tokens that the model was "
            f"trained with around it: write {picture}, or leave it out to have pictures in front"
        )

    def unknown(self, text: str) -> list[str]:
        """Parts of a text that the tokenizer maps to its unknown token, each once, in order.

        With a word-level vocabulary these are whole words; with one that falls back to bytes there
        are none.
        """
        if self._unknown_id is None:
            return []
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        spans: list[tuple[int, int]] = []
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if token != self._unknown_id:
                continue
            within_word = text[start - 1 : start].isalnum() and text[start : start + 1].isalnum()
            if spans and spans[-1][1] == start and within_word:
                start = spans.pop()[0]
            spans.append((start, stop))
        return list(dict.fromkeys(text[start:stop].strip() for start, stop in spans))

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered."""
        return self._renderer is not None

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """Text of generated tokens, without special tokens or with them."""
        return self._tokenizer.decode(ids, skip_special_tokens=not special)

    def _check_count(self, placeholders: int, images: int, advice: str | None = None) -> None:
        if placeholders != images:
            raise TrioError(
                f"the prompt has {placeholders} image placeholder(s) ({self.image_token}) but "
                f"{images} image(s) were given; {advice or 'pass one image for each placeholder'}"
            )


def _left_out(messages: Sequence[Message], numbers: Sequence[int]) -> str:
    """A warning of messages that the model does not get to see; one line."""
    named = ", ".join(f"{number} ({messages[number]['role']!s:.20})" for number in numbers[:_WORDS])
    more = f" and {len(numbers) - _WORDS} more" if len(numbers) > _WORDS else ""
    return (
        f"the chat template leaves out the text of message {named}{more}: the model does not see "
        "it; correct the template, or export with --chat-template"
    )


def _unknown_words(words: Sequence[str], vocabulary: int) -> str:
    """A warning of words that the vocabulary lacks; one line."""
    named = ", ".join(map(repr, words[:_WORDS]))
    more = f" and {len(words) - _WORDS} more" if len(words) > _WORDS else ""
    return (
        f"the model's vocabulary of {vocabulary} tokens lacks {named}{more}: the model cannot tell "
        "unknown words apart; ask in other words"
    )


@dataclass(frozen=True)
class Batch:
    """Prompts of different lengths, padded on the right.

    Attributes:
        input_ids: int64 [B,S]; 0 for visual tokens, whose embedding is never read.
        source_index: int64 [B,S], what `embed` gathers (see `collate`).
        position_ids: int64 [B,S], or [B,axes,S] where the model has several axes; 0 in padding.
        lengths: int64 [B], valid tokens.
        visual_mask: bool [B,S].
    """

    input_ids: np.ndarray
    source_index: np.ndarray
    position_ids: np.ndarray
    lengths: np.ndarray
    visual_mask: np.ndarray


def collate(
    prompts: Sequence[Prompt],
    images: Sequence[Sequence[Layout]],
) -> Batch:
    """Pad prompts and number their feature rows over the whole batch.

    Args:
        prompts: one per row.
        images: layouts of each row's images in order.

    `source_index` holds an entry below S for a text embedding of the same row, S + r for feature
    row r of the batch, and S + R (R: all feature rows) for image_newline.

    Raises:
        TrioError: a prompt and its images differ in the number of visual tokens.
    """
    size = max(prompt.length for prompt in prompts)
    total = sum(layout.feature_rows for layouts in images for layout in layouts)
    shape = (len(prompts), size)
    input_ids = np.zeros(shape, dtype=np.int64)
    visual_mask = np.zeros(shape, dtype=bool)
    place = np.arange(size, dtype=np.int64)
    source_index = np.tile(place, (len(prompts), 1))
    first = 0
    for row, prompt in enumerate(prompts):
        input_ids[row, : prompt.length] = np.where(prompt.visual, 0, prompt.ids)
        visual_mask[row, : prompt.length] = prompt.visual
        sources = []
        for layout in images[row]:
            sources.append(np.where(layout.rows < 0, size + total, size + first + layout.rows))
            first += layout.feature_rows
        found = np.concatenate(sources) if sources else np.zeros(0, dtype=np.int64)
        if len(found) != prompt.visual_tokens:
            raise TrioError(
                f"row {row}: the prompt has {prompt.visual_tokens} visual tokens, its images have "
                f"{len(found)}"
            )
        source_index[row, visual_mask[row]] = found
    lengths = np.array([prompt.length for prompt in prompts], dtype=np.int64)
    axes = len(prompts[0].positions)
    position_ids = np.zeros((len(prompts), axes, size), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        position_ids[row, :, : prompt.length] = prompt.positions
    if axes == 1:
        position_ids = position_ids[:, 0]
    return Batch(input_ids, source_index, position_ids, lengths, visual_mask)
