"""lm-eval: generation and multiple choice by `local-completions`, generation by `local-chat-completions`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from common import KEY, MODEL, URL, check, report
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

os.environ |= {"OPENAI_API_KEY": KEY, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
FOLDER = Path(tempfile.mkdtemp(prefix="lm-eval-"))
QUESTIONS = [
    {"question": "The capital of France is", "choices": ["Paris", "Rome", "a banana"], "answer": 0},
    {"question": "One, two, three,", "choices": ["green", "four", "Monday"], "answer": 1},
    {"question": "The sun rises in the", "choices": ["cellar", "fridge", "east"], "answer": 2},
]
(FOLDER / "test.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in QUESTIONS))
COMMON = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {FOLDER / "test.jsonl"}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
(FOLDER / "choice.yaml").write_text(f"""
task: local_choice
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
{COMMON}""")
(FOLDER / "text.yaml").write_text(f"""
task: local_text
output_type: generate_until
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 12}}
metric_list: [{{metric: exact_match}}]
{COMMON}""")


def evaluate(task: str, model: str = "local-completions", **options: Any) -> dict[str, Any]:
    route = "chat/completions" if model == "local-chat-completions" else "completions"
    arguments = {"model": MODEL, "base_url": f"{URL}/{route}", "num_concurrent": 2, "max_retries": 1, **options}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    chat = {"apply_chat_template": True} if model == "local-chat-completions" else {}
    found = simple_evaluate(model, model_args=arguments, tasks=[task], task_manager=manager, bootstrap_iters=0, **chat)
    return dict(found["samples"][task][0]), dict(found["results"][task])  # type: ignore[return-value]


@check("text", "generation")
def generation() -> None:
    samples, _ = evaluate("local_text", tokenizer_backend="none", tokenized_requests=False)
    assert samples["resps"][0][0]


@check("text", "generation by chats")
def generation_by_chats() -> None:
    samples, _ = evaluate("local_text", "local-chat-completions")
    assert samples["resps"][0][0]


@check("text", "multiple choice")
def multiple_choice() -> None:
    samples, results = evaluate("local_choice", tokenizer_backend="remote", tokenized_requests=True, auth_token=KEY)
    scores = [float(each[0][0]) for each in samples["resps"]]
    assert all(score < 0 for score in scores), scores
    assert max(scores) == scores[0], scores
    assert results["acc,none"] == 1, results


report("lm-eval")
