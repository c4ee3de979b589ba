"""Rows in the forms that people have, read from every kind of file."""

import gzip
import json

import pytest

pytest.importorskip("datasets")

from datasets import Dataset

from fastpo.data.errors import DataError
from fastpo.data.formats import COMPLETION_FIELDS, PAIR_FIELDS, near_name
from fastpo.data.records import iterate_rows, load_rows


def say(role, content, **more):
    return {"role": role, "content": content, **more}


ASK, YES, NO = say("user", "1+1?"), say("assistant", "2"), say("assistant", "no")
SYSTEM = say("system", "be brief")
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
CHAT = {"prompt": [ASK], "chosen": [YES], "rejected": [NO]}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tmp_path, row, fields, **options):
    found = load_rows(write(tmp_path / "rows.jsonl", row), fields, **options)[0]
    values = [json.loads(found[f]) if found["kind"] == "chat" else found[f] for f in fields]
    return dict(zip(fields, values, strict=True)), found


@pytest.mark.parametrize(
    ("row", "expected", "unused"),
    [
        ({"prompt": "1+1?", "chosen": "2", "rejected": "no"}, ..., ""),
        ({"chosen": "1+1? 2", "rejected": "1+1? no"}, ("1+1?", " 2", " no"), ""),
        (
            {"chosen": "\n\nHuman: 1+1?\n\nAssistant: 2",
             "rejected": "\n\nHuman: 1+1?\n\nAssistant: no"},
            ("\n\nHuman: 1+1?\n\nAssistant:", " 2", " no"), "",
        ),
        (CHAT, ..., ""),
        ({"chosen": [ASK, YES], "rejected": [ASK, NO]}, ([ASK], [YES], [NO]), ""),
        (
            {"prompt": "1+1?", "chosen": [ASK, YES], "rejected": [ASK, NO], "messages": [ASK, YES],
             "score_chosen": 8.0},
            ([ASK], [YES], [NO]), "messages,score_chosen",
        ),
        ({"prompt": "1+1?", "chosen": [YES], "rejected": [NO]}, ([ASK], [YES], [NO]), ""),
        ({"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]}, ([ASK], [YES], [NO]), ""),
        (CHAT | {"system": "be brief"}, ([SYSTEM, ASK], [YES], [NO]), ""),
        (
            {"prompt": "1+1?", "chosen": "2", "rejected": "no", "system": "be brief"},
            ([SYSTEM, ASK], [YES], [NO]), "",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "system": "", "tools": None, "id": 0},
            ("a", "b", "c"), "id",
        ),
        (
            {"instruction": "1+1?", "input": "", "chosen": "2", "rejected": "no"},
            ("1+1?", "2", "no"), "",
        ),
        (
            {"instruction": "Add", "input": "1+1", "chosen": "2", "rejected": "no"},
            ("Add\n1+1", "2", "no"), "",
        ),
        (
            {"conversations": [{"from": "system", "value": "be brief"},
                               {"from": "human", "value": "1+1?"}],
             "chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "gpt", "value": "no"}},
            ([SYSTEM, ASK], [YES], [NO]), "",
        ),
        (
            CHAT | {"chosen": [say("assistant", None, tool_calls=CALL)]},
            ([ASK], [{"role": "assistant", "tool_calls": CALL}], [NO]), "",
        ),
        (
            CHAT | {"prompt": [say("user", [{"type": "text", "text": "1+1?"}])]},
            ([ASK], [YES], [NO]), "",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": ["f"]}, ("a", "b", "c"), "tools"),
    ],
)  # fmt: skip
def test_pairs(tmp_path, row, expected, unused):
    found, whole = load(tmp_path, row, PAIR_FIELDS)
    expected = row if expected is ... else dict(zip(PAIR_FIELDS, expected, strict=True))
    assert found == expected
    assert whole["unused"] == unused


@pytest.mark.parametrize(
    ("row", "expected", "unused"),
    [
        ({"prompt": "1+1?", "completion": "2", "label": False}, ("1+1?", "2"), "label"),
        ({"prompt": [ASK], "completion": [YES]}, ([ASK], [YES]), ""),
        ({"messages": [ASK, YES]}, ([], [ASK, YES]), ""),
        ({"prompt": "1+1?", "messages": [ASK, YES]}, ([], [ASK, YES]), "prompt"),
        ({"messages": [ASK, YES], "system": "be brief"}, ([], [SYSTEM, ASK, YES]), ""),
        ({"conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]},
         ([], [ASK, YES]), ""),
        ({"text": "1+1? 2"}, ("", "1+1? 2"), ""),
        ({"text": "1+1? 2", "system": "be brief"}, ("", "1+1? 2"), "system"),
        ({"instruction": "1+1?", "input": "", "output": "2"}, ("1+1?", "2"), ""),
        ({"instruction": "Add", "input": "1+1", "output": "2"}, ("Add\n1+1", "2"), ""),
        ({"instruction": "a", "output": "2", "history": [["b", "c"]]}, ("a", "2"), "history"),
    ],
)  # fmt: skip
def test_completions(tmp_path, row, expected, unused):
    found, whole = load(tmp_path, row, COMPLETION_FIELDS)
    assert tuple(found.values()) == expected
    assert whole["unused"] == unused


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"question": "1+1?", "answer": "2"}, ("prompt",), "--columns prompt=question"),
        ({"question": "1+1?", "answer": "2"}, COMPLETION_FIELDS,
         "--columns prompt=question --columns completion=answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, COMPLETION_FIELDS,
         "--columns completion=chosen"),
        ({"prompt": "a", "completion": "b", "label": True}, PAIR_FIELDS,
         "one completion, where pairs .* `fastpo train sft`"),
        ({"prompt": "2+2?", "chosen": [ASK, YES], "rejected": [ASK, NO]}, PAIR_FIELDS,
         r"the prompt '2\+2\?' is in none of the messages"),
        (CHAT | {"chosen": "2"}, PAIR_FIELDS, "text and messages are mixed"),
        (CHAT | {"prompt": [SYSTEM, ASK], "system": "be brief"}, PAIR_FIELDS,
         "a column 'system', and a system message"),
        (CHAT | {"tools": "not JSON"}, PAIR_FIELDS, "column 'tools': not JSON"),
        (CHAT | {"chat_template_kwargs": [1]}, PAIR_FIELDS, "_kwargs': expected a dict"),
        (CHAT | {"prompt": [say("user", [{"type": "image"}])]}, PAIR_FIELDS, "'prompt': expected"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_converts_it(tmp_path, row, fields, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 1: .*{message}"):
        load(tmp_path, row, fields)


def test_template_columns_are_kept(tmp_path):
    given = {"tools": [{"name": "f", "parameters": {"x": None}}], "chat_template_kwargs": {"a": 0}}
    _, whole = load(tmp_path, CHAT | given, PAIR_FIELDS)
    assert (json.loads(whole["template"]), whole["unused"]) == (given, "")
    _, whole = load(tmp_path, CHAT | {"tools": json.dumps(given["tools"])}, PAIR_FIELDS)
    assert json.loads(whole["template"]) == {"tools": given["tools"]}


ROWS = [{"prompt": f"{i}+1?", "chosen": str(i + 1), "rejected": "NA"} for i in range(3)]


def _files(folder):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    rows = Dataset.from_list(ROWS)
    rows.to_csv(folder / "a.csv")
    rows.to_csv(folder / "a.tsv", sep="\t")
    rows.to_parquet(folder / "a.parquet")
    rows.save_to_disk(folder / "saved")
    texts = {
        "a.jsonl": lines, "a.json": json.dumps(ROWS, indent=1), "lines.json": lines,
        "bom.jsonl": "\ufeff" + lines, "bom.json": "\ufeff" + json.dumps(ROWS),
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "a.csv.gz").write_bytes(gzip.compress((folder / "a.csv").read_bytes()))
    hub = folder / "hub"
    hub.mkdir()
    rows.to_parquet(hub / "main.parquet")
    rows.select([0]).to_parquet(hub / "other.parquet")
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files: [{split: train, path: main.parquet}]\n"
        "- config_name: other\n  data_files: [{split: test, path: other.parquet}]\n---\n"
    )
    return [
        *texts,
        *(f"{name}.gz" for name in texts),
        "a.csv",
        "a.csv.gz",
        "a.tsv",
        "a.parquet",
        "saved",
    ]


# A stream of CSV that is not read to its end is left open by pandas.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    for name in _files(tmp_path):
        source = str(tmp_path / name)
        found = load_rows(source, PAIR_FIELDS)
        assert found.select_columns(PAIR_FIELDS).to_list() == ROWS, name
        assert list(found["row"]) == [1, 2, 3], name
        again = load_rows(source, PAIR_FIELDS)
        assert again._fingerprint == found._fingerprint, name
        assert again.cache_files == found.cache_files, name
        stream = load_rows(source, PAIR_FIELDS, limit=2, streaming=True)
        assert stream.to_list() == found.to_list()[:2], name


def test_subsets_splits_and_renamed_columns(tmp_path):
    _files(tmp_path)
    hub = str(tmp_path / "hub")
    assert len(load_rows(hub, PAIR_FIELDS, "train", subset="main")) == 3
    assert len(load_rows(hub, PAIR_FIELDS, "test", subset="other")) == 1
    assert len(load_rows(hub, PAIR_FIELDS, subset="main", limit=2, streaming=True)) == 2
    for options, message in (
        ({"subset": "none"}, "none"), ({"subset": "main", "split": "test"}, "test"),
        ({}, "main.*other"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=f"hub: cannot be read .*{message}"):
            load_rows(hub, PAIR_FIELDS, **options)
    rows = [{"question": "1+1?", "good": "2", "rejected": "no"}]
    path = write(tmp_path / "q.jsonl", *rows)
    names = {"prompt": "question", "chosen": "good"}
    found = load_rows(path, PAIR_FIELDS, columns=names)
    assert found[0]["prompt"] == "1+1?"
    assert found[0]["unused"] == ""
    for change, message in (
        ({"chosen": "god"}, "no row has 'god'; there are 'question', 'good', 'rejected'"),
        ({"rejected": "good"}, "but the row has a 'rejected' of its own"),
    ):
        with pytest.raises(DataError, match=message):
            list(iterate_rows(path, columns=names | change))
    for option in ({"split": "test"}, {"subset": "main"}):
        with pytest.raises(DataError, match=f"{min(option)}: .*q.jsonl is one file"):
            iterate_rows(path, **option)
    with pytest.raises(DataError, match=r"expected a file of \.jsonl, .*, got \.xlsx"):
        iterate_rows(write(tmp_path / "q.xlsx", *rows))


def test_text_stays_text(tmp_path):
    """What looks like a number, a date or nothing is an answer all the same."""
    texts = ["007", "2020-01-01", "NA", "null", "true", "[1]", ""]
    rows = [{"prompt": "a", "chosen": text, "rejected": "b"} for text in texts]
    Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    for path in (write(tmp_path / "a.jsonl", *rows), str(tmp_path / "a.csv")):
        assert list(load_rows(path, PAIR_FIELDS)["chosen"]) == texts


def test_tool_calls_keep_their_own_arguments(tmp_path):
    call = lambda **arguments: [{"function": {"name": "f", "arguments": arguments}}]
    rows = [
        CHAT | {"chosen": [say("assistant", "", tool_calls=call(**{name: 1}))]} for name in "ab"
    ]
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    for path in (write(tmp_path / "a.jsonl", *rows), str(tmp_path / "a.parquet")):
        found = [json.loads(text) for text in load_rows(path, PAIR_FIELDS)["chosen"]]
        assert found == [row["chosen"] for row in rows]


def test_a_changed_file_is_read_anew(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "a.jsonl", row)
    load_rows(path, PAIR_FIELDS)
    write(tmp_path / "a.jsonl", row | {"chosen": "d"})
    assert load_rows(path, PAIR_FIELDS)[0]["chosen"] == "d"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"s": 1.5, "h": [1, 2]}, None),
        ({"s": True, "h": [0.5, 2]}, None),
        ({"h": [1, 2]}, "column 's': expected a finite number, got None"),
        ({"s": "high", "h": [1, 2]}, "column 's': expected a finite number, got 'high'"),
        ({"s": float("nan"), "h": [1, 2]}, "column 's': expected a finite number"),
        ({"s": 1, "h": 2}, "column 'h': expected a list of numbers, got 2"),
        ({"s": 1, "h": [1]}, "column 'h': expected 2 numbers as in .*line 1, got 1"),
    ],
)
def test_columns_of_numbers(tmp_path, row, message):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write(tmp_path / "a.jsonl", pair | {"s": "0.5", "h": [3, 4]}, pair | row)
    options = {"numbers": {"s": False, "h": True}}
    if message is None:
        found = load_rows(path, PAIR_FIELDS, **options)[1]
        assert (found["s"], found["h"], found["unused"]) == (row["s"], row["h"], "")
    else:
        with pytest.raises(DataError, match=rf"a\.jsonl, line 2: {message}"):
            load_rows(path, PAIR_FIELDS, **options)


def test_near_names():
    assert near_name("chosen_scores", ["prompt_id", "score_chosen"]) == "score_chosen"
    assert near_name("ref_chosen", ["ref_chosen_logps"]) == "ref_chosen_logps"
    assert near_name("ref_chosen", ["score_chosen"]) is None
    assert near_name("rejected", ["chosen", "rejcted"]) == "rejcted"
    assert near_name("tools", ["tool"]) == "tool"
    assert near_name("prompt", ["id", "question"]) == "question"
    assert near_name("chosen_scores", ["id", "source"]) is None
