import copy
import inspect
import json
import shutil
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from tiny_rows import WORDS, make_pairs
from transformers import AutoModelForCausalLM

from fastpo import recipes
from fastpo.data.pairs import first_unless_worse
from fastpo.data.records import DataError
from fastpo.data.tokens import PairCollator
from fastpo.trainers import reference, run, sampling, scratch
from fastpo.trainers.base import NonFiniteLossError
from fastpo.trainers.config import ConfigError
from fastpo.trainers.dpo import DPOTrainer
from fastpo.trainers.online import Extragradient, OnlineTrainer
from fastpo.trainers.rounds import OuterLoop, RoundError
from fastpo.trainers.scoring import as_scores
from fastpo.trainers.states import restore, snapshot

QUIET = {"use_cpu": True, "disable_tqdm": True}
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def vowels(prompts, responses):
    """Rewards [B, K]: vowels in each response."""
    return torch.tensor([[sum(c in "aeiou" for c in r) for r in group] for group in responses]) / 1


def preferences(prompts, responses):
    scores = vowels(prompts, responses)
    return torch.sigmoid(scores[:, :, None] - scores[:, None, :])


class Recorder:
    """A scorer that notes what it is asked."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    def __call__(self, prompts, responses):
        if len(self.calls) == self.fail_at:
            raise ConnectionError("the judge is away")
        self.calls.append(responses)
        return vowels(prompts, responses)


@pytest.fixture
def start(model_folder, tmp_path):
    """Runs a recipe on the tiny model; its history and the model."""
    tokenizer = run.load_tokenizer(model_folder)

    def run_recipe(recipe, score=vowels, output="run", model=None, **options):
        model = model or AutoModelForCausalLM.from_pretrained(model_folder)
        training = QUIET | {"learning_rate": 1e-2, "per_device_train_batch_size": 4}
        options = {"max_new_tokens": 5, "samples": 2, "sample_batch_size": 3} | options
        options["training"] = training | options.get("training", {})
        prompts = options.pop("prompts", make_pairs(4))
        history = recipe(model, tokenizer, prompts, score, output=tmp_path / output, **options)
        return history, model

    return run_recipe


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


OPTIONS = {
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


@pytest.fixture
def streams(monkeypatch):
    """Per training: the loop's states by name, the streams asked for, and their columns."""
    seen = []
    plain = OuterLoop.add_streams

    def record(self, trainer, rows, ref, history):
        sums = {}
        for name in ("initial", "current"):
            with self.states.using(name):
                sums[name] = reference.compute(trainer, rows)
        found = plain(self, trainer, rows, ref, history)
        columns = {n: torch.tensor(found[n]) for n in found.column_names if "_ids" not in n}
        names = {name: self.states.names[name] for name in history if name != "current"}
        seen.append({"sums": sums, "columns": columns, "names": names, "history": history})
        return found

    monkeypatch.setattr(OuterLoop, "add_streams", record)
    return seen


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


NAN = float("nan")


@pytest.mark.parametrize("name", ["iterative_dpo", "xpo"])
def test_mixed_precision_survives_the_rounds(start, name):
    """What accelerate puts in the place of forward is gone afterwards, the fused head is not."""
    options = {"rounds": 2} if name == "iterative_dpo" else {}
    history, model = start(getattr(recipes, name), training={"bf16": True}, **options)
    assert torch.isfinite(torch.tensor(history[-1]["loss"]))
    assert not {"forward", "_original_forward"} & vars(model).keys()
    ids = torch.tensor([[5, 6, 7]])
    assert model(input_ids=ids, labels=ids, statistic="logprobs").dtype == torch.float32


def test_sampling_is_from_the_policy_whatever_its_generation_settings(model_folder):
    tokenizer = run.load_tokenizer(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder).train()
    ask = lambda: sampling.generate(
        model, tokenizer, [[1, 40, 41], [1, 42]], 4, 0, max_new_tokens=8, do_sample=True
    )
    want, end = ask(), model.generation_config.eos_token_id
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.temperature = 0.1
    model.generation_config.eos_token_id = [end, want[0][0][3]]
    found = ask()
    assert found[0][0] == want[0][0][:4], "the model's own end of sequence counts"
    for ids, whole in zip(chain(*found), chain(*want), strict=True):
        assert ids == whole[: len(ids)]
    with pytest.raises(IndexError):
        sampling.generate(model, tokenizer, [[10**6]], 1, 0, max_new_tokens=1)
    assert model.training
    assert model.generation_config.repetition_penalty == 5.0


def test_scores_may_be_integers_lists_and_arrays(start):
    want, _ = start(recipes.online_dpo, output="want")
    integers = lambda *given: vowels(*given).long().tolist()
    got, _ = start(recipes.online_dpo, integers)
    assert (got[0]["loss"], got[0]["score"]) == (want[0]["loss"], want[0]["score"])
    samples = sampling.Samples(["red"] * 2, [[5]] * 2, [[[6], [7]]] * 2, [["a", "b"]] * 2, [])
    rewards = torch.tensor([[1.0, 2.0], [NAN, 4.0]])
    for found in (rewards, rewards.numpy(), rewards.tolist(), list(rewards), [*rewards.numpy()]):
        assert torch.equal(as_scores(found, samples).nan_to_num(), rewards.nan_to_num())
    for found in (None, [[1.0], [1.0, 2.0]], [["a", "b"]] * 2, [[1.0, None], [1.0, 2.0]]):
        with pytest.raises(RoundError, match=r"expected \[2, 2\] rewards .*no array .* NaN for"):
            as_scores(found, samples)


def test_unscored_responses_are_left_out_of_online_training(start):
    def score(prompts, responses, lost=1):
        scores = vowels(prompts, responses)
        scores[:lost, 0] = NAN
        return scores

    two_steps = {"num_train_epochs": 2}
    history, _ = start(recipes.egpo, score, training=two_steps, output="egpo")
    assert torch.isfinite(torch.tensor(history[0]["loss"]))
    for name in ("egpo", "online_dpo", "xpo"):
        with pytest.raises(DataError, match="no pairs to train on in step 1"):
            start(
                getattr(recipes, name), lambda *given: score(*given, lost=None),
                training=two_steps, output=f"no-{name}",
            )  # fmt: skip


@pytest.mark.parametrize("diagonal", [0.0, NAN])
def test_sppo_counts_a_response_against_itself_as_half(start, streams, diagonal):
    start(recipes.sppo, preferences, output="half", rounds=1)
    score = lambda *given: preferences(*given).diagonal_scatter(
        torch.full((4, 2), diagonal), dim1=1, dim2=2
    )
    start(recipes.sppo, score, output="other", rounds=1)
    half, other = (seen["columns"] for seen in streams)
    for name in ("chosen_win_rates", "rejected_win_rates", "row"):
        assert torch.equal(half[name], other[name])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_the_reference_of_online_training_is_the_adapter_as_it_came(start, model_folder):
    """Not the base model without it: the loss of the first step is log 2."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=draw))
    training = {"max_steps": 1, "learning_rate": 0.0}
    history, _ = start(recipes.online_dpo, model=model, training=training, beta=10.0)
    assert history[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert history[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)


def test_the_reference_of_later_online_rounds_is_the_initial_model(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = run.load_tokenizer(model_folder)
    loop = OuterLoop(
        model, tokenizer, make_pairs(4), vowels, output=tmp_path / "run", max_new_tokens=4,
        training=QUIET | {"learning_rate": 1e-2},
    )  # fmt: skip

    def experience(index, seed):
        samples = loop.respond(index, seed, 2)
        pairs = first_unless_worse(loop.judge(samples))
        return samples.rows(pairs, keep_identical=True)

    for _ in loop.rounds(2):
        loop.train_online(experience, "dpo", beta=1.0)
    assert abs(loop.history[0]["rewards/chosen"]) < 1e-5
    assert abs(loop.history[1]["rewards/chosen"]) > 1e-3


def test_the_loss_of_the_last_step_is_looked_at(start, model_folder):
    """A model that became NaN after the last log does not become a state."""
    options = {"prompts": make_pairs(12), "rounds": 1}
    history, _ = start(recipes.iterative_dpo, **options)
    assert history[0]["epoch"] == 1.0
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    training = {"learning_rate": 1e38, "max_grad_norm": 0.0, "optim": "sgd"}
    with pytest.raises(NonFiniteLossError):
        start(recipes.iterative_dpo, model=model, training=training, output="nan", **options)


def test_extragradient_saves_whole_pairs_of_steps_only(start, tmp_path):
    with pytest.raises(ConfigError, match=r"expected 2 steps or more, .* got 1"):
        start(recipes.egpo, output="one")
    start(recipes.egpo, training={"save_strategy": "epoch", "num_train_epochs": 4})
    found = sorted(path.name for path in (tmp_path / "run").glob("round-0/*/checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-4"]


def test_wrong_prompts_are_named(start):
    cases = {
        "a single text": ("red", ConfigError),
        "there are no prompts": ([], RoundError),
        "a row with the field prompt; got {'question'": ([{"question": "red"}], RoundError),
        "got None": ([None], RoundError),
    }
    for i, (match, (prompts, error)) in enumerate(cases.items()):
        for recipe in (recipes.iterative_dpo, recipes.online_dpo):
            with pytest.raises(error, match=match):
                start(recipe, prompts=prompts, output=f"{recipe.__name__}-{i}")
    with pytest.raises(ConfigError, match="samples: expected at least 1 per prompt, got 0"):
        start(recipes.iterative_dpo, samples=0)


def test_messages_and_text_in_one_row_and_empty_prompts_are_named(model_folder, tmp_path):
    tokenizer = run.load_tokenizer(model_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [{"prompt": [{"role": "user", "content": "red"}], "chosen": "blue"}]
    with pytest.raises(DataError, match="row 0: the prompt is a list of messages, 'chosen' is not"):
        sampling.encode_responses(rows, ["chosen"], tokenizer, 20)
    chat = [{"role": "user", "content": ""}]
    with pytest.raises(DataError, match="prompt 1: has no token to begin with"):
        sampling.encode_prompts(["red", chat], tokenizer, 20)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    with pytest.raises(ConfigError, match="needs texts, not lists of messages"):
        recipes.evolve(model, tokenizer, [rows[0]["prompt"]], vowels, output=tmp_path / "chat")
    tokenizer.pad_token = None
    with pytest.raises(ConfigError, match=r"padding token\. Give it one: tokenizer\.pad_token ="):
        recipes.sppo(model, tokenizer, ["red"], vowels, output=tmp_path / "run")


def test_a_resumed_round_must_have_the_prompts_it_was_sampled_for(start):
    first = lambda number: make_pairs(4)
    with pytest.raises(ConnectionError):
        start(recipes.sppo, Recorder(fail_at=0), prompts=first, rounds=1)
    with pytest.raises(RoundError, match="round 0: it was interrupted after sampling, with other"):
        start(recipes.sppo, prompts=lambda number: make_pairs(4, 1), rounds=1, resume=True)
    history, _ = start(recipes.sppo, prompts=first, rounds=1, resume=True)
    assert len(history) == 1


def test_a_round_without_pairs_has_a_way_on(start, tmp_path):
    """Scored anew after its folder was deleted, or saved as it is by fewer rounds."""
    calls = []

    def score(prompts, responses):
        calls.append(responses)
        return vowels(prompts, responses) * (len(calls) != 2)

    with pytest.raises(RoundError, match=r"round 1: no pairs .* delete .*round-1 .* rounds=1,"):
        start(recipes.sppo, score, rounds=2)
    start(recipes.sppo, score, rounds=1, resume=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "run" / "round-1")
    history, _ = start(recipes.sppo, score, rounds=2, resume=True)
    assert len(history) == 2
    assert calls[1] == calls[2]


def test_rounds_without_their_states_are_not_taken_up(start, tmp_path):
    start(recipes.sppo, rounds=1)
    shutil.rmtree(tmp_path / "run" / "states")
    with pytest.raises(RoundError, match="holds rounds of a run without its states"):
        start(recipes.sppo, rounds=1, resume=True)
