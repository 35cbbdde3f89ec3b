"""guidellm: a short benchmark of three routes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import KEY, MODEL, ROOT, check, report

FOLDER = Path(tempfile.mkdtemp(prefix="guidellm-"))
(FOLDER / "prompts.jsonl").write_text("".join(f"{json.dumps({'prompt': f'Name {n} colours.'})}\n" for n in range(1, 9)))


def run(route: str) -> dict[str, Any]:
    output = FOLDER / f"{route.strip('/').replace('/', '-')}.json"
    backend = {
        "kind": "openai_http",
        "target": ROOT,
        "model": MODEL,
        "request_format": route,
        "api_key": KEY,
        "max_tokens": 8,
    }
    told = [
        ("--backend", ",".join(f"{name}={value}" for name, value in backend.items())),
        ("--profile", "kind=synchronous"),
        ("--constraint", "kind=max_requests,count=3"),
        ("--data", f"kind=json_file,path={FOLDER / 'prompts.jsonl'}"),
        ("--output", f"kind=json,path={output}"),
    ]
    command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"]
    command += [part for pair in told for part in pair]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    if done.returncode or not output.exists():
        raise RuntimeError(done.stdout[-400:])
    return dict(json.loads(output.read_text()))


def add_check(row: str, route: str) -> None:
    @check("stream", row)
    def stream() -> None:
        (found,) = run(route)["benchmarks"]
        totals = found["metrics"]["request_totals"]
        assert (totals["successful"], totals["errored"]) == (3, 0), totals


os.environ["GUIDELLM__LOGGING__DISABLED"] = "true"
add_check("chat", "/v1/chat/completions")
add_check("completions", "/v1/completions")
add_check("responses", "/v1/responses")
report("guidellm")
