"""generation_config.json: how a checkpoint wants its tokens chosen, as transformers reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.errors import TrioError

GENERATION_CONFIG = "generation_config.json"

_TRANSFORMERS_TOP_K = 50  # what transformers draws from where do_sample is set and top_k is not

_CARRIED = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
)

# Settings that change which tokens transformers generates and are not supported, with the values
# that have no effect.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "diversity_penalty": (0,),
    "constraints": (),
    "force_words_ids": (),
    "min_length": (0,),
    "stop_strings": ([],),
    "max_time": (),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "sequence_bias": ([], {}),
    "token_healing": (False,),
    "guidance_scale": (1,),
    "watermarking_config": (),
}


def read_sampling(
    settings: Mapping[str, Any], file: str = GENERATION_CONFIG
) -> tuple[SamplingOptions, tuple[str, ...]]:
    """Read the options that a bundle carries.

    Without do_sample the most likely token is chosen; top_k, top_p and min_p then hold for requests
    that set a temperature. Lengths (max_length, max_new_tokens) are what requests ask for.

    Args:
        settings: the file's content, or config.json's where there is no such file.
        file: the name of the file that they are from, for errors.

    Returns:
        The options, and settings as `name value` that have an effect in transformers and none here.

    Raises:
        TrioError: a value is of the wrong kind or out of range.
    """
    found = {name: settings[name] for name in _CARRIED if settings.get(name) is not None}
    if settings.get("do_sample") is True:
        found = {"temperature": 1.0, "top_k": _TRANSFORMERS_TOP_K} | found
    else:
        found.pop("temperature", None)
    options = SamplingOptions(**found)
    try:
        options.check()
    except TrioError as error:
        raise TrioError(f"{file}: {error}") from None
    unsupported = tuple(
        f"{name} {settings[name]!r:.60}"
        for name, neutral in _UNSUPPORTED.items()
        if settings.get(name) is not None and settings[name] not in neutral
    )
    return options, unsupported
