"""Which models run here, and what to take in place of those that do not."""

from __future__ import annotations

import re

FAMILIES = {
    "llama": "Llama 1 to 3.3, CodeLlama, SmolLM 1 and 2, the LayerSkip checkpoints",
    "mistral": "Mistral, of which 0.1 has a sliding window",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3, the dense ones",
}
"""Models that run here, by `model_type`."""
SUPPORTED_MODEL_TYPES = tuple(FAMILIES)

_EXAMPLES = {
    "llama": "meta-llama/Llama-3.2-1B-Instruct",
    "mistral": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen3": "Qwen/Qwen3-4B",
}
_NEAREST = (
    ("smollm", "llama", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    (r"mixtral|ministral|pixtral|mistral|devstral|voxtral", "mistral", None),
    (r"qwen3", "qwen3", None),
    (r"qwen", "qwen2", None),
    (r"starcoder|codegen|deci", "qwen2", "Qwen/Qwen2.5-Coder-7B-Instruct"),
    (r"llama|mllama|llava|idefics|yi|tinyllama|olmo|phi|granite|falcon|stablelm|internlm|baichuan|nemotron|cohere|command|mpt|opt|bloom|gpt.?neo"
     r"|gpt.?j|gpt2|pythia|persimmon|exaone|xverse|orion", "llama", None),
    (r"(pali)?gemma|gpt.?oss|internvl|deepseek|glm|chatglm|hunyuan|minicpm|lfm|ernie|dots|kimi|minimax|bailing|ling|seed|apertus",
     "qwen3", None),
)  # fmt: skip
"""How names of families begin, the family here that is nearest in kind and use, and a model of it."""

_OTHER_PURPOSES = (
    (r".*(bert|roberta|electra)|deberta.*|nomic.*|jina.*|mpnet|xlnet|longformer|e5|bge",
     "an encoder (for embeddings or classes)"),
    (r"(m|um|long)?t5.*|m?bart|pegasus.*|m2m.*|marian|nllb.*|prophetnet|fsmt|led", "an encoder-decoder"),
    (r"vit.*|clip.*|siglip.*|dino.*|swin.*|resnet|convnext.*|sam\d?|detr|yolos|segformer|beit|deit|depth.*|blip.*",
     "a vision model"),
    (r"whisper|wav2vec.*|hubert|speecht5|seamless.*|wavlm|musicgen|bark|vits|encodec|moonshine|csm|parler.*",
     "a model of sound"),
    (r"unet.*|flux.*|stable.?diffusion.*|sd\d.*|wan|ltxv|hidream|lumina\d", "a model of images"),
)  # fmt: skip


def nearest(model_type: object) -> str:
    """What to try in place of a family that is not supported, as the end of a sentence.

    >>> nearest("qwen3_moe")
    '; nearest to it is qwen3, such as Qwen/Qwen3-4B'
    """
    text = str(model_type).lower()
    if purpose(model_type) is not None:
        return f"; use a language model, such as {_EXAMPLES['qwen3']}"
    for pattern, family, example in _NEAREST:
        if re.match(pattern, text):
            return f"; nearest to it is {family}, such as {example or _EXAMPLES[family]}"
    return f"; for a model of about its size see the dense ones of a family that runs, such as {_EXAMPLES['qwen3']}"


def purpose(model_type: object) -> str | None:
    """What a model is for that continues no text, as the object of a sentence; None for language models."""
    text = str(model_type).lower()
    return next((what for pattern, what in _OTHER_PURPOSES if re.fullmatch(pattern, text)), None)


def unsupported(what: str, model_type: object, known: tuple[str, ...]) -> str:
    """The message for a family that does not run: what it is, what runs, and the next step.

    Args:
        what: the name and the value, `model_type 'bert'`.
        known: the names that run, in the terms of the file.
    """
    found = purpose(model_type)
    reason = (
        f"is {found}, which hopskip does not run" if found else f"is not supported; hopskip runs: {', '.join(known)}"
    )
    return f"{what} {reason}{nearest(model_type)}"
