"""`hopskip generate`: one prompt, one text, streamed."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hopskip.cli.answer import Answer
from hopskip.cli.console import PieceWriter, load_llm, print_json, print_statistics
from hopskip.cli.options import (
    ChatTemplateOption,
    ContextOption,
    DefaultsGroup,
    DraftGroup,
    JsonOption,
    LoadGroup,
    SamplingGroup,
    ThinkOption,
    checked_sampling,
    with_options,
)
from hopskip.cli.prompt import read_prompt
from hopskip.errors import ConfigError
from hopskip.sampling_params import with_defaults

if TYPE_CHECKING:
    from hopskip.llm import LLM, Prompt
    from hopskip.loading import LoadConfig
    from hopskip.sampling_params import SamplingParams


@with_options
def generate(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT|-",
            help="The prompt. What is piped in comes after it, or where a - stands.",
            show_default=False,
        ),
    ] = None,
    *,
    prompt_option: Annotated[str | None, typer.Option("--prompt", "-p", hidden=True)] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", "-f", metavar="FILE", help="A text after the prompt; may be given several times."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without chat template.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the chat template.")] = None,
    think: ThinkOption = None,
    chat_template: ChatTemplateOption = None,
    as_json: JsonOption = False,
    max_model_len: ContextOption = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write every round to a file, for `hopskip trace show`.", show_default=False),
    ] = None,
    load: LoadGroup,
    draft: DraftGroup,
    sampling: SamplingGroup,
    defaults: DefaultsGroup,
) -> None:
    """Generate text for one prompt.

    The text goes to stdout as it is generated; in a terminal, colours show where each token came from. Statistics go
    to stderr.

    $ hopskip generate "Give three tips for staying healthy."
    $ cat notes.txt | hopskip generate "Summarise:"
    $ hopskip generate --file notes.txt -m model.gguf --temperature 0.7 "Summarise:"
    """
    if prompt and prompt_option is not None:
        raise ConfigError(f"the prompt is given twice, as {' '.join(prompt)!r} and with --prompt; leave one out")
    text = read_prompt(prompt or ([] if prompt_option is None else [prompt_option]), file or ())
    if raw and system is not None:
        raise ConfigError("--raw and --system contradict each other: a plain prompt has no system message")
    if raw and think is not None:
        raise ConfigError("--raw and --think contradict each other: the switch is in the chat template")
    if raw and chat_template is not None:
        raise ConfigError("--raw and --chat-template contradict each other: a plain prompt goes through no template")
    given = checked_sampling(sampling, defaults)
    llm = load_llm(
        load,
        draft,
        max_model_len=max_model_len,
        generation_config=defaults.generation_config,
        chat_template=chat_template,
    )
    params = with_defaults(given, llm.recommended_sampling)
    wrapped = llm.encode(_with_template(llm, text, raw, system), enable_thinking=think)
    writer = None if as_json else PieceWriter()
    with contextlib.ExitStack() as open_files:
        if trace is not None:
            header = {"model": _describe_model(llm, load), "settings": _settings(llm, load, params)}
            from hopskip.engine.trace import TraceWriter

            llm.engine.on_round = open_files.enter_context(TraceWriter(trace, header))
        answer = _write(llm, wrapped, params, writer)
    if writer is not None:
        writer.end()
        if answer.stats is not None:
            print_statistics(answer.stats, answer.tokens, answer.ending, answer.seed)
    else:
        print_json({**answer.as_dict(), "model": _describe_model(llm, load), "settings": _settings(llm, load, params)})
    if answer.finish_reason == "abort":
        raise typer.Exit(130)


def _write(llm: LLM, prompt: Prompt, params: SamplingParams, writer: PieceWriter | None) -> Answer:
    """Generate, and show each piece; Ctrl-C ends it, and what there is until then counts like any other."""
    answer = Answer()
    try:
        for piece in llm.stream(prompt, params):
            answer.add(piece)
            if writer is not None:
                writer.write(piece)
    except KeyboardInterrupt:
        pass
    return answer


def _with_template(llm: LLM, text: str, raw: bool, system: str | None) -> Prompt:
    if raw or not llm.tokenizer.has_chat_template:
        if system is not None:
            raise ConfigError("--system has no effect: this model has no chat template; put the text into the prompt")
        return text
    messages = [{"role": "user", "content": text}]
    return [{"role": "system", "content": system}, *messages] if system is not None else messages


def _describe_model(llm: LLM, load: LoadConfig) -> dict[str, Any]:
    from hopskip.checkpoint.hub_cache import DEFAULT_MODEL

    config = llm.backend.config
    return {
        "name": load.model or DEFAULT_MODEL,
        "model_type": config.model_type,
        "num_hidden_layers": config.num_hidden_layers,
        "num_parameters": config.num_parameters,
        "max_model_len": llm.engine.max_model_len,
        "device": llm.backend.traits.device,
    }


def _settings(llm: LLM, load: LoadConfig, params: SamplingParams) -> dict[str, Any]:
    """Everything needed to run the same again: options with the values that were chosen for those left out."""
    options = {name: value for name, value in vars(load).items() if name != "model"}
    return {
        "sampling": asdict(params),
        "speculative": asdict(llm.engine.speculative),
        **options,
        "backend": llm.backend.traits.name,
    }
