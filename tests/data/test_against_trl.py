"""Tokens of rows are those of TRL's trainers, for every kind of tokenizer and of row."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")
pytest.importorskip("trl")

from datasets import Dataset
from tiny_tokenizers import CHAT, KINDS, LLAMA_2, make
from trl import DPOTrainer, SFTTrainer
from trl.data_utils import extract_prompt, maybe_extract_prompt

from fastpo.data.formats import COMPLETION_FIELDS, PAIR_FIELDS, convert, shared_start
from fastpo.data.tokens import encode_row


def say(role, content, **more):
    return {"role": role, "content": content, **more}


ASK, YES, NO = say("user", "What is 1?"), say("assistant", "It is 1."), say("assistant", "No?")
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}]
PAIRS = {
    "text": {"prompt": "What is 1? ", "chosen": "The other.", "rejected": "I do not know it."},
    "no-space": {"prompt": "What is 1?\n", "chosen": "1", "rejected": "The other."},
    "space-in-completion": {"prompt": "What is", "chosen": " 1", "rejected": " 2"},
    "merging": {"prompt": "What is 1? Th", "chosen": "e answer", "rejected": "e other"},
    "closed": {"prompt": "What is 1?", "chosen": " 1</s>", "rejected": " 2</s>"},
    "half-closed": {"prompt": "What is 1?", "chosen": " 1</s>", "rejected": " 2"},
    "empty-completion": {"prompt": "What is 1?", "chosen": " 1", "rejected": ""},
    "empty-prompt": {"prompt": "", "chosen": "The answer", "rejected": "I do not"},
    "closed-prompt": {"prompt": "hi </s>", "chosen": "hello", "rejected": "I do not"},
    "implicit-text": {"chosen": "What is 1? The answer", "rejected": "What is 1? The other"},
    "hh": {
        "chosen": "\n\nHuman: What? \n\nAssistant: The answer.",
        "rejected": "\n\nHuman: What? \n\nAssistant: I do not know it.",
    },
    "chat": {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    "turns": {
        "prompt": [say("system", "hi"), ASK, YES, say("user", "What?")],
        "chosen": [YES, ASK, NO],
        "rejected": [NO],
    },
    "empty-answer": {"prompt": [ASK], "chosen": [YES], "rejected": [say("assistant", "")]},
    "prefilled": {"prompt": [ASK, say("assistant", "It")], "chosen": [YES], "rejected": [NO]},
    "implicit-chat": {"chosen": [ASK, YES], "rejected": [ASK, NO]},
    "implicit-turns": {"chosen": [ASK, YES, ASK, NO], "rejected": [ASK, YES, ASK, YES]},
    "ultrafeedback": {"prompt": "What is 1?", "chosen": [ASK, YES], "rejected": [ASK, NO]},
    "tools": {
        "prompt": [ASK], "chosen": [say("assistant", "", tool_calls=CALL)], "rejected": [NO],
        "tools": TOOLS,
    },
    "tools-as-text": {
        "prompt": [ASK], "chosen": [YES], "rejected": [NO], "tools": json.dumps(TOOLS),
    },
    "template-options": {
        "prompt": [ASK], "chosen": [YES], "rejected": [NO],
        "chat_template_kwargs": {"thinking": True},
    },
}  # fmt: skip
COMPLETIONS = {
    name: {"prompt": row["prompt"], "completion": row["chosen"]} | {
        name: row[name] for name in ("tools", "chat_template_kwargs") if name in row
    }
    for name, row in PAIRS.items()
    if "prompt" in row and isinstance(row["prompt"], type(row["chosen"]))
} | {
    "whole-text": {"text": "What is 1? The answer"},
    "closed-text": {"text": "What is 1? The answer</s>"},
    "messages": {"messages": [ASK, YES, ASK, NO]},
    "messages-and-tools": {"messages": [ASK, YES], "tools": TOOLS},
    "from-and-value": {"conversations": [{"from": "user", "value": "hi"},
                                         {"from": "assistant", "value": "It"}]},
}  # fmt: skip


GROUPS = [  # TRL looks at the first row of a data set to know what all are.
    ("text", "no-space", "space-in-completion", "merging", "closed", "half-closed",
     "empty-completion", "empty-prompt", "closed-prompt"),
    ("implicit-text", "hh"),
    ("chat", "turns", "empty-answer", "prefilled"),
    ("tools",), ("tools-as-text",), ("template-options",),
    ("implicit-chat", "implicit-turns", "ultrafeedback"),
]  # fmt: skip
WHOLE = [("whole-text", "closed-text"), ("messages",), ("messages-and-tools",), ("from-and-value",)]


def ours(row, fields, tokenizer):
    """As of a file, without the file."""
    found = convert(row, fields, "row 1") | {"row": 1}
    encoded = encode_row(found, fields, tokenizer, 512)
    return [encoded[f"{field}_ids"] for field in fields]


def theirs(trainer, rows, tokenizer):
    """What a trainer of TRL makes of rows."""
    fake = SimpleNamespace(_tokenizer=tokenizer, completion_only_loss=True, chat_template=None)
    args = SimpleNamespace(
        dataset_num_proc=None, max_length=None, truncation_mode="keep_start",
        dataset_text_field="text", assistant_only_loss=False, shuffle_dataset=False,
    )  # fmt: skip
    more = (False, None) if trainer is SFTTrainer else ()
    rows = Dataset.from_list(json.loads(json.dumps(rows)))
    return trainer._prepare_dataset(fake, rows, tokenizer, args, *more, "train")


def one_end(ids, tokenizer):
    """Of a post-processor that closes every text TRL keeps the end that it adds by itself too."""
    while len(ids) > 1 and ids[-1] == ids[-2] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids


@pytest.fixture(params=[*KINDS, "llama-2"], scope="module")
def tokenizer(request):
    kind = request.param
    return make("legacy-bos", LLAMA_2) if kind == "llama-2" else make(kind, CHAT)


def test_every_kind_is_in_a_group():
    assert {name for group in GROUPS for name in group} == {*PAIRS}
    assert {name for group in (*GROUPS, *WHOLE) for name in group} >= {*COMPLETIONS}


def test_pairs(tokenizer):
    for names in GROUPS:
        rows = [maybe_extract_prompt(PAIRS[name]) for name in names]
        for name, found in zip(names, theirs(DPOTrainer, rows, tokenizer), strict=True):
            prompt, *completions = ours(PAIRS[name], PAIR_FIELDS, tokenizer)
            assert prompt == found["prompt_ids"], name
            expected = [one_end(found[f"{side}_ids"], tokenizer) for side in PAIR_FIELDS[1:]]
            assert completions == expected, name


def test_completions(tokenizer):
    for names in (*GROUPS, *WHOLE):
        names = [name for name in names if name in COMPLETIONS]
        if not names:
            continue
        rows = [COMPLETIONS[name] for name in names]
        for name, found in zip(names, theirs(SFTTrainer, rows, tokenizer), strict=True):
            prompt, completion = ours(COMPLETIONS[name], COMPLETION_FIELDS, tokenizer)
            ids = one_end(found["input_ids"], tokenizer)
            assert prompt + completion == ids, name
            # The first token of a sequence is scored by nobody.
            labels = [-100] * len(prompt) + completion
            assert labels[1:] == found["labels"][1 : len(ids)], name


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("ab c", "ab d"), ("abc", "abd"), ("a", "b"), ("ab", "abc"), ("same", "same"),
     ([ASK, YES], [ASK, NO]), ([ASK, YES], [ASK, YES, ASK, NO])],
)  # fmt: skip
def test_shared_start(chosen, rejected):
    place = shared_start(chosen, rejected)
    theirs = extract_prompt({"chosen": chosen, "rejected": rejected})
    assert theirs == {
        "prompt": chosen[:place], "chosen": chosen[place:], "rejected": rejected[place:],
    }  # fmt: skip
