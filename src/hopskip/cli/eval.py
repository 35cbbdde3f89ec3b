"""`hopskip eval`: lm-eval's tasks, after all layers and at early exits."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from hopskip.cli.console import print_json
from hopskip.cli.options import JsonOption, LoadGroup, with_options
from hopskip.cli.progress import loading
from hopskip.errors import ConfigError
from hopskip.machine import require


@with_options
def evaluate(
    *,
    tasks: Annotated[str, typer.Option("--tasks", metavar="LIST", help="Tasks of lm-eval, with commas between.")],
    exit_layers: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Early exits to read, such as 4,8,all (default: all, every layer)."),
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(metavar="N", help="Solved examples before each question.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first N questions of each task.")] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A folder with further tasks (YAML files).")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the scores over the layers.")] = None,
    as_json: JsonOption = False,
    load: LoadGroup,
) -> None:
    """Run tasks of lm-eval, at the last layer and at early exits, with one loaded model.

    Needs lm-eval: pip install 'hopskip[lm-eval]'.

    $ hopskip eval --tasks hellaswag --limit 100
    $ hopskip eval -m meta-llama/Llama-3.2-1B --tasks arc_easy,wikitext --exit-layers 4,8,12,all --json
    """
    require("lm_eval", "hopskip eval", "lm-eval")
    if plot is not None:
        require("matplotlib", "--plot", "eval")
    from lm_eval.tasks import TaskManager

    from hopskip.checkpoint.checkpoint import open_checkpoint
    from hopskip.checkpoint.hub import find_model
    from hopskip.doors.harness import evaluate as run
    from hopskip.llm import LLM

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ConfigError(f"tasks has {unknown[0]!r}, which lm-eval does not know; see `lm-eval ls tasks`")
    stops = numbers_of_layers(exit_layers, open_checkpoint(find_model(load.model)).config.num_hidden_layers)
    options = {name: value for name, value in vars(load).items() if name != "model"}
    with loading(load.model) as bar:
        llm = LLM(load.model, progress=bar.doing, **options)
    with llm, redirect_stdout(sys.stderr):  # where lm-eval's remarks do not spoil the result
        rows = run(llm, stops, names, num_fewshot=num_fewshot, limit=limit, task_manager=manager)
    if plot is not None:
        draw(rows, max(stops), plot)
    if as_json:
        print_json({"model": str(load.model), "rows": rows})
    else:
        print_table(rows)


def numbers_of_layers(text: str | None, depth: int) -> list[int]:
    """What `--exit-layers` names, rising; the number of all layers is always the last.

    Raises:
        ConfigError: it names no layers, or some that the model has not.
    """
    found = set()
    for part in (text or "all").split(","):
        word = part.strip()
        if word != "all" and not (word.isascii() and word.isdigit() and 0 < int(word) <= depth):
            raise ConfigError(f"exit_layers has {word!r}; this model has {depth} layers: give 1 to {depth}, or all")
        found.add(depth if word == "all" else int(word))
    return sorted({*found, depth})


def print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("task", "metric", "exit"):
        table.add_column(heading, justify="right" if heading == "exit" else "left")
    table.add_column("value", justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: (row["task"], row["metric"], row["exit_layer"] or 10**9)):
        error = "" if row["error"] is None else f" ± {row['error']:.4f}"
        exit_layer = "all" if row["exit_layer"] is None else str(row["exit_layer"])
        table.add_row(row["task"], row["metric"], exit_layer, f"{row['value']:.4f}{error}")
    Console(highlight=False).print(table)


def draw(rows: list[dict[str, Any]], depth: int, path: Path) -> None:
    """A curve for each task and metric.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="layers", ylabel="score")
    for task, metric in sorted({(row["task"], row["metric"]) for row in rows}):
        own = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
        places = [depth if row["exit_layer"] is None else row["exit_layer"] for row in own]
        axes.plot(places, [row["value"] for row in own], marker="o", label=f"{task} {metric}")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"plot is {str(path)!r}, which cannot be written ({error}); give a .png or .svg") from None
