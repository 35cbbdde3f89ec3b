"""The options that commands share, in groups: each is declared once, here.

Nothing here imports PyTorch before an option is used: `hopskip --help` must not wait for it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, cast, get_type_hints

import typer

from hopskip.errors import ConfigError

if TYPE_CHECKING:
    from typing import TypedDict

    from hopskip.llm import LLM
    from hopskip.loading import Backend, DType, KVDType, Quantize
    from hopskip.sampling import SamplingParams
    from hopskip.speculative import DraftChoice, DraftPrecision, SpeculativeConfig, VerifyMode

    class BackendArguments(TypedDict):
        dtype: DType
        quantize: Quantize | None
        device: str
        backend: Backend
        threads: int | None
        kv_dtype: KVDType


_MODEL, _DRAFTING, _SAMPLING = "Model", "Drafting", "Sampling"  # headings of --help
_MODEL_HELP = "A folder with a Hugging Face checkpoint, a GGUF file, or a Hub id (default: SmolLM2-135M-Instruct)."


ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False),
]
"""A model as the argument of a command: goes with `LoadOptions.at`."""


def max_new_tokens_option(help: str, panel: str | None = None) -> Any:
    """`--max-new-tokens`: commands differ in what they do without it, as `help` says."""
    return typer.Option("--max-new-tokens", "-n", metavar="N", help=help, show_default=False, rich_help_panel=panel)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give typer a command that takes groups of options: every parameter annotated with a dataclass of this module is
    replaced by one option per field, and the command gets the dataclass back.

    >>> @app.command()  # doctest: +SKIP
    ... @with_options
    ... def generate(load: LoadOptions, draft: DraftOptions) -> None: ...
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Callable[..., Any]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not is_dataclass(group):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = cast("Callable[..., Any]", group)
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
            )
            for field in fields(group)
        ]

    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(cast(Any, group))})
        command(**values)

    functools.update_wrapper(run, command)
    del run.__dict__["__wrapped__"]  # inspect would look through to the original signature
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    return run


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Which model to load, in which precision, and on what."""

    model: Annotated[
        str | None,
        typer.Option("--model", "-m", metavar="MODEL", help=_MODEL_HELP, show_default=False, rich_help_panel=_MODEL),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Precision of weights and arithmetic: float32, bfloat16, float16, or auto, the checkpoint's own.",
            rich_help_panel=_MODEL,
        ),
    ] = "auto"
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="Pack the weights to 8 or 4 bits: q8, q4 (native backend).", rich_help_panel=_MODEL
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one.", rich_help_panel=_MODEL
        ),
    ] = "auto"
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="native (the C++ engine for CPUs), torch, or auto, which prefers native on a CPU.",
            rich_help_panel=_MODEL,
        ),
    ] = "auto"
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="CPU threads; by default as many as there are cores.", rich_help_panel=_MODEL),
    ] = None
    kv_dtype: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Precision of cached keys and values: float32, bfloat16, int8, or auto (native backend).",
            rich_help_panel=_MODEL,
        ),
    ] = "auto"

    def arguments(self) -> BackendArguments:
        """The keyword arguments of `LLM` and `load_model`, which check their values."""
        return {
            "dtype": cast("DType", self.dtype),
            "quantize": cast("Quantize | None", self.quantize),
            "device": self.device,
            "backend": cast("Backend", self.backend),
            "threads": self.threads,
            "kv_dtype": cast("KVDType", self.kv_dtype),
        }

    def at(self, place: str | None) -> LoadOptions:
        """These options for the model that a command takes as its argument.

        Raises:
            ConfigError: `--model` names one as well.
        """
        if place is None:
            return self
        if self.model is not None:
            raise ConfigError(f"the model is given twice, as {place} and as --model {self.model}; leave one out")
        return replace(self, model=place)

    def load(
        self,
        speculative: SpeculativeConfig,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        prefix_caching: bool | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> LLM:
        """Load the model."""
        from hopskip.llm import LLM

        return LLM(
            self.model,
            speculative=speculative,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            prefix_caching=prefix_caching,
            progress=progress,
            **self.arguments(),
        )


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """How to speculate."""

    draft: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="auto (what pays, round by round; the default beside a trained exit), exit-branch (a trained exit), "
            "early-exit (the model's first layers), layer-skip (all its layers but some), ngram (text seen before), "
            "both, or none; by default what suits the model.",
            rich_help_panel=_DRAFTING,
        ),
    ] = None
    exit_branch: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="A trained exit for the model (default: the one that comes with hopskip, if any).",
            rich_help_panel=_DRAFTING,
        ),
    ] = None
    exit_layer: Annotated[
        int | None,
        typer.Option(metavar="E", help="An early-exit draft runs this many layers.", rich_help_panel=_DRAFTING),
    ] = None
    num_draft_tokens: Annotated[
        int | None, typer.Option(metavar="K", help="Most tokens drafted in a round.", rich_help_panel=_DRAFTING)
    ] = None
    num_runner_ups: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Verify this many tokens beside each draft of an exit, as second choices for its places.",
            rich_help_panel=_DRAFTING,
        ),
    ] = None
    skip_layers: Annotated[
        str | None,
        typer.Option(
            metavar="LAYERS",
            help="Layers that a layer-skip draft leaves out, such as 10+11+14, or none; by default those that a short "
            "search finds.",
            rich_help_panel=_DRAFTING,
        ),
    ] = None
    draft_precision: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Draft with a copy of the model's layers in q8 or q4; it takes memory and never changes the text.",
            rich_help_panel=_DRAFTING,
        ),
    ] = None
    verify: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="recompute (the verify pass runs all layers) or reuse (it goes on from where an early-exit draft "
            "stopped).",
            rich_help_panel=_DRAFTING,
        ),
    ] = None
    min_confidence: Annotated[
        float,
        typer.Option(metavar="P", help="End a draft at a token less probable than this.", rich_help_panel=_DRAFTING),
    ] = 0.0

    def config(self) -> SpeculativeConfig:
        """The configuration for `LLM`.

        Raises:
            ConfigError: a value is out of range, or would have no effect.
        """
        from hopskip.speculative import SpeculativeConfig, layer_list

        return SpeculativeConfig(
            draft=cast("DraftChoice | None", self.draft),
            exit_branch=self.exit_branch,
            exit_layer=self.exit_layer,
            num_draft_tokens=self.num_draft_tokens,
            num_runner_ups=self.num_runner_ups,
            skip_layers=None if self.skip_layers is None else layer_list(self.skip_layers),
            draft_precision=cast("DraftPrecision | None", self.draft_precision),
            verify=cast("VerifyMode | None", self.verify),
            min_confidence=self.min_confidence,
        )


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen, and when the text ends. The values are those of `SamplingParams`, which checks them."""

    max_new_tokens: Annotated[
        int | None,
        max_new_tokens_option("Most tokens to generate (default: 256; in a chat 1024 an answer).", _SAMPLING),
    ] = None
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 is greedy: always the best token.", rich_help_panel=_SAMPLING)
    ] = 0.0
    top_k: Annotated[
        int,
        typer.Option(metavar="K", help="Sample from the k most probable tokens; 0 is all.", rich_help_panel=_SAMPLING),
    ] = 0
    top_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            help="Sample from the fewest tokens whose probabilities reach this sum.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        typer.Option(
            metavar="P",
            help="Sample from tokens at least this fraction as probable as the best.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        typer.Option(metavar="X", help="Above 1: makes tokens seen before less likely.", rich_help_panel=_SAMPLING),
    ] = 1.0
    presence_penalty: Annotated[
        float,
        typer.Option(metavar="X", help="Taken off the logit of tokens generated before.", rich_help_panel=_SAMPLING),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        typer.Option(
            metavar="X", help="Taken off once for each time that a token was generated.", rich_help_panel=_SAMPLING
        ),
    ] = 0.0
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Same seed, same text (with a temperature).", rich_help_panel=_SAMPLING),
    ] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="End before this text; may be given several times.", rich_help_panel=_SAMPLING
        ),
    ] = None
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Go on when the model ends its text.", rich_help_panel=_SAMPLING)
    ] = False

    def params(self, default_max_new_tokens: int) -> SamplingParams:
        """The parameters for `LLM.stream`.

        Raises:
            ConfigError: a value is out of range, or would have no effect.
        """
        from hopskip.sampling import SamplingParams

        return SamplingParams(
            max_new_tokens=default_max_new_tokens if self.max_new_tokens is None else self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=tuple(self.stop or ()),
            ignore_eos=self.ignore_eos,
        )
