"""Pictures are new in every run, prompts as long as asked for."""

from __future__ import annotations

import numpy as np
import pytest

from trio_deploy.bench.workload import Workload, picture_size, prompt_of_length
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.families.registry import parse_config


def test_pictures_follow_from_the_seed_alone():
    work = Workload(2, 30, 20, "hi", 4)
    one, again, other = work.pictures(1), work.pictures(1), work.pictures(2)
    assert [picture.size for picture in one] == [(30, 20)] * 2
    assert np.array_equal(np.asarray(one[0]), np.asarray(again[0]))
    assert not np.array_equal(np.asarray(one[0]), np.asarray(other[0]))
    assert not np.array_equal(np.asarray(one[0]), np.asarray(one[1]))


def test_messages_name_every_picture_before_the_text():
    (message,) = Workload(3, 8, 8, "how many ?", 1).messages()
    assert [part["type"] for part in message["content"]] == ["image"] * 3 + ["text"]


def test_a_workload_survives_json():
    work = Workload(1, 8, 9, "hi", 4)
    assert Workload.from_json(work.to_json()) == work


@pytest.mark.parametrize("wanted", [1, 7, 64, 500])
def test_the_prompt_has_as_many_tokens_as_asked_for(wanted):
    words = prompt_of_length(lambda text: len(text.split()), wanted)
    assert len(words.split()) == wanted
    assert len(prompt_of_length(len, wanted)) == wanted


def test_the_picture_is_the_one_with_most_visual_tokens():
    for recipe, size in (("llava-1.5-7b", (336, 336)), ("llava-next-7b", (672, 672))):
        assert picture_size(parse_config(load_recipe(recipe).architecture)) == size
