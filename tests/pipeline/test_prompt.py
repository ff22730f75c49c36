"""Prompts come out token for token as transformers' processors make them."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from tests.support.checkpoints import BOS, CHAT_TEMPLATE, IMAGE, VOCABULARY
from tests.support.pictures import make_picture
from trio_deploy import TrioError
from trio_deploy.families.base import VISUAL_TOKEN, Layout
from trio_deploy.pipeline.prompt import Prompt, PromptEncoder, collate

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "image_token": "<image>"}
IMAGE_ITEM = {"type": "image"}


def text_item(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def encoder(checkpoint: Path, template: str | None = CHAT_TEMPLATE) -> PromptEncoder:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return PromptEncoder(tokenizer, IMAGE, TOKENS, template)


CONVERSATIONS = [
    [{"role": "user", "content": [IMAGE_ITEM, text_item("what color is the circle ?")]}],
    [{"role": "user", "content": "what is this ?"}],
    [
        {"role": "user", "content": [IMAGE_ITEM, text_item("count"), IMAGE_ITEM]},
        {"role": "assistant", "content": [text_item("two .")]},
        {"role": "user", "content": [text_item("and the third ?")]},
    ],
]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_messages_become_the_same_tokens_as_in_transformers(
    family: str, messages: list[dict], request: pytest.FixtureRequest
) -> None:
    from transformers import AutoProcessor

    checkpoint = request.getfixturevalue(f"{family}_checkpoint")
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    count = sum(part == IMAGE_ITEM for m in messages for part in m["content"])
    pictures = [make_picture(90 + 30 * i, 60, seed=i) for i in range(count)]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = processor(text=text, images=pictures or None)["input_ids"][0]
    image_counts = np.diff(
        np.flatnonzero(np.diff([0, *(np.array(expected) == IMAGE).astype(int), 0]))
    )[::2]

    ours = encoder(checkpoint)
    assert ours.text(messages, count) == text
    prompt = ours.encode(text, [VISUAL_TOKEN * count for count in image_counts])
    assert prompt.ids.tolist() == list(expected)
    assert (prompt.ids[prompt.visual] == IMAGE).all()
    assert prompt.visual_tokens == image_counts.sum()


def test_bos_is_added_once_even_if_the_template_writes_it(llava_checkpoint: Path) -> None:
    from transformers import AutoProcessor

    template = "{{ bos_token }}" + CHAT_TEMPLATE
    processor = AutoProcessor.from_pretrained(llava_checkpoint, backend="pil")
    messages = CONVERSATIONS[1]
    expected = processor.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=True
    )
    ours = encoder(llava_checkpoint, template)
    ids = ours.encode(ours.text(messages, 0), []).ids
    assert ids.tolist() == list(
        np.ravel(expected["input_ids"] if isinstance(expected, dict) else expected)
    )
    assert (ids == BOS).sum() == 1


def test_a_plain_question_is_put_behind_its_images(llava_checkpoint: Path) -> None:
    ours = encoder(llava_checkpoint)
    content = [IMAGE_ITEM, IMAGE_ITEM, text_item("what ?")]
    assert ours.text("what ?", 2) == ours.text([{"role": "user", "content": content}], 2)


def test_without_a_template_the_prompt_is_taken_as_it_is(llava_checkpoint: Path) -> None:
    ours = encoder(llava_checkpoint, None)
    assert ours.text("USER: <image>\nwhat ?", 1) == "USER: <image>\nwhat ?"
    assert ours.text("what ?", 2) == "<image>\n<image>\nwhat ?"
    assert ours.text("what ?", 0) == "what ?"
    with pytest.raises(TrioError, match="no chat template"):
        ours.text(CONVERSATIONS[1], 0)


@pytest.mark.parametrize(("images", "count"), [(0, 1), (2, 1), (1, 2)])
def test_images_and_placeholders_must_agree(
    llava_checkpoint: Path, images: int, count: int
) -> None:
    content = [*[IMAGE_ITEM] * count, text_item("what ?")]
    with pytest.raises(TrioError, match=rf"{count} image placeholder.*{images} image"):
        encoder(llava_checkpoint).text([{"role": "user", "content": content}], images)
    with pytest.raises(TrioError, match="image placeholder"):
        encoder(llava_checkpoint, None).text("<image>" * count + "what ?", images)


@pytest.mark.parametrize("content", ["what ?", [text_item("what ?")]])
def test_images_that_no_message_names_are_told_where_to_be_named(
    llava_checkpoint: Path, content: str | list
) -> None:
    with pytest.raises(TrioError, match=r'1 image.*\{"type": "image"\} in the message\'s content'):
        encoder(llava_checkpoint).text([{"role": "user", "content": content}], 1)


@pytest.mark.parametrize(
    "content", ["what <image> ?", [text_item("a <image> b")], [IMAGE_ITEM, text_item("<image>")]]
)
def test_a_users_text_cannot_smuggle_in_a_placeholder(
    llava_checkpoint: Path, content: str | list
) -> None:
    for images in (0, 1, 2):
        with pytest.raises(TrioError, match="placeholder"):
            encoder(llava_checkpoint).text([{"role": "user", "content": content}], images)
    with pytest.raises(TrioError, match="placeholder"):
        encoder(llava_checkpoint).text("what <image> ?", 1)


@pytest.mark.parametrize(
    "messages",
    [
        ["hello"],
        [{"role": "user"}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": [{"type": "video"}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
    ],
)
def test_malformed_messages_are_refused(llava_checkpoint: Path, messages: list) -> None:
    with pytest.raises(TrioError, match="message|content item"):
        encoder(llava_checkpoint).text(messages, 0)


@pytest.mark.parametrize("text", ["", "<image>"])
def test_a_prompt_without_text_is_refused(llava_checkpoint: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(llava_checkpoint / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    with pytest.raises(TrioError, match="no text"):
        PromptEncoder(tokenizer, IMAGE, TOKENS).encode(
            text, [VISUAL_TOKEN * 16] * text.count("<image>")
        )


def test_visual_tokens_are_those_of_the_images(llava_checkpoint: Path) -> None:
    """A tokenizer that splits image tokens, and grids of another size, show before a model runs."""
    ours = encoder(llava_checkpoint)
    image, wrong = [VISUAL_TOKEN * 6], "the prompt has 6 visual tokens, but its images have 6"
    assert ours.encode("<image> what ?", image, grids=[(1, 2, 3)]).visual_tokens == 6
    for grids in ([(1, 2, 2)], [(1, 2, 4)], [], [(1, 2, 3), (1, 1, 1)]):
        with pytest.raises(TrioError, match=f"{wrong} in grids of"):
            ours.encode("<image> what ?", image, grids=grids)
    splitting = Tokenizer(WordLevel({"<unk>": 0, "<image>": 1, "a": 2}, unk_token="<unk>"))
    splitting.pre_tokenizer = Whitespace()
    with pytest.raises(TrioError, match="has 0 visual tokens, but its images have 6: the tokeni"):
        PromptEncoder(splitting, 1, TOKENS).encode("<image> a", image)


def test_a_prompt_of_blanks_is_refused_in_every_form(llava_checkpoint: Path) -> None:
    templated, raw = encoder(llava_checkpoint), encoder(llava_checkpoint, None)
    blank = [{"role": "user", "content": " "}]
    pictured = [{"role": "user", "content": [IMAGE_ITEM, text_item("\n")]}]
    for ask in (
        lambda: templated.text("", 0),
        lambda: templated.text(" \n", 1),
        lambda: templated.text([], 0),
        lambda: templated.text(blank, 0),
        lambda: templated.text(pictured, 1),
        lambda: templated.text("<image> ", 1, raw=True),
        lambda: raw.text("", 0),
        lambda: raw.text("\t", 1),
    ):
        with pytest.raises(TrioError, match="^the prompt has no text: write something to ask$"):
            ask()


def test_messages_that_are_no_unicode_are_refused(llava_checkpoint: Path) -> None:
    for message in (
        {"role": "user", "content": "\ud800"},
        {"role": "\ud800", "content": "a"},
        {"role": "user", "content": [text_item("a"), text_item("\udfff")]},
    ):
        with pytest.raises(TrioError, match="not valid Unicode, at character 0"):
            encoder(llava_checkpoint).text([message], 0)


def test_a_text_that_the_template_leaves_out_is_a_warning(llava_checkpoint: Path) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    ours = encoder(llava_checkpoint, template)
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "what ?"}]
    (warning,) = ours.warnings(messages, ours.encode(ours.text(messages, 0), []))
    assert warning.startswith("the chat template leaves out the text of message 0 (system): ")
    ours = encoder(llava_checkpoint, "{% for m in messages %}{{ m.role }}{% endfor %}")
    encoded = ours.encode(ours.text("what ?", 0), [])
    assert "message 0 (user)" in ours.warnings("what ?", encoded)[0]
    assert ours.warnings("what ?", encoded, raw=True) == []


def test_the_tokenizers_own_truncation_and_padding_are_off(llava_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(llava_checkpoint / "tokenizer.json"))
    expected = PromptEncoder(tokenizer, IMAGE, TOKENS).encode("<image> what is this ?", ["<image>"])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    ours = PromptEncoder(tokenizer, IMAGE, TOKENS)
    assert ours.encode("<image> what is this ?", ["<image>"]).ids.tolist() == expected.ids.tolist()
    assert 3 < expected.length < 40
    assert len(ours.answer("what is this ?")) == 4


def test_a_template_that_writes_other_placeholders_than_images_is_an_error(
    llava_checkpoint: Path,
) -> None:
    ours = encoder(llava_checkpoint)
    for text, images in (("<image><image> what ?", 1), ("what ?", 1), ("<image> what ?", 0)):
        with pytest.raises(
            TrioError, match=rf"{text.count('<image>')} image placeholder.*{images}"
        ):
            ours.encode(text, [VISUAL_TOKEN] * images)


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.given = 0
        self._tokenizer = tokenizer

    def encode(self, text: str, **options: bool) -> object:
        self.given += len(text)
        return self._tokenizer.encode(text, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)


@pytest.mark.parametrize("word", ["what ", "what is ", "x" * 20 + " "])
def test_a_prompt_beyond_the_context_is_not_tokenised_to_its_end(
    llava_checkpoint: Path, word: str
) -> None:
    tokenizer = Counting(Tokenizer.from_file(str(llava_checkpoint / "tokenizer.json")))
    ours = PromptEncoder(tokenizer, IMAGE, TOKENS, CHAT_TEMPLATE, 512)  # type: ignore[arg-type]
    for count in (1_000_000, 2000, 600):
        with pytest.raises(TrioError, match="context is 512: shorten the text"):
            ours.check_fits(ours.text(word * count, 0), 0)
        assert tokenizer.given <= 3 * 16 * 512
        tokenizer.given = 0
    ours.check_fits(ours.text(word * 100, 0), 0)
    with pytest.raises(TrioError, match=r"tokens \(450 of them visual\), but .* context is 512"):
        ours.check_fits(ours.text("what " * 100, 1), 450)


def test_words_that_the_tokenizer_does_not_know_are_named_as_they_were_written() -> None:
    words = WordLevel({"<unk>": 0, "<image>": 1, "a": 2, "cat": 3, "?": 4}, unk_token="<unk>")
    tokenizer = Tokenizer(words)
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens(["<image>"])
    known = PromptEncoder(tokenizer, 1, {"image_token": "<image>"})
    assert known.unknown("A cat?") == []
    assert known.unknown("a Gnu, a cat, a gnat and a Gnu?") == ["Gnu", ",", "gnat", "and"]
    for prompt in (
        "a Gnu?",
        [{"role": "user", "content": "a cat?"}, {"role": "user", "content": "a Gnu?"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a Gnu?"}]}],
    ):
        encoded = known.encode("a Gnu<image>", ["<image>"])
        assert known.warnings(prompt, encoded) == [
            "the model's vocabulary of 5 tokens lacks 'Gnu': the model cannot tell unknown words "
            "apart; ask in other words"
        ]
    assert known.warnings("a cat?", known.encode("a cat?", [])) == []


def test_a_warning_of_many_unknown_words_stays_one_line() -> None:
    words = Tokenizer(WordLevel({"<unk>": 0, "<image>": 1}, unk_token="<unk>"))
    known = PromptEncoder(words, 1, {"image_token": "<image>"})
    text = [{"role": "user", "content": f"word{n}\n"} for n in range(20)]
    (warning,) = known.warnings(text, known.encode("word", []))
    assert "'word7' and 12 more: " in warning and "\n" not in warning


def test_a_tokenizer_without_an_unknown_token_knows_every_word() -> None:
    characters = Tokenizer(BPE({"<image>": 0, "a": 1}, []))
    assert PromptEncoder(characters, 0, {"image_token": "<image>"}).unknown("a b") == []
    characters = Tokenizer(BPE({"<image>": 0, "a": 1, "<u>": 2}, [], unk_token="<u>"))
    assert PromptEncoder(characters, 0, {"image_token": "<image>"}).unknown("abba") == ["bb"]


def test_a_tokenizer_without_the_models_image_token_is_refused(llava_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(llava_checkpoint / "tokenizer.json"))
    with pytest.raises(TrioError, match="image token with the id 7"):
        PromptEncoder(tokenizer, 7, TOKENS)


def prompt(pattern: str) -> Prompt:
    """A prompt with a visual token for every x."""
    visual = np.array([letter == "x" for letter in pattern])
    ids = np.where(visual, IMAGE, np.arange(10, 10 + len(pattern)))
    return Prompt(ids, visual, np.arange(len(pattern))[None])


def layout(rows: list[int], feature_rows: int) -> Layout:
    """An image whose visual tokens take these of so many feature rows."""
    boxes = np.zeros((len(rows), 4))
    return Layout({}, feature_rows, VISUAL_TOKEN * len(rows), np.array(rows), boxes, (1, 1))


def test_source_index_numbers_image_rows_over_the_whole_batch() -> None:
    batch = collate(
        [prompt("axxxbxxc"), prompt("ab"), prompt("xxa")],
        [[layout([0, 1, -1], 4), layout([2, -1], 5)], [], [layout([2, -1], 3)]],
    )
    size, rows = 8, 12
    newline = size + rows
    assert batch.lengths.tolist() == [8, 2, 3]
    assert batch.source_index[0].tolist() == [0, 8, 9, newline, 4, 8 + 4 + 2, newline, 7]
    assert batch.source_index[1].tolist() == list(range(8))
    assert batch.source_index[2, :3].tolist() == [8 + 9 + 2, newline, 2]
    assert batch.visual_mask.sum(axis=1).tolist() == [5, 0, 2]
    assert (batch.input_ids[batch.visual_mask] == 0).all()
    assert batch.position_ids[1].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def test_prompt_and_images_must_agree_in_visual_tokens() -> None:
    with pytest.raises(TrioError, match="the prompt has 2 visual tokens, its images have 1"):
        collate([prompt("xx")], [[layout([0], 1)]])


def test_several_axes_of_positions_are_kept_apart() -> None:
    plain, (ids, visual) = prompt("axxb"), (np.arange(3), np.zeros(3, dtype=bool))
    positions = np.array([[0, 1, 1], [0, 1, 2], [0, 3, 1]])
    assert (plain.next_position, Prompt(ids, visual, positions).next_position) == (4, 4)
    batch = collate([Prompt(ids, visual, positions)] * 2, [[], []])
    assert batch.position_ids.shape == (2, 3, 3)
    assert (batch.position_ids[1] == positions).all()


def test_an_image_may_expand_to_text_and_visual_tokens(llava_checkpoint: Path) -> None:
    ours = encoder(llava_checkpoint)
    v = VISUAL_TOKEN
    prompt = ours.encode("<image> what ?", [f"left {v}{v} right {v}"], rendered=False)
    words = [VOCABULARY[word] for word in ("left", "right", "what", "?")]
    assert prompt.ids.tolist() == [BOS, words[0], IMAGE, IMAGE, words[1], IMAGE, *words[2:]]
    assert prompt.visual.tolist() == [False, False, True, True, False, True, False, False]
