"""From rows to a tuned model on disk: frozen layers run once, one trainer for all methods, nothing done twice."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback,
                          TrainingArguments, __version__, logging, set_seed)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import get_last_checkpoint

from .. import data
from ..model import Backbone, Catalogue, context_limit, open_backbone, split_layers
from ..train import (OF_FLOWER, WIDTHS, Objective, Rows, TrainSettings, collate, make_rows, training_rows,
                     validation_rows)
from ..tree import Beams, PackedTree, beam_search, right_padded
from . import sources, store


class OnDisk:
    """A 2-D array in a .npy file, its rows read when they are asked for: a map would grow in memory to all of it."""

    def __init__(self, path: Path):
        file = np.load(path, mmap_mode="r")
        self.path, self.begin, self.width, self.dtype = path, file.offset, file.shape[1], file.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        size, begin = (n * self.width for n in (rows.stop - rows.start, rows.start))
        read = np.fromfile(self.path, self.dtype, size, offset=self.begin + begin * self.dtype.itemsize)
        return read.reshape(-1, self.width)


@torch.no_grad()
def run_trunk(rows: Rows, trunk: PreTrainedModel, folder: Path, name: str, batch_size: int = 16) -> None:
    """Runs the frozen layers once over all rows; their output stays on disk as float16, in
    folder/<name>-<digest of rows and weights>.npy."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{store.digest(rows.start, *rows.input_ids, *trunk.parameters())}.npy"
    shape = (int(rows.start[-1]), trunk.config.hidden_size)
    if store.outdated(path):
        _check_room(folder, 2 * shape[0] * shape[1])  # a memory-mapped file that outgrows the disk kills the process
        with store.atomic(path) as new:
            out = np.lib.format.open_memmap(new, mode="w+", dtype=np.float16, shape=shape)
            order = sorted(range(len(rows)), key=lambda i: -len(rows.input_ids[i]))
            for first in tqdm(range(0, len(order), batch_size), desc="frozen layers, once", unit="batch"):
                batch = order[first : first + batch_size]
                ids = right_padded([rows.input_ids[i] for i in batch], multiple=WIDTHS).to(trunk.device)
                states = trunk(input_ids=ids).last_hidden_state.half().numpy(force=True)
                for i, row in zip(batch, states):
                    out[rows.start[i] : rows.start[i + 1]] = own = row[: len(rows.input_ids[i])]
                    if not np.isfinite(own).all():
                        raise ValueError("the frozen layers' output leaves float16's range: set frozen_layers to 0")
            out.flush()
    with store.reading(path):
        np.load(path, mmap_mode="r").reshape(shape)
    rows.hidden = OnDisk(path)


def _check_room(folder: Path, needed: int) -> None:
    """Raises OSError where the disk has less than this many bytes free."""
    if needed > (free := shutil.disk_usage(folder).free):
        raise OSError(f"{folder} needs {needed >> 20:,} MB and the disk has {free >> 20:,} MB free: make room")


class LikeLengths(LengthGroupedSampler):
    """Rows of like length in one batch; random by seed and epoch, so that a run that resumes goes on where it was."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        return super().__iter__()


class FlowerTrainer(Trainer):
    """transformers' Trainer with the loss of an `Objective`."""

    def __init__(self, *args: Any, objective: Objective, **kwargs: Any):
        super().__init__(*args, data_collator=collate, **kwargs)
        self.objective, self.model_accepts_loss_kwargs, self.label_names = objective, False, ["nodes"]
        self._parts: dict[str, list[Tensor]] = {}

    def _get_train_sampler(self, train_dataset: Rows | None = None) -> LikeLengths:
        lengths = map(len, (train_dataset or self.train_dataset).input_ids)
        return LikeLengths(lengths, self.args.train_batch_size * self.args.world_size, self.args.seed)

    def compute_loss(self, model: PreTrainedModel, inputs: dict[str, Tensor], return_outputs: bool = False,
                     **_: Any) -> Any:
        parts = {}
        for name, (mean, weight) in self.objective(model, inputs).items():
            term = mean.detach(), weight.float()
            if (n := self.accelerator.num_processes) > 1:  # their average is then the mean over the terms of all
                mean = mean * weight * n / self.accelerator.reduce(weight.float(), "sum")
            parts[name] = mean
            term = torch.stack((mean.detach(), torch.ones_like(mean)) if model.training else term)
            self._parts.setdefault(name if model.training else f"eval_{name}", []).append(term)
        loss = self.objective.total(parts)
        return (loss, {"loss": loss}) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the parts of the loss to transformers' own record: their mean over the steps since the last log, or over
        the terms of all validation rows; there the loss is made of them too, as batches differ in their terms."""
        prefix = "eval_" if "eval_loss" in logs else ""
        for key in [k for k in self._parts if k.startswith("eval_") == bool(prefix)]:
            mean, weight = torch.stack(self._parts.pop(key)).unbind(1)
            total, terms = self.accelerator.reduce(torch.stack([mean @ weight, weight.sum()]), "sum").tolist()
            logs[key] = total / terms
            if not np.isfinite(logs[key]):
                raise ValueError(f"{key} is {logs[key]} at step {self.state.global_step}: lower learning_rate, or set "
                                 "bfloat16 to False")
        if prefix:
            logs["eval_loss"] = self.objective.total({key: logs[f"eval_{key}"] for key in ("sft", "flow")
                                                      if f"eval_{key}" in logs})
        super().log(logs, *args, **kwargs)


class OneBar(ProgressCallback):
    """One tqdm bar over the steps, with the last losses beside it."""

    on_prediction_step = TrainerCallback.on_prediction_step  # no bar of its own

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.current_step = state.global_step
        self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step",
                                 disable=not state.is_world_process_zero)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        self.training_bar.set_postfix({k: f"{v:.3f}" for k, v in (logs or {}).items() if k in ("loss", "eval_loss")})


def log_table(history: list[dict[str, float]], last_step: int | None = None) -> pd.DataFrame:
    """transformers' record of a training as columns step, kind ("train" or "validation"), loss, and sft and flow. Where
    a run was killed behind its `last_step`, transformers takes one more, at a learning rate of 0: it is left out."""
    records = []
    for entry in history:
        kind, prefix = ("train", "") if "loss" in entry else ("validation", "eval_")
        if prefix + "loss" in entry and entry["step"] <= (last_step or entry["step"]):
            parts = {name: entry[prefix + name] for name in ("loss", "sft", "flow") if prefix + name in entry}
            records.append({"step": entry["step"], "kind": kind} | parts)
    return pd.DataFrame(records)


@lru_cache
def computes_in_bfloat16() -> bool:
    """Whether this machine's GPU, or without one its CPU, gains by bfloat16: it must have the instructions, and a CPU
    must be faster with them (some that have AVX512_BF16 alone take twice as long as in float32)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    return able and store.matmul_seconds(dtype=torch.bfloat16) < store.matmul_seconds()


@lru_cache
def base_digest(path: str | Path) -> str:
    """A name for the weights in a model's folder, by content; a hub id, or "tiny", is its own name."""
    files = sorted(p for p in Path(path).glob("*") if p.suffix in (".json", ".safetensors", ".bin"))
    contents = []
    for file in files:
        with file.open("rb") as stream:
            contents.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return store.digest(contents) if files else str(path)


def digest_of(tables: data.Tables) -> str:
    """12 hexadecimal digits that name what a model learns from: ids and titles of items, rows of train and valid."""
    index, parts = pd.Index(tables.items.item_id), [tables.items.item_id.tolist(), tables.items.title.tolist()]
    for rows in (tables.train, tables.valid):
        flat, offsets = data.histories(rows)
        users = rows.user_id.tolist() if "user_id" in rows else []
        parts += [[len(flat), len(rows)], users, index.get_indexer(flat), offsets, index.get_indexer(rows.target)]
    return store.digest(*parts)


def made_from(settings: TrainSettings, tables: data.Tables, log_item_rewards: Tensor | None = None,
              preference: torch.nn.Module | None = None, leaf_weights: Tensor | None = None) -> dict[str, Any]:
    """What a tuned model depends on: the settings that touch its method, and names of the data and weights."""
    sft = log_item_rewards is None or settings.theta == 1
    read = {"beta": settings.reward in ("exact", "add"), "lam": settings.flow == "subtb", "model": False,
            "n_paths": settings.paths != "logged"} | dict.fromkeys(OF_FLOWER if sft else (), False)
    used = {f.name: getattr(settings, f.name) for f in fields(TrainSettings) if read.get(f.name, True)}
    used["theta"] = 1.0 if sft else settings.theta
    used |= {"bfloat16": settings.bfloat16 and computes_in_bfloat16(), "data": digest_of(tables),
             "base": base_digest(sources.model_folder(settings.model)),
             "weights": None if leaf_weights is None else store.digest(leaf_weights)}
    if not sft:
        used["item_rewards"] = store.digest(log_item_rewards)
        asked = settings.reward != "none" and preference is not None
        used["preference"] = store.digest(*preference.parameters()) if asked else None
    return used


def finetune(backbone: Backbone, tables: data.Tables, settings: TrainSettings, folder: Path, cache: Path,
             log_item_rewards: Tensor | None = None, preference: torch.nn.Module | None = None,
             leaf_weights: Tensor | None = None) -> tuple[pd.DataFrame, Path]:
    """Tunes the backbone's model in place and saves it, with tokenizer and items, ready for `recommend`.
    The checkpoint of the lowest validation loss stays. A killed run resumes from its last checkpoint, and a finished
    one is taken as it is, if settings and data are the same (`made_from`); others beside it stay as they are.
    Deviation: the paper stops once two validations in a row were no better; here all `epochs` are run.

    Returns the log: columns step, loss, kind ("train" or "validation"), sft and flow (nats a token; nats² or nats a
    node); and the folder of this training. Raises ValueError: a title or a row is longer than the model's context;
    `dry_run` fails; LoRA with drawn paths behind frozen layers; a reward that is not positive; a batch that does not
    part evenly over the processes; a loss that is no number; another process trains the same.

    Args:
        folder: gets a folder <method>-<digest> for this training.
        cache: folder for the frozen layers' output, shared by the runs on one backbone.
        log_item_rewards: (n_items,) log R in nats for Flower; None is SFT.
        preference: p_ui, needed by every reward but "none". leaf_weights: as `Objective` takes them."""
    settings = settings if log_item_rewards is not None else replace(settings, theta=1.0)
    drawn = settings.theta < 1 and settings.paths != "logged"  # such paths go through the frozen layers step by step
    if drawn and settings.frozen_layers and settings.lora_rank:
        raise ValueError("LoRA would tune the frozen layers, which drawn paths go through: set lora_rank to 0")
    model, _, catalogue = backbone
    origin = made_from(settings, tables, log_item_rewards, preference, leaf_weights)
    folder = folder / f"{settings.method.split(',')[0]}-{store.digest(origin)}"
    with store.at_work(folder, origin, "log") as record:
        if record is not None:
            print(f"{folder.name}: trained already with these settings, taken as it is", flush=True)
            with store.reading(folder / "model", folder):
                model.load_state_dict(type(model).from_pretrained(folder / "model", dtype=torch.float32).state_dict())
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # of a process that was killed as it ended
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            return pd.DataFrame(record["log"]), folder
        rows, valid = training_rows(catalogue, tables, settings), validation_rows(catalogue, tables, settings)
        test = make_rows(catalogue, data.row_positions(tables, tables.test)[0], [[]] * len(tables.test))
        _check_lengths(model, catalogue, (rows, valid, test))
        rewards = torch.zeros(catalogue.trie.n_items) if log_item_rewards is None else log_item_rewards
        arguments = trainer_arguments(settings, folder / "checkpoints", len(rows))
        objective = Objective(catalogue.trie, rewards, settings, preference, leaf_weights, arguments.device)
        tuned = model.to(arguments.device)
        with arguments.main_process_first():  # where several processes train
            dry_run(settings, catalogue.titles, cache)
            start = time.perf_counter()
            set_seed(settings.seed)
            if settings.frozen_layers:
                trunk, upper = split_layers(model, settings.frozen_layers)
                model.get_input_embeddings().requires_grad_(False)
                tuned = model if drawn else upper
                with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):
                    for part, name in () if drawn else ((rows, "train"), (valid, "valid")):
                        run_trunk(part, trunk, cache, f"{name}_bfloat16" if arguments.bf16 else name)
        if settings.lora_rank:
            tuned = with_lora(tuned, settings.lora_rank)
        logging.set_verbosity_error()
        trainer = FlowerTrainer(tuned, arguments, train_dataset=rows, eval_dataset=valid, callbacks=[OneBar()],
                                objective=objective)
        trainer.remove_callback(PrinterCallback)
        torch.manual_seed(settings.seed + 1_000_003 * arguments.process_index)  # every process draws paths of its own
        with arguments.main_process_first():
            last = last_checkpoint(folder / "checkpoints")
        trainer.train(resume_from_checkpoint=last)
        trainer.accelerator.unwrap_model(tuned, keep_fp32_wrapper=False)  # bfloat16 is for training alone
        if settings.lora_rank:
            tuned.merge_and_unload()
        log = log_table(trainer.state.log_history, arguments.max_steps)
        whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) if tuned is model else None  # if sharded
        if trainer.is_world_process_zero():
            with store.atomic(folder / "model") as new:
                model.eval().save_pretrained(new, state_dict=whole)
                backbone.tokenizer.save_pretrained(new)
            tables.items.to_parquet(folder / "items.parquet", index=False)
            items = hashlib.sha256((folder / "items.parquet").read_bytes()).hexdigest()
            source = store.provenance(asdict(settings), time.perf_counter() - start, arguments.bf16)
            source["resumed"] = last is not None  # then the seconds are those since
            store.keep(folder / "made.json", origin, source, log=json.loads(log.to_json(orient="records")), items=items)
        trainer.accelerator.wait_for_everyone()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return log, folder


def with_lora(model: PreTrainedModel, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


def _check_lengths(model: PreTrainedModel, catalogue: Catalogue, parts: Sequence[Rows]) -> None:
    """Refuses a title or a row that is longer than the model's context."""
    limit = context_limit(model)
    item, sequence = max(enumerate(catalogue.sequences), key=lambda pair: len(pair[1]))
    if len(catalogue.context([])) + len(sequence) > limit:
        raise ValueError(f"item {item}, {catalogue.titles[item][:60]!r}, has {len(sequence)} tokens; prompt and title "
                         f"together may have {limit}, the model's context or sliding window: shorten the title, or "
                         "take another model")
    widest = max(len(ids) for rows in parts for ids in rows.input_ids)
    if (longest := max(widest + catalogue.trie.max_depth, widest + -widest % WIDTHS)) > limit:
        raise ValueError(f"a row may grow to {longest} tokens and the model reads {limit}: lower max_history, or "
                         f"shorten the longest title, {catalogue.titles[item][:60]!r} of {len(sequence)} tokens")


def dry_run(settings: TrainSettings, titles: Sequence[str], cache: Path, prompt: str | None = None) -> None:
    """Tries all that is done with a model on six of the titles and a copy opened for this, before anything is trained:
    every two ways to compute the same log π must agree within 1e-3 nats. What went well is remembered in `cache`.
    Raises ValueError where they differ or one of them fails; the message names settings that do work, if any."""
    names = ("frozen_layers", "tuned_layers", "cut_vocabulary", "rows", "lora_rank")
    origin = {name: getattr(settings, name) for name in names}
    origin |= {"base": base_digest(sources.model_folder(settings.model)), "prompt": prompt,
               "transformers": __version__, "commit": store.commit()}
    path, start, few = cache / f"dry_run-{store.digest(origin)}.json", time.perf_counter(), sorted(set(titles))[:6]
    if store.find(path, origin) is not None:
        return
    if wrong := _wrong(settings, few, cache, prompt):
        words, layers = {"cut_vocabulary": False}, {"frozen_layers": 0, "tuned_layers": 0}
        cures = ({"lora_rank": 0}, words, layers, words | layers)
        others = [cure for cure in cures if replace(settings, **cure) != settings]
        able = (cure for cure in others if not _wrong(replace(settings, **cure), few, cache, prompt))
        do = " and ".join(f"set {name} to {value}" for name, value in next(able, {}).items()) or "take another model"
        raise ValueError(f"{settings.model} cannot be used with these settings, {wrong}: {do}")
    store.keep(path, origin, store.provenance(asdict(settings), time.perf_counter() - start))


@torch.no_grad()
def _wrong(settings: TrainSettings, titles: Sequence[str], cache: Path, prompt: str | None) -> str:
    """What goes wrong with the model under these settings, or ""."""
    try:
        with store.scratch(cache / "dry_run") as folder:
            for ways, one, other in _ways(settings, titles, folder, prompt):
                gap = (one.double() - other.double()).abs().max()
                if not gap <= 1e-3:  # NaN too
                    return f"{ways} differ by {gap:.2g} nats"
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        return f"the dry run fails with {type(error).__name__}, {' '.join(str(error).split())[:160]}"
    return ""


def _ways(settings: TrainSettings, titles: Sequence[str], folder: Path, prompt: str | None) -> Iterator[tuple]:
    """Two ways at a time to compute the same log π, and what they give; the model is saved in `folder`."""
    uncut = replace(settings, frozen_layers=0, tuned_layers=0, cut_vocabulary=False)
    lm, tokenizer, catalogue = sources.open_backbone(settings, titles, prompt)
    trie, histories, n_frozen = catalogue.trie, ([], [0, -1]), settings.frozen_layers
    if settings.tuned_layers or settings.cut_vocabulary:
        original, words, _ = sources.open_backbone(uncut, titles, prompt)
        if settings.tuned_layers:
            for layer in original.get_decoder().layers[n_frozen : -settings.tuned_layers]:
                layer.forward = lambda hidden_states, *_, **__: hidden_states
        ids = torch.tensor([catalogue.context([0, -1]) + catalogue.sequences[0]])
        kept = torch.arange(lm.config.vocab_size)
        if len(kept) < original.config.vocab_size:  # the cut tokenizer has no holes
            kept = torch.tensor(words.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(kept)))
        logits = lm(ids).logits[..., : len(kept)], original(kept[ids]).logits[..., kept]
        yield "the model cut to size and the original", *(x.log_softmax(-1) for x in logits)
        del original
    if settings.lora_rank:
        _plain(adapted := with_lora(lm, settings.lora_rank), catalogue, [])  # it runs, and is merged
        lm = adapted.merge_and_unload()
        del adapted
    lm.get_output_embeddings().weight.mul_(1.1)  # as a training would change it
    plain = [_plain(lm, catalogue, history) for history in histories]
    searches = [Beams(len(trie.leaves), seen_allowed=True)] * 32  # side by side, as far apart as in a run
    leaves, scores = map(torch.from_numpy, beam_search(lm, catalogue, histories, searches)[-1])
    totals = torch.tensor([[log_pi.sum() for log_pi in of_titles] for of_titles in plain])
    yield "beam search and plain forward passes", scores, totals.gather(1, leaves)
    paths = trie.paths(trie.leaves)
    for history, of_titles in zip(histories, plain):
        tree = PackedTree(lm, trie, catalogue.context(history), n_frozen)
        tree.model.eval()
        yield "the packed tree and plain forward passes", tree.log_probs()[paths[paths >= 0]], torch.cat(of_titles)
    _check_room(folder, sum(weights.numel() * weights.element_size() for weights in lm.parameters()))
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del lm, tree  # memory for one
    saved = open_backbone(uncut, titles, folder, prompt)
    again = [x for history in histories for x in _plain(saved.model, saved.catalogue, history)]
    yield "the saved model and the one in memory", torch.cat(again), torch.cat(sum(plain, []))


def _plain(lm: PreTrainedModel, catalogue: Catalogue, history: Sequence[int]) -> list[Tensor]:
    """log π of every title's tokens after a history: one forward pass a title, without padding, mask or cache."""
    context = catalogue.context(history)
    logits = [lm(torch.tensor([context + ids])).logits[0, len(context) - 1 : -1] for ids in catalogue.sequences]
    return [part.log_softmax(-1)[range(len(ids)), ids] for part, ids in zip(logits, catalogue.sequences)]


def last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint of a killed run; half-written ones are removed."""
    if store.outdated(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    for half in folder.glob("checkpoint-*"):
        try:
            store.read_json(half / TRAINER_STATE_NAME)  # written last
        except (FileNotFoundError, ValueError):
            shutil.rmtree(half)
    return get_last_checkpoint(folder)


def _parted(batch_size: int, device_batch: int, processes: int) -> tuple[int, int]:
    """Rows that each process takes at once, and how often, so that all together see `batch_size` rows a step."""
    times = -(-batch_size // (device_batch * processes))
    rows, rest = divmod(batch_size, times * processes)
    if rest:
        raise ValueError(f"batch_size {batch_size} does not part into equal batches of at most {device_batch} rows "
                         f"(device_batch) for {processes} processes: make it a multiple of {times * processes}")
    return rows, times


def trainer_arguments(settings: TrainSettings, folder: Path, n_rows: int) -> TrainingArguments:
    """transformers' arguments of a training on n_rows rows, by the settings, with its checkpoints in the folder."""
    total = max(1, round(settings.epochs * n_rows / settings.batch_size))
    every = -(-total // settings.evaluations)
    processes = int(os.environ.get("WORLD_SIZE", 1))  # set by `accelerate launch`
    at_a_time, accumulated = _parted(settings.batch_size, settings.device_batch, processes)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=at_a_time, per_device_eval_batch_size=2 * at_a_time,
        gradient_accumulation_steps=accumulated, learning_rate=settings.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=total // 20, max_steps=total, eval_strategy="steps", eval_steps=every, save_steps=every,
        save_total_limit=2, load_best_model_at_end=True, logging_steps=max(1, total // 50), report_to="none",
        seed=settings.seed, remove_unused_columns=False, prediction_loss_only=True, disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),  # else several CPU processes would not know of each other
        bf16=settings.bfloat16 and computes_in_bfloat16(), dataloader_pin_memory=torch.cuda.is_available())
    arguments._n_gpu = min(1, arguments.n_gpu)  # transformers would put a batch on each device that it sees
    return arguments
