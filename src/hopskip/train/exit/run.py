"""`hopskip train exit`: from a recipe to the fastest exit for a model. Every part goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import cache, partial
from pathlib import Path

import torch

from hopskip.backends.base import Backend
from hopskip.backends.torch.weights import load_tensor
from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.hub import find_model
from hopskip.checkpoint.trained_exit import DEFAULT_EXIT, ExitConfig, TrainedExit
from hopskip.engine.engine import Engine, make_engine
from hopskip.errors import ConfigError, TrainingError
from hopskip.loading import Progress, known_device, load_backend
from hopskip.speculative import SpeculativeConfig
from hopskip.text.tokenizer import Tokenizer
from hopskip.text.tokenizer_files import load_tokenizer
from hopskip.train.checkpoint import replacing, replacing_file
from hopskip.train.exit.choose import Candidate, draft_vocabulary, measure
from hopskip.train.exit.collect import collect
from hopskip.train.exit.conversations import Conversation, read_conversations
from hopskip.train.exit.distill import ExitTrainer
from hopskip.train.exit.estimate import Work, check_disk, check_start, duration, flops_per_second
from hopskip.train.exit.feed import Feed
from hopskip.train.exit.fit import Evaluation, Stage
from hopskip.train.exit.prompts import encode_prompts, write_prompts
from hopskip.train.exit.recipe import ExitRecipe
from hopskip.train.exit.stored import check_stored
from hopskip.train.plot import plot_acceptance
from hopskip.version import stamp

Report = Callable[[str], None]


def run(recipe: ExitRecipe, report: Report = print, progress: Progress = lambda what, share: None) -> Path:
    """Run a recipe; the folder of the finished exit.

    Args:
        report: told what has been reached.
        progress: told what is being done, and the share of it that is done.

    Raises:
        ConfigError: a setting cannot work with this model, or what was collected before does not fit the recipe.
        CheckpointError: the model cannot be read.
        TrainingError: something cannot be written (a full disk, say); what is complete stays.
    """
    folder = recipe.folder
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
    device = known_device(recipe.device)
    initial = _initial(recipe, checkpoint)
    check_stored(recipe, checkpoint, tokenizer)
    work = Work.of(recipe, checkpoint.config)
    check_disk(work, folder)
    report(work.described(flops_per_second(recipe.threads)))
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)

    _collect(recipe, checkpoint, tokenizer, report, progress)
    collected_taps, training, held_out = _read(recipe, checkpoint)
    vocabularies = [draft_vocabulary(training, size) for size in (recipe.vocabulary, *recipe.search.vocabulary)]
    notes = {"base_model": checkpoint.path.name, "stages": [vars(stage) for stage in recipe.stages], **stamp()}
    found: list[Candidate] = []
    for exit_config in recipe.exits(depth):
        trainer = ExitTrainer(checkpoint, exit_config, vocabularies[0], getattr(torch, recipe.precision))
        if initial is not None and initial.config == exit_config:
            trainer.start_from(initial)
        elif recipe.stages:
            torch.manual_seed(recipe.stages[0].seed)
            trainer.scale_to(torch.cat([c.states_TAD for c in held_out[:20] if c.states_TAD is not None]))
        if exit_config.num_layers:  # a plain exit has nothing to train
            trainer.to(device)
            _train(recipe, checkpoint, trainer, training, held_out, collected_taps, report, progress)
        trainer.cpu()
        for vocabulary in vocabularies:
            trained = trainer.trained_exit(checkpoint.fingerprint, 1, vocabulary=vocabulary)
            # loaded anew for each, as a backend takes one exit; and not kept, as two may not fit into memory
            measured = measure(
                load_backend(checkpoint, recipe.load), trained, held_out, recipe.search, tokenizer.eos_token_ids, notes
            )
            progress(f"timing drafts of {name_of(exit_config)}", None)
            for candidate in measured:
                report(
                    f"{name_of(exit_config)}, {candidate.shape}: {candidate.described} plain decoding, "
                    f"{candidate.tokens_per_pass:.2f} tokens a pass"
                )
                found.append(candidate)
    return _write_best(found, recipe, report)


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


def _collect(
    recipe: ExitRecipe, checkpoint: Checkpoint, tokenizer: Tokenizer, report: Report, progress: Progress
) -> None:
    """Prompts and the model's answers to them, as far as they are not there yet."""
    folder, settings = recipe.folder, recipe.collect
    eos_token_ids, depth = sorted(tokenizer.eos_token_ids), checkpoint.config.num_hidden_layers

    @cache
    def backend() -> Backend:
        """Loaded once, and not before it is known that the files of prompts can be read."""
        return load_backend(checkpoint, recipe.load, progress)

    def plain_engine() -> Engine:
        plain = SpeculativeConfig(draft="none")
        return make_engine(backend(), plain, eos_token_ids=eos_token_ids, max_num_seqs=settings.max_num_seqs)

    path = folder / "prompts.jsonl"
    if not path.exists():
        write_prompts(recipe.prompts, tokenizer, plain_engine, path, report, partial(progress, "writing prompts"))
    prompts = encode_prompts(path, tokenizer, recipe.prompts.max_prompt_tokens)
    collect(
        backend(),
        prompts,
        folder / "data",
        fingerprint=checkpoint.fingerprint,
        taps=[tap for tap in recipe.taps(depth) if tap < depth],
        max_new_tokens=settings.max_new_tokens,
        eos_token_ids=eos_token_ids,
        max_num_seqs=settings.max_num_seqs,
        progress=lambda done, tokens: report(f"collected {tokens:,} tokens from {done} of {len(prompts)} prompts"),
        doing=partial(progress, "answering prompts"),
    )


def _read(recipe: ExitRecipe, checkpoint: Checkpoint) -> tuple[list[int], list[Conversation], list[Conversation]]:
    """What was collected: the layers whose outputs it holds, and the conversations to train on and to hold out."""
    folder = recipe.folder / "data"
    metadata, conversations = read_conversations(folder)
    if metadata["fingerprint"] != checkpoint.fingerprint:
        raise ConfigError(f"{folder} was collected from another model; use another output folder")
    answered = [c for c in conversations if c.num_answer_tokens > 1]
    training = [c for i, c in enumerate(answered) if i % recipe.held_out_every]
    return json.loads(metadata["taps"]), training, answered[:: recipe.held_out_every]


def _train(
    recipe: ExitRecipe,
    checkpoint: Checkpoint,
    trainer: ExitTrainer,
    training: Seq[Conversation],
    held_out: Seq[Conversation],
    taps: Seq[int],
    report: Report,
    progress: Progress,
) -> None:
    """All stages of one candidate."""
    folder = recipe.folder / name_of(trainer.exit_config)
    feed = Feed(
        exit_config=trainer.exit_config,
        taps=taps,
        index_V=Feed.index_of(trainer.vocabulary, checkpoint.config.vocab_size),
        embedding=load_tensor(checkpoint, "model.embed_tokens.weight"),
        num_workers=recipe.num_workers,
    )

    digest = hashlib.sha256(trainer.vocabulary.numpy(force=True).tobytes()).hexdigest()[:16]

    def tell(found: Evaluation) -> None:
        shares = ", ".join(f"{share:.1%}" for share in found.acceptance_at_starts)
        rest = max(0, stage.num_tokens - found.num_tokens) + later
        report(
            f"{folder.name}: {found.num_tokens:,} tokens, loss {found.loss:.3f}, accepted {shares} "
            f"({found.tokens_per_pass:.2f} tokens a pass), "
            f"{found.tokens_per_second:.0f} tokens/s, about {duration(rest / found.tokens_per_second)} left for it"
        )

    for number, stage in enumerate(recipe.stages):
        later = sum(each.num_tokens for each in recipe.stages[number + 1 :])
        doing = partial(progress, f"training {folder.name}, stage {number + 1} of {len(recipe.stages)}")
        Stage(
            trainer,
            feed,
            stage,
            folder / f"stage-{number}",
            identity={"draft vocabulary": digest, "precision": recipe.precision, "initial": recipe.initial},
            report=tell,
            doing=doing,
        ).run(training, held_out)
    plot_acceptance(folder, folder / "acceptance.png")


def _write_best(found: Seq[Candidate], recipe: ExitRecipe, report: Report) -> Path:
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
    return folder / "exit"
