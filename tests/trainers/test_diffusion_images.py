"""Images of pairs: upright, never stretched, of every mode, in buckets of their shape."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

pytest.importorskip("diffusers")

from diffusers import DDPMPipeline
from diffusion_parts import QUIET, ddpm, tiny_unet
from tiny_rows import write_jsonl

from fastpo.data.errors import DataError
from fastpo.trainers.config import ConfigError, build
from fastpo.trainers.diffusion_config import DiffusionDPOConfig
from fastpo.trainers.diffusion_data import Encoder, PairOrder, read_pairs
from fastpo.trainers.diffusion_images import Frame, ImageReader, frame_of, image_size, parse_buckets
from fastpo.trainers.diffusion_run import train_diffusion_dpo


def circle(width, height, centre, radius=12):
    """A white circle on black."""
    image = Image.new("RGB", (width, height))
    x, y = centre
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), "white")
    return image


def extent(image):
    """Width and height of what is bright."""
    left, top, right, bottom = image.convert("L").point(lambda v: 255 * (v > 127)).getbbox()
    return right - left, bottom - top


def read(path, size, **options):
    return ImageReader(3).read(str(path), frame_of(image_size(str(path)), [size], **options))


@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (96, 40), (20, 33)])
def test_a_circle_stays_a_circle(tmp_path, shape):
    radius = min(shape) * 3 // 8
    circle(*shape, (shape[0] // 2, shape[1] // 2), radius).save(tmp_path / "a.png")
    got = read(tmp_path / "a.png", (32, 32))
    assert got.size == (32, 32)
    width, height = extent(got)
    assert abs(width - height) <= 1
    assert width == pytest.approx((2 * radius + 1) * 32 / min(shape), abs=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path, orientation):
    """What a camera stored in any of the eight ways is the same image; its size is the upright."""
    upright = circle(64, 32, (44, 12), 8)
    ways = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = upright.transpose(ways[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / "a.png")
    stored.save(path, exif=exif)
    assert image_size(path) == (32, 64)
    reader = ImageReader(3)
    got = reader.read(path, frame_of(image_size(path), [(32, 64)]))
    assert got.tobytes() == upright.tobytes()
    assert reader.counts["turned upright"] == (orientation > 1)


def in_mode(mode):
    """An image of one grey or colour in a mode, and what it is in 8 bits of RGB."""
    if mode == "I;16":
        return Image.fromarray(np.full((16, 16), 40000, np.uint16)), (156,) * 3
    if mode in ("L", "LA", "1"):
        grey = {"L": 100, "LA": (100, 255), "1": 1}[mode]
        return Image.new(mode, (16, 16), grey), (255,) * 3 if mode == "1" else (100,) * 3
    colour = (200, 60, 20)
    if mode == "transparent":
        return Image.new("RGBA", (16, 16), (*colour, 0)), (255,) * 3
    if mode == "half":
        return Image.new("RGBA", (16, 16), (*colour, 51)), (244, 216, 208)
    plain = Image.new("RGB", (16, 16), colour)
    return (plain.quantize(4) if mode == "P" else plain.convert(mode)), colour


@pytest.mark.parametrize(
    "mode",
    ["RGB", "RGBA", "P", "L", "LA", "1", "CMYK", "YCbCr", "HSV", "I;16", "transparent", "half"],
)
def test_every_mode_keeps_its_colours(tmp_path, mode):
    image, want = in_mode(mode)
    path = tmp_path / ("a.tiff" if mode in ("CMYK", "YCbCr", "HSV") else "a.png")
    if mode == "HSV":  # no format holds it
        image = image.convert("RGB")
    image.save(path)
    got = read(path, (16, 16))
    assert got.mode == "RGB"
    assert np.abs(np.asarray(got, int) - want).max() <= 2
    grey = ImageReader(1).read(str(path), frame_of((16, 16), [(16, 16)]))
    assert grey.mode == "L"


def test_what_is_no_image_is_named(tmp_path):
    frames = [Image.new("L", (16, 16), grey) for grey in (0, 255)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    circle(64, 64, (30, 30)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:120])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    Image.fromarray(np.ones((16, 16), np.float32)).save(tmp_path / "float.tiff")
    for name, reason in {
        "moving.gif": "expected one image, got 2 frames", "cut.png": "no image that can be read",
        "text.png": "no image that can be read", "empty.jpg": "no image that can be read",
        "float.tiff": "expected 8 or 16 bits per channel, got 32",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=rf"{name}: .*{reason}"):
            read(tmp_path / name, (16, 16))


def test_a_phone_s_second_image_is_no_animation(tmp_path):
    first, second = circle(64, 32, (32, 16)), circle(16, 8, (8, 4), 3)
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second])
    assert read(tmp_path / "a.jpg", (32, 32)).size == (32, 32)


def test_frames_are_those_of_the_scripts():
    """Short side to the resolution, crop at the rounded middle, and SDXL's six numbers."""
    frame = frame_of((600, 1000), [(512, 512)])
    assert frame.resized == (512, 853)
    assert frame.corner == (0, round((853 - 512) / 2))
    assert frame.time_ids == [600, 1000, 0, 170, 512, 512]
    assert frame_of((512, 512), [(512, 512)]) == Frame((512,) * 2, (512,) * 2, (0, 0), (512,) * 2)
    corners = {frame_of((16, 64), [(16, 16)], random.Random(i)).corner for i in range(300)}
    assert corners == {(0, left) for left in range(49)}


def test_buckets_are_of_the_nearest_shape():
    buckets = parse_buckets("16,32; 32,16 ;24,24")
    assert buckets == [(16, 32), (32, 16), (24, 24)]
    sizes = {(100, 200): (16, 32), (200, 100): (32, 16), (90, 100): (24, 24), (10, 99): (16, 32)}
    for original, size in sizes.items():
        assert frame_of(original, buckets).size == size
    for text in ("512", "512x512", "0,8", "a,b", ";"):
        with pytest.raises(ConfigError, match="aspect_ratio_buckets: expected heights and widths"):
            parse_buckets(text)


def mixed_rows(folder, **fields):
    rows = []
    for i, (width, height) in enumerate([(64, 32), (32, 64), (40, 40), (64, 32), (32, 64)] * 2):
        row = {"chosen": f"{i}-a.png", "rejected": f"{i}-b.png"} | fields
        circle(width, height, (width // 2, height // 2)).save(folder / row["chosen"])
        # The rejected image is of another size, and of another shape in some.
        circle(2 * width, 2 * height if i % 2 else height, (9, 9)).save(folder / row["rejected"])
        rows.append(row)
    return rows


@pytest.mark.parametrize("buckets", [None, "8,16;16,8;8,8"])
def test_images_of_mixed_sizes_train(tmp_path, buckets, capsys):
    torch.manual_seed(0)
    DDPMPipeline(tiny_unet(in_channels=3, out_channels=3), ddpm()).save_pretrained(tmp_path / "p")
    data = write_jsonl(tmp_path / "pairs.jsonl", mixed_rows(tmp_path, note="dull", promt="x"))
    options = QUIET | {
        "model": str(tmp_path / "p"), "data": data, "output": str(tmp_path / "run"),
        "batch_size": 2, "eval_share": 0.0, "max_steps": 6, "sample_count": 1, "sample_steps": 2,
        "aspect_ratio_buckets": buckets,
    }  # fmt: skip
    results = train_diffusion_dpo(build(DiffusionDPOConfig, options))
    assert results["steps"] == 6
    said = capsys.readouterr().out
    assert "not used: note, promt (did you mean 'prompt'?)" in said
    assert "images: 20; " in said
    most = 50 if buckets else 75  # of a wide image at a high one's side: its bucket keeps more
    assert f" cropped (by {most} % at most)" in said
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert all(math.isfinite(json.loads(line)["loss"]) for line in lines)


def test_both_of_a_pair_are_resized_and_cropped_by_their_own_shape(tmp_path):
    """A rejected image of another size is brought to it, one of another shape cut from its own."""
    circle(64, 32, (32, 16), 10).save(tmp_path / "a.png")
    circle(128, 64, (64, 32), 20).save(tmp_path / "b.png")
    circle(64, 64, (32, 32), 10).save(tmp_path / "c.png")
    encoder = Encoder(DDPMPipeline(tiny_unet(in_channels=3, out_channels=3), ddpm()), 32)
    for other, wide in (
        ("b.png", 21),
        ("c.png", 11),
    ):  # the latter of half the zoom: all of it fits
        rows = [{"chosen": str(tmp_path / "a.png"), "rejected": str(tmp_path / other)}]
        tensors = encoder(rows).tensors
        for side, expected in (("chosen", 21), ("rejected", wide)):
            pixels = tensors[side][0].mean(0).add(1).mul(127.5).byte().numpy()
            width, height = extent(Image.fromarray(pixels))
            assert abs(width - height) <= 1
            assert width == pytest.approx(expected, abs=1)
    assert encoder.images.report() == ("images: 4; 2 resized, 3 cropped (by 50 % at most)")


def test_batches_are_of_one_shape():
    """All ranks meet the same ones, and rare shapes are counted."""
    shapes = ["wide"] * 7 + ["high"] * 5 + ["square"]
    orders = [PairOrder(shapes, 2, seed=3, rank=rank, ranks=2) for rank in range(2)]
    assert [order.batches for order in orders] == [2, 2]
    assert [(order.left_out, order.never) for order in orders] == [(5, 1)] * 2
    seen = []
    for _, first, second in zip(range(20), *orders, strict=False):
        assert len({shapes[i] for i in first + second}) == 1
        seen.append(tuple(first + second))
    assert len({i for batch in seen for i in batch}) == 12  # each pass leaves out other ones
    for order in orders:
        order.start = 7
    assert (*next(iter(orders[0])), *next(iter(orders[1]))) == seen[7]
    plain = PairOrder(9, 2, seed=5)
    permuted = torch.randperm(9, generator=torch.Generator().manual_seed(5))[:8]
    assert [next(b) for b in [iter(plain)] for _ in range(4)] == permuted.view(4, 2).tolist()
    with pytest.raises(ConfigError, match=r"2 in a batch .* of 3 shapes"):
        PairOrder([1, 2, 3], 2, 0)


def test_exif_of_the_library_agrees(tmp_path):
    """A turned image is what Pillow's own transposition gives."""
    exif = Image.Exif()
    exif[0x0112] = 6
    circle(64, 32, (44, 12), 8).save(tmp_path / "a.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        want = ImageOps.exif_transpose(image)
    assert read(tmp_path / "a.jpg", (64, 32)).tobytes() == want.tobytes()


def test_sizes_that_do_not_fit_are_named():
    pipeline = DDPMPipeline(tiny_unet(in_channels=3, out_channels=3), ddpm())
    with pytest.raises(ConfigError, match="resolution: aspect_ratio_buckets say it"):
        Encoder(pipeline, 32, buckets=[(16, 16)])
    assert Encoder(pipeline).size == (8, 8)


def test_rows_may_have_a_prompt_label_or_sizes_for_each_image(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    images = {"chosen": "a.png", "rejected": "b.png"}
    own = {"chosen_prompt": "x", "rejected_prompt": "y", "chosen_class_label": 1,
           "rejected_class_label": 2, "time_ids": [1, 2, 0, 0, 8, 8.5], "weights": 0.5}  # fmt: skip
    said = []
    (row,) = read_pairs(
        write_jsonl(tmp_path / "rows.jsonl", [images | own | {"id": 7, "caption": "z"}]),
        loss_inputs=["weights"], say=said.append,
    )  # fmt: skip
    assert {name: row[name] for name in own} == own
    assert len(said) == 1
    assert said[0].endswith("not used: caption (did you mean 'prompt'?), id")
    for wrong, message in (
        ({"chosen_prompt": "x"}, "chosen_prompt is given and rejected_prompt is not"),
        ({"chosen_prompt": "x", "rejected_prompt": "y", "prompt": "z"}, "give one for both"),
        ({"time_ids": [1, 2]}, "field 'time_ids': expected six numbers"),
        ({"weights": "1"}, "field 'weights': expected a number, got '1'"),
    ):
        path = write_jsonl(tmp_path / "rows.jsonl", [images | wrong])
        with pytest.raises(DataError, match=message):
            read_pairs(path, loss_inputs=["weights"], say=said.append)


def test_pairs_that_are_the_same_are_left_out(tmp_path):
    """By what the files hold; the same image under prompts of its own is a pair (DCPO)."""
    circle(32, 32, (16, 16)).save(tmp_path / "a.png")
    circle(32, 32, (16, 16)).save(tmp_path / "copy.png")
    circle(32, 32, (16, 16), 4).save(tmp_path / "b.png")
    rows = [
        {"chosen": "a.png", "rejected": other, "chosen_prompt": "a", "rejected_prompt": prompt}
        for other, prompt in (("a.png", "a"), ("copy.png", "a"), ("copy.png", "b"), ("b.png", "a"))
    ]
    said = []
    read = read_pairs(write_jsonl(tmp_path / "pairs.jsonl", rows), say=said.append)
    assert [row["rejected_prompt"] for row in read] == ["b", "a"]
    assert said == [f"{tmp_path / 'pairs.jsonl'}: 2 left out as chosen equals rejected"]
    with pytest.raises(DataError, match="no pair is left"):
        read_pairs(write_jsonl(tmp_path / "same.jsonl", rows[:2]), say=said.append)
