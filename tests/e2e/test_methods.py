"""The objectives and the forms of a teacher's signal with the real engines."""

import math

import pytest
from runs import STEPS, check_ledger, losses, run_and_resume
from tiny import VOCABULARY

REWARD = '''
def share_of_a(samples, scale):
    """How much of a response is the letter a."""
    return [scale * s.response.count("a") / max(len(s.response), 1) for s in samples]
'''

DIVERGENCE = '''
def scaled_reverse_kl(student_logits_TV, teacher_logits_TV, factor):
    """As a user would write it."""
    student, teacher = student_logits_TV.log_softmax(-1), teacher_logits_TV.log_softmax(-1)
    return factor * (student.exp() * (student - teacher)).sum(-1)
'''


def test_critics_of_moment_matching_survive_a_resume(train):
    changes = {
        "objective": {"type": "moment_matching", "future_credit": "mc", "warmup_inner_steps": 2},
        "data.on_policy_fraction": 0.5,
        "data.mixing": "per_sample",
    }
    (metrics, ledger, _), (again, _, _) = run_and_resume(train, "moments", changes)
    assert {line["source"] for line in ledger} == {"student", "dataset"}
    assert losses(again) == losses(metrics)
    assert all(line["teacher/signal_bytes"] % (64 * 4) == 0 for line in metrics)  # hidden states of width 64
    for line in metrics:
        assert line["loss/d_on"] <= 2 * line["loss/tv_on"] + 1e-6
        assert line["loss/d_off"] <= 2 * line["loss/tv_off"] + 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_train_the_critics_as_one_does(train, zero_stage):
    """They are not DeepSpeed's to share out: each rank has them whole, and their gradients are added up."""
    changes = {"objective": {"type": "moment_matching"}, "data.on_policy_fraction": 0.5}
    changes |= {"data.mixing": "per_sample", "trainer.tokens_per_micro_batch": 50, "trainer.max_steps": STEPS}
    alone, _, _ = train("alone", changes | {"trainer.zero_stage": 0})
    (metrics, _, _), (again, _, _) = run_and_resume(
        train, "ranks", changes | {"trainer.num_ranks": 2, "trainer.zero_stage": zero_stage}
    )
    for name in ("loss/total", "loss/critic_loss", "loss/d_on", "loss/d_off"):
        assert [line[name] for line in metrics] == pytest.approx([line[name] for line in alone], abs=2e-3), name
        assert [line[name] for line in again] == pytest.approx([line[name] for line in metrics], abs=2e-3), name


def test_a_reward_a_divergence_of_ones_own_and_sampled_tokens_in_streaming(train, tmp_path):
    """What is the user's own is in files outside the repository, found by their paths alone."""
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "divergence.py").write_text(DIVERGENCE, encoding="utf-8")
    mine = {"type": "custom", "path": f"{tmp_path / 'divergence.py'}:scaled_reverse_kl", "kwargs": {"factor": 3.0}}
    terms = [
        {"weight": 0.5, "objective": {"type": "sampled_kl"}},
        {"objective": {"type": "rl_gkd", "alpha": 0.5, "divergence": mine}},
        {"objective": {"type": "distill", "divergence": {"type": "reverse_kl"}}},
    ]
    changes = {
        "objective": {"type": "sum", "terms": terms},
        "reward": {"path": f"{tmp_path / 'reward.py'}:share_of_a", "kwargs": {"scale": 2.0}},
        "teacher.signal": "top_k",
        "teacher.top_k": 4,
        "sync.max_staleness": 1,
        "trainer.max_steps": STEPS,
    }
    metrics, ledger, _ = train("reward", changes)
    check_ledger(metrics, ledger, max_staleness=1)
    for line in metrics:
        own = [sample["reward"] for sample in ledger if sample["step"] == line["step"]]
        assert line["reward/mean"] == pytest.approx(sum(own) / len(own))
        assert all(0 <= reward <= 2 for reward in own)
        assert line["staleness/ratio_mean"] > 0
        assert line["loss/rl_gkd_divergence"] == pytest.approx(3 * line["loss/distill_loss"], rel=1e-3)
    first = metrics[0]
    assert first["staleness/ratio_mean"] == pytest.approx(1.0, abs=1e-3)  # written by the very weights they train


@pytest.mark.slow
@pytest.mark.parametrize("signal", [{"signal": "hidden_states"}, {"signal": "top_k", "top_k": 40}])
def test_what_travels_does_not_change_what_is_learnt(train, models, signal):
    teacher = models("llama", seed=1)
    plain, _, _ = train("full", {"teacher.signal": "full_logits"})
    tree = {f"teacher.{key}": value for key, value in signal.items()}
    other, _, _ = train("other", tree, teacher=teacher)
    assert losses(other) == pytest.approx(losses(plain), abs=2e-4)


@pytest.mark.slow
def test_a_few_tokens_and_the_rest_in_one_bucket(train, train_file):
    """Less than the exact divergence, for a fraction of the bytes; the student's own favourites are scored, too, in
    training and in evaluation."""
    changes = {"objective": {"type": "distill", "divergence": {"type": "reverse_kl"}}, "trainer.max_steps": 1}
    changes |= {"data.eval": {"path": train_file}, "eval": {"every_steps": 1, "limit": 8, "metrics": ["divergence"]}}
    exact, _, _ = train("exact", changes)
    sparse, _, _ = train(
        "sparse", changes | {"teacher.signal": "top_k", "teacher.top_k": 2, "teacher.student_top_k": 2}
    )
    assert 0.3 * losses(exact)[0] < losses(sparse)[0] <= losses(exact)[0] * (1 + 1e-4)
    # All that the student may say is among its favourites, so nothing is left for the bucket.
    everything = {"teacher.signal": "top_k", "teacher.top_k": 1, "teacher.student_top_k": VOCABULARY}
    favourites, _, _ = train("favourites", changes | everything)
    assert losses(favourites) == pytest.approx(losses(exact), abs=2e-4)
    assert favourites[-1]["eval/divergence"] == pytest.approx(exact[-1]["eval/divergence"], abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"estimator": "monte_carlo"}, {"gamma": 0.9}, {"type": "minillm"}])
def test_policy_gradients_reach_the_weights(train, changes):
    objective = {"type": "sampled_kl"} | changes
    metrics, _, _ = train("gradient", {"objective": objective, "trainer.max_steps": 2})
    assert all(math.isfinite(line["loss/total"]) and line["train/grad_norm"] > 1e-4 for line in metrics)
