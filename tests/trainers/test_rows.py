"""From a file to the batches of a run: columns are used or named, what is cut is counted."""

import dataclasses

import pytest
import torch
from tiny_rows import make_pairs, write_jsonl

pytest.importorskip("transformers")

from fastpo import losses
from fastpo.data.errors import DataError
from fastpo.data.formats import COMPLETION_FIELDS, PAIR_FIELDS
from fastpo.data.records import load_rows
from fastpo.data.tokens import PairCollator
from fastpo.inputs import inputs_of
from fastpo.trainers import config as configs
from fastpo.trainers import dpo, run
from fastpo.trainers.grpo_batches import GroupCollator
from fastpo.trainers.grpo_rollouts import read_rows
from fastpo.trainers.rows import load_data, pair_columns

TEMPLATE = (
    "{% if tools %}{{ tools }}{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
WITH_COLUMNS = [name for name in dpo.pair_losses() if dpo.columns_of(name)]


def config(options, cls=configs.DPOConfig, **change):
    return configs.build(cls, options, change)


@pytest.fixture
def tokenizer(options):
    found = run.load_tokenizer(options["model"])
    found.chat_template = TEMPLATE
    return found


def test_every_column_that_a_loss_takes_reaches_its_trainer(options, tokenizer, tmp_path):
    """Over all losses by name, from one file with the columns of them all."""
    taken = {}
    for loss in WITH_COLUMNS:
        inputs = inputs_of(getattr(losses, loss))
        columns = dpo.columns_of(loss) - {"extra_ids"}
        taken[loss] = {name: inputs[name].is_sequence for name in columns}
    lists = {name for columns in taken.values() for name, is_list in columns.items() if is_list}
    names = sorted({name for columns in taken.values() for name in columns})
    rows = make_pairs(6)
    for i, row in enumerate(rows):
        row["extra"] = " red"
        row |= {n: [i + k, i - k] if n in lists else i + k for k, n in enumerate(names)}
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    whole = config(options, data=data)
    for loss, columns in taken.items():
        found = pair_columns(dataclasses.replace(whole, loss=loss))
        assert found.numbers == columns, loss
        assert found.known == (), loss
        assert ("extra" in found.fields) == ("extra_ids" in dpo.columns_of(loss)), loss
    every = {name: name in lists for name in names}
    fields = (*PAIR_FIELDS, "extra")
    part, _ = load_data(config(options, data=data, eval_share=0), fields, tokenizer, every)
    batch = PairCollator(0)([part[i] for i in range(6)])
    number = torch.arange(6.0)
    for k, name in enumerate(names):
        expected = torch.stack([number + k, number - k], 1) if name in lists else number + k
        assert torch.equal(batch[name], expected), name
    assert len(batch["labels"]) == 3 * 6


def test_a_null_in_a_needed_column_names_the_row(options, tmp_path):
    """Wherever it is: in the first row, by which the columns are chosen, or in a later one."""
    for i in (0, 2):
        rows = [row | {"chosen_scores": 1.0, "rejected_scores": 0.0} for row in make_pairs(4)]
        rows[i]["chosen_scores"] = None
        data = write_jsonl(tmp_path / f"null{i}.jsonl", rows)
        where = rf"null{i}\.jsonl, line {i + 1}: .*chosen_scores"
        found = config(options, data=data, loss="rebel")
        with pytest.raises(DataError, match=where) as caught:
            load_rows(data, PAIR_FIELDS, numbers=pair_columns(found).numbers)
        assert "chosen_scores=chosen_scores" not in str(caught.value)


def test_a_loss_uses_what_is_in_the_file(options, tmp_path, capsys):
    results = []
    for scores in ((1.0, 0.0), (0.0, 1.0)):
        rows = [
            row | {"chosen_scores": scores[0], "rejected_scores": scores[1], "id": 3}
            for row in make_pairs(24)
        ]
        data = write_jsonl(tmp_path / f"{scores[0]}.jsonl", rows)
        output = str(tmp_path / f"run-{scores[0]}")
        found = run.train_dpo(config(options, data=data, loss="rebel", output=output, max_steps=1))
        results.append(found["after"]["eval_loss"])
    assert results[0] != results[1]
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("not used: id") == 2


def test_a_column_under_another_name_is_pointed_at(options, tmp_path):
    rows = [row | {"score_chosen": 1.0, "score_rejected": 0.0} for row in make_pairs(8)]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    names = {"chosen_scores": "score_chosen", "rejected_scores": "score_rejected"}
    with pytest.raises(configs.ConfigError, match=r"rebel needs .*chosen_scores=score_chosen"):
        run.train_dpo(config(options, data=data, loss="rebel", model="missing"))
    found = pair_columns(config(options, data=data, loss="rebel", columns=names))
    assert found.numbers == {"chosen_scores": False, "rejected_scores": False}


def test_what_is_not_used_is_named_once(options, tokenizer, tmp_path, capsys):
    rows = [row | {"tools": ["f"], "systems": "s", "id": i} for i, row in enumerate(make_pairs(9))]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    load_data(config(options, data=data), PAIR_FIELDS, tokenizer)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("not used")] == [
        "not used: id, systems, tools; for system give --columns system=systems"
    ]
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["chosen"]}],
            "chat_template_kwargs": {"depth": 1},
            "tools": [{"name": "f"}],
        }
        for row in rows
    ]
    data = write_jsonl(tmp_path / "chats.jsonl", chats)
    rows, _ = load_data(config(options, data=data), COMPLETION_FIELDS, tokenizer)
    assert tokenizer.decode(rows[0]["prompt_ids"]).startswith("[{'name': 'f'}][user]")
    assert capsys.readouterr().out.splitlines()[-1] == (
        "not used: chat_template_kwargs.depth (the chat template has none)"
    )


def test_log_probs_of_the_reference_from_the_file(options, tmp_path, capsys, monkeypatch):
    rows = [row | {"ref_chosen": -9.0, "ref_rejected": -7.0} for row in make_pairs(24)]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    change = {"data": data, "max_steps": 1}
    seen = []
    plain = dpo.DPOTrainer.pair_loss
    record = lambda self, given, inputs: seen.append(given) or plain(self, given, inputs)
    monkeypatch.setattr(dpo.DPOTrainer, "pair_loss", record)
    run.train_dpo(config(options, **change))
    assert "reference: the columns ref_chosen, ref_rejected" in capsys.readouterr().out
    assert seen[0]["ref_chosen"].tolist() == [-9.0] * len(seen[0]["ref_chosen"])
    # A reference that is asked for is computed, and the columns are named.
    found = pair_columns(config(options, **change, reference="copy"))
    assert found.numbers == {}
    with pytest.raises(DataError, match=r"ref_chosen: is of whole sequences, of which .* are cut"):
        run.train_dpo(config(options, **change, max_length=6, output=str(tmp_path / "cut")))
    for row in rows:
        del row["ref_rejected"]
    data = write_jsonl(tmp_path / "half.jsonl", rows)
    with pytest.raises(configs.ConfigError, match="have ref_chosen, but not ref_rejected"):
        pair_columns(config(options, data=data))


def test_cuts_are_counted(options, tokenizer, tmp_path, capsys):
    """In one line, for pairs, completions, groups and prompts to sample from."""
    long = {"prompt": "a" * 40, "chosen": "b" * 30, "rejected": "c" * 30, "completion": "b" * 30}
    same = {"prompt": "a", "chosen": "b", "rejected": "b", "completion": "b"}
    short = {"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b"}
    group = {"completions": ["b" * 30, "c"], "rewards": [0, 1]}
    rows = [row | group for row in (long, same, short)]
    change = {
        "data": write_jsonl(tmp_path / "rows.jsonl", rows), "max_length": 20, "eval_share": 0.0,
    }  # fmt: skip
    load_data(config(options, **change), PAIR_FIELDS, tokenizer)
    load_data(config(options, configs.SFTConfig, **change), COMPLETION_FIELDS, tokenizer)
    run.load_rollouts(config(options, configs.GRPOConfig, **change), tokenizer)
    online = {"reward": "grpo_parts:vowels", "max_new_tokens": 4, "samples": 2}
    run.load_rollouts(config(options, configs.GRPOConfig, **change, **online), tokenizer)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("train")]
    cut = "prompts cut in 1, completions cut in 1"
    assert lines == [
        f"train: 2 rows, longest 20 tokens, {cut}, left out as chosen equals rejected: 1",
        f"train: 3 rows, longest 20 tokens, {cut}",
        "train: 3 groups, 6 completions, 0 groups of equal rewards, longest 20 tokens, "
        "prompts cut in 1, completions cut in 3",
        "train: 3 prompts, 2 completions each, prompts cut in 1",
    ]


def test_completions_without_a_reward_are_counted(options, tokenizer, tmp_path, capsys):
    group = {"prompt": "a", "completions": ["b", "c", "d"], "rewards": [0, None, 1]}
    data = write_jsonl(tmp_path / "rows.jsonl", [group] * 20)
    given = config(options, configs.GRPOConfig, data=data, eval_share=0.0)
    groups, _ = run.load_rollouts(given, tokenizer)
    counts = "0 groups of equal rewards, 20 completions without a reward, longest"
    assert f"train: 20 groups, 60 completions, {counts}" in capsys.readouterr().out
    batch = GroupCollator(0)(groups.groups[:2], [torch.zeros(3)] * 2)
    torch.testing.assert_close(batch["metrics"]["rewards/missing"], torch.tensor(1 / 3))


def test_groups_take_columns_and_templates(options, tokenizer, tmp_path, capsys):
    row = {
        "question": "red", "system": "be brief", "tools": [{"name": "f"}], "answer": "blue",
        "completions": [[{"role": "assistant", "content": "a"}], {"from": "gpt", "value": "b"}],
        "rewards": [0, 1],
    }  # fmt: skip
    data = write_jsonl(tmp_path / "rows.jsonl", [row])
    names = {"prompt": "question"}
    found = config(options, configs.GRPOConfig, data=data, columns=names, eval_share=0.0)
    groups, _ = run.load_rollouts(found, tokenizer)
    group = groups.groups[0]
    prompt = "[{'name': 'f'}][system]be brief</s>[user]red</s>[assistant]"
    assert tokenizer.decode(group.prompt_ids) == prompt
    assert tokenizer.batch_decode(group.ids) == ["a</s>", "b</s>"]
    assert capsys.readouterr().out.splitlines()[-1] == "not used: answer"
    online = {"reward": "grpo_parts:vowels", "samples": 2, "eval_share": 0.0}
    found = config(options, configs.GRPOConfig, data=data, columns=names, **online)
    groups, _ = run.load_rollouts(found, tokenizer)
    assert tokenizer.decode(groups.prompt_ids[0]) == prompt
    assert groups.columns == ["answer", "rewards", "tools"]
    assert capsys.readouterr().out.splitlines()[-1] == "not used: completions"
    with pytest.raises(DataError, match="--columns prompt=question"):
        read_rows(data)


def test_a_stream_is_read_as_far_as_it_is_needed(options, tokenizer, tmp_path):
    data = write_jsonl(tmp_path / "pairs.jsonl", make_pairs(40))
    found = config(options, data=data, streaming=True, max_steps=2, batch_size=3, eval_share=0.25)
    train, held = load_data(found, PAIR_FIELDS, tokenizer)
    assert len(train) >= 6
    assert len(train) + len(held) < 12
    with pytest.raises(configs.ConfigError, match="streaming: give limit or max_steps"):
        load_data(config(options, data=data, streaming=True, max_steps=-1), PAIR_FIELDS, tokenizer)
