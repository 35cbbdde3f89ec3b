"""Greedy ids of transformers. Runs where it is installed and hopskip is not: `transformers_ids.py JSON`, a list of
{model, assistant, ids, count}; prints the version, and of each the ids that follow, plain and with the assistant."""

import importlib.util
import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert importlib.util.find_spec("hopskip") is None
found = []
for job in json.loads(sys.argv[1]):
    load = {name: AutoModelForCausalLM.from_pretrained(job[name]).float() for name in ("model", "assistant")}
    ids = torch.tensor([job["ids"]])
    settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": job["count"]}
    settings["pad_token_id"] = 0
    plain = load["model"].generate(ids, **settings)
    drafted = load["model"].generate(ids, assistant_model=load["assistant"], **settings)
    text_ids = AutoTokenizer.from_pretrained(job["assistant"])(job["text"])["input_ids"]
    start = ids.shape[1]
    found.append({"text_ids": text_ids, "ids": plain[0, start:].tolist(), "drafted": drafted[0, start:].tolist()})
print(json.dumps({"version": transformers.__version__, "found": found}))
