"""The catalogue: complete, importable, callable as it says, and the README's table comes of it."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import method_arguments
import pytest

import fastpo
from fastpo import methods
from fastpo.cli import main

README = Path(__file__).parent.parent / "README.md"
FAMILIES = {"pairwise": 38, "online": 29, "diffusion": 25, "group": 47}  # at least, as of 2026
CALLS = [
    pytest.param(entry, id=f"{row.key}-{entry.name}")
    for row in methods.rows()
    for entry in row.entry_points
]
BUILT = list(methods.select(built=True))


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


@pytest.mark.parametrize("row", BUILT, ids=lambda row: row.key)
def test_what_is_printed_runs_as_it_stands(row, monkeypatch, capsys, tmp_path):
    """Beforehand there is what the text tells the reader to supply, and nothing else."""
    monkeypatch.chdir(tmp_path)  # Recipes write into the folder "run".
    main(["methods", row.key])
    printed = capsys.readouterr().out
    named = re.findall(r"^#   (\w+): ", printed.partition("# You supply:\n")[2], re.MULTILINE)
    kinds = {}
    for entry in row.entry_points:
        for parameter, name in {**{name: name for name in entry.arguments}, **entry.named}.items():
            kind = method_arguments.kind(entry.name, parameter, name)
            assert kinds.setdefault(name, kind) == kind, "two calls take two things for one name"
    assert sorted(named) == sorted(kinds)
    if any(entry.name.startswith("recipes.") for entry in row.entry_points):
        from fastpo.recipes import _recipe

        monkeypatch.setattr(_recipe, "OuterLoop", Rehearsal)  # tests/trainers runs the whole
    exec(printed, {name: method_arguments.ARGUMENTS[kind]() for name, kind in kinds.items()})


class Rehearsal:
    """An outer loop of no rounds."""

    def __init__(self, model, tokenizer, prompts, score, *, output, settings, **options):
        self.history, self.samples, self.score_function = [], 4, score

    def rounds(self, count):
        return iter(())

    def train_online(self, *args, **options): ...


@pytest.mark.parametrize("entry", CALLS)
def test_inputs_have_the_names_of_the_parameters(entry):
    """By position each has its parameter's own name, and no two parameters share an input."""
    signature = inspect.signature(entry.load())
    signature.bind(*entry.arguments, **entry.named, **entry.options)
    assert entry.arguments == tuple(signature.parameters)[: len(entry.arguments)]
    given = [*entry.arguments, *entry.named.values()]
    assert len(set(given)) == len(given)
    assert all(entry.inputs().values()), "each is described"


def test_recipes_are_printed_where_only_torch_is_installed(monkeypatch):
    monkeypatch.delitem(sys.modules, "fastpo.recipes", raising=False)
    monkeypatch.delattr(fastpo, "recipes", raising=False)
    monkeypatch.setitem(sys.modules, "fastpo.recipes.curry_dpo", None)  # as if it were not there
    printed = methods.describe(methods.find("curry_dpo"))
    assert "#   model: described once fastpo[train] is installed: " in printed
    assert "\nfastpo.recipes.curry_dpo(" in printed


def test_every_module_of_the_catalogue_is_found_after_import_fastpo():
    """Each in a process that has imported nothing but fastpo.

    Recipes are left out, for the time that transformers takes; they are found in the same way.
    """
    names = {entry.values[0].name.rpartition(".")[0]: entry.values[0].name for entry in CALLS}
    del names["recipes"]
    code = """
import operator, os, sys, fastpo
for name in sys.argv[1:]:
    if not os.fork():
        operator.attrgetter(name)(fastpo)
        os._exit(0)
    assert os.wait()[1] == 0, name
assert not {"transformers", "datasets", "fastpo.recipes"} & sys.modules.keys()
assert not hasattr(fastpo, "nothing") and not hasattr(fastpo.data, "nothing")
"""
    subprocess.run([sys.executable, "-c", code, *names.values()], check=True)


def test_what_is_confirmed_does_not_call_itself_experimental():
    """But for a form that one of several options has."""
    experimental = {
        entry.name for row in methods.select(status="experimental") for entry in row.entry_points
    }
    for row in methods.select(status="confirmed"):
        for entry in row.entry_points:
            if entry.name not in experimental:
                text = inspect.getdoc(entry.load()) or ""
                assert not re.search(r"^Experimental: (?!``)", text, re.MULTILINE), entry.name


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
