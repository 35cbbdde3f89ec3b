"""Making models that speculate well: the LayerSkip recipe (arXiv 2404.16710), and exits for frozen models.

The recipe: `curriculum` (when and how much), `dropout` (layers that samples skip), `loss` (exits, chunk by chunk),
`trainer` (`LayerSkipTrainer` on transformers' Trainer), `read`, `encode` and `data` (rows of token ids), `base` (the
model to start from), `recipe` and `run` (a YAML file from start to end), `checkpoint`, `report`, `plot`. `exit`:
exits that draft beside a model whose weights stay as they are.
"""
