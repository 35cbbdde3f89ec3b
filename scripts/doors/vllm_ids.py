"""Greedy ids of vLLM on CPUs, float32. Runs where it is installed: `vllm_ids.py JSON`, {model, speculative, ids,
count}; prints the version, the ids that follow each of the prompts `ids`, drafts, and accepted tokens per position. One
configuration a process."""

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"}

import vllm

job = json.loads(sys.argv[1])
llm = vllm.LLM(
    model=job["model"],
    dtype="float32",
    max_model_len=512,
    max_num_seqs=4,
    enforce_eager=True,
    disable_log_stats=False,
    enable_prefix_caching=False,
    **({"speculative_config": job["speculative"]} if job["speculative"] else {}),
)
settings = vllm.SamplingParams(temperature=0, max_tokens=job["count"], ignore_eos=True)
ids = [
    list(llm.generate({"prompt_token_ids": prompt}, settings, use_tqdm=False)[0].outputs[0].token_ids)
    for prompt in job["ids"]
]
metrics = {m.name: getattr(m, "value", getattr(m, "values", None)) for m in llm.get_metrics() if "spec" in m.name}
print(json.dumps({"version": vllm.__version__, "ids": ids, "metrics": metrics}))
