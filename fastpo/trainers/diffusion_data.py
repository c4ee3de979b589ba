"""Pairs of samples: their order in training, and those of a file of images and a pipeline."""

from __future__ import annotations

import difflib
import filecmp
import inspect
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from fastpo.data.errors import DataError
from fastpo.data.records import read_jsonl
from fastpo.integrations.diffusers import Adapter, encode_latents, latent_scales
from fastpo.trainers.config import ConfigError
from fastpo.trainers.diffusion_images import Frame, ImageReader, frame_of, image_size

SIDES = ("chosen", "rejected")


class PairRows(Dataset):
    """Rows of a dataset with their ``index``, and maybe the reference's errors of them.

    Every row is looked at once.

    Attributes:
        shapes: of the samples of each row, [C, H, W].

    Raises:
        DataError: a row, which is named, is not a pair of finite floating samples of one shape, or
            has other columns than the first.
    """

    def __init__(self, rows: Dataset):
        self.rows, self.reference_errors = rows, None
        if not len(rows):
            raise DataError("pairs: there are none.")
        self.shapes: list[tuple[int, ...]] = []
        for index in range(len(rows)):
            row = rows[index]
            if row.keys() != rows[0].keys():
                got = ", ".join(row.keys() ^ rows[0].keys())
                raise DataError(f"pairs, row {index}: {got}: in this row or in the first alone.")
            self.shapes.append(self._shape(row, f"pairs, row {index}"))

    def _shape(self, row: Mapping[str, Any], where: str) -> tuple[int, ...]:
        shapes = [list(getattr(row.get(side), "shape", ())) for side in SIDES]
        if shapes[0] != shapes[1] or len(shapes[0]) != 3:
            expected = "chosen and rejected, tensors of one shape [C, H, W]"
            raise DataError(f"{where}: expected {expected}, got {shapes[0]} and {shapes[1]}.")
        for side in SIDES:
            if not torch.as_tensor(row[side]).is_floating_point():
                expected = "floats, images in [-1, 1] or latents"
                raise DataError(f"{where}: {side}: expected {expected}, got {row[side].dtype}.")
        for name, value in row.items():
            if not torch.as_tensor(value).isfinite().all():
                raise DataError(f"{where}: {name}: expected finite numbers, got NaN or infinity.")
        return tuple(shapes[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "index": index}

    def of_one_shape(self, indices: Iterable[int], size: int) -> list[list[int]]:
        """Batches of up to ``size`` of the indices, of samples of one shape each."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for index in indices:
            groups.setdefault(self.shapes[index], []).append(index)
        return [g[i : i + size] for g in groups.values() for i in range(0, len(g), size)]

    def values(self) -> Iterator[str | Tensor]:
        """Names and values of all rows, for a fingerprint."""
        for row in map(self.rows.__getitem__, range(len(self))):
            for name in sorted(row):
                yield name
                yield torch.as_tensor(row[name])


class PairOrder(Sampler[list[int]]):
    """Batches of indices without end, shuffled anew in each pass, from any batch on.

    The pairs of a batch are of one shape. A pass leaves out those that do not fill a batch of every
    process, other ones each time.

    Args:
        rows: their number, or the shape of each, anything that compares.
        batch_size: per process.
        seed: of the order.
        rank: of this process.
        ranks: number of processes.

    Attributes:
        batches: of each process in a pass.
        left_out: number of pairs that a pass leaves out.
        never: number of pairs of shapes too rare for a batch, which all passes leave out.
        start: the first batch to give.

    Raises:
        ConfigError: the rows do not fill a batch of every process.

    Example:
        >>> order = PairOrder(["wide", "high", "wide", "high", "wide"], 2, seed=0)
        >>> first = [batch for batch, _ in zip(order, range(6))]
        >>> all(len({i % 2 for i in batch}) == 1 for batch in first)
        True
        >>> order.start = 4
        >>> next(iter(order)) == first[4]
        True
    """

    def __init__(
        self, rows: int | Sequence[Any], batch_size: int, seed: int, rank: int = 0, ranks: int = 1
    ):
        self.shapes = shapes = [()] * rows if isinstance(rows, int) else rows
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.ranks, self.start = rank, ranks, 0
        whole = batch_size * ranks
        counts = Counter(shapes).values()
        self.batches = sum(count // whole for count in counts)
        self.left_out = len(shapes) - self.batches * whole
        self.never = sum(count for count in counts if count < whole)
        if not self.batches:
            got = f"{len(shapes)} pairs to train on, {whole} in a batch of all devices"
            got += f", of {len(counts)} shapes" if len(counts) > 1 else ""
            raise ConfigError(f"batch_size: {got}. Make it smaller.")

    def _batches(self, run: int) -> list[list[int]]:
        """Of all processes in a pass, in the order of their last pairs."""
        generator = torch.Generator().manual_seed(self.seed + run)
        batches, open_batches = [], {}
        for index in torch.randperm(len(self.shapes), generator=generator).tolist():
            batch = open_batches.setdefault(self.shapes[index], [])
            batch.append(index)
            if len(batch) == self.batch_size * self.ranks:
                batches.append(open_batches.pop(self.shapes[index]))
        return batches

    def __iter__(self) -> Iterator[list[int]]:
        run, place = divmod(self.start, self.batches)
        first = self.rank * self.batch_size
        while True:
            for batch in self._batches(run)[place:]:
                yield batch[first : first + self.batch_size]
            run, place = run + 1, 0


def conditions(row: Mapping[str, Any], loss_inputs: set[str]) -> dict[str, tuple[Any, Any]]:
    """By name, the conditions of the chosen and of the rejected sample of a row or batch.

    Raises:
        DataError: one is given for one of the two only, or twice.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name in row.keys() - {*SIDES, "index"} - loss_inputs:
        side, _, own = name.partition("_")
        if side not in SIDES:
            found[name] = row[name], row[name]
            continue
        missing = [f"{s}_{own}" for s in SIDES if f"{s}_{own}" not in row]
        if missing:
            raise DataError(f"pairs: {name} is given and {missing[0]} is not; give both.")
        if own in row:
            raise DataError(f"pairs: {name} and {own}: give one for both samples, or one for each.")
        found[own] = tuple(row[f"{s}_{own}"] for s in SIDES)
    return found


class Rows(Dataset):
    """Tensors, or lists of them, by name, of which row n is the n-th of each."""

    def __init__(self, tensors: Mapping[str, Tensor | list[Tensor]]):
        self.tensors = dict(tensors)

    def __len__(self) -> int:
        return len(self.tensors["chosen"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 6 and all(map(_is_number, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# What a row may hold of each image, or once for both, and what it has to be.
CONDITIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": ("str", lambda value: isinstance(value, str)),
    "class_label": ("int", lambda value: type(value) is int),
    "time_ids": ("six numbers: original height and width, top, left, height, width", _is_numbers),
}
# Names that other data sets have for them.
_OTHER_NAMES = {
    "caption": "prompt", "text": "prompt", "label": "class_label", "class": "class_label",
    "image_chosen": "chosen", "image_rejected": "rejected", "jpg_0": "chosen", "jpg_1": "rejected",
}  # fmt: skip


def read_pairs(
    path: str | Path,
    limit: int | None = None,
    loss_inputs: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Rows of a JSONL file: ``chosen`` and ``rejected``, image files, and what belongs to them.

    ``prompt``, ``class_label`` and ``time_ids`` may be there once for both images, or for each, as
    ``chosen_prompt`` and ``rejected_prompt``; numbers that the loss takes by their names. Paths are
    relative to the folder of the file. Pairs that are the same on both sides are left out.

    Args:
        path: of the file.
        limit: the first so many rows only.
        loss_inputs: names of the loss's own inputs of each pair.
        say: what takes a line on columns that are not used, and what they may be meant as, and on
            pairs that are left out.

    Raises:
        DataError: the file has no rows, all are left out, or one lacks an image or has a field of
            the wrong kind.
    """
    kinds = {
        side: ("str, the file of an image", lambda value: isinstance(value, str)) for side in SIDES
    }
    for name, kind in CONDITIONS.items():
        kinds |= dict.fromkeys((name, *(f"{side}_{name}" for side in SIDES)), kind)
    kinds |= dict.fromkeys(loss_inputs, ("a number", _is_number))
    rows: list[dict[str, Any]] = []
    unused: dict[str, str] = {}
    for line, row in read_jsonl(path):
        if limit is not None and len(rows) == limit:
            break
        where = f"{path}, line {line}"
        for side in SIDES:
            if side not in row:
                raise DataError(f"{where}: field {side!r} is missing, the file of an image.")
        given = {name: row[name] for name in kinds if row.get(name) is not None}
        for name, value in given.items():
            expected, is_right = kinds[name]
            if not is_right(value):
                raise DataError(f"{where}: field {name!r}: expected {expected}, got {value!r:.80}.")
        if rows and given.keys() != rows[0].keys():
            raise DataError(f"{where}: expected the fields {', '.join(rows[0])}, as above.")
        conditions(given, set(loss_inputs))
        unused |= {name: _hint(name, kinds) for name in row.keys() - kinds.keys()}
        rows.append(given)
        for side in SIDES:
            rows[-1][side] = str(Path(path).parent / row[side])
            if not Path(rows[-1][side]).is_file():
                raise DataError(f"{where}: field {side!r}: there is no file {rows[-1][side]}.")
    if not rows:
        raise DataError(f"{path}: no rows.")
    if unused:
        named = (f"{n} (did you mean {h!r}?)" if h else n for n, h in sorted(unused.items()))
        say(f"{path}: not used: {', '.join(named)}")
    different = [row for row in rows if not _is_same(row)]
    if len(different) < len(rows):
        say(f"{path}: {len(rows) - len(different)} left out as chosen equals rejected")
    if not different:
        raise DataError(f"{path}: no pair is left, chosen equals rejected in all.")
    return different


def _is_same(row: Mapping[str, Any]) -> bool:
    """Whether both sides of a pair have the same image file and the same conditions."""
    sides = ((row.get(f"chosen_{n}"), row.get(f"rejected_{n}")) for n in CONDITIONS)
    same = all(chosen == rejected for chosen, rejected in sides)
    return same and filecmp.cmp(row["chosen"], row["rejected"], shallow=False)


def _hint(name: str, known: Collection[str]) -> str:
    """The known field that a name may be meant as; empty if it is like none."""
    side, _, own = name.partition("_")
    prefix, own = (f"{side}_", own) if side in SIDES and own else ("", name)
    other = prefix + _OTHER_NAMES.get(own.lower(), "")
    near = [other] if other in known else difflib.get_close_matches(name.lower(), known, 1, 0.75)
    return near[0] if near else ""


class Encoder:
    """Makes tensors of rows by the parts of a pipeline, once for each sample.

    Images are resized on their short side and cropped to a bucket, see
    :mod:`fastpo.trainers.diffusion_images`; those of latent models become the means of the VAE's
    posterior, scaled as the denoiser sees them. The geometry of a pair is that of its chosen image.

    Args:
        pipeline: of diffusers: a denoiser and a scheduler, with or without VAE and text encoders.
        resolution: pixels of a side; that of the pipeline by default.
        guidance: told to models that are distilled for guidance.
        buckets: heights and widths in pixels, in place of the resolution.
        crop_seed: for crops at random places, drawn once for each pair; the centre without it.

    Attributes:
        size: height and width in pixels of the first bucket.
        factor: pixels of a side per latent.
        images: what reads them, with its counts.

    Raises:
        ConfigError: the size is not known or does not fit, guidance is given to a model without it
            or missing, or the VAE and the denoiser do not go together.
    """

    def __init__(
        self,
        pipeline: Any,
        resolution: int | None = None,
        guidance: float | None = None,
        *,
        buckets: Sequence[tuple[int, int]] = (),
        crop_seed: int | None = None,
    ):
        self.pipeline, self.guidance, self.crop_seed = pipeline, guidance, crop_seed
        self.vae = getattr(pipeline, "vae", None)
        denoiser = denoiser_of(pipeline)[1]
        self.adapter, config = Adapter(denoiser), denoiser.config
        if guidance is not None and not config.get("guidance_embeds"):
            raise ConfigError("guidance: the model is not distilled for guidance; leave it out.")
        if guidance is None and config.get("guidance_embeds"):
            raise ConfigError("guidance: the model is distilled for guidance; give --guidance.")
        channels, shape = self.adapter.channels, None
        if self.vae is not None:
            channels = self.vae.config.get("in_channels", 3)
            shape = self._probe(channels)
        self.factor = _PROBE // shape[1] if shape else 1
        if channels not in (1, 3) or (shape and shape[0] != self.adapter.channels):
            got = f"{shape[0]} by the VAE" if shape else "images of 1 or 3 alone"
            what = f"{self.adapter.name} denoises samples of {self.adapter.channels} channels"
            remedy = "Masks, images and other inputs of a model are not in pairs."
            raise ConfigError(f"model: {what}, and there are {got}. {remedy}")
        self.buckets = self._sizes(resolution, buckets)
        self.size = self.buckets[0]
        self.images = ImageReader(channels)
        self.processor = VaeImageProcessor(do_resize=False)

    def _sizes(
        self, resolution: int | None, buckets: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """The buckets, checked; one square without any."""
        if resolution is not None and buckets:
            raise ConfigError("resolution: aspect_ratio_buckets say it; give one of them.")
        default = getattr(self.pipeline, "default_sample_size", None)
        default = default or self.adapter.config.get("sample_size")
        if resolution is None and not buckets and not isinstance(default, int):
            raise ConfigError("resolution: the pipeline does not say any; give --resolution.")
        side = resolution or (default * self.factor if isinstance(default, int) else 0)
        unit = self.factor * self.adapter.patch
        for size in buckets or [(side, side)]:
            if any(n < 1 or n % unit for n in size):
                name = "aspect_ratio_buckets" if buckets else "resolution"
                got = " x ".join(map(str, size))
                raise ConfigError(f"{name}: expected multiples of {unit} pixels, got {got}.")
        return list(buckets) or [(side, side)]

    @torch.no_grad()
    def _probe(self, channels: int) -> tuple[int, ...]:
        """The shape [C, H, W] of the latents of a small image.

        Raises:
            ConfigError: the VAE is not one of images.
        """
        name, got = type(self.vae).__name__, ""
        try:
            zeros = torch.zeros(1, channels, _PROBE, _PROBE, device=self.vae.device)
            shape = tuple(encode_latents(self.vae, zeros.to(self.vae.dtype)).shape)
        except Exception as error:  # of a model that we cannot know
            shape, got = (), str(error)
        if len(shape) != 4 or shape[2] != shape[3] or not shape[2] or _PROBE % shape[2]:
            got = got or f"latents {list(shape)}"
            raise ConfigError(f"model: {name}: expected a VAE of images [N, C, H, W], got {got}.")
        return shape[1:]

    @torch.no_grad()
    def __call__(self, rows: list[dict[str, Any]], progress: bool = False) -> Rows:
        """The tensors of rows, on the CPU."""
        needs_text = hasattr(self.pipeline, "encode_prompt")
        given = {name.removeprefix("chosen_") for name in rows[0]}
        name = type(self.pipeline).__name__
        if needs_text and "prompt" not in given:
            raise DataError(f"data: {name} needs a field 'prompt' in every row.")
        if not needs_text and "prompt" in given:
            raise DataError(f"data: {name} has no text encoder for the field 'prompt'; drop it.")
        shown = {"disable": not progress}
        draws = (
            None if self.crop_seed is None else random.Random(f"{self.crop_seed} {row['chosen']}")
            for row in rows
        )
        frames = [
            frame_of(image_size(row["chosen"]), self.buckets, draw)
            for row, draw in zip(rows, draws, strict=True)
        ]
        tensors: dict[str, Any] = {
            side: [
                self.image(row[side], frame)
                for row, frame in zip(tqdm(rows, side, **shown), frames, strict=True)
            ]
            for side in SIDES
        }
        for side in SIDES:
            if len({image.shape for image in tensors[side]}) == 1:
                tensors[side] = torch.stack(tensors[side])
        columns = [name for name in rows[0] if name not in SIDES]
        # Embeddings are large and prompts repeat: rows share what is made once.
        prompts = [name for name in columns if name.endswith("prompt")]
        words = dict.fromkeys(row[name] for name in prompts for row in rows)
        texts = {text: self.text(text) for text in tqdm(words, "prompts", **shown)}
        for column in columns:
            if column in prompts:
                side = column.removesuffix("prompt")
                for name in texts[rows[0][column]]:
                    tensors[side + name] = [texts[row[column]][name] for row in rows]
            else:
                name = column + "s" if column.endswith("class_label") else column
                tensors[name] = torch.tensor([row[column] for row in rows])
        if self.adapter.config.get("addition_embed_type") == "text_time" and (
            "time_ids" not in given
        ):
            tensors["time_ids"] = torch.tensor([frame.time_ids for frame in frames])
        if self.guidance is not None:
            tensors["guidance"] = torch.full((len(rows),), float(self.guidance))
        return Rows(tensors)

    def image(self, path: str, frame: Frame | None = None) -> Tensor:
        """[C, H, W] in [-1, 1], or its latents, scaled as the denoiser sees them.

        Raises:
            DataError: the file is no image, or gives latents that are not finite.
        """
        frame = frame or frame_of(image_size(path), self.buckets)
        pixels = self.processor.preprocess(self.images.read(path, frame))
        if self.vae is None:
            return pixels[0]
        shift, scale = latent_scales(self.vae)
        raw = encode_latents(self.vae, pixels.to(self.vae.device, self.vae.dtype))[0].float().cpu()
        latents = (raw - shift) * scale
        if not latents.isfinite().all():
            got = f"NaN or infinity of the VAE in {self.vae.dtype}"
            raise DataError(f"{path}: expected finite latents, got {got}. Load it in float32.")
        return latents

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] of samples [N, ...], the inverse of :meth:`image`."""
        if self.vae is None:
            return samples
        shift, scale = (x.to(samples.device) for x in latent_scales(self.vae))
        latents = samples / scale + shift
        with torch.autocast(samples.device.type, enabled=False):
            return self.vae.decode(latents.to(self.vae.dtype)).sample

    def text(self, prompt: str) -> dict[str, Tensor]:
        """Embeddings of a prompt, by the names of the denoiser's conditions."""
        encode = self.pipeline.encode_prompt
        wanted = {
            "prompt": prompt, "prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1,
            "do_classifier_free_guidance": False, "device": self.pipeline.device,
        }  # fmt: skip
        known = inspect.signature(encode).parameters
        embeds, *others = encode(**{name: v for name, v in wanted.items() if name in known})
        found = {"encoder_hidden_states": embeds[0]}
        if denoiser_of(self.pipeline)[0] == "transformer":
            # SD3: embeddings, negative, pooled, negative; Flux: no negative
            found["pooled_projections"] = others[1 if len(others) == 3 else 0][0]
        elif self.adapter.config.get("addition_embed_type") == "text_time":
            found["text_embeds"] = others[1][0]
        return {name: tensor.float().cpu() for name, tensor in found.items()}


_PROBE = 64  # pixels of a side: a multiple of what the known VAEs make one latent of


def denoiser_of(pipeline: Any) -> tuple[str, torch.nn.Module]:
    """Name and module of a pipeline's denoiser.

    Raises:
        ConfigError: it has none.
    """
    for name in ("unet", "transformer"):
        if getattr(pipeline, name, None) is not None:
            return name, getattr(pipeline, name)
    raise ConfigError(f"model: {type(pipeline).__name__} has neither unet nor transformer.")
