import copy
import inspect
import json

import pytest
import torch
from recipe_parts import QUIET, SGD, Recorder, assert_same, preferences, vowels, weights
from safetensors.torch import load_file
from tiny_rows import WORDS, make_pairs
from transformers import AutoModelForCausalLM

from fastpo import recipes
from fastpo.data.tokens import PairCollator
from fastpo.trainers import run, scratch
from fastpo.trainers.config import ConfigError
from fastpo.trainers.dpo import DPOTrainer
from fastpo.trainers.online import Extragradient, OnlineTrainer
from fastpo.trainers.rounds import OuterLoop, RoundError
from fastpo.trainers.states import restore, snapshot

OPTIONS = {
    "curry_dpo": {"samples": 4, "max_new_tokens": 12, "stages": 2},
    "egpo": {"training": {"num_train_epochs": 2}},  # The first step of two is undone.
    "dno_prct": {"min_score": 0.0, "gap": 1.0, "teacher": "chosen"},
    "raft": {"fraction": 0.5},
    "temporal_self_rewarding": {"samples": 3},
}
NAMES = [name for name in recipes.__all__ if name != "rubric_judge"]


CASES = [(name, vowels) for name in NAMES]
CASES += [(name, preferences) for name in ("dno", "egpo", "inpo", "sppo", "rebel", "xpo")]


@pytest.mark.parametrize(("name", "score"), CASES)
def test_every_recipe_runs_a_round(start, tmp_path, name, score):
    recipe = getattr(recipes, name)
    options = OPTIONS.get(name, {})
    if "rounds" in inspect.signature(recipe).parameters:
        options = options | {"rounds": 1}
    history, model = start(recipe, score, **options)
    assert len(history) == 1
    assert torch.isfinite(torch.tensor(history[0]["loss"]))
    initial = json.loads((tmp_path / "run" / "states" / "states.json").read_text())["names"]
    assert initial["latest"] != initial["initial"], "the model has changed"
    assert_same(weights(tmp_path / "run"), {n: p for n, p in model.named_parameters()})


def test_mean_score_rises(tmp_path):
    """Two rounds of iterative DPO on the demonstration's size of model."""
    texts = [" ".join(pair.values()) for pair in make_pairs(50)]
    sizes = {"vocab_size": 300, "hidden_size": 128, "layers": 4, "heads": 2}
    model = scratch.init_model(tmp_path / "init", texts, **sizes)
    tokenizer = run.load_tokenizer(str(tmp_path / "init"))
    prompts = [" ".join(WORDS[i : i + 3]) for i in range(12)]
    options = {"samples": 8, "max_new_tokens": 8}
    training = {"learning_rate": 3e-3, "num_train_epochs": 4, "per_device_train_batch_size": 4}
    history = recipes.iterative_dpo(
        model, tokenizer, prompts, vowels, output=tmp_path / "run", rounds=2, reference="current",
        training=QUIET | training, **options,
    )  # fmt: skip
    after = OuterLoop(
        model, tokenizer, prompts, vowels, output=tmp_path / "after", training=QUIET, **options
    )
    for _ in after.rounds(1):
        after.score(after.sample())
    first, second, third = (m["score"] for m in (*history, *after.history))
    assert second > 1.5 * first
    assert third > 1.5 * second


class StopError(Exception):
    pass


def test_a_run_stopped_in_its_second_round_goes_on_there(start, tmp_path, monkeypatch):
    """Stopped while scoring, then while training: nothing is sampled, scored or trained twice."""
    training = {"save_strategy": "steps", "save_steps": 1}
    options = {"rounds": 2, "training": training, "prompts": make_pairs(8), "samples": 3}
    whole = Recorder()
    want, _ = start(recipes.sppo, whole, "whole", **options)
    steps = want[1]["rows"] // 4 + (want[1]["rows"] % 4 > 0)
    assert steps > 1

    first = Recorder(fail_at=1)
    with pytest.raises(ConnectionError):
        start(recipes.sppo, first, **options)
    with pytest.raises(RoundError, match=r"holds a run\. Pass resume=True"):
        start(recipes.sppo, first, **options)
    with pytest.raises(RoundError, match=r"other beta, seed\. Restore"):
        start(recipes.sppo, first, **options, resume=True, seed=1, beta=0.1)
    samples = sorted((tmp_path / "run").glob("round-*/*samples*"))
    written = [path.stat().st_mtime_ns for path in samples]
    assert len(written) == 2

    second, taken, plain = Recorder(), [], DPOTrainer.compute_loss

    def counted(self, *args, **kwargs):
        taken.append(self.state.global_step)
        if stops and self.state.global_step == 1:
            raise StopError
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(DPOTrainer, "compute_loss", counted)
    stops = True
    with pytest.raises(StopError):
        start(recipes.sppo, second, **options, resume=True)
    assert taken == [0, 1]
    assert first.calls + second.calls == whole.calls
    stops, third = False, Recorder()
    got, _ = start(recipes.sppo, third, **options, resume=True)
    assert taken == [0, 1, *range(1, steps)]
    assert third.calls == []
    assert [path.stat().st_mtime_ns for path in samples] == written
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    for metrics in (*got, *want):
        metrics.pop("seconds")
    assert got[0] == want[0]
    again, _ = start(recipes.sppo, third, **options, resume=True)
    assert len(again) == 2


@pytest.mark.parametrize(
    ("recipe", "options", "state"),
    [
        (recipes.dno, {}, "current"),
        (recipes.iterative_dpo, {}, "initial"),
        (recipes.iterative_dpo, {"reference": "current"}, "current"),
    ],
    ids=["dno", "dpo-initial", "dpo-current"],
)
def test_the_reference_is_the_state_that_the_method_names(start, streams, recipe, options, state):
    start(recipe, rounds=2, **options)
    first, second = streams
    assert torch.equal(first["sums"]["initial"], first["sums"]["current"])
    assert (second["sums"]["initial"] != second["sums"]["current"]).all()
    for i, side in enumerate(("chosen", "rejected")):
        assert torch.equal(second["columns"][f"ref_{side}"], second["sums"][state][:, i])


def test_each_stage_of_curry_dpo_has_the_model_of_the_last_as_reference(start, streams):
    ranks = lambda prompts, responses: torch.arange(4.0).expand(len(prompts), 4)
    start(recipes.curry_dpo, ranks, samples=4)
    assert len(streams) == 3
    for stage, seen in enumerate(streams):
        initial, current = seen["sums"]["initial"], seen["sums"]["current"]
        assert (initial != current).all() if stage else torch.equal(initial, current)
        for i, side in enumerate(("chosen", "rejected")):
            assert torch.equal(seen["columns"][f"ref_{side}"], current[:, i])
    with pytest.raises(RoundError, match=r"stages: expected pairs in each, got \[4, 0, 0\]"):
        start(recipes.curry_dpo, lambda *given: ranks(*given)[:, :2], output="two", samples=2)


def test_history_shifts_by_a_round(start, streams, tmp_path):
    """In the third round of MNPO the opponents are the models after rounds two and one."""
    index, latest = tmp_path / "run" / "states" / "states.json", []
    note = lambda metrics: latest.append(json.loads(index.read_text())["names"]["latest"])
    start(recipes.mnpo, rounds=3, opponents=2, on_round=note)
    initial = json.loads(index.read_text())["names"]["initial"]
    assert [seen["history"] for seen in streams] == [["history0"], *[["history0", "history1"]] * 2]
    assert [seen["names"]["history0"] for seen in streams] == [initial, *latest[:2]]
    assert [seen["names"].get("history1") for seen in streams] == [None, initial, latest[0]]
    history = streams[2]["columns"]["history_chosen"]
    assert torch.equal(history[:, 0], streams[2]["sums"]["current"][:, 0])
    assert (history[:, 1] != history[:, 0]).all()


def test_extra_is_the_greedy_or_the_initial_response(start, streams):
    start(recipes.selm, rounds=1)
    (seen,) = streams
    assert torch.equal(seen["columns"]["ref_extra"], seen["sums"]["initial"][:, 2])


def test_apo_extrapolates_the_parameters(start, model_folder):
    """alpha 0 is iterative DPO; else theta_hat + alpha (theta_hat - the theta_hat before)."""
    _, plain = start(recipes.iterative_dpo, output="plain", rounds=2, reference="current")
    _, zero = start(recipes.apo_momentum, output="zero", rounds=2, alpha=0.0)
    assert_same(snapshot(zero), snapshot(plain))
    _, one = start(recipes.iterative_dpo, output="one", rounds=1, reference="current")
    _, ahead = start(recipes.apo_momentum, output="ahead", rounds=1, alpha=0.5)
    initial = AutoModelForCausalLM.from_pretrained(model_folder)
    want = {
        name: hat + 0.5 * (hat - start)
        for (name, hat), start in zip(one.named_parameters(), initial.parameters(), strict=True)
    }
    assert_same(snapshot(ahead), want)


def pair_rows(seed):
    """Four rows of random tokens and win rates."""
    draw = torch.Generator().manual_seed(seed)
    ids = lambda: torch.randint(3, 200, (4,), generator=draw).tolist()
    rate = lambda: torch.rand((), generator=draw).item()
    return [
        {
            "prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids(), "row": i, "index": i,
            "chosen_win_rates": rate(), "rejected_win_rates": rate(),
        }
        for i in range(4)
    ]  # fmt: skip


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.0}),
}


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_extragradient_step(model_folder, tmp_path, optim):
    """The second step is theta_t - s g(theta_t) to the bit, on rows made from the half step."""
    rate, rows, halves = 0.05, [], []
    steps = Extragradient()

    def experience(index, seed):
        halves.append(steps.half)
        rows.append(pair_rows(seed))
        return rows[-1]

    def arguments(name):
        options = QUIET | SGD | {"optim_args": "momentum=0.9" if optim == "momentum" else None}
        options |= {"optim": "adamw_torch"} if optim == "adamw" else {}
        options |= {"learning_rate": rate, "max_steps": 4, "save_strategy": "no", "report_to": []}
        return run.TrainingArguments(tmp_path / name, remove_unused_columns=False, **options)

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    subject = OnlineTrainer(
        model, arguments("subject"), experience=experience, pad_id=0, loss="egpo",
        train_dataset=[{"index": i} for i in range(8)], callbacks=[steps],
    )  # fmt: skip
    subject.train()

    plain = AutoModelForCausalLM.from_pretrained(model_folder)
    by_hand = DPOTrainer(plain, arguments("plain"), loss="egpo")
    make, settings = OPTIMIZERS[optim]
    optimizer = make(plain.parameters(), lr=rate, **settings)
    for first, second in ((0, 1), (2, 3)):
        theta, moments = snapshot(plain), copy.deepcopy(optimizer.state_dict())
        for number in (first, second):
            batch = PairCollator(0)(rows[number])
            plain.train()
            by_hand.compute_loss(plain, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            if number == first:
                assert_same(halves[second], snapshot(plain))
                restore(plain, theta)
                optimizer.load_state_dict(moments)
    assert halves[0] is halves[2] is None
    assert_same(snapshot(model), snapshot(plain))


def test_extragradient_does_not_save_between_its_steps(start):
    with pytest.raises(ConfigError, match="save_steps: expected an even number, got 3"):
        start(recipes.egpo, training={"save_strategy": "steps", "save_steps": 3})


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_states_of_an_adapter_are_the_adapter(start, model_folder, tmp_path, streams):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear"))
    start(recipes.inpo, model=model, rounds=2)
    stored = list((tmp_path / "run" / "states").glob("*.safetensors"))
    assert all("lora_" in name for path in stored for name in load_file(path))
    assert all(path.stat().st_size < 100_000 for path in stored)
    second = streams[1]
    for i, side in enumerate(("chosen", "rejected")):
        assert torch.equal(second["columns"][f"ref_{side}"], second["sums"]["initial"][:, i])
        history = second["columns"][f"history_{side}"]
        assert torch.equal(history[:, 0], second["sums"]["current"][:, i])


def test_replay_brings_rows_of_the_last_rounds(start, streams):
    options = OPTIONS["dno_prct"] | {"replay": (0.5, 0.25), "rounds": 3}
    history, _ = start(recipes.dno_prct, **options)
    assert len(history) == 3
    counts = [len(seen["columns"]["row"]) for seen in streams]
    assert counts == [metrics["rows"] for metrics in history]
    assert torch.isfinite(streams[2]["columns"]["ref_chosen"]).all()


def test_the_model_judges_itself(start, model_folder):
    """Points are read from what the model writes, nothing readable is NaN and gives no pair."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = run.load_tokenizer(model_folder)
    points = lambda text: float(len(text) % 6)
    judge = recipes.rubric_judge(model, tokenizer, parse=points, votes=2, max_new_tokens=3)
    scores = judge(["red", "blue"], [[" cat", " dog"], [" house", " a"]])
    assert scores.shape == (2, 2)
    assert ((scores >= 0) & (scores <= 5)).all()
    assert torch.equal(scores, judge(["red", "blue"], [[" cat", " dog"], [" house", " a"]]))
    history, _ = start(recipes.self_rewarding, judge, rounds=1, samples=3)
    assert history[0]["rows"] > 0
    with pytest.raises(RoundError, match="round 0: no pairs to train on"):
        start(recipes.self_rewarding, None, output="none", rounds=1)


def test_wrong_scores_and_prompts_are_named(start):
    wrong = lambda prompts, responses: torch.zeros(3, 2)
    with pytest.raises(RoundError, match=r"score: expected \[4, 2\] rewards or \[4, 2, 2\] pref.*"):
        start(recipes.sppo, wrong)
    with pytest.raises(RoundError, match="score: this recipe needs a function"):
        start(recipes.sppo, None, output="none")
    with pytest.raises(RoundError, match="prompts: expected rows with prompt, chosen, rejected"):
        start(recipes.selm, prompts=["red", "blue"], output="other")
    with pytest.raises(ConfigError, match="training: seed is set by the loop"):
        start(recipes.sppo, training={"seed": 1}, output="third")
    with pytest.raises(TypeError, match="unexpected keyword argument 'gamma'"):
        start(recipes.sppo, gamma=1.0, output="fourth")
