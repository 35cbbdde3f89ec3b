"""Greedy ids of llama.cpp. Runs where llama-cpp-python is: `llama_cpp_ids.py JSON`, a list of {model, text, ids,
count}; prints the version, and of each the ids of its text and those that follow its ids, with the gap between the two
best logits before each."""

import json
import sys

import llama_cpp
import numpy as np

found = []
for job in json.loads(sys.argv[1]):
    model = llama_cpp.Llama(job["model"], n_ctx=512, n_threads=2, verbose=False, logits_all=True)
    text_ids = model.tokenize(job["text"].encode(), add_bos=True, special=True)
    model.eval(job["ids"])
    ids, gaps = [], []
    for _ in range(job["count"]):
        scores = model.scores[model.n_tokens - 1]
        second, best = np.partition(scores, -2)[-2:]
        gaps.append(float(best - second))
        ids.append(int(scores.argmax()))
        model.eval(ids[-1:])
    found.append({"text_ids": text_ids, "ids": ids, "gaps": gaps})
print(json.dumps({"version": llama_cpp.__version__, "found": found}))
