import pytest

pytest.importorskip("transformers")

from datasets import Dataset

from fastpo.data.records import PAIR_FIELDS, DataError
from fastpo.data.tokens import PairCollator, encode_row, tokenize_rows
from fastpo.trainers.scratch import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a"], vocab_size=300)  # One token per byte.


def row(prompt="abcdef", chosen="xyz", rejected="uv"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "row": 7}


def encode(tokenizer, max_length, **fields):
    return encode_row(row(**fields), PAIR_FIELDS, tokenizer, max_length)


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_prompt_completion_and_end(tokenizer):
    got = encode(tokenizer, 100)
    assert text(tokenizer, got["prompt_ids"]) == "<s>abcdef"
    assert text(tokenizer, got["chosen_ids"]) == "xyz</s>"
    assert not got["cut_prompt"]
    assert not got["cut_completion"]


@pytest.mark.parametrize(
    ("max_length", "prompt", "chosen"),
    [(8, "<s>def", "xyz</s>"), (5, "f", "xyz</s>"), (4, "f", "xyz"), (2, "f", "x")],
)
def test_prompt_loses_its_start_first(tokenizer, max_length, prompt, chosen):
    got = encode(tokenizer, max_length, prompt="bcdef")
    assert text(tokenizer, got["prompt_ids"]) == prompt
    assert text(tokenizer, got["chosen_ids"]) == chosen
    assert got["cut_prompt"] == (max_length < 10)
    assert got["cut_completion"] == (max_length < 5)


def test_chat_messages_go_through_the_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    say = lambda role, content: [{"role": role, "content": content}]
    fields = {"prompt": say("user", "a"), "chosen": say("assistant", "b")}
    got = encode(tokenizer, 100, **fields, rejected=say("assistant", "c"))
    assert text(tokenizer, got["prompt_ids"]) == "[user]a</s>[assistant]"
    assert text(tokenizer, got["chosen_ids"]) == "b</s>"
    with pytest.raises(DataError, match="row 7: the chat template does not put 'rejected'"):
        encode(tokenizer, 100, **fields, rejected=say("user", "c"))


def test_empty_completion_is_its_end_or_an_error(tokenizer):
    assert text(tokenizer, encode(tokenizer, 100, chosen="")["chosen_ids"]) == "</s>"
    endless = train_tokenizer(["a"], vocab_size=300)
    endless.eos_token = None
    with pytest.raises(DataError, match="row 7: field 'chosen' is empty"):
        encode(endless, 100, chosen="")


def test_report_and_batch(tokenizer):
    rows = Dataset.from_list([row(), row(prompt="a", rejected="uvwxyz")])
    tokens, report = tokenize_rows(rows, PAIR_FIELDS, tokenizer, max_length=9)
    assert report == (2, 1, 0, 9)
    batch = PairCollator(0)([tokens[0], tokens[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 9)
    assert batch["index"].tolist() == [0, 1]
    assert batch["row"].tolist() == [7, 7]
    assert (batch["labels"] >= 0).sum(1).tolist() == [4, 4, 3, 7]
    with pytest.raises(DataError, match="at least 2 tokens"):
        tokenize_rows(rows, PAIR_FIELDS, tokenizer, max_length=1)
