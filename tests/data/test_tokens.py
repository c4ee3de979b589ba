import copy
import itertools

import pytest

pytest.importorskip("transformers")

from datasets import Dataset
from tiny_tokenizers import CHAT, KINDS, LLAMA_2, make

from fastpo.data import tokens as tokens_module
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
    ("max_length", "prompt", "chosen", "rejected"),
    [
        (10, "<s>bcdef", "xyz</s>", "u</s>"),
        (9, "<s>cdef", "xyz</s>", "u</s>"),  # a long prompt gives way to completions
        (8, "<s>def", "xyz</s>", "u</s>"),
        (7, "<s>def", "xyz", "u</s>"),  # down to half; then each completion is cut by itself
        (4, "<s>f", "xy", "u</s>"),
        (2, "f", "x", "u"),
    ],
)
def test_prompts_keep_half(tokenizer, max_length, prompt, chosen, rejected):
    got = encode(tokenizer, max_length, prompt="bcdef", chosen="xyz", rejected="u")
    found = [text(tokenizer, got[f"{field}_ids"]) for field in PAIR_FIELDS]
    assert found == [prompt, chosen, rejected]
    assert got["cut_prompt"] == (max_length < 10)
    assert got["cut_completion"] == (max_length < 8)
    assert got["tokens"] == max_length


def test_no_prompt_loses_more_than_half(tokenizer):
    """Over all lengths: a prompt is whole or has its half, and nothing is cut without a cause."""
    for prompt, completion, max_length in itertools.product(range(1, 12), range(12), range(2, 14)):
        got = encode(tokenizer, max_length, prompt="a" * (prompt - 1), chosen="b" * completion)
        kept, answer = len(got["prompt_ids"]), len(got["chosen_ids"])
        assert kept >= min(prompt, max_length / 2)
        assert kept + answer <= max_length
        if prompt <= max_length / 2:
            assert (kept, answer) == (prompt, min(completion + 1, max_length - prompt))
        if kept < prompt or answer <= completion:
            assert got["tokens"] == max_length
        assert got["cut_prompt"] == (kept < prompt)


def test_pairs_that_are_the_same_are_left_out(tokenizer):
    rows = [row(), row(rejected="xyz"), row(chosen="xyzabcdef", rejected="xyzabcghi")]
    tokens, report = tokenize_rows(Dataset.from_list(rows), PAIR_FIELDS, tokenizer, max_length=12)
    assert (len(tokens), list(tokens["index"]), report.identical) == (1, [0], 2)
    assert "left out as chosen equals rejected: 2" in str(report)
    with pytest.raises(DataError, match="in all 1 rows chosen and rejected are the same"):
        tokenize_rows(Dataset.from_list(rows[1:2]), PAIR_FIELDS, tokenizer, max_length=12)


def test_chat_messages_go_through_the_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    say = lambda role, content: [{"role": role, "content": content}]
    fields = {"prompt": say("user", "a"), "chosen": say("assistant", "b")}
    got = encode(tokenizer, 100, **fields, rejected=say("assistant", "c"))
    assert text(tokenizer, got["prompt_ids"]) == "[user]a</s>[assistant]"
    assert text(tokenizer, got["chosen_ids"]) == "b</s>"
    with pytest.raises(DataError, match="row 7: field 'rejected' begins with a user message"):
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
    assert (report.rows, report.cut_prompts, report.cut_completions, report.longest) == (2, 1, 0, 9)
    assert str(report) == "2 rows, longest 9 tokens, prompts cut in 1, completions cut in 0"
    batch = PairCollator(0)([tokens[0], tokens[1]])
    assert batch["input_ids"].shape == batch["labels"].shape == (4, 9)
    assert batch["index"].tolist() == [0, 1]
    assert batch["row"].tolist() == [7, 7]
    assert (batch["labels"] >= 0).sum(1).tolist() == [4, 4, 3, 7]
    with pytest.raises(DataError, match="at least 2 tokens"):
        tokenize_rows(rows, PAIR_FIELDS, tokenizer, max_length=1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_beginning_and_one_end(kind):
    """Text with the special tokens written out is that without them."""
    made = make(kind)
    plain = encode_row(row("What is", " 1", " 2"), PAIR_FIELDS, made, 100)
    adds_bos = made("a")["input_ids"][0] == made.bos_token_id
    begin = "<s>" if adds_bos else ""
    closed = encode_row(row(f"{begin}What is", " 1</s>", " 2</s>"), PAIR_FIELDS, made, 100)
    assert closed == plain
    ids = plain["prompt_ids"] + plain["chosen_ids"]
    assert ids.count(made.bos_token_id) == adds_bos
    assert ids.count(made.eos_token_id) == (ids[-1] == made.eos_token_id) == 1
    prompt = encode_row({"prompt": "What is", "row": 1}, ("prompt",), made, 100)["prompt_ids"]
    assert made.eos_token_id not in prompt


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", [CHAT, LLAMA_2])
def test_a_conversation_is_that_of_its_template(kind, template):
    made = make(kind, template)
    say = lambda role, content: {"role": role, "content": content}
    prompt, answer = [say("user", "What is 1?")], [say("assistant", "The answer")]
    got = encode_row(row(prompt, answer, [say("assistant", "")]), PAIR_FIELDS, made, 1000)
    whole = made.apply_chat_template(prompt + answer, return_dict=True)["input_ids"]
    assert got["prompt_ids"] + got["chosen_ids"] == whole


def test_what_a_template_has_no_place_for_is_named():
    made = make("bytes")
    messages = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "it"}]
    given = {"tools": [{"name": "add"}], "chat_template_kwargs": {"thinking": True, "depth": 2}}
    got = encode_row(row(*messages, messages[1]) | given, PAIR_FIELDS, made, 1000)
    assert got["unused"] == "chat_template_kwargs.depth"
    made.chat_template = TEMPLATE
    got = encode_row(row(*messages, messages[1]) | given, PAIR_FIELDS, made, 1000)
    assert got["unused"] == "tools,chat_template_kwargs.thinking,chat_template_kwargs.depth"


def test_a_template_that_fails_names_the_row():
    made = make("bytes", "{{ raise_exception('no system role') }}")
    messages, answer = [{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "it"}]
    with pytest.raises(DataError, match=r"row 7: the chat template fails .*no system role"):
        encode_row(row(messages, answer, answer), PAIR_FIELDS, made, 100)
    made.chat_template = None
    with pytest.raises(DataError, match=r"row 7: .* the tokenizer has no chat template"):
        encode_row(row(messages, answer, answer), PAIR_FIELDS, made, 100)


def test_the_cache_knows_what_tokens_depend_on(tokenizer, monkeypatch):
    rows = Dataset.from_list([row(), row("a", "b", "c")])
    calls = []
    monkeypatch.setattr(tokens_module, "encode_row", lambda *a: calls.append(a) or encode_row(*a))
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages }}"
    longer = train_tokenizer(["abcdef"], vocab_size=300)
    for fields, made, length in (
        (PAIR_FIELDS, tokenizer, 50), (PAIR_FIELDS, tokenizer, 49), (PAIR_FIELDS, other, 50),
        (PAIR_FIELDS, longer, 50), (("prompt", "chosen"), tokenizer, 50),
    ):  # fmt: skip
        calls.clear()
        first, report = tokenize_rows(rows, fields, made, length)
        assert len(calls) == 2
        again, same = tokenize_rows(rows, fields, made, length)
        assert len(calls) == 2
        assert again[:] == first[:]
        assert report == same
    changed = Dataset.from_list([row(), row("a", "b", "d")])
    calls.clear()
    tokenize_rows(changed, PAIR_FIELDS, tokenizer, 50)
    assert len(calls) == 2


def test_processes_share_the_work(tokenizer):
    rows = Dataset.from_list([row(prompt="a" * i) for i in range(1, 7)])
    alone, report = tokenize_rows(rows, PAIR_FIELDS, tokenizer, 40)
    shared, same = tokenize_rows(rows, PAIR_FIELDS, tokenizer, 40 + 1, num_proc=2)
    assert shared[:] == alone[:]
    assert report == same
