"""The card of an exported folder, README.md: what it is, how each engine takes it, and how to verify it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from hopskip.checkpoint.config import ModelConfig
from hopskip.checkpoint.trained_exit import TrainedExit
from hopskip.export.self_check import TOLERANCE
from hopskip.export.source import Source
from hopskip.version import describe

_SAME_TEXT = (
    "With greedy decoding the text is the same with and without the drafter, up to the engine's own rounding: in "
    "float32 compare token ids; in 16 bits engines differ from themselves when batch sizes change, so compare a few "
    "texts and the acceptance."
)


def early_exit(source: Source, config: ModelConfig, num_draft_tokens: int, name: str) -> str:
    """Of the first layers as a checkpoint folder."""
    base = source.base
    vllm = {"method": "draft_model", "model": f"./{name}", "num_speculative_tokens": num_draft_tokens}
    transformers = f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base!r}, dtype="auto")
draft = AutoModelForCausalLM.from_pretrained({f"./{name}"!r}, dtype="auto")
inputs = AutoTokenizer.from_pretrained({base!r})("The capital of France is", return_tensors="pt")
model.generate(**inputs, assistant_model=draft, do_sample=False, max_new_tokens=64)"""
    sglang = (
        f"python -m sglang.launch_server --model-path {base} --speculative-algorithm STANDALONE "
        f"--speculative-draft-model-path ./{name} --speculative-num-steps {num_draft_tokens} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {num_draft_tokens + 1}"
    )
    return _page(
        source,
        f"{source.name}: its first {config.num_hidden_layers} layers, as a draft model",
        [
            f"The first {config.num_hidden_layers} of {source.checkpoint.config.num_hidden_layers} layers with the "
            "model's own embedding, final norm and head: an ordinary checkpoint. It drafts for the whole model; by "
            "itself it writes poor text.",
            *_exit_facts(source, config),
        ],
        [
            ("vLLM", "console", f"$ vllm serve {base} --speculative-config {_quoted(vllm)}"),
            ("SGLang", "console", f"$ {sglang}"),
            ("transformers", "python", transformers),
        ],
        [
            _SAME_TEXT,
            "vLLM counts acceptance per position in its metrics (`vllm:spec_decode_num_accepted_tokens_per_pos`). It "
            "refuses paths with `eagle3`, `eagle-`, `dflash` or `dspark` in them as plain draft models, so give the "
            "folder no such name.",
            "transformers takes the draft length from this folder's `generation_config.json`, not from the call. Pass "
            "it the attention mask.",
        ],
    )


def early_exit_gguf(source: Source, config: ModelConfig, num_draft_tokens: int, name: str) -> str:
    """Of the first layers as a GGUF file."""
    return _page(
        source,
        f"{source.name}: its first {config.num_hidden_layers} layers, as a draft model",
        [
            f"`{name}` has the first {config.num_hidden_layers} of {source.checkpoint.config.num_hidden_layers} layers "
            "with the model's own embedding, final norm, head and tokenizer. It drafts for the whole model; by itself "
            "it writes poor text.",
            *_exit_facts(source, config),
            *_limits(config),
        ],
        [
            (
                "llama.cpp",
                "console",
                f"$ llama-server -m MODEL.gguf -md {name} --spec-type draft-simple "
                f"--spec-draft-n-max {num_draft_tokens}",
            )
        ],
        [_SAME_TEXT, "llama-server prints the acceptance of each answer (`draft acceptance`)."],
    )


def eagle3(source: Source, exit: TrainedExit, difference: float, name: str) -> str:
    """Of a trained exit as an EAGLE-3 drafter of several layers."""
    vllm = {"method": "eagle3", "model": f"./{name}", "num_speculative_tokens": exit.num_draft_tokens}
    layers = exit.config.num_layers + 1
    acceptance = exit.notes.get("held_out_acceptance")
    shares = ", ".join(f"{share:.1%}" for share in acceptance) if isinstance(acceptance, Sequence) else "not measured"
    return _page(
        source,
        f"{source.name}: an EAGLE-3 drafter for vLLM",
        [
            f"A trained exit of hopskip as an EAGLE-3 drafter of {layers} layers. The first one stands for what "
            "EAGLE-3's own form has no place for, so it computes what the exit computes: on random features its"
            f" logits differ by {difference:.2g} of the largest one (at most {TOLERANCE:.0e} is let through).",
            "It is for vLLM only: SGLang's EAGLE-3 has no biases in attention, llama.cpp's one layer.",
            f"Acceptance per position, held out: {shares}.",
            f"It reads the outputs of the model's first {_listed(exit.config.features)} layers, and drafts "
            f"{len(exit.vocabulary):,} of {source.checkpoint.config.vocab_size:,} tokens. Trained for the weights with "
            f"fingerprint `{exit.fingerprint[:16]}` ({exit.notes.get('base_model', source.base)}); beside other "
            "precisions of the same model it works, with a somewhat different acceptance.",
        ],
        [
            ("vLLM", "console", f"$ vllm serve {source.base} --speculative-config {_quoted(vllm)}"),
            ("vLLM, model and drafter by the drafter's folder", "console", f"$ vllm serve ./{name}"),
        ],
        [
            _SAME_TEXT,
            "vLLM loads a drafter that lacks a tensor without a word, and drafts badly then: compare the acceptance in "
            "its metrics (`vllm:spec_decode_num_accepted_tokens_per_pos`) with the one above.",
        ],
    )


def merged(source: Source, name: str, exit_layer: int | None) -> str:
    """Of a whole model as a checkpoint folder, by which transformers drafts where there is an exit layer."""
    path, base = source.checkpoint.path, source.model_folder
    fact = f"The model `{source.name}`, which was stored as {source.stored_as}: an ordinary checkpoint."
    if base is not None and base != path:
        fact = (
            f"The LoRA adapter `{path.name}` merged into its base `{base.name}`: an ordinary checkpoint. Each weight "
            "was merged in float32 and rounded once."
        )
    code = (
        "from transformers import AutoModelForCausalLM\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("./{name}", trust_remote_code=True)\n'
        "ids = model.generate(**inputs, max_new_tokens=64)"
    )
    drafting = [] if exit_layer is None else [(f"transformers, drafting with {exit_layer} layers", "python", code)]
    return _page(
        source,
        f"{source.name}, as a checkpoint",
        [fact],
        [
            ("hopskip", "console", f'$ hopskip generate -m ./{name} "Hello"'),
            ("vLLM", "console", f"$ vllm serve ./{name}"),
            *drafting,
        ],
        ["hopskip runs the source as well: in the same precision its greedy texts are the same."],
    )


def gguf(source: Source, name: str) -> str:
    """Of a model as a GGUF file."""
    return _page(
        source,
        f"{source.name}, as GGUF",
        [f"`{name}` holds the whole model and its tokenizer.", *_limits(source.checkpoint.config)],
        [
            ("hopskip", "console", f'$ hopskip generate -m {name} "Hello"'),
            ("llama.cpp", "console", f"$ llama-server -m {name}"),
        ],
        [
            "In float32 hopskip's ids of the file are those of the source. llama.cpp rounds otherwise: where its text "
            "parts from hopskip's, the two tokens have nearly the same log-probability.",
        ],
    )


def _exit_facts(source: Source, config: ModelConfig) -> list[str]:
    measure = f"hopskip bench -m {source.base} --setting draft=early-exit,exit_layer={config.num_hidden_layers}"
    return [f"Acceptance per position: not measured here; `{measure}` measures it."]


def _limits(config: ModelConfig) -> list[str]:
    if config.sliding_window is None:
        return []
    return [
        f"The model attends over {config.sliding_window} tokens only. llama.cpp attends over all of them, so its texts "
        "are the model's up to that length."
    ]


def _page(
    source: Source,
    title: str,
    facts: Iterable[str],
    commands: Iterable[tuple[str, str, str]],
    verify: Iterable[str],
) -> str:
    hub = source.hub_id
    front = ["---", *([f"base_model: {hub}"] if hub else []), "tags:", "- speculative-decoding", "- hopskip", "---"]
    revision = f", revision `{source.revision}`" if source.revision else ""
    about = [
        f"- Base: `{source.base}`{revision}",
        f"- The base's weights were stored as {source.stored_as}; its fingerprint is "
        f"`{source.checkpoint.fingerprint[:16]}`",
        f"- Written by hopskip {describe()}",
    ]
    parts = [
        "\n".join(front),
        f"# {title}",
        *facts,
        "\n".join(about),
        "## How to run it",
        *(f"{engine}:\n\n```{language}\n{code}\n```" for engine, language, code in commands),
        "## How to verify it",
        *verify,
    ]
    return "\n\n".join(parts) + "\n"


def _quoted(value: object) -> str:
    return f"'{json.dumps(value)}'"


def _listed(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last
