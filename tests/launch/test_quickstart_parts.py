"""The quickstart's task, models, displays and plot; the quickstart itself is `make quickstart`."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from launch.chain_sum import make_problem, prepare
from launch.display import make_display
from launch.plots import plot_curves


def test_problems_are_worked_out_correctly():
    random = np.random.default_rng(0)
    lengths = set()
    for _ in range(500):
        prompt, completion = make_problem(random)
        assert re.fullmatch(r"\d([+-]\d){5,9}=", prompt)
        terms = re.findall(r"[+-]?\d", prompt)
        totals = np.cumsum([int(term) for term in terms])
        assert completion == ";".join(f"{total:02d}" for total in totals[1:])
        assert totals.min() >= 0 and totals.max() <= 99
        lengths.add(len(terms))
    assert lengths == set(range(6, 11))


def test_what_the_configs_read_is_written_and_fits_together(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    prepare(tmp_path)
    files = {path.stem: path.read_text().splitlines() for path in (tmp_path / "data").iterdir()}
    prompts = [json.loads(line)["prompt"] for lines in files.values() for line in lines]
    assert len(prompts) == len(set(prompts)), "no problem is in two files"
    assert all("completion" not in json.loads(line) for line in files["prompts"])
    sizes = {}
    for name in ("teacher", "student"):
        folder = tmp_path / "models" / name
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = json.loads(files["test"][0])["prompt"]
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
        config = AutoConfig.from_pretrained(folder)
        assert config.tie_word_embeddings and len(tokenizer) == config.vocab_size
        sizes[name] = AutoModelForCausalLM.from_config(config).num_parameters()
    assert 1.0e6 < sizes["teacher"] < 1.3e6 and 0.08e6 < sizes["student"] < 0.13e6


def line(step, *, gap):
    return {
        "step": step,
        "stage": step // 5,
        "loss/total": 1.0 / step,
        "source/on_policy": 1.0 if gap else 0.0,
        "tokens/generated": 100 if gap else 0,
        "tokens/trained": 100,
        "time/rollout_s": 0.5 if gap else 0.0,
        "time/teacher_s": 0.25,
        "time/train_s": 0.1,
        "time/train_wait_s": 0.6,
        "time/rollout_wait_s": 0.2,
        "time/teacher_wait_s": 0.3,
        "time/step_s": 0.8,
        "sync/seconds": 0.1,
        "sync/logprob_gap_max": gap,
        "rollout/mean_length": 12.0 if gap else None,
    }


@pytest.mark.parametrize("gap", [1e-5, None])
@pytest.mark.parametrize("terminal", [True, False])
def test_both_displays_show_the_numbers(gap, terminal):
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=140)
    with make_display(console, "demo", 2, 5, stages=[]) as display:
        for step in (3, 4, 5):
            display.show(line(step, gap=gap))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert "demo" in text and "0.2000" in text and "5/5" in text
    assert ("1.0e-05" in text and "200" in text and "100%" in text) if gap else "0%" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_names_the_stage_of_a_run_that_has_several(terminal):
    output = io.StringIO()
    with make_display(
        Console(file=output, force_terminal=terminal, width=180), "demo", 2, 5, stages=["warm", "on-policy run"]
    ) as display:
        for step in (3, 4, 5):
            display.show(line(step, gap=1e-5))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.getvalue())
    assert "on-policy run" in text and "stage" in text
    assert terminal or "stage warm" in text  # on a terminal only the last picture is sure to be drawn


def test_the_plot_is_a_picture(tmp_path):
    plot_curves([line(step, gap=1e-5) for step in range(1, 60)], tmp_path / "curves.png", title="demo")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
