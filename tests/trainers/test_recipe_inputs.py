"""Recipes on numbers, prompts and folders as users have them."""

import shutil
from itertools import chain

import pytest
import torch
from recipe_parts import QUIET, Recorder, preferences, vowels
from tiny_rows import make_pairs
from transformers import AutoModelForCausalLM

from fastpo import recipes
from fastpo.data.pairs import first_unless_worse
from fastpo.data.records import DataError
from fastpo.trainers import run, sampling
from fastpo.trainers.base import NonFiniteLossError
from fastpo.trainers.config import ConfigError
from fastpo.trainers.rounds import OuterLoop, RoundError
from fastpo.trainers.scoring import as_scores

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
    with pytest.raises(DataError, match="row 0: text and messages are mixed"):
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
