"""What end-to-end tests ask of a run's metrics and ledger, and the run that is resumed."""

from tiny import ALPHABET, EOS

STEPS = 4
_IDS = {letter: i + 2 for i, letter in enumerate(ALPHABET)}


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


def written(folder, ledger, step, *, source):
    """(prompt, response) of every sample of a step as token ids, from the text that the run recorded of all of them."""
    lines = [line for line in ledger if line["step"] == step]
    blocks = (folder / "rollouts" / f"step_{step}.txt").read_text().split("\n\n")
    pairs = []
    for line, block in zip(lines, blocks, strict=True):
        header, prompt, response = block.strip("\n").split("\n")
        identity = f"epoch {line['epoch']}, prompt {line['prompt_index']}, sample {line['sample_index']}"
        assert header.startswith(f"### {identity}: {source}, ")
        response = response.removeprefix(">>> ").replace("<eos>", "").replace("<pad>", "?")
        ids = [_IDS.get(letter, 0) for letter in response] + [EOS] * (line["stop_reason"] == "stop")
        assert len(ids) == line["tokens"]
        pairs.append(([_IDS[letter] for letter in prompt], ids))
    return pairs


def response_logits(model, pairs):
    """[T, V] of all responses one after the other, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        found = [loaded(input_ids=torch.tensor([prompt + response])).logits[0] for prompt, response in pairs]
    return torch.cat([rows[len(prompt) - 1 : -1] for rows, (prompt, _) in zip(found, pairs, strict=True)])
