"""`hopskip check`: proofs that speculation changes nothing, on a model of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import typer

from hopskip.cli.check_server import ServerGroup, check_server, refuse_model_options, refuse_server_options
from hopskip.cli.console import print_json
from hopskip.cli.options import JsonOption, LoadGroupOfMany, with_options
from hopskip.cli.precisions import PrecisionList, choose_precisions, load_each
from hopskip.cli.progress import progress
from hopskip.errors import ConfigError
from hopskip.machine import require

if TYPE_CHECKING:
    from rich.console import Console

    from hopskip.backends.base import Backend
    from hopskip.checkpoint.checkpoint import Checkpoint
    from hopskip.loading import LoadConfig
    from hopskip.prompts import Prompt
    from hopskip.prove.proof import Proof
    from hopskip.text.tokenizer import Tokenizer

_NUM_PROMPTS, _MAX_NEW_TOKENS = 20, 32
_NUM_PROMPTS_AGAINST, _MAX_NEW_TOKENS_AGAINST = 80, 64
_STYLES = {"passed": "green", "failed": "bold red", "not claimed": "dim"}


@with_options
def check(
    *,
    context: typer.Context,
    precision: PrecisionList = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="transformers|URL",
            help="Compare greedy texts and tokenised prompts with transformers instead (80 prompts, 64 tokens); or an "
            "OpenAI server's texts with and without its speculation (20 prompts, 64 tokens).",
        ),
    ] = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Prompts per proof (default: 20; with --against transformers 80).", show_default=False
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            metavar="N",
            help="Tokens to generate per prompt (default: 32; with --against 64).",
        ),
    ] = None,
    as_json: JsonOption = False,
    load: LoadGroupOfMany,
    server: ServerGroup,
) -> None:
    """Prove that speculation changes no token and no distribution; exit code 1 if a proof fails.

    Greedy ids (and hidden states) against plain decoding for every draft source, length and verify mode; sampled
    tokens against the exact distribution; texts alone against texts in a batch and after a cached prefix.

    $ hopskip check
    $ hopskip check model.gguf --precision q8 --num-prompts 4
    $ hopskip check --against http://127.0.0.1:8000 --badge lossless.json
    """
    from hopskip.prove.proof import all_hold

    if max_new_tokens is not None and max_new_tokens < 2:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; a proof needs at least 2")
    if against is not None and against.startswith(("http://", "https://")):
        refuse_model_options(context)
        check_server(against, server, num_prompts, max_new_tokens, as_json)
        return
    refuse_server_options(server)
    precisions = choose_precisions(load, precision if against is None else precision or "float32")
    if against not in (None, "transformers"):
        raise ConfigError(
            f"against is {against!r}; give 'transformers', or the URL of a server, with http:// before it"
        )
    found: list[tuple[str, Proof]] = []
    table = None if as_json else _Table()
    for name, proof in _proofs(load, precisions, against, num_prompts, max_new_tokens):
        found.append((name, proof))
        if table is not None:
            table.add(name, proof)
    passed = all_hold(proof for _, proof in found)
    if as_json:
        print_json({"passed": passed, "proofs": [{"precision": name, **proof.as_dict()} for name, proof in found]})
    elif table is not None:
        table.conclude(passed, [proof for _, proof in found])
    if not passed:
        raise typer.Exit(1)


def _proofs(
    load: LoadConfig,
    precisions: list[str],
    against: str | None,
    num_prompts: int | None,
    max_new_tokens: int | None,
) -> Iterator[tuple[str, Proof]]:
    """Every proof, with the precision it was made in."""
    from hopskip.checkpoint.checkpoint import open_checkpoint
    from hopskip.checkpoint.hub import find_model
    from hopskip.prompts import load_prompts, mixed_prompts
    from hopskip.text.tokenizer_files import load_tokenizer

    checkpoint = open_checkpoint(find_model(load.model))
    tokenizer = load_tokenizer(checkpoint.path, checkpoint.config)
    if against is not None:
        prompts = load_prompts("alpaca", _NUM_PROMPTS_AGAINST if num_prompts is None else num_prompts)
        yield from _against_transformers(
            load,
            precisions,
            checkpoint,
            tokenizer,
            prompts,
            max_new_tokens or _MAX_NEW_TOKENS_AGAINST,
        )
        return
    from hopskip.prove.context import context_proofs
    from hopskip.prove.greedy import greedy_proofs
    from hopskip.prove.sampled import sampling_proofs

    prompts = mixed_prompts(_NUM_PROMPTS if num_prompts is None else num_prompts)
    ids = [prompt.encode(tokenizer) for prompt in prompts]
    length = max_new_tokens or _MAX_NEW_TOKENS
    for name, backend in load_each(load, precisions, checkpoint):
        proofs = chain(
            greedy_proofs(backend, ids, length),
            sampling_proofs(backend, ids, length),
            context_proofs(backend, ids, length),
        )
        num_proofs = _num_proofs(backend)
        with progress(f"proving in {name}") as bar:
            backend.verify_weights()
            for number, proof in enumerate(proofs, start=1):
                bar.doing(f"proving in {name}", min(1.0, number / num_proofs))
                yield name, proof


def _num_proofs(backend: Backend) -> int:
    """How many there will be, about: each draft greedily, those of one length with a seed as well, and a few others."""
    from hopskip.prove.greedy import settings_to_try

    settings = settings_to_try(backend)
    return len(settings) + sum(s.num_draft_tokens == 3 and s.verify != "reuse" for s in settings) + 5


def _against_transformers(
    load: LoadConfig,
    precisions: list[str],
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    max_new_tokens: int,
) -> Iterator[tuple[str, Proof]]:
    torch = require("torch", "the comparison with transformers", "eval")
    require("transformers", "the comparison with transformers", "eval")
    from hopskip.checkpoint.in_transformers import (
        encode_in_transformers,
        load_in_transformers,
        load_tokenizer_in_transformers,
    )
    from hopskip.prove.greedy import PLAIN
    from hopskip.prove.hf_reference import tokenizer_proof, transformers_proof
    from hopskip.prove.recorder import run
    from hopskip.sampling_params import SamplingParams

    if precisions != ["float32"]:
        raise ConfigError(
            f"precision is {','.join(precisions)!r}; transformers rounds other precisions than float32 in its own way, "
            "so only float32 can be compared"
        )
    ids = [prompt.encode(tokenizer) for prompt in prompts]
    theirs = load_tokenizer_in_transformers(checkpoint.path)
    yield "", tokenizer_proof(ids, [encode_in_transformers(theirs, prompt.content) for prompt in prompts])
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    for name, backend in load_each(load, precisions, checkpoint):
        with progress(f"comparing {len(ids)} texts with transformers'"):
            runs = run(backend, ids, PLAIN, params, max_num_seqs=16)
            reference = load_in_transformers(checkpoint.path, torch.float32)
            proof = transformers_proof(reference, ids, [r.token_ids for r in runs], "plain decoding")
        yield name, proof


class _Table:
    """Proofs as they come: a heading per precision and topic, a line per proof."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console: Console = Console(highlight=False)
        self._heading = ""
        self._claim = ""

    def add(self, precision: str, proof: Proof) -> None:
        heading = " ".join(filter(None, (precision, proof.topic)))
        if (heading, proof.claim) != (self._heading, self._claim):
            self._print(f"{heading}: {proof.claim}", style="bold", before="\n")
            self._heading, self._claim = heading, proof.claim
        self._print(f"{proof.status:<12}{proof.setting:<40}{proof.detail}", style=_STYLES[proof.status], before="  ")
        for tie in proof.ties:
            self._print(
                f"tie at prompt {tie.prompt}, token {tie.position}: {tie.got} or {tie.expected}, {tie.gap:.1e} apart",
                style="dim",
                before=" " * 14,
            )

    def conclude(self, passed: bool, proofs: list[Proof]) -> None:
        counts: dict[str, int] = {}
        for proof in proofs:
            counts[proof.status] = counts.get(proof.status, 0) + 1
        outcome = ", ".join(f"{number} {status}" for status, number in counts.items())
        self._print(outcome, style=_STYLES["passed" if passed else "failed"], before="\n")

    def _print(self, text: str, *, style: str, before: str) -> None:
        from rich.text import Text

        self._console.print(Text(before) + Text(text, style=style), soft_wrap=True)
