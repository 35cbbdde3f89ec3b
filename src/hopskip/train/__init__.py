"""Making models that speculate well: the LayerSkip recipe (arXiv 2404.16710), and exits for frozen models.

The recipe: `curriculum` (when and how much), `dropout` (layers that samples skip), `loss` and `unembed` (exits, chunk
by chunk), `trainer` and `saving` (the mixin over transformers' Trainer), `read`, `chats`, `encode` and `data` (rows of
token ids), `base` (the model to start from), `recipe` and `run` (a YAML file from start to end), `effects` and
`supported` (what is refused), `plan`, `footprint` and `memory` (what a run takes), `checkpoint`, `report`, `speed`,
`plot`. `exit`: exits that draft beside a model whose weights stay as they are.
"""
