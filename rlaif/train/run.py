"""A training run: its folder, its parts (stages and members), each from its newest complete checkpoint, and what it leaves.

OUT/config.yaml    the settings        OUT/metrics.jsonl   a line each time the trainer logs
OUT/run.json       what was done       OUT/plots/          the metrics as pictures
OUT/model/         the model           OUT/parts/NAME/     checkpoints, and the models that later parts begin from
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import constants

from rlaif.data import atomic
from rlaif.job import versions
from rlaif.provenance import labelers, sha256
from rlaif.records import FatalError, UsageError
from rlaif.runner import StoppedError
from rlaif.train.config import Training
from rlaif.train.data import Rows, held_out
from rlaif.train.folder import Folder, hashes

PACKAGES = ("rlaif", "trl", "transformers", "torch", "accelerate", "peft", "datasets")
EMBEDDED = "embedded"
DEFAULTS = {"ddp_find_unused_parameters": False}
"""Fields of TRL's configs that `trainer` may set otherwise. A search for unused parameters would cost time at each step."""


@dataclass(frozen=True)
class Part:
    """One trainer's work: a stage, of one member of an ensemble. `model` is what it begins from, `folder` its own."""

    name: str
    config: Any
    model: str
    folder: Path
    seed: int
    tokenizer: Any
    train: Rows
    held: Rows | None
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def peft(self) -> Any:
        """The adapters' settings; None for full fine-tuning."""
        lora = self.config.lora
        if lora is None:
            return None
        from peft import LoraConfig

        targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
        return LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)

    def settings(self, kind: type[Any], **own: Any) -> Any:
        """TRL's config of this kind.

        Raises: UsageError for a field of `trainer` that it has not, or that is ours to set, and for values that it refuses.
        """
        known = {own.name for own in fields(kind)}
        for name in self.config.trainer:
            if name not in known:
                raise UsageError(f"trainer.{name}: {kind.__name__} has no such field")
            if name in self.arguments or name in own:
                raise UsageError(f"trainer.{name}: is set by a field of its own")
        values = {k: v for k, v in {**self.arguments, **own}.items() if k in known and v is not None}
        try:
            return kind(**{**DEFAULTS, **values, **self.config.trainer})
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{self.config.name}: {kind.__name__}: {' '.join(str(error).split())}") from error


class Kind(Protocol):
    """A module for each kind of training."""

    def read(self, config: Any) -> tuple[Rows, Rows | None]:
        """The rows to train on, and those held out. Raises: UsageError naming the place of what is wrong."""
        ...

    def fitting(self, found: Rows, config: Any, tokenizer: Any) -> Rows:
        """The rows that are short enough, with no text in them that could pass for a turn's end. Raises: as `read`."""
        ...

    def trainer(self, part: Part) -> Any:
        """A transformers Trainer, ready to train."""
        ...

    def finish(self, run: Run, out: Path) -> dict[str, Any]:
        """Complete the model folder, before it takes its place, and say what was measured."""
        ...


@dataclass
class Run:
    """A run over all its parts."""

    kind: str
    config: Any
    resume: bool = False
    rows: dict[str, tuple[Rows, Rows | None]] = field(default_factory=dict)
    labelers: list[dict[str, Any]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    models: dict[str, Path] = field(default_factory=dict)
    """Each member's last model; under the name "" where there is one member."""

    def __post_init__(self) -> None:
        self.out = Path(self.config.out)
        self.module: Kind = import_module(MODULES[getattr(self.config, "algorithm", self.kind)])
        self.main = int(os.environ.get("RANK", "0")) == 0
        self.started = time.monotonic()

    @property
    def model(self) -> Path:
        return self.out / "model"

    def train(self) -> dict[str, Any]:
        """Train all parts, or what is left of them; returns what `run.json` holds.

        Raises: UsageError for bad data or settings, before a model is loaded; StoppedError where it was interrupted.
        """
        stages = self.config.each_stage()
        for number, stage in enumerate(stages, 1):
            self.rows[f"stage-{number}"] = self.module.read(stage)
        self.labelers = labelers((name for stage in stages for name in stage.files), self.config.human)
        contexts = {f"{n}/context": sha256(s.context) for n, s in enumerate(stages, 1) if getattr(s, "context", None)}
        folder = Folder(self.out, self.config.model_dump(mode="json"), hashes(self.rows) | contexts, self.resume)
        report = folder.report()
        if report:
            return report
        tokenizer = load_tokenizer(self.config)
        self.rows = {name: self._fitting(found, tokenizer) for name, found in self.rows.items()}
        meet(self.config)  # all processes have looked at the folder before the main one writes to it
        with folder.held() if self.main else nullcontext():
            members = getattr(self.config, "ensemble", 1)
            for member in range(members):
                name = f"member-{member + 1}" if members > 1 else ""
                self.models[name] = self._member(name, member, stages, tokenizer)
            return self._close()

    def _member(self, own: str, number: int, stages: list[Any], tokenizer: Any) -> Path:
        """Train one member through all stages; returns the folder of its last model."""
        model = model_path(self.config.model)
        for which, stage in enumerate(stages, 1):
            name = "/".join(part for part in (own, f"stage-{which}" if len(stages) > 1 else "") if part) or "train"
            folder, (train, held) = self.out / "parts" / name, self.rows[f"stage-{which}"]
            model = str(self._part(Part(name, stage, model, folder, stage.seed + number, tokenizer, train, held)))
        return Path(model)

    def _fitting(self, found: tuple[Rows, Rows | None], tokenizer: Any) -> tuple[Rows, Rows | None]:
        train, held = found
        return self.module.fitting(train, self.config, tokenizer), held and self.module.fitting(held, self.config, tokenizer)

    def _close(self) -> dict[str, Any]:
        """Put the model into its place, and write what was done."""
        report: dict[str, Any] = {
            "kind": self.kind,
            "settings": self.config.model_dump(mode="json"),
            "data": {
                name: {"train": train.facts(), "held_out": held.facts() if held else None}
                for name, (train, held) in self.rows.items()
            },
            "labeler": self.labelers,
            "parts": self.parts,
            "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        }
        if self.main:
            with building(self.model) as folder:
                for name, made in self.models.items():
                    shutil.copytree(made, folder / name, copy_function=link, dirs_exist_ok=True)
                report["evaluation"] = self.module.finish(self, folder)
            from rlaif.train.card import write_card
            from rlaif.train.curves import last, write_curves

            report["metrics"] = last(self.out / "metrics.jsonl")
            report["wall_seconds"] = round(time.monotonic() - self.started, 1)
            report["finished_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            write_curves(self.out / "metrics.jsonl", self.out / "plots")
            write_card(self.model / "README.md", report)
            with atomic(self.out / "run.json") as temporary:
                temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            shutil.rmtree(self.out / "parts")
        return report

    # ------------------------------------------------------------ a part

    def _part(self, part: Part) -> Path:
        """Train a part, unless that is done; returns the folder of its model."""
        model = part.folder / "model"
        done = part.folder / "done.json"
        if not done.exists():
            part.arguments.update(arguments(part))
            trainer, begun = self._trainer(part), time.monotonic()
            steps = self._loop(trainer, part) if hasattr(trainer, "learn") else self._train(trainer, part)
            figures = {"steps": steps, "seconds": round(time.monotonic() - begun, 1)}
            trainer.save_model(model) if hasattr(trainer, "learn") else save_model(trainer, part, model, self.main)
            if self.main:
                with atomic(done) as temporary:
                    temporary.write_text(json.dumps({"name": part.name, **figures}), encoding="utf-8")
                shutil.rmtree(part.folder / "checkpoints", ignore_errors=True)
            trainer.accelerator.wait_for_everyone()
            free(trainer)
        if self.main:  # to the others it may be gone already
            self.parts.append(json.loads(done.read_text(encoding="utf-8")))
        return model

    def _train(self, trainer: Any, part: Part) -> int:
        """Let a trainer of transformers make its steps, from its newest checkpoint on; returns how many there are."""
        from transformers import PrinterCallback

        from rlaif.train.checkpoints import Checkpoints, Trained, clear, newest, step_of
        from rlaif.train.record import Recorder, tokens_read

        checkpoints, recorder = Checkpoints(part.config.keep), Recorder(self.out / "metrics.jsonl", part.name)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(recorder)
        trainer.add_callback(checkpoints)
        start = newest(part.folder / "checkpoints")
        if self.main:
            clear(part.folder / "checkpoints")
        if start:
            trainer._total_train_tokens = tokens_read(recorder.path, part.name, step_of(start))  # TRL begins at 0
            trainer.args.eval_on_start = False  # that was another start
        try:
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        except Trained:
            pass
        finally:
            recorder.close()
            checkpoints.restore()
        if checkpoints.stopped and trainer.state.global_step < trainer.state.max_steps:
            raise StoppedError(f"{self.out}: stopped at step {trainer.state.global_step}; --resume goes on from there")
        return int(trainer.state.global_step)

    def _loop(self, loop: Any, part: Part) -> int:
        """The same for a loop of `rlaif.rl`."""
        from rlaif.train.checkpoints import Interrupt
        from rlaif.train.record import Recorder

        recorder = Recorder(self.out / "metrics.jsonl", part.name)
        with Interrupt() if int(os.environ.get("WORLD_SIZE", "1")) == 1 else nullcontext(Interrupt()) as interrupt:
            try:
                return int(loop.run(recorder, interrupt))
            finally:
                recorder.close()

    def _trainer(self, part: Part) -> Any:
        try:
            return self.module.trainer(part)
        except (OSError, ValueError, RuntimeError) as error:  # no weights, layers that are not there, too little memory …
            raise FatalError(f"cannot begin to train {part.model}: {' '.join(str(error).split())[:300]}") from error


MODULES = {
    "sft": "rlaif.train.sft",
    "reward": "rlaif.train.reward",
    "gpo": "rlaif.train.gpo",
    **dict.fromkeys(("dpo", "kto"), "rlaif.train.preference"),
    **dict.fromkeys(("ppo", "reinforce", "p3o", "trpo"), "rlaif.rl.ppo"),
    **dict.fromkeys(("grpo", "rloo"), "rlaif.rl.group"),
    "online": "rlaif.rl.online",
}
"""What trains a model of each kind; PPO's kin by their algorithms."""


def run(kind: str, config: Training, resume: bool = False) -> dict[str, Any]:
    """Train a model of this kind, one of `KINDS`, as its config says; returns what `run.json` holds.

    Raises: UsageError for bad settings or data, before a model is loaded; FatalError where a model cannot be loaded;
    StoppedError where it was interrupted, after a checkpoint.
    """
    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL's trainers say what they train, unless told not to
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # TRL's bars beside ours
    quiet()
    return Run(kind, config, resume).train()


# ---------------------------------------------------------------- what every kind needs


def read_both(config: Any, read: Callable[[str, int | None], Rows]) -> tuple[Rows, Rows | None]:
    """The rows of `data`, and those of `eval` or the share of `data` that is held out."""
    train = read(config.data, config.limit)
    if config.eval:
        return train, read(config.eval, None)
    return held_out(train, config.eval_share, config.seed)


def model_path(name: str) -> str:
    """What transformers loads a model by. Raises: FatalError where the embedded model is missing."""
    if name != EMBEDDED:
        return name
    from rlaif.engines.embedded import embedded_model

    return str(embedded_model())


def load_tokenizer(config: Any) -> Any:
    from rlaif.engines.chat import load_tokenizer as load

    tokenizer = load(model_path(config.model), config.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def meet(config: Training) -> None:
    """Wait until all processes of the run are here, where `accelerate launch` started several."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=config.device == "cpu" or not torch.cuda.is_available()).wait_for_everyone()


def arguments(part: Part) -> dict[str, Any]:
    """The fields that all of TRL's configs share, from ours."""
    import torch

    config = part.config
    gpu = config.device == "auto" and torch.cuda.is_available()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    a_step = config.batch_size * config.accumulate * world
    steps = config.max_steps or max(1, int(config.epochs * -(-len(part.train.rows) // a_step)))
    return {
        "output_dir": str(part.folder / "checkpoints"),
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_checkpointing": config.gradient_checkpointing,
        "bf16": config.dtype == "bf16" or (config.dtype == "auto" and gpu),
        "use_cpu": not gpu,
        "dataloader_pin_memory": gpu,
        "seed": part.seed,
        "data_seed": part.seed,
        "logging_steps": config.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.save_steps or max(1, -(-steps // 10)),
        "save_total_limit": None,  # `Checkpoints` lets old ones go, when the new one is complete
        "eval_strategy": "steps" if part.held and config.eval_steps else "no",
        "eval_steps": config.eval_steps,
        "report_to": list(config.report_to) or "none",
        "disable_tqdm": True,
        "trust_remote_code": config.trust_remote_code,
        "max_length": config.max_length,
    }


def save_model(trainer: Any, part: Part, folder: Path, main: bool) -> None:
    """Write the model, adapters merged into it, with its tokenizer; the folder appears whole or not at all."""
    lora = part.config.lora
    target = folder.with_name(f".{folder.name}.tmp")
    if main:
        shutil.rmtree(target, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    if lora and lora.merge:
        if main:
            merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
            merged.save_pretrained(target)
    else:
        trainer.save_model(str(target))  # gathers what other processes hold
    if main:
        part.tokenizer.save_pretrained(target)
        (target / "training_args.bin").unlink(missing_ok=True)  # a pickle, and all it says is in run.json
        put_in_place(target, folder)


@contextmanager
def building(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place only when the block ends well."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(made: Path, folder: Path) -> None:
    """Let a folder that was made whole take the name of another."""
    shutil.rmtree(folder, ignore_errors=True)
    made.rename(folder)


def link(source: str, target: str) -> None:
    """The same file under another name, where the disk can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def free(trainer: Any) -> None:
    """Let go of a trainer's model and optimizer, for the next part needs the memory."""
    import gc

    import torch

    trainer.model = trainer.optimizer = trainer.model_wrapped = trainer.ref_model = None
    trainer.accelerator.free_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def quiet() -> None:
    """Libraries' own progress bars and remarks, which would tear ours apart."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    logging: Any = transformers.utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
