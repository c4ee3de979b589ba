"""The catalogue: complete, importable, callable as it says, and the README's table comes of it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from method_arguments import ARGUMENTS

from fastpo import methods
from fastpo.cli import main

README = Path(__file__).parent.parent / "README.md"
FAMILIES = {"pairwise": 38, "online": 29, "diffusion": 25, "group": 47}  # at least, as of 2026
CALLS = [
    pytest.param(entry, id=f"{row.key}-{entry.name}")
    for row in methods.rows()
    for entry in row.entry_points
]


def test_every_method_of_the_field_has_a_row():
    keys = [row.key for row in methods.rows()]
    assert len(set(keys)) == len(keys)
    for family, count in FAMILIES.items():
        assert len(list(methods.select(family=family))) >= count


@pytest.mark.parametrize("row", methods.rows(), ids=lambda row: row.key)
def test_row_is_complete(row):
    assert row.title
    assert 2010 < row.year < 2030
    assert row.arxiv == "" or re.fullmatch(r"\d{4}\.\d{5}", row.arxiv)
    assert row.blocks
    assert row.status in methods.STATUSES
    if row.status == "outside" or not row.entry_points:
        assert row.note, "why there is nothing to call"
    if row.spec.split()[0] != "diffusion" and row.status != "outside":
        assert row.entry_points


@pytest.mark.parametrize("entry", CALLS)
def test_entry_point_takes_the_arguments_its_row_declares(entry):
    function = entry.load()
    if entry.name.startswith("recipes."):  # tests/trainers runs them; here there is no model
        inspect.signature(function).bind("model", "tokenizer", ["prompt"], score=len, output="run")
        return
    named = {keyword: ARGUMENTS[name]() for keyword, name in entry.named.items()}
    function(*(ARGUMENTS[name]() for name in entry.arguments), **named, **entry.options)


def test_what_is_experimental_says_so_in_its_docstring():
    confirmed = {
        entry.name for row in methods.select(status="confirmed") for entry in row.entry_points
    }
    for row in methods.select(status="experimental", built=True):
        own = [entry for entry in row.entry_points if entry.name not in confirmed]
        texts = [entry.load().__doc__ for entry in own]
        assert not own or any("xperimental" in text for text in texts) or row.note, row.key


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"got 'simpoo'.*simpo"):
        methods.find("simpoo")


def test_command_prints_and_filters(capsys):
    main(["methods"])
    everything = capsys.readouterr().out
    assert all(row.key in everything for row in methods.rows())
    main(["methods", "--needs", "full vocabulary", "--family", "pairwise"])
    some = capsys.readouterr().out
    assert "sparse_po" in some
    assert "simpo" not in some
    main(["methods", "inpo"])
    one = capsys.readouterr().out
    assert "2407.00617" in one
    assert "losses.inpo(" in one


def test_command_says_what_it_does_not_find(monkeypatch):
    for arguments, message in (
        (["inpoo"], "fastpo: key: expected a key of the catalogue, got 'inpoo'. Nearest: inpo"),
        (["--status", "confirmedd"], "fastpo: methods: none has all of this."),
    ):
        monkeypatch.setattr("sys.argv", ["fastpo", "methods", *arguments])
        with pytest.raises(SystemExit, match=re.escape(message)):
            main()


def test_readme_has_the_generated_table():
    begin, end = "<!-- fastpo methods --markdown -->\n", "<!-- end -->"
    table = README.read_text().partition(begin)[2].partition(end)[0]
    assert table.strip() == methods.markdown(methods.rows()).strip()
