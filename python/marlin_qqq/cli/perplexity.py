"""`marlin-qqq perplexity DIR --text FILE`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer


def command(
    directory: Annotated[
        Path, typer.Argument(help="Model folder: QQQ, or any that Transformers loads from safetensors.")
    ],
    text: Annotated[Path, typer.Option(help="UTF-8 text file.")],
    window: Annotated[int, typer.Option(min=2, help="Tokens that are predicted in one pass.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Use only the first tokens of the text.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in one pass.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:INDEX or auto.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="auto, float16, bfloat16 or float32.")] = "auto",
    json_output: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure the perplexity of a model folder on a text file, in windows that do not overlap."""
    from rich.console import Console
    from rich.progress import Progress

    from marlin_qqq._devices import check_device
    from marlin_qqq.cli.app import CliError
    from marlin_qqq.evaluation import measure_perplexity, num_windows
    from marlin_qqq.model_folder import load_model, load_tokenizer, read_tokens

    if dtype not in ("auto", "float16", "bfloat16", "float32"):
        raise CliError(f"dtype is {dtype!r}; allowed: auto, float16, bfloat16, float32")
    device = check_device(device)
    tokenizer = load_tokenizer(directory)
    tokens = read_tokens(tokenizer, text)[:max_tokens]
    model = load_model(directory, device=device, dtype=dtype)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("perplexity", total=num_windows(tokens.numel(), window))
        result = measure_perplexity(
            model,
            tokens,
            window,
            start_token=tokenizer.bos_token_id,
            batch_size=batch_size,
            on_window=lambda count: bar.update(task, advance=count),
        )
    if json_output:
        fields = {
            "perplexity": _finite(result.value),
            "loss": _finite(result.loss),
            "tokens": result.num_tokens,
            "seconds": result.seconds,
        }
        typer.echo(json.dumps(fields | {"window": window, "directory": str(directory), "device": device}))
    else:
        speed = f"{result.tokens_per_second:.0f} tokens/s on {device}"
        typer.echo(f"perplexity {result.value:.4f} over {result.num_tokens} tokens, windows of {window} ({speed})")


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity: null stands for them."""
    return value if math.isfinite(value) else None
