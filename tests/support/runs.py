"""What end-to-end tests ask of a run's metrics and ledger, and the run that is resumed."""

STEPS = 4


def losses(metrics):
    return [line["loss/total"] for line in metrics]


def identities(ledger):
    return [(line["epoch"], line["prompt_index"], line["sample_index"]) for line in ledger]


def check_ledger(metrics, ledger, *, max_staleness=0, batch_size=8):
    """Every sample once, in its step's place, no older than the bound; every sync proven."""
    assert len(set(identities(ledger))) == len(ledger) == batch_size * len(metrics)
    for line in ledger:
        first, last = line["versions"]
        assert 0 <= line["step"] - 1 - first <= max_staleness
        assert first <= last <= line["step"] - 1
    for line in metrics:
        assert line["sync/logprob_gap_max"] <= 1e-3 and line["weights/version"] == line["step"]
        assert line["staleness/max"] <= max_staleness
        assert all(line[f"time/{worker}_wait_s"] >= 0 for worker in ("train", "rollout", "teacher"))


def run_and_resume(train, folder, changes, **models):
    """A whole run, and one that goes on from its checkpoint after half of the steps."""
    half = {"trainer.max_steps": STEPS, "trainer.checkpoint_every": STEPS // 2, "trainer.keep_last": 9}
    metrics, ledger, whole = train(folder, changes | half, **models)
    from_half = {"run.resume": str(whole / "checkpoints" / f"step_{STEPS // 2}")}
    again, again_ledger, resumed = train(f"{folder}-resumed", changes | half | from_half, **models)
    assert len(again) == STEPS and identities(again_ledger) == identities(ledger)
    return (metrics, ledger, whole), (again, again_ledger, resumed)
