"""The oracle as a contender answers as the oracle does."""

from __future__ import annotations

import importlib.util

import pytest

from trio_deploy.bench.workload import Inputs, Workload

TORCH = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


@pytest.mark.skipif(not TORCH, reason="needs torch and transformers")
def test_the_oracle_baseline_chooses_what_the_oracle_chooses(random_bundle):
    """It generates without recording the stages' tensors, so the tokens are compared."""
    from trio_deploy.bench.contenders.oracle import answer_with
    from trio_deploy.reference.oracle import Oracle, Row
    from trio_deploy.reference.restore import restore_model

    manifest = random_bundle.manifest
    oracle = Oracle(
        restore_model(random_bundle), positions=manifest.positions, probe=manifest.probe
    )
    work = Workload(1, 56, 56, "what is it ?", 4)
    chosen, logits = [], oracle.logits
    oracle.logits = lambda hidden: chosen.append(int(logits(hidden)[-1].argmax())) or logits(hidden)
    answer = answer_with(oracle, Inputs(random_bundle), work, random_bundle.schedule)
    run = answer(5)
    assert {"preprocess", "vision", "select_1", "prefill_1"} <= set(run.stages)
    assert run.first_token_s >= sum(run.stages.values()) * 0.99
    mine = chosen[-work.new_tokens :]
    prompt, (picture,) = Inputs(random_bundle).encode(work.messages(), work.pictures(5))
    row = Row(prompt.ids, picture.feeds["pixel_values"], [picture.size])
    result = oracle.generate([row], random_bundle.schedule, max_new_tokens=work.new_tokens)
    assert result.token_ids[0] == mine
