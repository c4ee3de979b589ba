"""What signatures say of the inputs of losses is what the losses do."""

import doctest
import inspect

import pytest
from method_arguments import ARGUMENTS, kind

from fastpo import inputs, losses, methods
from fastpo.inputs import inputs_of

# Inputs with a default that no row of the catalogue gives; their shapes are those of the function.
FURTHER = {
    "nll_sums": ARGUMENTS["policy_chosen"],
    "nll_counts": ARGUMENTS["chosen_counts"],
    "other_margins": ARGUMENTS["gaps"],
    "mask_l1": ARGUMENTS["reliability"],
    "kl_mask_l1": ARGUMENTS["reliability"],
    "pair_weights": ARGUMENTS["reliability"],
    "label": ARGUMENTS["label"],
    "margins": ARGUMENTS["gaps"],
    "kl": ARGUMENTS["kl_estimate"],
}
OPTIONS = {"sparse_po": {"l1": 0.1, "kl_l1": 0.1}}


def is_loss(function):
    returned = inspect.signature(function).return_annotation
    return returned in ("LossOutput", "UnpairedOutput") and inputs_of(function)


LOSSES = [
    name
    for name in losses.__all__
    if inspect.isfunction(getattr(losses, name)) and is_loss(getattr(losses, name))
]


def arguments_of(name):
    """An example of each input of a loss, and the options that the catalogue calls it with."""
    parameters = inspect.signature(getattr(losses, name)).parameters
    entries = [e for row in methods.rows() for e in row.entry_points if e.name == f"losses.{name}"]
    given = {name: name for name, p in parameters.items() if p.default is p.empty}
    for entry in entries[:1]:
        given = {name: name for name in entry.arguments} | entry.named
    kinds = {p: kind(f"losses.{name}", p, one) for p, one in given.items()}
    examples = {p: ARGUMENTS[one]() for p, one in kinds.items() if one in ARGUMENTS}
    return examples | (entries[0].options if entries else {})


@pytest.mark.parametrize("name", LOSSES)
def test_an_input_is_marked_as_trained_where_it_gets_a_gradient(name):
    function, given = getattr(losses, name), arguments_of(name)
    marked = inputs_of(function)
    for parameter in marked.keys() - given.keys():
        if parameter in FURTHER and not (name, parameter) == ("oreo", "kl"):
            given[parameter] = FURTHER[parameter]()
    leaves = {}
    for parameter in marked.keys() & given.keys():
        is_list = isinstance(given[parameter], (list, tuple))
        tensors = [x.clone() for x in (given[parameter] if is_list else [given[parameter]])]
        if all(x.is_floating_point() for x in tensors):
            leaves[parameter] = [x.requires_grad_() for x in tensors]
            given[parameter] = leaves[parameter] if is_list else leaves[parameter][0]
    function(**given, **OPTIONS.get(name, {})).loss.sum().backward()
    got = {parameter for parameter, values in leaves.items() if values[0].grad is not None}
    assert got == {parameter for parameter in leaves if marked[parameter].is_trained}


def test_examples_run():
    assert doctest.testmod(inputs).failed == 0
