"""How the data of server-sent events is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_OTHER_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def line_of(data: Mapping[str, Any]) -> str:
    """JSON of one line, for all who read lines: some clients take other characters than the protocol's for their
    ends."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).translate(_OTHER_LINE_ENDS)
