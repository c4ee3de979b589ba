"""The outer loop of on-policy recipes: sample, score, build rows, train, keep states, repeat.

A recipe is a plain ``for`` loop over :meth:`OuterLoop.rounds`: ``sample`` from a named state,
``score``, build rows from pairs, ``train`` with log-probs of named states; what stands after that
in the loop's body is the end of the round. Training is ``DPOTrainer``, ``SFTTrainer`` or
``OnlineTrainer`` as they are.
"""

from __future__ import annotations

import gc
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from fastpo.data.tokens import CompletionCollator, PairCollator
from fastpo.data.win_rates import bradley_terry_matrix, win_rates
from fastpo.trainers import reference, sampling
from fastpo.trainers.base import LogAtEnd, own_forward
from fastpo.trainers.checkpoints import load_plain, resume_point, weights_digest
from fastpo.trainers.config import ConfigError
from fastpo.trainers.dpo import DPOTrainer
from fastpo.trainers.head import add_logprob_head
from fastpo.trainers.online import Experience, OnlineTrainer
from fastpo.trainers.sampling import Prompt, Samples
from fastpo.trainers.scoring import RoundError, Score, as_scores
from fastpo.trainers.sft import SFTTrainer
from fastpo.trainers.states import CURRENT, State, StateStore, temporarily

Prompts = Sequence[Prompt | dict[str, Any]]

LATEST = "latest"  # The model at the end of the last round.


class OuterLoop:
    """Rounds of sampling from a model and training it, each resumable from its beginning.

    After every round the weights, all named states and the metrics are in ``output/states``;
    sampled responses and scores are kept in ``output/round-<n>`` as soon as they are there. A run
    that is started again with ``resume`` goes on in the round it was in, with what it had sampled
    and scored, and from the last Trainer checkpoint if ``training`` asks for any.

    Args:
        model: a causal LM, or a ``PeftModel`` around one; trained in place.
        tokenizer: of the model, with a padding token.
        prompts: texts or lists of chat messages, or rows with ``prompt`` and further fields; or a
            function that gives them for a round.
        score: of responses to prompts, a callable that gives a tensor, an array or lists; NaN for
            a response without a score. Called in the main process only.
        output: folder of the run.
        samples: K, responses per prompt.
        max_new_tokens: of a response.
        temperature: of sampling.
        top_p: of sampling.
        max_prompt_length: tokens; longer prompts lose their start.
        sample_batch_size: prompts per call of ``generate``.
        training: any ``transformers.TrainingArguments``, for every round's training.
        seed: of everything random.
        state_bytes: of states in memory; the others are read from disk. None for no limit.
        resume: go on with the run in ``output``, if there is one.
        on_round: called with the metrics of each finished round.
        settings: what else makes it another run; compared on resume.

    Attributes:
        round: number of the round, from 0.
        states: the named states; ``initial`` is the model as it came.
        metrics: of the present round, to be added to.
        history: metrics of the finished rounds.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Prompts | Callable[[int], Prompts],
        score: Score | None = None,
        *,
        output: str | Path,
        samples: int = 4,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_prompt_length: int = 512,
        sample_batch_size: int = 16,
        training: dict[str, Any] | None = None,
        seed: int = 42,
        state_bytes: int | None = None,
        resume: bool = False,
        on_round: Callable[[dict[str, Any]], None] | None = None,
        settings: dict[str, Any] | None = None,
    ):
        sampling.require_padding(tokenizer)
        if samples < 1:
            raise ConfigError(f"samples: expected at least 1 per prompt, got {samples}.")
        if isinstance(prompts, str):
            raise ConfigError("prompts: expected a list of them, got a single text.")
        if not callable(prompts):
            prompts = list(prompts)
        self.model, self.tokenizer, self.score_function = model, tokenizer, score
        self.output, self.samples, self.seed = Path(output), samples, seed
        self.max_length = {"prompt": max_prompt_length, "all": max_prompt_length + max_new_tokens}
        self.generation = {
            "do_sample": True, "max_new_tokens": max_new_tokens, "temperature": temperature,
            "top_p": top_p, "top_k": 0,
        }  # fmt: skip
        self.sample_batch_size, self.training, self.on_round = sample_batch_size, training, on_round
        self._prompts_of = prompts if callable(prompts) else lambda number: prompts
        self.round, self.history, self.metrics = 0, [], {}
        # The trainers' arguments know the device; the head must come before any adapter.
        model.to(self._arguments(self.output).device)
        add_logprob_head(model.get_base_model() if hasattr(model, "get_base_model") else model)
        self.states = StateStore(model, self.output / "states", state_bytes)
        self.states.save("initial")
        settings = {
            **(settings or {}), **self.generation, "samples": samples, "seed": seed,
            "sample_batch_size": sample_batch_size, "max_prompt_length": max_prompt_length,
            "training": training or {},
            "prompts": "" if callable(prompts) else _digest(prompts),
            "model": weights_digest(model),
        }  # fmt: skip
        name = lambda value: getattr(value, "__qualname__", str(value))
        self.settings = json.loads(json.dumps(settings, default=name))
        self._open(resume)

    def _open(self, resume: bool) -> None:
        # All ranks look before any of them writes.
        exists = (self.output / "states" / "states.json").exists()
        self._kept = {p.relative_to(self.output) for p in self.output.glob("round-*/*.pt")}
        PartialState().wait_for_everyone()
        if exists and not resume:
            remedy = "Pass resume=True to continue it, or another output."
            raise RoundError(f"{self.output}: holds a run. {remedy}")
        if not exists and any(self.output.glob("round-*")):
            remedy = "Restore the folder states, or pass another output."
            raise RoundError(f"{self.output}: holds rounds of a run without its states. {remedy}")
        if exists:
            notes = self.states.reopen()
            before = notes["settings"]
            changed = [n for n, value in self.settings.items() if before.get(n) != value]
            if changed:
                remedy = "Restore what it was started with."
                raise RoundError(f"{self.output}: the run had other {', '.join(changed)}. {remedy}")
            self.round, self.history = notes["round"], notes["history"]
            self.states.load(LATEST)
        else:
            self._kept = set()
            self._commit()

    def _commit(self) -> None:
        self.states.save(LATEST)
        self.states.commit(
            PartialState().is_main_process,
            round=self.round, history=self.history, settings=self.settings,
        )  # fmt: skip
        PartialState().wait_for_everyone()

    def rounds(self, count: int) -> Iterator[int]:
        """Numbers of the rounds that are still to do; each is committed when its body ends.

        After the last one the model is saved in ``output/model``.
        """
        while self.round < count:
            started, self._step = time.perf_counter(), 0
            self.metrics = {"round": self.round}
            self.rows = list(self._prompts_of(self.round))
            self.prompts = [self._prompt_of(row) for row in self.rows]
            if not self.prompts:
                raise RoundError(f"round {self.round}: there are no prompts; give one at least.")
            self.prompt_ids = self.encode(self.rows)
            yield self.round
            self.metrics["seconds"] = time.perf_counter() - started
            self.history.append(self.metrics)
            self.round += 1
            self._commit()
            if self.on_round:
                self.on_round(self.metrics)
        self.model.eval()
        if PartialState().is_main_process:
            self.model.save_pretrained(self.output / "model")
            self.tokenizer.save_pretrained(self.output / "model")

    def _prompt_of(self, row: Prompt | dict[str, Any]) -> Prompt:
        prompt = row.get("prompt") if isinstance(row, dict) else row
        if not isinstance(prompt, (str, list)):
            expected = "a text, a list of messages, or a row with the field prompt"
            raise RoundError(f"prompts: expected of each {expected}; got {row!r}.")
        return prompt

    @property
    def folder(self) -> Path:
        """Of the present round."""
        return self.output / f"round-{self.round}"

    def _next(self, name: str) -> Path:
        """A path in the folder of the round, the same one in every run of the recipe."""
        self._step += 1
        return self.folder / f"{self._step:02d}-{name}"

    def _once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, or gave before the run was interrupted."""
        path = self._next(f"{name}.pt")
        if path.relative_to(self.output) in self._kept:
            return load_plain(path)
        found = compute()
        if PartialState().is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            torch.save(found, partial)
            partial.replace(path)
        return found

    def encode(self, prompts: Prompts) -> list[list[int]]:
        """Token ids of prompts or their rows, as the trainers have them."""
        return sampling.encode_prompts(prompts, self.tokenizer, self.max_length["prompt"])[0]

    def sample(
        self,
        samples: int | None = None,
        state: str = CURRENT,
        prompts: Sequence[Prompt] | None = None,
        **generation: Any,
    ) -> Samples:
        """Responses to the round's prompts, or others, shared out among the ranks.

        Args:
            samples: K; that of the loop if not given.
            state: which model samples.
            prompts: in place of the round's.
            **generation: of ``GenerationConfig``, over those of the loop.
        """
        prompts = self.prompts if prompts is None else list(prompts)
        prompt_ids = self.encode(prompts)
        parts = list(sampling.batches(len(prompts), self.sample_batch_size))
        name = f"samples-{state}"
        seeds = [sampling.seed_of(self.seed, self.round, self._step, i) for i in range(len(parts))]

        def compute():
            ranks = PartialState()
            mine = range(ranks.process_index, len(parts), ranks.num_processes)
            with self.states.using(state):
                found = [
                    (i, self._generate(prompt_ids[parts[i]], seeds[i], samples, **generation))
                    for i in mine
                ]
            ids = [ids for _, part in sorted(gather_object(found)) for ids in part]
            return vars(self._samples(prompts, prompt_ids, ids, seeds))

        found = Samples(**self._once(name, compute))
        if found.prompt_ids != prompt_ids:
            remedy = "Let the function of prompts give the same for a round in every run."
            problem = "it was interrupted after sampling, with other prompts"
            raise RoundError(f"round {self.round}: {problem}. {remedy}")
        return found

    def respond(
        self,
        index: Sequence[int],
        seed: int,
        samples: int | None = None,
        state: str | State = CURRENT,
        **generation: Any,
    ) -> Samples:
        """Responses to a batch of the round's prompts on this rank alone, kept nowhere."""
        prompts, prompt_ids = ([v[i] for i in index] for v in (self.prompts, self.prompt_ids))
        is_name = isinstance(state, str)
        with self.states.using(state) if is_name else temporarily(self.model, state):
            ids = self._generate(prompt_ids, seed, samples, **generation)
        return self._samples(prompts, prompt_ids, ids, [seed])

    def _samples(self, prompts, prompt_ids, ids, seeds) -> Samples:
        texts = [self.tokenizer.batch_decode(group, skip_special_tokens=True) for group in ids]
        return Samples(prompts, prompt_ids, ids, texts, seeds)

    def _generate(
        self, prompt_ids: list[list[int]], seed: int, samples: int | None = None, **generation: Any
    ) -> list[list[list[int]]]:
        options = self.generation | generation
        if not options["do_sample"]:
            options = {"do_sample": False, "max_new_tokens": options["max_new_tokens"]}
        return sampling.generate(
            self.model, self.tokenizer, prompt_ids, samples or self.samples, seed, **options
        )

    def given(self, *fields: str) -> Samples:
        """Responses that the rows of the prompts bring, such as ``chosen`` and ``rejected``."""
        needed = {"prompt", *fields}
        if not all(isinstance(row, dict) and needed <= row.keys() for row in self.rows):
            expected = ", ".join(("prompt", *fields))
            raise RoundError(f"prompts: expected rows with {expected}; this recipe needs them.")
        found = sampling.encode_responses(self.rows, fields, self.tokenizer, self.max_length["all"])
        found.prompt_ids = self.prompt_ids
        return found

    def score(self, samples: Samples, state: str = CURRENT) -> Tensor:
        """Rewards [B, K] or preferences [B, K, K] by the loop's scorer, with the model in a state.

        The mean reward of the first call of a round is its metric ``score``.
        """

        def compute():
            found = [None]
            if PartialState().is_main_process:
                with self.states.using(state):
                    found = [self.judge(samples)]
            return broadcast_object_list(found)[0]

        scores = self._once("scores", compute)
        if scores.ndim == 2:
            self.metrics.setdefault("score", scores.double().nanmean().item())
        return scores

    def judge(self, samples: Samples) -> Tensor:
        """The scorer on this rank alone, its result checked and kept nowhere."""
        if self.score_function is None:
            raise RoundError("score: this recipe needs a function that scores responses.")
        return as_scores(self.score_function(samples.prompts, samples.texts), samples)

    # What the rules of fastpo.data take.

    def rewards(self, scores: Tensor) -> Tensor:
        """Scores [B, K]; of preferences, the rates of wins against the other responses."""
        return win_rates(scores) if scores.ndim == 3 else scores

    def preferences(self, scores: Tensor) -> Tensor:
        """Preferences [B, K, K]; of rewards, those of Bradley and Terry."""
        return scores if scores.ndim == 3 else bradley_terry_matrix(scores)

    def replay(self, shares: Sequence[float]) -> list[dict[str, Any]]:
        """Rows of earlier rounds to train on again.

        Args:
            shares: how many, as a share of the rows of their round, of the last round, the one
                before it, and so on.
        """
        found = []
        for back, share in enumerate(shares[: self.round], 1):
            number = self.round - back
            paths = sorted(self.output.glob(f"round-{number}/*-rows.pt"))
            rows = [row for path in paths for row in load_plain(path)]
            generator = random.Random(sampling.seed_of(self.seed, self.round, number))
            found += generator.sample(rows, round(share * len(rows)))
        return found

    def train(
        self,
        rows: list[dict[str, Any]],
        loss: str | Callable,
        *,
        ref: str | None = None,
        history: Sequence[str] = (),
        **loss_options: Any,
    ) -> None:
        """Train the model on pairs, from where it is.

        Args:
            rows: of :meth:`Samples.rows`; the log-probs of states are added to them.
            loss: as of :class:`DPOTrainer`.
            ref: the state that is the reference; None for losses without.
            history: states of the loss's history, most recent first.
            **loss_options: of the loss.
        """
        dataset = self._dataset(rows)
        self._train(
            lambda args: DPOTrainer(
                self.model, args, loss=loss, loss_options=loss_options, reference="cached",
                data_collator=PairCollator(self.tokenizer.pad_token_id), train_dataset=dataset,
            ),
            lambda trainer: self.add_streams(trainer, dataset, ref, history),
        )  # fmt: skip

    def fit(self, rows: list[dict[str, Any]]) -> None:
        """Fit the model to responses, rows of :meth:`Samples.rows_of`."""
        dataset = self._dataset(rows)
        collator = CompletionCollator(self.tokenizer.pad_token_id)
        self._train(
            lambda args: SFTTrainer(self.model, args, data_collator=collator, train_dataset=dataset)
        )

    def train_online(
        self, experience: Experience, loss: str | Callable, callbacks=(), **loss_options: Any
    ) -> None:
        """Train on rows made anew from every batch of prompts; the reference is ``initial``.

        Of an adapter that is the adapter as it came, not the base model.

        Args:
            experience: rows of some prompts, as of :class:`OnlineTrainer`.
            loss: as of :class:`DPOTrainer`.
            callbacks: of the Trainer, called before and after every step.
            **loss_options: of the loss.
        """
        prompts = Dataset.from_dict({"index": list(range(len(self.prompts)))})
        has_adapter = hasattr(self.model, "disable_adapter")
        initial = self.states.get("initial") if has_adapter else None

        def build(args):
            with self.states.using("initial"):  # What a copy is taken of.
                return OnlineTrainer(
                    self.model, args, experience=experience, loss=loss, loss_options=loss_options,
                    reference="cached" if has_adapter else "copy", initial=initial,
                    pad_id=self.tokenizer.pad_token_id, train_dataset=prompts,
                    callbacks=[*callbacks],
                )  # fmt: skip

        self._train(build)

    def _dataset(self, rows: list[dict[str, Any]]) -> Dataset:
        """Rows as a data set, kept in the folder of the round."""
        self.metrics["rows"] = self.metrics.get("rows", 0) + len(rows)
        if not rows:
            remedy = (
                f"Look whether the scores differ; to score anew delete {self.folder} and resume. "
                f"Or resume with rounds={self.round}, which saves the model as it is, and start "
                "from that with more samples or a higher temperature."
            )
            raise RoundError(f"round {self.round}: no pairs to train on. {remedy}")
        rows = self._once("rows", lambda: rows)  # For replay.
        return Dataset.from_list([row | {"index": i} for i, row in enumerate(rows)])

    def add_streams(
        self, trainer: DPOTrainer, rows: Dataset, ref: str | None, history: Sequence[str]
    ) -> Dataset:
        """Columns of summed log-probs, each state's computed once."""
        sums = {}
        for state in dict.fromkeys([*([ref] if ref else []), *history]):
            with self.states.using(state):
                sums[state] = reference.compute(trainer, rows)
        columns = {}
        if ref:
            names = ("ref_chosen", "ref_rejected", "ref_extra")
            columns |= zip(names, sums[ref].unbind(1), strict=False)
        for i, side in enumerate(("chosen", "rejected") if history else ()):
            columns[f"history_{side}"] = torch.stack([sums[s][:, i] for s in history], 1)
        for name, values in columns.items():
            rows = rows.add_column(name, values.tolist())
        return rows

    def _arguments(self, folder: Path) -> TrainingArguments:
        options = {
            "per_device_train_batch_size": 8, "learning_rate": 5e-7, "num_train_epochs": 1,
            "save_strategy": "no", "report_to": [], "logging_steps": 10, "logging_first_step": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
        } | (self.training or {})  # fmt: skip
        own = {"output_dir": str(folder), "remove_unused_columns": False}
        own["seed"] = sampling.seed_of(self.seed, self.round) % 2**31
        clash = own.keys() & options.keys()
        if clash:
            raise ConfigError(f"training: {min(clash)} is set by the loop; leave it out.")
        return TrainingArguments(**options, **own)

    def _train(
        self,
        build: Callable[[TrainingArguments], Trainer],
        finish: Callable[[Any], Dataset] | None = None,
    ) -> None:
        folder = self._next("train")
        checkpoint = resume_point(folder, "auto", None)
        trainer = build(self._arguments(folder))
        trainer.add_callback(LogAtEnd())
        if finish:
            trainer.train_dataset = finish(trainer)
        with own_forward(self.model):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        logs = [log for log in trainer.state.log_history if "loss" in log]
        self.metrics |= {k: v for k, v in (logs[-1] if logs else {}).items() if k != "step"}
        # The next round's Trainer wraps the model anew.
        trainer.accelerator.free_memory()
        self.model._is_accelerate_prepared = False
        del trainer  # Its optimiser is in reference cycles.
        gc.collect()


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()
