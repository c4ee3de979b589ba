import gzip
import json

import pytest

pytest.importorskip("datasets")

from datasets import Dataset

from fastpo.data.records import PAIR_FIELDS, DataError, load_rows, read_jsonl, split_by_prompt

ROW = {"prompt": "a", "chosen": " b", "rejected": " c"}


def write(path, *lines):
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def test_plain_gzip_and_saved_folder_give_the_same_rows(tmp_path):
    lines = [json.dumps(ROW), "", json.dumps(ROW | {"prompt": "d", "more": 1})]
    plain = write(tmp_path / "pairs.jsonl", *lines)
    packed = tmp_path / "pairs.jsonl.gz"
    packed.write_bytes(gzip.compress("\n".join(lines).encode()))
    Dataset.from_list([ROW, ROW | {"prompt": "d"}]).save_to_disk(tmp_path / "saved")
    rows = load_rows(plain, PAIR_FIELDS)
    assert rows["row"] == [1, 3]
    assert load_rows(str(packed), PAIR_FIELDS)[:] == rows[:]
    saved = load_rows(str(tmp_path / "saved"), PAIR_FIELDS)
    assert saved.select_columns(PAIR_FIELDS)[:] == rows.select_columns(PAIR_FIELDS)[:]
    assert rows["unused"] == ["", "more"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": "b", "chosen": "c"}', r"line 2: 'chosen' is given twice"),
        ('{"prompt": [{"role": "user", "role": "u"}]}', r"line 2: 'role' is given twice"),
        ('{"prompt": "a", ', r"bad\.jsonl, line 2, column \d+: not JSON"),
        ('["a"]', r"bad\.jsonl, line 2: expected a JSON object, got a list"),
        ('{"prompt": "a", "chosen": " b"}', r"line 2: field 'rejected' is missing; the"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', r"line 2: field 'chosen': expected"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}',
            r"line 2: text and messages are mixed",
        ),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", json.dumps(ROW), line)
    with pytest.raises(DataError, match=message):
        load_rows(path, PAIR_FIELDS)


def test_damaged_gzip_and_missing_file(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    content = gzip.compress("".join(json.dumps(ROW | {"n": i}) + "\n" for i in range(999)).encode())
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz, after line \d+: the file cannot be read"):
        list(read_jsonl(path))
    with pytest.raises(DataError, match="no such file"):
        load_rows(str(tmp_path / "none.jsonl"), PAIR_FIELDS)
    with pytest.raises(DataError, match="no rows"):
        load_rows(write(tmp_path / "empty.jsonl", ""), PAIR_FIELDS)


def test_split_keeps_prompts_together():
    rows = Dataset.from_list([ROW | {"prompt": f"p{i % 10}", "row": i} for i in range(40)])
    train, held = split_by_prompt(rows, 0.2, seed=1)
    assert len(held) == 8
    assert len(train) == 32
    assert not set(train["prompt"]) & set(held["prompt"])
    assert split_by_prompt(rows, 0.2, seed=1)[1]["row"] == held["row"]
    with pytest.raises(DataError, match="leaves none to train on"):
        split_by_prompt(rows.select([0, 10]), 0.2, seed=1)
