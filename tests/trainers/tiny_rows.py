"""Rows of a few words, and the file they are read from."""

import json
import random

WORDS = "red blue tall small old cat dog bird house tree runs sings sleeps and the".split()


def make_pairs(count, seed=0):
    generator = random.Random(seed)
    text = lambda n: " ".join(generator.choices(WORDS, k=n))
    return [
        {"prompt": text(5), "chosen": " " + text(4), "rejected": " " + text(3)}
        for _ in range(count)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
