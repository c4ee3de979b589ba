"""What a bfloat16 checkpoint is trained and saved in."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastpo.trainers import config as configs
from fastpo.trainers import run


@pytest.fixture(params=["bfloat16", "float16"])
def half_folder(request, model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, request.param))
    folder = tmp_path / "half"
    model.save_pretrained(folder)
    run.load_tokenizer(model_folder).save_pretrained(folder)
    return str(folder)


def train(options, **more):
    """The weights before and after a few steps at the default rate of preference training."""
    more = {"learning_rate": 1e-6, "max_steps": 3, "save_steps": 3, "eval_share": 0.0, **more}
    run.train_dpo(configs.build(configs.DPOConfig, options, more))
    before = load_file(f"{options['model']}/model.safetensors")
    return before, load_file(f"{options['output']}/model.safetensors")


def changed(before, after):
    """Mean share over tensors of the weights that are not what they were."""
    shares = [(before[n].float() != w.float()).float().mean() for n, w in after.items()]
    return torch.stack(shares).mean().item()


def test_a_whole_model_stored_in_half_precision_trains_in_float32(options, half_folder, capsys):
    """Nearly every weight moves, under mixed precision, and is saved as it is; a line says so."""
    options = options | {"model": half_folder}
    before, after = train(options)
    assert changed(before, after) > 0.9
    assert {w.dtype for w in after.values()} == {torch.float32}
    assert "trained and saved in float32" in capsys.readouterr().out
    config = json.loads((run.Path(options["output"]) / "config.json").read_text())
    assert config["dtype"] == "float32"
    args = run.training_arguments(configs.build(configs.DPOConfig, options))
    assert args.bf16
    state = torch.load(f"{options['output']}/checkpoint-3/optimizer.pt", weights_only=True)["state"]
    assert {state[0][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.float32}


def test_bfloat16_weights_only_when_asked(options, half_folder, capsys):
    """Then most weights stay, which a line says."""
    options = options | {"model": half_folder, "dtype": "bfloat16"}
    before, after = train(options)
    # Roundings of a float16 checkpoint to bfloat16 are changes too.
    before = {name: w.bfloat16() for name, w in before.items()}
    assert changed(before, after) < 0.5
    assert "in which small updates are lost" in capsys.readouterr().out
    assert not run.training_arguments(configs.build(configs.DPOConfig, options)).bf16


def test_a_lora_leaves_the_weights_below_as_stored(options, half_folder):
    config = configs.build(configs.DPOConfig, options, {"model": half_folder, "lora_r": 2})
    model = run.load_model(config)
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    stored = AutoModelForCausalLM.from_pretrained(half_folder).dtype
    assert kinds == {(True, torch.float32), (False, stored)}
    assert not run.training_arguments(config).bf16


def test_options_given_by_the_user_stand(options, half_folder, model_folder):
    config = configs.build(configs.DPOConfig, options, {"model": half_folder})
    config.trainer["bf16"] = False
    assert not run.training_arguments(config).bf16
    assert run.load_model(config).dtype == torch.float32
    # What is stored in float32 trains in it, without mixed precision.
    config = configs.build(configs.DPOConfig, options, {"trainer": {"use_cpu": True}})
    assert not run.training_arguments(config).bf16


def test_mixed_precision_computes_the_head_in_bfloat16(options, half_folder):
    """Log-probs are float32, and those of the logits under autocast within its rounding."""
    model = run.load_model(configs.build(configs.DPOConfig, options, {"model": half_folder}))
    ids = torch.arange(1, 13).view(2, 6)
    hidden = []
    hook = lambda module, args, out: hidden.append(args[0].dtype)
    model.model.layers[0].mlp.down_proj.register_forward_hook(hook)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(input_ids=ids, labels=ids, statistic="logprobs")[:, :-1]
        logits = model(input_ids=ids).logits
    want = logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert hidden == [torch.bfloat16] * 2
    assert got.dtype == torch.float32
    assert logits.dtype == torch.bfloat16
    bound = 4 * torch.finfo(torch.bfloat16).eps * logits.abs().max().item()
    torch.testing.assert_close(got, want, atol=bound, rtol=0)
    got.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
