"""`hopskip train`: make models whose early layers can draft."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hopskip.cli.commands import App
from hopskip.cli.console import print_error
from hopskip.cli.progress import progress
from hopskip.errors import ConfigError
from hopskip.machine import require

app = App(help="Make models that are their own good draft models.\n\n$ hopskip train exit --model ./my-model")

_RECIPE = "a .yaml file, or the name of a recipe that comes with hopskip"
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Replace values of the recipe.", show_default=False),
]


@app.command(takes_time=False)  # its log is what it gives
def layerskip(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help=f"What to train, on what, and how: {_RECIPE}.")],
    overrides: Overrides = None,
    *,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print parameters, tokens, memory and time, and whether it fits."),
    ] = False,
    card: Annotated[
        str | None,
        typer.Option(
            "--card",
            metavar="[NUMBERx]GIB",
            help="With --dry-run: plan for such GPUs, not for this machine.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train by the LayerSkip recipe: layer dropout and early-exit loss (arXiv 2404.16710).

    Run the same command again to go on after an interruption. On several GPUs:
    `torchrun --nproc-per-node 8 -m hopskip train layerskip RECIPE`.

    $ hopskip train layerskip recipe.yaml
    $ hopskip train layerskip smollm2-135m-lora data.train=chats.jsonl
    $ hopskip train layerskip llama3-8b-continual --dry-run --card 8x80
    """
    require("torch", "training", "train")
    from hopskip.train.recipe import load_recipe

    if card is not None and not dry_run:
        raise ConfigError(f"--card {card} has no effect without --dry-run; leave it out")
    settings = load_recipe(recipe, overrides or ())
    if dry_run:
        from hopskip.train.plan import Cards, plan

        planned = plan(settings, None if card is None else Cards.parse(card))
        print("\n".join(planned.lines()))
        planned.check()
        return

    from hopskip.train.run import run

    print(run(settings))


@app.command("exit")
def train_exit(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            metavar="[RECIPE]",
            help=f"On what, and how: {_RECIPE}. Left out, it follows from the model and the machine.",
            show_default=False,
        ),
    ] = None,
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
    hours: Annotated[
        float | None,
        typer.Option(
            metavar="N", help="Hours of work that a recipe by rule may take (default: 1).", show_default=False
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Begin without asking.")] = False,
) -> None:
    """Train an exit for a model whose weights stay as they are: it drafts, and the text does not change.

    The model writes its own training text, or answers chats of yours. First it says what that takes, in the end what
    it gains. Run the same command again to go on after an interruption.

    $ hopskip train exit --model ./my-model
    $ hopskip train exit --model ./my-model prompts.files=chats/
    $ hopskip train exit recipe.yaml output=runs/exit
    """
    require("torch", "training", "train")
    from hopskip.train.exit.plan import plan_by_rule, plan_of
    from hopskip.train.exit.recipe import ExitRecipe
    from hopskip.train.recipe import read_recipe

    settings = list(overrides or ())
    if recipe is not None and "=" in str(recipe) and not recipe.exists():  # it is the first of the values
        settings.insert(0, str(recipe))
        recipe = None
    if recipe is None:
        plan = plan_by_rule(model, settings, hours)
    else:
        if hours is not None:
            raise ConfigError(f"--hours has no effect on a recipe that is given ({recipe}); leave one of them out")
        base = [] if model is None else [f"base={json.dumps(model)}"]
        plan = plan_of(read_recipe(ExitRecipe, recipe, [*base, *settings]))

    from hopskip.train.exit.processes import agreed, is_first
    from hopskip.train.exit.run import run

    if is_first():
        print("\n".join(plan.lines()), flush=True)
    plan.check()
    if recipe is None and not plan.is_begun and not yes and is_first():
        _ask()
    with progress("training an exit") as shown:
        folder = run(agreed(plan.recipe), progress=shown.doing)
    if is_first():
        print(folder)


def _ask() -> None:
    """Whether to begin.

    Raises:
        ConfigError: nobody is there to be asked.
    """
    if not _is_interactive():
        raise ConfigError("nobody is there to say yes to this plan; give --yes to begin")
    if not typer.confirm("Begin?", err=True):
        print_error("nothing was begun")
        raise typer.Exit(1)


def _is_interactive() -> bool:
    return sys.stdin.isatty()
