"""`hopskip export`: models and exits in the formats of other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hopskip.cli.commands import App
from hopskip.cli.progress import progress

app = App(help="Write models and exits for other engines.\n\n$ hopskip export early-exit draft --exit-layer 8")

Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        envvar="HOPSKIP_MODEL",
        help="A Hugging Face folder, a GGUF file, or a Hub id (default: SmolLM2-135M-Instruct).",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What the card and the configs call the model (default: its Hub id or path).",
        show_default=False,
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace OUT if it is there already.")]
DType = Annotated[
    str,
    typer.Option(metavar="auto|float32|bfloat16|float16", help="Precision of the weights; auto is the model's own."),
]
DTypeOrQ8 = Annotated[
    str,
    typer.Option(
        metavar="auto|float32|bfloat16|\nfloat16|q8",
        help="Precision of the weights; auto is the model's own. q8, llama.cpp's Q8_0, is for GGUF.",
    ),
]


@app.command("early-exit")
def early_exit(
    out: Out,
    model: Model = None,
    exit_layer: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many layers (default: as the model recommends).", show_default=False),
    ] = None,
    format: Annotated[
        str, typer.Option(metavar="folder|gguf", help="A checkpoint folder, or a GGUF file in a folder.")
    ] = "folder",
    dtype: DTypeOrQ8 = "auto",
    base: Base = None,
    force: Force = False,
) -> None:
    """Write a model's first layers as a draft model: for vLLM, SGLang and transformers, or for llama.cpp.

    $ hopskip export early-exit draft --exit-layer 8
    $ hopskip export early-exit draft -m facebook/layerskip-llama3.2-1B --format gguf
    """
    from hopskip.export import early_exit

    with progress("exporting") as shown:
        early_exit(
            model,
            out,
            exit_layer=exit_layer,
            format=format,  # type: ignore[arg-type]
            dtype=dtype,
            base=base,
            force=force,
            progress=shown.doing,
        )
    print(out)


@app.command("eagle3")
def eagle3(
    out: Out,
    model: Model = None,
    exit_branch: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A trained exit (default: the one that comes with hopskip for the model).",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="auto|float32|bfloat16", help="Precision of the weights; auto is bfloat16.")
    ] = "auto",
    base: Base = None,
    force: Force = False,
) -> None:
    """Write a trained exit as an EAGLE-3 drafter for vLLM.

    $ hopskip export eagle3 drafter
    $ hopskip export eagle3 drafter -m model --exit-branch runs/exit --base org/model
    """
    from hopskip.export import eagle3

    with progress("exporting") as shown:
        eagle3(model, out, exit_branch=exit_branch, dtype=dtype, base=base, force=force, progress=shown.doing)
    print(out)


@app.command("merged")
def merged(
    out: Out,
    model: Model = None,
    exit_layer: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Layers that transformers drafts with, by code in the folder (default: as the model recommends).",
            show_default=False,
        ),
    ] = None,
    dtype: DType = "auto",
    base: Base = None,
    force: Force = False,
) -> None:
    """Write a LoRA adapter merged into its base, or a GGUF file's model, as an ordinary checkpoint folder.

    $ hopskip export merged merged -m runs/adapter
    $ hopskip export merged whole -m model.Q4_K_M.gguf --dtype float32
    """
    from hopskip.export import merged

    with progress("exporting") as shown:
        merged(model, out, dtype=dtype, exit_layer=exit_layer, base=base, force=force, progress=shown.doing)
    print(out)


@app.command("gguf")
def gguf(out: Out, model: Model = None, dtype: DTypeOrQ8 = "auto", base: Base = None, force: Force = False) -> None:
    """Write a model, or an adapter merged into its base, as a GGUF file for llama.cpp.

    $ hopskip export gguf smollm2 -m HuggingFaceTB/SmolLM2-135M-Instruct
    $ hopskip export gguf merged -m runs/adapter --dtype q8
    """
    from hopskip.export import gguf

    with progress("exporting") as shown:
        gguf(model, out, dtype=dtype, base=base, force=force, progress=shown.doing)
    print(out)
