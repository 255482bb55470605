"""What is checked of a reward function before a run: that it gives two records of the data a number each."""

from collections.abc import Sequence
from typing import Any

from gkd.config.schema import RewardConfig
from gkd.errors import UserError
from gkd.rewards import RewardError, RewardSample, call_reward, load_reward
from rollout.records import Record
from rollout.tokenized import TokenizedRecord


def check_reward(
    config: RewardConfig,
    records: Sequence[Record],
    tokenized: Sequence[TokenizedRecord],
    tokenizer: Any,
) -> None:
    """Call it on two records, their own answers as responses, as if the dataset had written them.

    Of records with and without an answer there is one each, where the data has both.

    Args:
        config: the function.
        records: all training records.
        tokenized: those that are used.
        tokenizer: the student's.

    Raises:
        UserError: if it fails, or does not return one finite number for each.
    """
    answered = [record for record in tokenized if records[record.index].answer is not None]
    unanswered = [record for record in tokenized if records[record.index].answer is None]
    some = [*answered[:1], *unanswered[:1], *answered[1:2], *unanswered[1:2]][:2]
    samples = [_sample(record, records[record.index].answer, tokenizer) for record in some]
    try:
        call_reward(load_reward(config.path, config.kwargs), samples, name="it")
    except RewardError as error:
        raise UserError(
            "reward.path",
            config.path,
            f"does not work on two records of the data: {error}.",
            "It must take (samples, **kwargs) and return one finite number per sample; gkd/rewards.py says what a "
            "sample is.",
        ) from error


def _sample(record: TokenizedRecord, answer: str | None, tokenizer: Any) -> RewardSample:
    return RewardSample(
        prompt=tokenizer.decode(list(record.prompt_ids)),
        response=answer or "",
        reference=answer,
        source="dataset",
        stop_reason="dataset",
        num_tokens=len(tokenizer(answer or "", add_special_tokens=False)["input_ids"]),
    )
