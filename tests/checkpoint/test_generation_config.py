"""generation_config.json is carried as transformers reads it; what is not supported is named."""

from typing import Any

import pytest
from transformers import GenerationConfig

from trio_deploy import TrioError
from trio_deploy.checkpoint.generation_config import read_sampling

CARRIED = {
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3,
    "min_new_tokens": 2,
    "suppress_tokens": [1, 2],
    "begin_suppress_tokens": [3],
    "bad_words_ids": [[4], [5, 6]],
}
DRAWN = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05}


def carried(settings: dict[str, Any]) -> dict[str, Any]:
    options, unsupported = read_sampling(settings)
    assert not unsupported
    return options.to_json()


def test_every_supported_setting_is_carried() -> None:
    assert carried(CARRIED | DRAWN | {"do_sample": True}) == CARRIED | DRAWN


@pytest.mark.parametrize("do_sample", [{}, {"do_sample": False}, {"do_sample": None}])
def test_without_do_sample_the_default_is_greedy(do_sample: dict[str, Any]) -> None:
    expected = {name: value for name, value in DRAWN.items() if name != "temperature"}
    assert carried(DRAWN | do_sample) == expected


def test_sampling_that_names_no_numbers_has_those_of_transformers() -> None:
    assert carried({"do_sample": True}) == {"temperature": 1.0, "top_k": 50}
    assert carried({"do_sample": True, "top_k": None, "top_p": None}) == carried(
        {"do_sample": True}
    )
    assert carried({"do_sample": True, "top_k": 0})["top_k"] == 0
    defaults = GenerationConfig._get_default_generation_params()
    assert (defaults["temperature"], defaults["top_k"]) == (1.0, 50)


UNSUPPORTED = {
    "num_beams": 4,
    "num_beam_groups": 2,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 0.5,
    "constraints": [1],
    "force_words_ids": [[1]],
    "min_length": 5,
    "stop_strings": ["x"],
    "max_time": 1.0,
    "top_h": 0.4,
    "typical_p": 0.9,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [5, 1.1],
    "sequence_bias": [[[1], 2.0]],
    "token_healing": True,
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0},
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named_with_its_value(name: str) -> None:
    options, unsupported = read_sampling({name: UNSUPPORTED[name]})
    assert unsupported == (f"{name} {UNSUPPORTED[name]!r}",) and options.to_json() == {}


def test_the_defaults_of_transformers_have_nothing_to_name() -> None:
    assert carried(GenerationConfig._get_default_generation_params()) == {
        "top_k": 50,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
    }


def test_every_setting_of_transformers_that_changes_tokens_is_known_here() -> None:
    # Lengths, token ids, caches, outputs, and what decodes the same tokens faster.
    harmless = """max_length max_new_tokens early_stopping do_sample use_mtp use_cache
        cache_implementation cache_config max_cache_len length_penalty renormalize_logits
        output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
        pad_token_id bos_token_id eos_token_id decoder_start_token_id is_assistant
        num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
        prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind
        target_lookbehind assistant_ensemble_weight speculation_type compile_config disable_compile
        low_memory prefill_chunk_size transformers_version""".split()
    known = {*harmless, *CARRIED, *DRAWN, *UNSUPPORTED}
    settings = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert settings - known - {"continuous_batching_config"} == set()


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 0},
        {"repetition_penalty": "x"},
        {"do_sample": True, "temperature": float("nan")},
        {"top_p": 0},
        {"suppress_tokens": 5},
        {"bad_words_ids": [[]]},
        {"bad_words_ids": [5]},
        {"min_new_tokens": 10.5},
    ],
    ids=str,
)
def test_a_value_that_cannot_be_meant_names_the_file(settings: dict[str, Any]) -> None:
    with pytest.raises(TrioError, match=r"generation_config\.json: "):
        read_sampling(settings)
