import pytest
import torch

from fastpo.demo import arithmetic


def test_sums_are_right_and_some_of_the_answers_to_fit_are_not():
    rows = arithmetic.sums(seed=1)
    assert rows == arithmetic.sums(seed=1) != arithmetic.sums(seed=2)
    assert len(rows["train"]) == 55
    for row in rows["train"]:
        a, b = row["prompt"].rstrip("=").split("+")
        assert int(a) + int(b) == int(row["answer"]) < 10
    answers = {row["prompt"]: row["answer"] for row in rows["train"]}
    share = sum(answers[r["prompt"]] == r["completion"] for r in rows["fit"]) / len(rows["fit"])
    # A tenth of the random answers is right.
    assert share == pytest.approx(1 - 0.9 * arithmetic.RANDOM_ANSWERS, abs=0.03)


def test_reward_is_exact_match():
    assert arithmetic.right(completions=["2", "2 "], answer=["2", "2"]) == [1.0, 0.0]


def test_program_runs_and_leaves_the_threads_alone(tmp_path, capsys):
    threads = torch.get_num_threads()
    results = arithmetic.main(str(tmp_path), fit_steps=2, steps=1)
    assert torch.get_num_threads() == threads
    assert results["steps"] == 1
    assert "mean reward of samples for 55 sums" in capsys.readouterr().out
