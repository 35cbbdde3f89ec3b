"""`hopskip train`: make models whose early layers can draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hopskip.cli.commands import App
from hopskip.cli.progress import progress
from hopskip.machine import require

app = App(help="Make models that are their own good draft models.\n\n$ hopskip train exit recipe.yaml")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Replace values of the recipe.", show_default=False),
]


@app.command(takes_time=False)  # its log is what it gives
def layerskip(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="What to train, on what, and how.")],
    overrides: Overrides = None,
) -> None:
    """Train by the LayerSkip recipe: layer dropout and early-exit loss (arXiv 2404.16710).

    Run the same command again to go on after an interruption. On several GPUs:
    `torchrun --nproc-per-node 8 -m hopskip train layerskip RECIPE.yaml`.

    $ hopskip train layerskip recipe.yaml
    $ hopskip train layerskip recipe.yaml training.learning_rate=1e-4
    """
    require("torch", "training", "train")
    from hopskip.train.recipe import load_recipe

    settings = load_recipe(recipe, overrides or ())

    from hopskip.train.run import run

    print(run(settings))


@app.command("exit")
def train_exit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="For which model, on what, and how.")],
    overrides: Overrides = None,
    *,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="The model to train for, instead of the recipe's `base`: a folder, a GGUF file, or a Hub id.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train an exit for a model whose weights stay as they are: it drafts, and the text does not change.

    The model writes its own training text. Run the same command again to go on after an interruption.

    $ hopskip train exit recipe.yaml
    $ hopskip train exit recipe.yaml output=runs/exit
    """
    require("torch", "training", "train")
    from hopskip.train.exit.recipe import ExitRecipe
    from hopskip.train.recipe import read_recipe

    base = [] if model is None else [f"base={json.dumps(model)}"]
    settings = read_recipe(ExitRecipe, recipe, [*base, *(overrides or ())])

    from hopskip.train.exit.run import run

    with progress("training an exit") as shown:
        folder = run(settings, progress=shown.doing)
    print(folder)
