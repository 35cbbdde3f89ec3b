"""Other names of options, which fingers know from llama.cpp, vLLM and transformers: accepted, and not shown."""

from __future__ import annotations

from collections.abc import Iterable

_ALIASES: dict[str, tuple[str, ...]] = {
    "--model": ("-hf", "-hfr", "--hf-repo", "--model-path"),
    "--dtype": ("--precision", "--torch-dtype"),
    "--precision": ("--dtype", "--quantize", "--quantization", "-q", "--torch-dtype"),
    "--quantize": ("--quantization", "-q"),
    "--kv-dtype": ("--kv-cache-dtype",),
    "--threads": ("-t",),
    "--max-model-len": ("--ctx-size", "-c", "--context-length"),
    "--context": ("--ctx-size", "-c", "--context-length", "--max-model-len"),
    "--max-num-seqs": ("--parallel", "-np"),
    "--served-model-name": ("--alias", "-a", "--model"),
    "--max-new-tokens": ("-n", "--max-tokens", "--predict", "--n-predict"),
    "--temperature": ("--temp",),
    "--repetition-penalty": ("--repeat-penalty",),
    "--seed": ("-s",),
    "--system": ("--system-prompt", "-sys"),
    "--chat-template": ("--chat-template-file",),
    "--num-tokens": ("--max-tokens",),
    "--num-draft-tokens": ("--num-speculative-tokens", "--draft-max", "--draft-n"),
    "--min-confidence": ("--draft-p-min",),
}


def aliases(names: Iterable[str], taken: Iterable[str]) -> list[str]:
    """Further names of the option that is shown by `names`, but for those that the command has `taken` for others.

    >>> aliases(["--max-new-tokens"], taken=["--max-tokens"])
    ['-n', '--predict', '--n-predict']
    """
    own = {*names, *taken}
    return [alias for name in names for alias in _ALIASES.get(name, ()) if alias not in own]
