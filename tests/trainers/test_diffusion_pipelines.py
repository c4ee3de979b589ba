import json
import math

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
)
from diffusion_parts import (
    QUIET,
    ddpm,
    tiny_conditional_unet,
    tiny_unet,
)
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from tiny_rows import write_jsonl

from fastpo.data.errors import DataError
from fastpo.diffusion._adapters import adapter_scales
from fastpo.trainers.config import ConfigError, build
from fastpo.trainers.diffusion_config import DiffusionDPOConfig
from fastpo.trainers.diffusion_data import Encoder, read_pairs
from fastpo.trainers.diffusion_run import _load_pipeline, _split, train_diffusion_dpo

LOG2 = math.log(2)
LORA = {"lora_r": 2, "lora_targets": "all-linear"}


def size(path):
    with Image.open(path) as image:
        return image.size


def image_rows(folder, count, **fields):
    rows = []
    for i in range(count):
        rows.append({"chosen": f"{i}-chosen.png", "rejected": f"{i}-rejected.png", **fields})
        for side, grey in (("chosen", 180), ("rejected", 70)):
            Image.new("RGB", (20, 16), (grey + i,) * 3).save(folder / rows[-1][side])
    return rows


def test_pipeline_of_images_from_the_command_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboard")
    from fastpo.cli import main

    torch.manual_seed(0)
    DDPMPipeline(tiny_unet(), ddpm()).save_pretrained(tmp_path / "pipeline")
    data = write_jsonl(tmp_path / "pairs.jsonl", image_rows(tmp_path, 10))
    yaml = tmp_path / "run.yaml"
    yaml.write_text("learning_rate: 1e-3\nmax_steps: 2\nbatch_size: 4\ncpu: true\nbeta: 20\n")
    command = [
        "train", "diffusion-dpo", "--config", yaml, "--model", tmp_path / "pipeline",
        "--data", data, "--output", tmp_path / "run", "--eval-share", "0.2", "--no-progress",
        "--sample-count", "2", "--sample-steps", "2", "--save-steps", "1",
    ]  # fmt: skip
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main([*command[:2], "--help"])
    assert "Pairs per device and forward. (type: int, default: 4)" in capsys.readouterr().out
    main(map(str, command))
    assert "rewards/accuracies" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 2
    assert results["before"]["loss"] == pytest.approx(LOG2)
    assert results["after"]["loss"] < results["before"]["loss"]
    for name in ("before", "after"):
        assert size(tmp_path / "run" / "samples" / f"{name}.png") == (16, 8)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in (tmp_path / "run").rglob("*tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    assert set(events.Tags()["images"]) >= {"samples/before", "samples/after"}
    assert "rewards/margins" in events.Tags()["scalars"]
    trained = DDPMPipeline.from_pretrained(tmp_path / "run" / "model")
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert all(torch.equal(p, saved[n]) for n, p in trained.unet.named_parameters())


def stable_diffusion():
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    vocabulary = {word: i for i, word in enumerate(words)}
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12, bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    vae = AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), unet=tiny_conditional_unet(),
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12),
        scheduler=PNDMScheduler(num_train_timesteps=100, skip_prk_steps=True),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def test_pipeline_of_texts_and_latents(tmp_path):
    torch.manual_seed(0)
    pipeline = stable_diffusion()
    pipeline.save_pretrained(tmp_path / "pipeline")
    rows = image_rows(tmp_path, 8, prompt="a grey cat")
    for row, letter in zip(rows, "abcdef", strict=False):
        row["prompt"] += letter
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    encoder = Encoder(pipeline)
    encoded = encoder(read_pairs(data)).tensors
    assert encoded["chosen"].shape == (8, 4, 8, 8)
    texts = encoded["encoder_hidden_states"]
    assert [text.shape for text in texts] == [(12, 8)] * 8
    assert [torch.equal(text, texts[7]) for text in texts] == [False] * 6 + [True] * 2
    with torch.autocast("cpu", torch.bfloat16):
        decoded = encoder.decode(encoded["chosen"])
    assert torch.equal(decoded, encoder.decode(encoded["chosen"]))
    # The image is one grey, which resizing and the map of [0, 255] to [-1, 1] keep as one.
    pixels = torch.full((1, 3, 16, 16), 180 / 255 * 2 - 1)
    mean = pipeline.vae.encode(pixels).latent_dist.mean[0].detach()
    torch.testing.assert_close(encoded["chosen"][0], mean * pipeline.vae.config.scaling_factor)
    options = QUIET | LORA | {
        "model": str(tmp_path / "pipeline"), "data": data, "output": str(tmp_path / "run"),
        "lora_alpha": 6.0,
        "eval_share": 0.25, "sample_count": 2, "sample_steps": 2, "max_steps": 2,
    }  # fmt: skip
    results = train_diffusion_dpo(build(DiffusionDPOConfig, options))
    assert results["before"]["loss"] == pytest.approx(LOG2)
    assert results["after"]["loss"] < results["before"]["loss"]
    assert size(tmp_path / "run" / "samples" / "after.png") == (32, 16)
    trained = PeftModel.from_pretrained(pipeline.unet, tmp_path / "run" / "model")
    assert any(p.abs().max() > 0 for n, p in trained.named_parameters() if "lora_B" in n)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.load_lora_weights(tmp_path / "run" / "model")
    state, own = loaded.unet.state_dict(), "base_model.model."
    for key, tensor in trained.state_dict().items():
        name = key.removeprefix(own).replace(".default.", ".default_0.")
        assert torch.equal(state[name], tensor), name
    scales = adapter_scales(trained, "default")
    assert adapter_scales(loaded.unet, "default_0") == scales
    assert scales == [6.0 / LORA["lora_r"]] * len(scales)
    bare = write_jsonl(tmp_path / "bare.jsonl", image_rows(tmp_path, 2))
    with pytest.raises(DataError, match="StableDiffusionPipeline needs a field 'prompt'"):
        encoder(read_pairs(bare))


@pytest.mark.parametrize("options", [{}, LORA])
def test_pipelines_are_loaded_in_the_precision_of_their_use(tmp_path, options):
    """Weights that are trained are those of the file, not rounded to half on the way."""
    torch.manual_seed(0)
    pipeline = stable_diffusion()
    pipeline.save_pretrained(tmp_path)
    more = {"model": str(tmp_path), "data": "pairs.jsonl", "output": "run"}
    loaded = _load_pipeline(DiffusionDPOConfig(**QUIET | more | options, mixed_precision="bf16"))
    assert loaded.text_encoder.dtype == torch.bfloat16
    assert loaded.unet.dtype == (torch.bfloat16 if options else torch.float32)
    exact = ("vae",) if options else ("vae", "unet")
    for name in exact:
        state = getattr(pipeline, name).state_dict()
        for key, tensor in getattr(loaded, name).state_dict().items():
            assert torch.equal(tensor, state[key]), key
    with pytest.raises(ConfigError, match="nowhere is no pipeline of diffusers"):
        _load_pipeline(DiffusionDPOConfig(**QUIET | more | {"model": str(tmp_path / "nowhere")}))


def test_prompts_are_held_out_whole():
    rows = [{"prompt": f"prompt {i // 3}"} for i in range(12)]
    kept, held = _split(rows, DiffusionDPOConfig(output="run", eval_share=0.3))
    assert len(held) == 6
    assert not {row["prompt"] for row in kept} & {row["prompt"] for row in held}
    assert _split(rows, DiffusionDPOConfig(output="run", eval_share=0.0)) == (rows, [])
