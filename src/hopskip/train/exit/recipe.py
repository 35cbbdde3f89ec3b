"""What a recipe of `hopskip train exit` says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from hopskip.checkpoint.hub_cache import DEFAULT_MODEL
from hopskip.checkpoint.trained_exit import ExitConfig
from hopskip.errors import ConfigError
from hopskip.loading import LoadConfig, Quantize


@dataclass(frozen=True, kw_only=True)
class PromptsRecipe:
    """What the model is asked, so that there is text to train on."""

    files: tuple[str, ...] = ()
    """Files, folders or Hub data sets, as `data.train` of a LayerSkip recipe: prompts, or chats of several turns."""
    split: str = "train"
    """Split of a Hub data set."""
    subset: str | None = None
    """Configuration of a Hub data set."""
    where: Mapping[str, Any] | None = None
    """Only rows whose fields have these values."""
    prompt_field: str = "prompt"
    response_field: str = "response"
    messages_field: str = "messages"
    max_prompts: int | None = None
    """Take so many of the files' chats, chosen at random."""
    self_written: int = 0
    """So many prompts that the model is to write itself; some are dropped as unfinished or repeated."""
    openings: tuple[str, ...] = ("",)
    """Beginnings of these prompts, in rotation."""
    exclude: tuple[str, ...] = ()
    """Files with prompts that must not be trained on: those that the exit will be measured with."""
    max_prompt_tokens: int = 1024
    """Longer prompts are left out, and turns of a chat whose history is longer."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.files and self.self_written < 1:
            raise ConfigError("prompts has neither files nor self_written; give one of them")
        for name in ("max_prompts", "max_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"prompts.{name} is {value}; it must be at least 1")
        if not self.files and (self.max_prompts is not None or self.subset is not None or self.where is not None):
            raise ConfigError("prompts.max_prompts, subset and where choose among files, but prompts.files names none")


@dataclass(frozen=True, kw_only=True)
class ServerRecipe:
    """An OpenAI-compatible server that answers in place of this engine. It must serve the exit's model."""

    url: str
    """Up to what `/chat/completions` follows: `http://localhost:8000/v1`."""
    model: str | None = None
    """As the server calls it; None: the first that it lists."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key, if it wants one."""
    concurrency: int = 32
    """Requests at once."""
    max_retries: int = 6
    """Of one request, with pauses of 1, 2, 4, .. seconds, or as the server says."""
    timeout: float = 600.0
    """Seconds for an answer."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"collect.server.url is {self.url!r}; give one such as http://localhost:8000/v1")
        for name, least in (("concurrency", 1), ("max_retries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"collect.server.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.timeout <= 0:
            raise ConfigError(f"collect.server.timeout is {self.timeout}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class CollectRecipe:
    """Who answers, and what is kept of it."""

    answers: Literal["model", "given", "server"] = "model"
    """`model`: this engine, greedily. `given`: the chats' own answers, of which an exit learns less, for it is to draft
    what the model says. `server`: that of `server`."""
    server: ServerRecipe | None = None
    states: Literal["stored", "on-the-fly"] = "stored"
    """The model's hidden states: on disk, or made anew by a pass over each batch. That takes longer, and no disk."""
    precision: str = "bfloat16"
    """As `dtype` of `LLM`; on the native backend also q8 or q4."""
    max_new_tokens: int = 256
    max_num_seqs: int = 64

    def __post_init__(self) -> None:
        for name in ("answers", "states"):
            value, choices = getattr(self, name), get_args(get_type_hints(type(self))[name])
            if value not in choices:
                raise ConfigError(f"collect.{name} is {value!r}; choose one of {', '.join(choices)}")
        if (self.server is not None) != (self.answers == "server"):
            raise ConfigError("collect.server and collect.answers: server belong together; give both or neither")
        for name in ("max_new_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"collect.{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How long and how to train."""

    num_tokens: int
    """Tokens to train on, counted with repetition and padding left out."""
    batch_tokens: int = 512
    """Of one forward pass, with padding."""
    gradient_accumulation_steps: int = 1
    """Batches of each process that an optimizer step takes together."""
    learning_rate: float = 3e-3
    warmup: float = 0.02
    """Share of the tokens over which the learning rate rises."""
    decay: float = 0.3
    """Share of the tokens, at the end, over which it falls to zero; between, it stays."""
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    unroll_steps: int = 3
    step_discount: float = 0.8
    """The loss of unroll step j weighs this to the power j - 1."""
    hard_weight: float = 0.3
    """Weight of the model's own next token beside its distribution."""
    seed: int = 0
    eval_every: int = 100_000
    """Tokens between evaluations, which also write a checkpoint."""
    early_stopping: int | None = None
    """End after so many evaluations in a row that are worse than the best one. Its weights are kept in any case."""

    def __post_init__(self) -> None:
        for name in (
            *("num_tokens", "batch_tokens", "gradient_accumulation_steps", "unroll_steps", "eval_every"),
            *("learning_rate", "warmup", "decay", "early_stopping"),
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} is {value}; it must be above 0")
        if not 0 <= self.hard_weight <= 1:
            raise ConfigError(f"hard_weight is {self.hard_weight}; it must be between 0 and 1")

    def rate(self, num_tokens: int) -> float:
        """Learning rate after so many tokens: warm-up, constant, linear decay."""
        done = num_tokens / self.num_tokens
        return self.learning_rate * max(0.0, min(1.0, done / self.warmup, (1 - done) / self.decay))


@dataclass(frozen=True, kw_only=True)
class Branch:
    """The shape of an exit, for a model of any depth: see `ExitConfig`.

    Raises:
        ConfigError: it would be no exit of any model.
    """

    start: int
    num_layers: int
    features: tuple[int | str, ...] = ()
    """Layers by their number, or as a share of the model's: `[50%, 90%, 100%]` sees layers 15, 27 and 30 of 30."""

    def __post_init__(self) -> None:
        self.of(100)

    def of(self, depth: int) -> ExitConfig:
        """For a model of so many layers."""
        layers = [layer if isinstance(layer, int) else _layer_at(layer, depth) for layer in self.features]
        # of a shallow model two shares may be one layer
        is_shared = any(isinstance(layer, str) for layer in self.features)
        features = sorted(set(layers)) if is_shared else layers
        return ExitConfig(start=self.start, num_layers=self.num_layers, features=tuple(features))


def _layer_at(share: str, depth: int) -> int:
    number = share.strip().removesuffix("%")
    if not share.strip().endswith("%") or not number.isdecimal() or not 0 < int(number) <= 100:
        raise ConfigError(f"features has {share!r}; give a layer's number, or a share such as 50%")
    return max(1, round(depth * int(number) / 100))


@dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """How the candidates are compared: by tokens per second on prompts that were held out."""

    num_prompts: int = 8
    max_new_tokens: int = 128
    num_draft_tokens: tuple[int, ...] = (1, 2, 3, 4)
    num_runner_ups: tuple[int, ...] = (0, 1, 2)
    vocabulary: tuple[int, ...] = ()
    """Smaller draft vocabularies to try besides the one that was trained over: a draft step reads less, and misses
    more."""
    repeats: int = 3
    """Runs of every prompt at least."""
    max_repeats: int = 20
    """And at most: runs go on until the best candidate of an exit is known beyond the noise."""
    least_speedup: float = 1.05
    """Over plain decoding: a candidate below is not worth its memory, and none such is chosen."""

    def __post_init__(self) -> None:
        if not 1 <= self.repeats <= self.max_repeats:
            raise ConfigError(f"search.repeats is {self.repeats}; it must be from 1 to max_repeats, {self.max_repeats}")


@dataclass(frozen=True, kw_only=True)
class ExitRecipe:
    """A whole run: prompts, collection, training of every candidate exit, and the choice of the fastest.

    Raises:
        ConfigError: it names no candidate, or no stage though a candidate has layers to train.
    """

    output: str
    """Folder of the run; the chosen exit is in `exit` in it. `{model}` stands for the model's own name."""
    base: str = "default"
    """A folder, a GGUF file or a Hub id; `default` is hopskip's default model."""
    prompts: PromptsRecipe
    collect: CollectRecipe = field(default_factory=CollectRecipe)
    branches: tuple[Branch, ...] = ()
    """The shapes of exit to try: the candidates."""
    vocabulary: int = 8192
    """Size of the draft vocabulary: so many of the tokens that the model uses most."""
    fill_vocabulary: bool = False
    """Where the answers have fewer kinds of tokens, take those as well that the tokenizer's makers merged first."""
    initial: str | None = None
    """The folder of an exit whose weights the candidates of its shape start from, such as one that was trained for the
    model that this one was fine-tuned from; `default` is the one that ships for the default model."""
    stages: tuple[FitConfig, ...] = ()
    """Trainings of each candidate, one after the other."""
    precision: str = "float32"
    """Of the matrix products in training: float32, or bfloat16, which is faster where the CPU multiplies it. Weights
    and optimizer are float32 in any case."""
    held_out_every: int = 40
    """Every so manieth conversation is kept from training, for evaluation."""
    search: SearchRecipe = field(default_factory=SearchRecipe)
    num_workers: int = 0
    """Processes that put batches together while the step before runs: for a GPU. On a CPU the step needs its cores."""
    report_to: tuple[str, ...] = ()
    """Trackers that accelerate knows, such as tensorboard and wandb."""
    device: str = "auto"
    """Where to collect, train and measure; `auto` takes a CUDA device where there is one, else the CPU."""
    threads: int | None = None
    """CPU threads; by default as many as there are cores."""

    def __post_init__(self) -> None:
        if not self.branches:
            raise ConfigError("a recipe needs at least one entry in `branches`, such as {start: 0, num_layers: 1}")
        if not self.stages and any(exit.num_layers for exit in self.branches):
            raise ConfigError("a recipe needs at least one entry in `stages`, such as {num_tokens: 1000000}")
        if self.collect.answers == "given" and (self.prompts.self_written or not self.prompts.files):
            raise ConfigError("collect.answers: given takes answers of prompts.files; leave prompts.self_written out")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision is {self.precision}; it must be float32 or bfloat16")
        if self.num_workers and self.collect.states == "on-the-fly":
            raise ConfigError(f"num_workers is {self.num_workers}, but states on the fly are made by the first process")
        if self.num_workers < 0:
            raise ConfigError(f"num_workers is {self.num_workers}; it must be at least 0")
        if self.held_out_every < 2:
            raise ConfigError(f"held_out_every is {self.held_out_every}; it must be at least 2")
        if self.vocabulary < 1:
            raise ConfigError(f"vocabulary is {self.vocabulary}; it must be at least 1")
        if not all(0 < size < self.vocabulary for size in self.search.vocabulary):
            raise ConfigError(
                f"search.vocabulary is {list(self.search.vocabulary)}; give sizes from 1 to {self.vocabulary - 1}"
            )

    def exits(self, depth: int) -> tuple[ExitConfig, ...]:
        """The candidates, for a model of so many layers."""
        return tuple(branch.of(depth) for branch in self.branches)

    def taps(self, depth: int) -> tuple[int, ...]:
        """Layers whose outputs any candidate needs; those of the last one every collection has."""
        return tuple(sorted({tap for exit in self.exits(depth) for tap in exit.taps}))

    @property
    def folder(self) -> Path:
        """Of the run."""
        return folder_of(self.output, self.base)

    @property
    def load(self) -> LoadConfig:
        """How the model is loaded to answer, and to be measured."""
        precision: Any = self.collect.precision
        return LoadConfig(
            model=None if self.base == "default" else self.base,
            dtype="auto" if precision in get_args(Quantize) else precision,
            quantize=precision if precision in get_args(Quantize) else None,
            device=self.device,
            threads=self.threads,
        )


def folder_of(output: str, base: str) -> Path:
    """Of a run: `{model}` stands for the model's own name."""
    name = DEFAULT_MODEL if base == "default" else base.rstrip("/")
    return Path(output.replace("{model}", Path(name).name.removesuffix(".gguf").replace(":", "-")))
