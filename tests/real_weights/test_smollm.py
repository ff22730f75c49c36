"""A real language model, SmolLM2-135M-Instruct inside LLaVA: it speaks, and graphs agree with it.

Kept tokens in each precision are in tests/runtimes/test_fresh_process.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.real_weights import in_full_runs, questions, smollm_bundle, smollm_llava
from trio_deploy import Pipeline, Request, check
from trio_deploy.verify.report import format_report

#: Prompts without pictures, and what a sound model says next.
SENTENCES = {
    "The capital of France is": " Paris.",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n": (
        "The capital of France is Paris."
    ),
}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return smollm_llava()


def continuations(checkpoint: Path) -> tuple[list[list[int]], float]:
    """The greedy tokens of transformers' model, and the greatest of its hidden states."""
    import torch
    from tokenizers import Tokenizer
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokens, greatest = [], 0.0
    for sentence in SENTENCES:
        ids = torch.tensor([tokenizer.encode(sentence).ids])
        made = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False)
        tokens.append(made[0, ids.shape[1] :].tolist())
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        greatest = max(greatest, *(float(state.abs().max()) for state in states))
    return tokens, greatest


def test_it_speaks_and_says_what_transformers_says(checkpoint):
    expected, greatest = continuations(checkpoint)
    # What random weights lack: a hidden state whose square is beyond float16.
    assert greatest > 20_000
    requests = [Request(sentence, max_new_tokens=16, raw=True) for sentence in SENTENCES]
    with smollm_bundle(checkpoint) as bundle:
        answers = Pipeline.open(bundle, threads=2).generate_batch(requests)
    assert [answer.token_ids for answer in answers] == expected
    for answer, said in zip(answers, SENTENCES.values(), strict=True):
        assert answer.text.startswith(said)


@in_full_runs
@pytest.mark.parametrize("dialect", ["ort", "onnx", "primitive"])
def test_float16_graphs_agree_with_the_oracle_and_say_the_same(dialect, checkpoint):
    requests = [Request(sentence, max_new_tokens=16, raw=True) for sentence in SENTENCES]
    with smollm_bundle(checkpoint, dialect=dialect, dtype="float16") as bundle:
        report = check(bundle, threads=2, examples=questions())
        answers = Pipeline.open(bundle, threads=2).generate_batch(requests)
    assert report.passed, format_report(report)
    for answer, said in zip(answers, SENTENCES.values(), strict=True):
        assert answer.text.startswith(said)
        assert np.isfinite(answer.first_logits).all()
