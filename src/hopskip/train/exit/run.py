"""`hopskip train exit`: from a recipe to the fastest exit for a model. Every part goes on where it was interrupted."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from hopskip.checkpoint.checkpoint import Checkpoint, open_checkpoint
from hopskip.checkpoint.hub import DEFAULT_EXIT, find_model
from hopskip.checkpoint.trained_exit import ExitConfig, TrainedExit
from hopskip.engine.engine import Engine
from hopskip.errors import ConfigError
from hopskip.llm import LLM
from hopskip.loading import Quantize, load_model, resolve_backend
from hopskip.sampling import SamplingParams
from hopskip.sequence import Sequence
from hopskip.speculative import SpeculativeConfig
from hopskip.text.tokenizer import Tokenizer
from hopskip.trace import Round
from hopskip.train.checkpoint import replacing, replacing_file
from hopskip.train.exit.collect import Conversation, collect, read_conversations
from hopskip.train.exit.distill import ExitTrainer
from hopskip.train.exit.fit import fit
from hopskip.train.exit.prompts import self_prompts
from hopskip.train.exit.recipe import ExitRecipe, PromptsRecipe, SearchRecipe
from hopskip.train.read import DataConfig, read

Report = Callable[[str], None]


def run(recipe: ExitRecipe, report: Report = print) -> Path:
    """Run a recipe; the folder of the finished exit.

    Raises:
        ConfigError: a setting cannot work with this model, or what was collected before does not fit the recipe.
        CheckpointError: the model cannot be read.
        TrainingError: something cannot be written (a full disk, say); what is complete stays.
    """
    folder = Path(recipe.output)
    base = None if recipe.base == "default" else recipe.base
    checkpoint = open_checkpoint(find_model(base))
    tokenizer = Tokenizer.load(checkpoint.path, checkpoint.config)
    depth = checkpoint.config.num_hidden_layers
    if any(tap > depth for tap in recipe.taps):
        raise ConfigError(f"a branch wants to see layer {max(recipe.taps)}, but the model has {depth}")
    _, device = resolve_backend(**_how_to_load(recipe))
    initial = _initial(recipe, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)

    prompts = _prompts(recipe, base, tokenizer, folder / "prompts.jsonl", report)
    model = load_model(checkpoint, **_how_to_load(recipe))
    collect(
        model,
        prompts,
        folder / "data",
        fingerprint=checkpoint.fingerprint,
        taps=[tap for tap in recipe.taps if tap < depth],
        max_new_tokens=recipe.collect.max_new_tokens,
        eos_token_ids=sorted(tokenizer.eos_token_ids),
        max_num_seqs=recipe.collect.max_num_seqs,
        progress=lambda done, tokens: report(f"collected {tokens:,} tokens from {done} of {len(prompts)} prompts"),
    )
    del model
    metadata, conversations = read_conversations(folder / "data")
    if metadata["fingerprint"] != checkpoint.fingerprint:
        raise ConfigError(f"{folder / 'data'} was collected from another model; use another output folder")
    answered = [c for c in conversations if len(c.ids_T) > c.num_prompt_tokens + 1]
    held_out = answered[:: recipe.held_out_every]
    training = [c for i, c in enumerate(answered) if i % recipe.held_out_every]
    vocabularies = [draft_vocabulary(training, size) for size in (recipe.vocabulary, *recipe.search.vocabulary)]

    found: list[tuple[float, TrainedExit]] = []
    for branch in recipe.branches:
        trainer = ExitTrainer(checkpoint, branch, vocabularies[0], getattr(torch, recipe.precision))
        if initial is not None and initial.config == branch:
            trainer.start_from(initial)
        elif recipe.stages:
            torch.manual_seed(recipe.stages[0].seed)
            trainer.scale_to(torch.cat([c.states_TAD for c in held_out[:20]]))
        if branch.num_layers:  # a plain exit has nothing to train
            trainer.to(device)
            _train(recipe, checkpoint, trainer, training, held_out, metadata, folder / name_of(branch), report)
        trained = trainer.cpu().exit_branch(checkpoint.fingerprint, 1)
        for vocabulary in vocabularies:
            candidate = replace(trained, vocabulary=vocabulary)
            for speed, exit_branch in _measure(recipe, checkpoint, tokenizer, candidate, held_out):
                report(
                    f"{name_of(branch)}, {_shape(exit_branch)}: {speed:.2f} x plain decoding, "
                    f"{exit_branch.notes['held_out_tokens_per_pass']:.2f} tokens a pass"
                )
                found.append((speed, exit_branch))
    speed, best = max(found, key=lambda pair: pair[0])
    candidates = [_describe(*pair) for pair in found]
    with replacing_file(folder / "search.json") as partial:
        partial.write_text(json.dumps(candidates, indent=1) + "\n", encoding="utf-8")
    with replacing(folder / "exit") as partial:
        best.save(partial)
    report(f"the fastest is {name_of(best.config)} with {_shape(best)} ({speed:.2f} x)")
    return folder / "exit"


def draft_vocabulary(conversations: Seq[Conversation], size: int) -> Tensor:
    """The tokens that the model's own answers use most, rising: int64 [at most size]."""
    answers = torch.cat([c.ids_T[c.num_prompt_tokens :] for c in conversations])
    counts = answers.bincount()
    return counts.argsort(descending=True, stable=True)[: min(size, int((counts > 0).sum()))].sort().values


def name_of(branch: ExitConfig) -> str:
    """`s0-b1-f15.27.30`."""
    features = f"-f{'.'.join(map(str, branch.features))}" if branch.features else ""
    return f"s{branch.start}-b{branch.num_layers}{features}"


def _describe(speed: float, branch: TrainedExit) -> dict[str, Any]:
    return {
        **asdict(branch.config),
        "vocabulary": len(branch.vocabulary),
        "num_draft_tokens": branch.num_draft_tokens,
        "num_runner_ups": branch.num_runner_ups,
        "over_plain_decoding": round(speed, 3),
        **{
            name: branch.notes[name]
            for name in ("held_out_coverage", "held_out_tokens_per_pass", "held_out_acceptance")
        },
    }


def _shape(branch: TrainedExit) -> str:
    return f"{branch.num_draft_tokens} draft tokens of {len(branch.vocabulary)} and {branch.num_runner_ups} runner-ups"


def _prompts(recipe: ExitRecipe, base: str | None, tokenizer: Tokenizer, path: Path, report: Report) -> list[list[int]]:
    """Token ids of the prompts, which are written to `path` when first made."""
    settings = recipe.prompts
    if not path.exists():
        excluded = {text.strip() for source in settings.exclude for text in _texts(source, settings)}
        texts = [text for source in settings.files for text in _texts(source, settings)]
        rng = random.Random(settings.seed)
        if settings.max_prompts is not None and len(texts) > settings.max_prompts:
            texts = rng.sample(texts, settings.max_prompts)
        if settings.self_written:
            llm = LLM(
                base,
                speculative=SpeculativeConfig(draft="none"),
                max_num_seqs=recipe.collect.max_num_seqs,
                **_how_to_load(recipe),
            )
            for number, text in enumerate(
                self_prompts(llm, settings.self_written, openings=settings.openings, seed=settings.seed), start=1
            ):
                texts.append(text)
                if number % 100 == 0:
                    report(f"the model has written {number} prompts")
        texts = [text for text in dict.fromkeys(texts) if text.strip() and text.strip() not in excluded]
        rng.shuffle(texts)
        with replacing_file(path) as partial:
            partial.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    texts = [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()]
    encoded = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}])
        if tokenizer.has_chat_template
        else tokenizer.encode(text)
        for text in texts
    ]
    kept = [ids for ids in encoded if len(ids) <= settings.max_prompt_tokens]
    if not kept:
        raise ConfigError(f"none of {len(encoded)} prompts has at most {settings.max_prompt_tokens} tokens")
    return kept


def _texts(source: str, settings: PromptsRecipe) -> Iterator[str]:
    """What the user says first in every row of a file."""
    for row in read(source, DataConfig(train=(source,))):
        messages, turns = row.get(settings.messages_field), row.get("turns")
        if isinstance(row.get(settings.prompt_field), str):
            yield row[settings.prompt_field]
        elif isinstance(turns, list) and turns:
            yield str(turns[0])
        elif isinstance(messages, list) and messages:
            yield next((m["content"] for m in messages if m["role"] == "user"), "")
        else:
            raise ConfigError(
                f"a row of {source} has none of {settings.prompt_field}, turns, {settings.messages_field}: {dict(row)}"
            )


def _how_to_load(recipe: ExitRecipe) -> dict[str, Any]:
    """Options of `load_model`."""
    precision = recipe.collect.precision
    kind = "quantize" if precision in get_args(Quantize) else "dtype"
    return {kind: precision, "device": recipe.device, "threads": recipe.threads}


def _initial(recipe: ExitRecipe, checkpoint: Checkpoint) -> TrainedExit | None:
    if recipe.initial is None:
        return None
    initial = TrainedExit.load(DEFAULT_EXIT if recipe.initial == "default" else Path(recipe.initial))
    initial.check(checkpoint.config)
    if initial.config not in recipe.branches:
        raise ConfigError(
            f"initial is {recipe.initial}, of shape {vars(initial.config)}, which no candidate has; add it to branches"
        )
    return initial


def _train(
    recipe: ExitRecipe,
    checkpoint: Checkpoint,
    trainer: ExitTrainer,
    training: Seq[Conversation],
    held_out: Seq[Conversation],
    metadata: Mapping[str, str],
    folder: Path,
    report: Report,
) -> None:
    embedding = checkpoint.tensor("model.embed_tokens.weight", torch.float32)

    def tell(entry: Mapping[str, Any]) -> None:
        shares = ", ".join(f"{share:.1%}" for share in entry["acceptance"])
        report(
            f"{folder.name}: {entry['num_tokens']:,} tokens, loss {entry['loss']:.3f}, accepted {shares}, "
            f"{entry['tokens_per_second']:.0f} tokens/s"
        )

    taps = json.loads(metadata["taps"])
    for number, stage in enumerate(recipe.stages):
        fit(trainer, training, held_out, taps, embedding, stage, folder / f"stage-{number}", tell)
    write_plot(folder, folder / "acceptance.png")


def _measure(
    recipe: ExitRecipe,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    trained: TrainedExit,
    held_out: Seq[Conversation],
) -> Iterator[tuple[float, TrainedExit]]:
    """Decoding speed over plain decoding for every shape of draft, on held-out prompts, the two taking turns."""
    search = recipe.search
    prompts = [c.ids_T[: c.num_prompt_tokens].tolist() for c in held_out[: search.num_prompts]]
    eos = sorted(tokenizer.eos_token_ids)
    model = load_model(checkpoint, **_how_to_load(recipe))
    model.attach(trained)
    answers = torch.cat([c.ids_T[c.num_prompt_tokens :] for c in held_out])
    coverage = float(torch.isin(answers, trained.vocabulary).float().mean())
    plain = Engine(model, SpeculativeConfig(draft="none"), eos_token_ids=eos)
    for length, num_runner_ups in product(search.num_draft_tokens, search.num_runner_ups):
        setting = SpeculativeConfig(draft="exit-branch", num_draft_tokens=length, num_runner_ups=num_runner_ups)
        drafting = Engine(model, setting, eos_token_ids=eos)
        counted = _Acceptance(length)
        drafting.on_round = counted
        ratios: list[float] = []
        num_tokens = num_passes = 0
        for _ in range(search.repeats):
            slow = fast = 0.0
            for prompt in prompts:  # in turn for each, as a machine's speed changes within seconds
                slow += _decode(plain, prompt, search)[0]
                seconds, done = _decode(drafting, prompt, search)
                fast += seconds
                num_tokens += len(done.tokens) - 1
                num_passes += done.stats.num_target_passes
            ratios.append(slow / fast)
        notes = {
            "base_model": checkpoint.path.name,
            "stages": [vars(stage) for stage in recipe.stages],
            "held_out_coverage": round(coverage, 4),
            "held_out_tokens_per_pass": round(num_tokens / max(1, num_passes), 3),
            "held_out_acceptance": [round(share, 4) for share in counted.shares],
        }
        found = replace(trained, num_draft_tokens=length, num_runner_ups=num_runner_ups, notes=notes)
        yield statistics.median(ratios), found


class _Acceptance:
    """Shares of drafts whose first 1, 2, .. tokens were all accepted, without runner-ups: where draft `auto` starts."""

    def __init__(self, num_draft_tokens: int) -> None:
        self._num_drafts = 0
        self._num_accepted = [0] * num_draft_tokens

    def __call__(self, outcome: Round) -> None:
        for part in outcome.sequences:
            self._num_drafts += part.source is not None
            for place in range(part.num_accepted_tokens - (part.runner_up is not None)):
                self._num_accepted[place] += 1

    @property
    def shares(self) -> list[float]:
        return [number / max(1, self._num_drafts) for number in self._num_accepted]


def _decode(engine: Engine, prompt: Seq[int], search: SearchRecipe) -> tuple[float, Sequence]:
    """Seconds of decoding, without the prompt's pass, and what came of it."""
    sequence = engine.add(prompt, SamplingParams(max_new_tokens=search.max_new_tokens))
    while not sequence.is_prefilled:
        engine.step()
    started = time.perf_counter()
    while not sequence.is_finished:
        engine.step()
    return time.perf_counter() - started, sequence


def write_plot(folder: Path, path: Path) -> None:
    """Acceptance over training tokens, from the logs of a branch's stages.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the plot needs matplotlib: pip install 'hopskip[train]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    curves: dict[int, list[tuple[int, float]]] = {}
    done = 0
    for stage in sorted(folder.glob("stage-*")):
        entries = [json.loads(line) for line in (stage / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for entry in entries:
            for step, share in enumerate(entry["acceptance"]):
                curves.setdefault(step, []).append((done + entry["num_tokens"], share))
        done += entries[-1]["num_tokens"]
    for step, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=f"first {step + 1} right")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("share of held-out drafts")
    axes.set_ylim(0, None)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
