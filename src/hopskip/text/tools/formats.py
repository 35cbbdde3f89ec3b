"""All formats of tool calls, and which one a chat template teaches."""

from __future__ import annotations

from typing import Literal, get_args

from hopskip.text.tools.base import ToolFormat
from hopskip.text.tools.hermes import Hermes
from hopskip.text.tools.llama3 import JSON, Llama3
from hopskip.text.tools.mistral import Mistral, MistralArgs
from hopskip.text.tools.qwen3_coder import Qwen3Coder

ToolFormatName = Literal["auto", "hermes", "llama3", "json", "mistral", "mistral-args", "qwen3-coder"]

FORMATS: dict[str, ToolFormat] = {
    tool_format.name: tool_format
    for tool_format in (Hermes(), Llama3(), JSON(), Mistral(), MistralArgs(), Qwen3Coder())
}
assert set(get_args(ToolFormatName)) == {"auto", *FORMATS}


def format_of_template(source: str, knows_tools: bool) -> ToolFormat:
    """The format of the calls that a template writes; of a template without tools that of the generic prompt."""
    if not knows_tools:
        return FORMATS["hermes"]
    if "<function=" in source and "<parameter=" in source:
        return FORMATS["qwen3-coder"]
    if "<tool_call>" in source:
        return FORMATS["hermes"]
    if "[TOOL_CALLS]" in source:
        return FORMATS["mistral-args" if "[ARGS]" in source else "mistral"]
    return FORMATS["llama3" if '"parameters"' in source or "<|python_tag|>" in source else "json"]
