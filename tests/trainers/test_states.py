import doctest
import importlib
import pkgutil

import pytest
import torch

import fastpo.trainers
from fastpo.trainers.states import StateError, StateStore, digest, restore, snapshot


class Small(torch.nn.Module):
    """A frozen and two trainable parameters, one of them bfloat16."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.Parameter(torch.randn(3), requires_grad=False)
        self.weight = torch.nn.Parameter(torch.randn(4, 5))
        self.scale = torch.nn.Parameter(torch.randn((), dtype=torch.bfloat16))


def change(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[n], other[n]) for n in state)


SIZE = 4 * 5 * 4 + 2


def test_states_hold_the_trainable_parameters_bit_for_bit():
    model = Small()
    model.weight.data[0, 0] = float("nan")
    model.weight.data[0, 1] = -0.0
    state = snapshot(model)
    assert state.keys() == {"weight", "scale"}
    bits = state["weight"].view(torch.int32).clone()
    change(model)
    assert torch.equal(state["weight"].view(torch.int32), bits)
    restore(model, state)
    assert torch.equal(model.weight.data.view(torch.int32), bits)


def test_using_gives_back_the_parameters_even_after_an_error():
    model = Small()
    store = StateStore(model)
    store.save("initial")
    change(model)
    now = snapshot(model)
    with store.using("initial"):
        assert equal(snapshot(model), store.get("initial"))
    assert equal(snapshot(model), now)
    with pytest.raises(ZeroDivisionError), store.using("initial"):
        1 / 0  # noqa: B018
    assert equal(snapshot(model), now)
    with store.using("current"):
        assert equal(snapshot(model), now)


def test_equal_states_are_kept_once_and_names_shift():
    model = Small()
    store = StateStore(model)
    assert store.save("initial") == store.save("history0")
    assert len(store._held) == 1
    change(model)
    store.alias("history1", "history0")
    store.save("history0")
    assert len(store._held) == 2
    assert store.names["history1"] == store.names["initial"] != store.names["history0"]
    store.drop("initial")
    assert equal(store.get("history1"), store.get("history1"))
    store.drop("history1")
    assert len(store._held) == 1
    with pytest.raises(StateError, match="'history1': not stored; there are history0"):
        store.get("history1")


def test_digest_tells_names_shapes_dtypes_and_values_apart():
    ones = torch.ones(2, 2)
    states = [
        {"a": ones}, {"b": ones}, {"a": ones.view(4)}, {"a": ones.view(torch.int32)},
        {"a": ones * 2}, {"a": ones, "b": ones}, {"a": -0.0 * ones}, {"a": 0.0 * ones},
    ]  # fmt: skip
    assert len({digest(state) for state in states}) == len(states)
    assert digest({"a": ones, "b": -ones}) == digest({"b": -ones, "a": ones.clone()})


def test_budget_spills_the_least_recently_used_to_disk(tmp_path):
    model = Small()
    store = StateStore(model, tmp_path, budget_bytes=2 * SIZE)
    kept = {}
    for name in ("a", "b", "c"):
        change(model)
        store.save(name)
        kept[name] = snapshot(model)
    assert len(store._held) == 2
    assert store.names["a"] not in store._held
    for name in ("a", "b", "c", "a"):
        assert equal(store.get(name), kept[name])
        assert len(store._held) == 2
    tight = StateStore(model, None, budget_bytes=SIZE)
    tight.save("a")
    change(model)
    with pytest.raises(StateError, match=f"exceed {SIZE} bytes"):
        tight.save("b")


def test_commit_and_reopen(tmp_path):
    model = Small()
    store = StateStore(model, tmp_path)
    assert store.reopen() == {}
    store.save("initial")
    change(model)
    store.save("old")
    store.commit(round=1)
    store.alias("old", "initial")
    change(model)
    store.save("new")
    store.commit(round=2)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2, "the state of no name is removed"
    other = StateStore(Small(), tmp_path)
    assert other.reopen() == {"round": 2}
    assert other.names == store.names
    other.load("new")
    assert equal(snapshot(other.model), snapshot(model))


def test_damage_and_other_models_are_named(tmp_path):
    model = Small()
    store = StateStore(model, tmp_path)
    key = store.save("initial")
    store.commit()
    path = tmp_path / f"{key}.safetensors"
    content = path.read_bytes()
    again = StateStore(model, tmp_path)
    again.reopen()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StateError, match="damaged, its values"):
        again.load("initial")
    path.write_bytes(content[:-1])
    with pytest.raises(StateError, match="cannot be read"):
        again.load("initial")
    path.unlink()
    with pytest.raises(StateError, match="missing; it is the state 'initial'"):
        StateStore(model, tmp_path).reopen()
    (tmp_path / "states.json").write_text("{")
    with pytest.raises(StateError, match=r"states.json: damaged"):
        StateStore(model, tmp_path).reopen()
    with pytest.raises(StateError, match="parameter bias does not fit"):
        restore(torch.nn.Linear(5, 4), store.get("initial"))


@pytest.mark.parametrize("name", [m.name for m in pkgutil.iter_modules(fastpo.trainers.__path__)])
def test_docstring_examples(name):
    module = importlib.import_module(f"fastpo.trainers.{name}")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0
