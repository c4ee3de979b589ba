import pytest
import torch

from fastpo.trainers import config as configs
from fastpo.trainers import run


@pytest.fixture
def sft_options(options, completions_file):
    return options | {"data": completions_file, "max_steps": 8}


def test_fitting_lowers_the_held_out_loss(sft_options):
    results = run.train_sft(configs.build(configs.SFTConfig, sft_options, {"learning_rate": 1e-2}))
    assert results["after"]["eval_loss"] < results["before"]["eval_loss"]


def test_accumulation_weighs_tokens_alike(sft_options, tmp_path):
    """Two batches of 2 give the step of one batch of 4."""
    weights = []
    for name, batch in (("one", {"batch_size": 4}), ("two", {"batch_size": 2, "accumulation": 2})):
        output = {"output": str(tmp_path / name), "max_steps": 2, "eval_share": 0.0}
        run.train_sft(configs.build(configs.SFTConfig, sft_options, batch, output))
        model = run.load_model(
            configs.build(configs.SFTConfig, sft_options, {"model": str(tmp_path / name)})
        )
        weights.append(model.get_input_embeddings().weight)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)
