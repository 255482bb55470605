import pytest

from gkd.scoring import GroupLimits
from gkd.types import Completion
from rollout.mixer import Mixer
from rollout.prompts import PromptStream
from rollout.tokenized import TokenizedRecord

CONVERSATION = Completion(prompt_ids=(3,), response_ids=(5, 1, 6, 7, 1), loss_mask=(True, True, False, True, True))


def plain_records():
    prompts = [tuple(range(2, 4 + i % 5)) for i in range(50)]
    return [TokenizedRecord(i, p, Completion(prompt_ids=p, response_ids=(5, 6, 1))) for i, p in enumerate(prompts)]


def mixer(
    fraction, *, mixing="per_sample", seed=0, group_tokens=60, group_sequences=4, batch_size=16, records=plain_records()
):
    return Mixer(
        PromptStream(records, seed=seed, samples_per_prompt=1),
        seed=seed,
        batch_size=batch_size,
        on_policy_fraction=fraction,
        mixing=mixing,
        max_new_tokens=10,
        limits={None: GroupLimits(group_tokens, group_sequences)},
    )


@pytest.mark.parametrize("mixing", ["per_step", "per_sample"])
def test_lambda_zero_and_one_are_exact(mixing):
    for step in range(1, 50):
        assert not mixer(0.0, mixing=mixing).plan(step).on_policy
        assert not mixer(1.0, mixing=mixing).plan(step).off_policy


def test_per_step_draws_once_a_step():
    plans = [mixer(0.5, mixing="per_step").plan(step) for step in range(1, 400)]
    assert {len(plan.on_policy) for plan in plans} == {0, 16}
    share = sum(len(plan.on_policy) for plan in plans) / (16 * len(plans))
    assert 0.42 < share < 0.58


def test_per_sample_draws_once_a_sample():
    plans = [mixer(0.25).plan(step) for step in range(1, 200)]
    assert len({len(plan.on_policy) for plan in plans}) > 3
    share = sum(len(plan.on_policy) for plan in plans) / (16 * len(plans))
    assert 0.21 < share < 0.29


def test_a_plan_is_a_function_of_the_step():
    for step in (1, 7, 30):
        assert mixer(0.5).plan(step) == mixer(0.5).plan(step)
    assert mixer(0.5).plan(3) != mixer(0.5, seed=1).plan(3)


def test_every_sample_is_in_one_group_of_one_source():
    for step in range(1, 40):
        plan = mixer(0.5).plan(step)
        students = {prompt.id for prompt in plan.on_policy}
        assert sorted(sample for group in plan.groups for sample in group) == sorted(plan.samples)
        for group in plan.groups:
            assert len(group) <= 4
            assert len({sample in students for sample in group}) == 1


def test_off_policy_samples_are_the_datasets_completions_as_they_are():
    for rollout in mixer(0.0).plan(1).off_policy:
        assert rollout.response_ids == (5, 6, 1)
        assert (rollout.source, rollout.stop_reason, rollout.versions) == ("dataset", "dataset", None)


def test_a_conversation_answers_its_own_prompt_and_keeps_its_mask():
    """The student is asked the last turn, the dataset answers from the first on."""
    records = [TokenizedRecord(i, (3, 5, 1, 6), CONVERSATION) for i in range(16)]
    [rollout, *_] = mixer(0.0, records=records).plan(1).off_policy
    assert (rollout.prompt_ids, rollout.response_ids) == ((3,), (5, 1, 6, 7, 1))
    assert (rollout.loss_mask, rollout.num_loss_tokens) == (CONVERSATION.loss_mask, 4)
    assert {prompt.token_ids for prompt in mixer(1.0, records=records).plan(1).on_policy} == {(3, 5, 1, 6)}


def test_groups_are_filled_by_the_sequences_that_are_scored():
    records = [TokenizedRecord(i, (2,) * 20, CONVERSATION) for i in range(16)]  # 6 tokens, or 20 and 10 new ones

    def sizes(fraction):
        plan = mixer(fraction, records=records, group_tokens=60, group_sequences=16).plan(1)
        return [len(group) for group in plan.groups]

    assert sizes(0.0) == [10, 6] and sizes(1.0) == [2] * 8
