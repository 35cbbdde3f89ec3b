"""`hopskip train exit`: from a recipe to the fastest exit for a model. Every part goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from hopskip.backends.torch.weights import load_tensor
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.hub import find_model
from hopskip.checkpoint.trained_exit import DEFAULT_EXIT, ExitConfig, TrainedExit
from hopskip.errors import ConfigError, TrainingError
from hopskip.loading import Progress, load_backend
from hopskip.machine import num_usable_cores
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer
from hopskip.train.checkpoint import replacing, replacing_file
from hopskip.train.durations import duration
from hopskip.train.exit.choose import Candidate, measure
from hopskip.train.exit.conversations import Conversation
from hopskip.train.exit.distill import ExitTrainer
from hopskip.train.exit.estimate import Work, check_disk, check_start
from hopskip.train.exit.feed import Feed
from hopskip.train.exit.fit import Evaluation, Stage
from hopskip.train.exit.processes import check_trackers, device_of, make_accelerator
from hopskip.train.exit.recipe import ExitRecipe, FitConfig
from hopskip.train.exit.stored import check_stored, settings_of
from hopskip.train.exit.text import Text, TextMaker
from hopskip.train.exit.vocabulary import by_merge_rank, draft_vocabulary
from hopskip.train.plot import plot_acceptance
from hopskip.version import stamp

Report = Callable[[str], None]


def run(recipe: ExitRecipe, report: Report = print, progress: Progress = lambda what, share: None) -> Path:
    """Run a recipe; the folder of the finished exit. Of several processes (`torchrun`) each does a part, and the first
    one reports and times the exits.

    Args:
        report: told what has been reached.
        progress: told what is being done, and the share of it that is done.

    Raises:
        ConfigError: a setting cannot work with this model, or what was collected before does not fit the recipe.
        CheckpointError: the model cannot be read.
        TrainingError: something cannot be written (a full disk, say); what is complete stays.
    """
    checkpoint = open_checkpoint(find_model(recipe.load.model))
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
    depth = checkpoint.config.num_hidden_layers
    wanted = recipe.taps(depth)
    if any(tap > depth for tap in wanted):
        raise ConfigError(
            f"an exit wants to see layer {max(wanted)}, but the model has {depth}; "
            "give shares of the depth, such as features: [50%, 90%, 100%]"
        )
    check_start(recipe, tokenizer)
    check_trackers(recipe.report_to)
    initial = _initial(recipe, checkpoint)
    accelerator = make_accelerator(recipe.device, recipe.report_to, recipe.folder, settings_of(recipe))
    if not accelerator.is_main_process:
        report, progress = _silent, _silent
    elif recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if accelerator.is_main_process:
        check_stored(recipe, checkpoint, tokenizer)
        check_disk(Work.of(recipe, checkpoint.config), recipe.folder)
    accelerator.wait_for_everyone()
    device, threads = str(device_of(accelerator, recipe.device)), recipe.threads
    if threads is None and accelerator.num_processes > 1:  # those of this machine share its cores
        threads = max(1, num_usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)))
    own = _Run(
        replace(recipe, device=device, threads=threads), checkpoint, tokenizer, initial, accelerator, report, progress
    )
    found = own.candidates()
    for tracker in accelerator.trackers:
        tracker.finish()
    return found


def _silent(*told: object) -> None:
    return


@dataclass(frozen=True)
class _Run:
    """One process's part of a run."""

    recipe: ExitRecipe
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    initial: TrainedExit | None
    accelerator: Accelerator
    report: Report
    progress: Progress

    def candidates(self) -> Path:
        """Collect, train, measure; the folder of the best exit."""
        recipe, checkpoint = self.recipe, self.checkpoint
        text = TextMaker(recipe, checkpoint, self.tokenizer, self.accelerator, self.report, self.progress).make()
        more = by_merge_rank(self.tokenizer, checkpoint.config.vocab_size) if recipe.fill_vocabulary else ()
        sizes = (recipe.vocabulary, *recipe.search.vocabulary)
        vocabularies = [draft_vocabulary(text.training, size, more) for size in sizes]
        exits = recipe.exits(checkpoint.config.num_hidden_layers)
        trained = [self._trained(exit_config, text, vocabularies[0]) for exit_config in exits]
        held_out = text.held_out
        del text  # it may hold the model
        if self.accelerator.is_main_process:
            found = [c for exit in trained for size in vocabularies for c in self._measured(exit, size, held_out)]
            _write_best(found, recipe, self.report)
        self.accelerator.wait_for_everyone()
        return recipe.folder / "exit"

    def _trained(self, exit_config: ExitConfig, text: Text, vocabulary: Tensor) -> ExitTrainer:
        """A candidate, on the CPU."""
        recipe = self.recipe
        trainer = ExitTrainer(self.checkpoint, exit_config, vocabulary, getattr(torch, recipe.precision))
        if self.initial is not None and self.initial.config == exit_config:
            trainer.start_from(self.initial)
        elif recipe.stages:
            torch.manual_seed(recipe.stages[0].seed)
            some = text.held_out[:20]
            with_states = some if text.with_states is None else text.with_states(some)
            trainer.scale_to(torch.cat([c.states_TAD for c in with_states if c.states_TAD is not None]))
        if exit_config.num_layers:  # a plain exit has nothing to train
            trainer.to(torch.device(recipe.device))
            self._train(trainer, text)
        return trainer.cpu()

    def _measured(self, trainer: ExitTrainer, vocabulary: Tensor, held_out: Seq[Conversation]) -> Iterator[Candidate]:
        """The shapes of draft of a candidate, each with its speed."""
        recipe, name = self.recipe, name_of(trainer.exit_config)
        notes = {"base_model": self.checkpoint.path.name, "stages": [vars(stage) for stage in recipe.stages], **stamp()}
        trained = trainer.trained_exit(self.checkpoint.fingerprint, 1, vocabulary=vocabulary)
        # loaded anew for each, as a backend takes one exit; and not kept, as two may not fit into memory
        backend = load_backend(self.checkpoint, recipe.load)
        self.progress(f"timing drafts of {name}", None)
        for candidate in measure(backend, trained, held_out, recipe.search, self.tokenizer.eos_token_ids, notes):
            self.report(
                f"{name}, {candidate.shape}: {candidate.described} plain decoding, "
                f"{candidate.tokens_per_pass:.2f} tokens a pass"
            )
            yield candidate

    def _train(self, trainer: ExitTrainer, text: Text) -> None:
        """All stages of one candidate."""
        recipe, name = self.recipe, name_of(trainer.exit_config)
        feed = Feed(
            exit_config=trainer.exit_config,
            taps=text.taps,
            index_V=Feed.index_of(trainer.vocabulary, self.checkpoint.config.vocab_size),
            embedding=load_tensor(self.checkpoint, "model.embed_tokens.weight"),
            with_states=text.with_states,
            num_workers=recipe.num_workers,
        )
        digest = hashlib.sha256(trainer.vocabulary.numpy(force=True).tobytes()).hexdigest()[:16]
        for number, stage in enumerate(recipe.stages):
            later = sum(each.num_tokens for each in recipe.stages[number + 1 :])
            Stage(
                trainer,
                feed,
                stage,
                recipe.folder / name / f"stage-{number}",
                identity={"draft vocabulary": digest, "precision": recipe.precision, "initial": recipe.initial},
                accelerator=self.accelerator,
                report=partial(self._tell, name, stage, later),
                doing=partial(self.progress, f"training {name}, stage {number + 1} of {len(recipe.stages)}"),
            ).run(text.training, text.held_out)
        if self.accelerator.is_main_process:
            plot_acceptance(recipe.folder / name, recipe.folder / name / "acceptance.png")

    def _tell(self, name: str, stage: FitConfig, later: int, found: Evaluation) -> None:
        shares = ", ".join(f"{share:.1%}" for share in found.acceptance_at_starts)
        rest = max(0, stage.num_tokens - found.num_tokens) + later
        self.report(
            f"{name}: {found.num_tokens:,} tokens, loss {found.loss:.3f}, accepted {shares} "
            f"({found.tokens_per_pass:.2f} tokens a pass), {found.tokens_per_second:.0f} tokens/s, about "
            f"{duration(rest / found.tokens_per_second)} left for it"
        )


def name_of(exit_config: ExitConfig) -> str:
    """`s0-b1-f15.27.30`."""
    features = f"-f{'.'.join(map(str, exit_config.features))}" if exit_config.features else ""
    return f"s{exit_config.start}-b{exit_config.num_layers}{features}"


def _initial(recipe: ExitRecipe, checkpoint: Checkpoint) -> TrainedExit | None:
    if recipe.initial is None:
        return None
    initial = TrainedExit.load(DEFAULT_EXIT if recipe.initial == "default" else Path(recipe.initial))
    initial.check(checkpoint.config)
    if initial.config not in recipe.exits(checkpoint.config.num_hidden_layers):
        raise ConfigError(
            f"initial is {recipe.initial}, of shape {vars(initial.config)}, which no candidate has; add it to branches"
        )
    return initial


def _write_best(found: Seq[Candidate], recipe: ExitRecipe, report: Report) -> None:
    """`search.json` with every candidate, and the folder of the fastest."""
    folder, least = recipe.folder, recipe.search.least_speedup
    best = max(found, key=lambda candidate: candidate.speedup)
    with replacing_file(folder / "search.json") as written:
        result = {**stamp(), "candidates": [candidate.as_json() for candidate in found]}
        written.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    name = f"{name_of(best.trained_exit.config)} with {best.shape} ({best.described} plain decoding)"
    if best.speedup < least:
        raise TrainingError(
            f"no candidate is worth using: the fastest is {name}, below {least} x (search.least_speedup); decode "
            "plainly, or train for longer (stages) on more text (prompts). What was collected and trained stays"
        )
    with replacing(folder / "exit") as written:
        best.trained_exit.save(written)
    report(f"the fastest is {name}")
    model = "" if recipe.base == "default" else f"--model {shlex.quote(recipe.base)} "
    report(f"try it: hopskip generate {model}--exit-branch {shlex.quote(str(folder / 'exit'))} 'How do tides work?'")
