"""Training: the LayerSkip recipe (arXiv 2404.16710) on transformers' Trainer.

`curriculum` (when and how much), `dropout` (layers that samples skip), `loss` (exits, chunk by chunk), `trainer`
(`LayerSkipTrainer`), `data`, `base` (the model to start from), `recipe` and `run` (a YAML file from start to end).
"""
