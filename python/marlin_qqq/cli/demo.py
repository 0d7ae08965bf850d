"""`marlin-qqq demo`: a real language model is quantised to QQQ, written, loaded back, run, and compared."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

# Read when torch loads its OpenMP: threads sleep at barriers in place of spinning. On a machine that does other work as
# well, spinning makes a demo of one minute one of ten.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from marlin_qqq.cli import demo_view
from marlin_qqq.cli.app import CliError
from marlin_qqq.evaluation import (
    Continuation,
    Perplexity,
    continue_greedily,
    linear_weight_bytes,
    measure_perplexity,
    num_windows,
)

REPOSITORY_MODEL = Path(__file__).resolve().parents[3] / "demo" / "model"
HELD_OUT_FILE = "heldout.txt"
DEFAULT_PROMPT = "def main():\n    parser = argparse.ArgumentParser("
FORMATS = {"QQQ per-channel": -1, "QQQ group 128": 128}
WINDOW = 512
# Weights times tokens of one pass over the text on a CPU: about ten seconds on two cores. A GPU reads the whole text.
_CPU_WORK_LIMIT = 1.8e11


@dataclass
class Source:
    """What is compared: the original model in its stored precision, its tokenizer, and the text cut into windows."""

    folder: Path
    model: Any
    tokenizer: Any
    token_ids: torch.Tensor
    text_tokens: int
    window: int
    device: torch.device
    stored_dtype: torch.dtype

    @property
    def run_dtype(self) -> torch.dtype:
        """Activations in the model's own 16-bit type on a GPU, in fp32 on a CPU, which multiplies fp16 slowly."""
        if self.device.type == "cpu":
            return torch.float32
        return self.stored_dtype if self.stored_dtype == torch.bfloat16 else torch.float16

    @property
    def batch_size(self) -> int:
        # Logits are the largest tensor: keep them near 128 MB in fp32.
        return min(max(2**25 // (self.window * self.model.config.vocab_size), 1), 16)


@dataclass(frozen=True)
class Row:
    """One line of the table and one continuation."""

    name: str
    linear_bytes: int
    perplexity: Perplexity
    continuation: Continuation


def command(
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of a LLaMA-like Hugging Face model. Default: demo/model.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text for the perplexity. Default: the held-out text of demo/model.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", show_default=False)] = None,
    new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Length of the continuation.")] = 64,
    method: Annotated[str, typer.Option(help="How scales are found: rtn, or mse (clip search).")] = "rtn",
    device: Annotated[str, typer.Option(help="auto, cuda, cuda:N or cpu.")] = "auto",
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Tokens of the text to use. Default: all of it on a GPU, less on a CPU.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Keep the two QQQ checkpoints in this folder.", show_default=False)
    ] = None,
) -> None:
    """Quantise a language model to QQQ, per-channel and group 128, and compare both with the original.

    Each format is written as a checkpoint, loaded back, and run through
    quantize_per_token and marlin_qqq_gemm: on the GPU if there is one, else on the CPU.
    """
    console = Console()
    if method not in ("rtn", "mse"):
        raise CliError(f"--method is {method!r}; allowed: rtn, mse")
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise CliError(f"--keep is {keep}, which exists and is not an empty folder; nothing is overwritten")
    run_device, device_note = choose_device(device)
    if device_note:
        console.print(device_note, style="yellow", markup=False)

    with demo_view.progress_bar(console) as progress:
        task = progress.add_task("reading the model", total=None)
        source = read_source(model, text, run_device, max_tokens)
        console.print(demo_view.describe(source))
        windows = num_windows(source.token_ids.numel(), source.window)
        progress.update(task, total=(1 + len(FORMATS)) * (windows + new_tokens))
        rows = list(compare(source, prompt or DEFAULT_PROMPT, new_tokens, method, keep, progress, task))

    console.print(demo_view.results_table(rows, source, method))
    for row in rows:
        console.print(demo_view.continuation_panel(row, rows[0], prompt or DEFAULT_PROMPT, highlight=prompt is None))
    if keep is not None:
        console.print(f"The checkpoints are in {keep}", markup=False)


def choose_device(wanted: str) -> tuple[torch.device, str]:
    """The device to run on, and a sentence for the user where it is not the obvious one."""
    from marlin_qqq import _library, ops  # noqa: F401  loads the libraries

    if wanted == "cpu":
        return torch.device("cpu"), ""
    if wanted != "auto" and wanted.partition(":")[0] != "cuda":
        raise CliError(f"--device is {wanted!r}; allowed: auto, cuda, cuda:N, cpu")
    reason = _library.cuda_unavailable_reason
    if not torch.cuda.is_available():
        reason, note = "torch finds no CUDA GPU", ""
    else:
        capability = torch.cuda.get_device_capability()
        if reason is None and capability < (8, 0):
            reason = f"{torch.cuda.get_device_name()} has compute capability {capability}; (8, 0) is needed"
        note = f"Running on the CPU: {reason}"
    if reason is None:
        try:
            device = torch.device("cuda" if wanted == "auto" else wanted)
        except RuntimeError as error:
            raise CliError(f"--device is {wanted!r}; allowed: auto, cuda, cuda:N, cpu") from error
        if (device.index or 0) >= torch.cuda.device_count():
            raise CliError(f"--device is {wanted}; there are {torch.cuda.device_count()} GPUs, counted from 0")
        return device, ""
    if wanted != "auto":
        raise CliError(f"--device is {wanted}, but {reason}; use --device cpu")
    return torch.device("cpu"), note


# Reading


def read_source(
    model_folder: Path | None, text_file: Path | None, device: torch.device, max_tokens: int | None
) -> Source:
    """Loads model, tokenizer and text; anything unusable is a CliError or a CheckpointError, never a pickle."""
    try:
        import transformers
    except ImportError as error:
        raise CliError(
            f"the demo needs Transformers ({error}); in a clone: pip install '.[transformers]', elsewhere: "
            "pip install 'transformers>=5' tokenizers"
        ) from error
    from marlin_qqq.model_folder import load_model, load_tokenizer, read_tokens

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    folder = _model_folder(model_folder)
    _refuse_quantized(folder)
    model = load_model(folder)
    tokenizer = load_tokenizer(folder)
    token_ids = read_tokens(tokenizer, _text_file(text_file, folder))
    text_tokens = token_ids.numel()
    if text_tokens < 2:
        raise CliError(f"the text holds {text_tokens} tokens; at least 2 are needed")

    # A start token goes before each window: it must fit as well.
    window = min(WINDOW, (getattr(model.config, "max_position_embeddings", None) or WINDOW + 1) - 1)
    if max_tokens is None:
        max_tokens = text_tokens
        if device.type == "cpu":
            parameters = sum(parameter.numel() for parameter in model.parameters())
            max_tokens = max(int(_CPU_WORK_LIMIT / parameters) // window, 1) * window
    return Source(folder, model, tokenizer, token_ids[:max_tokens], text_tokens, window, device, model.dtype)


def _refuse_quantized(folder: Path) -> None:
    from marlin_qqq.checkpoint.config import find_quantization_config

    if not (folder / "config.json").is_file():
        raise CliError(f"{folder} has no config.json: it is no Hugging Face model folder")
    if find_quantization_config(folder) is not None:
        raise CliError(f"{folder} is quantised already; the demo starts from an fp16, bf16 or fp32 model")


def _model_folder(given: Path | None) -> Path:
    if given is not None:
        if not given.is_dir():
            state = "a file" if given.exists() else "not there"
            raise CliError(f"--model is {given}, which is {state}; give a model folder")
        return given
    for folder in (REPOSITORY_MODEL, Path("demo/model")):
        if (folder / "config.json").is_file():
            return folder
    raise CliError(
        "the demo model (demo/model of the source repository) is not part of the installed package; "
        "run this in a clone, or give --model DIR and --text FILE"
    )


def _text_file(given: Path | None, folder: Path) -> Path:
    candidates = [directory / HELD_OUT_FILE for directory in (folder, REPOSITORY_MODEL, Path("demo/model"))]
    file = given or next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise CliError("there is no text to measure the perplexity on; give --text FILE")
    return file


# Running


def compare(
    source: Source, prompt: str, new_tokens: int, method: Any, keep: Path | None, progress: Progress, task: Any
) -> Iterator[Row]:
    """Evaluates the original, then each format from its written checkpoint."""
    from marlin_qqq import quantize_model
    from marlin_qqq.checkpoint import load_quantized_model, write_checkpoint

    stored_bytes = linear_weight_bytes(source.model, torch.finfo(source.stored_dtype).bits // 8)
    if not stored_bytes:
        raise CliError(f"{source.folder} has no linear layers to quantise")
    original = copy.deepcopy(source.model).to(device=source.device, dtype=source.run_dtype)
    name = f"original, {str(source.stored_dtype).removeprefix('torch.')}"
    yield _evaluate(name, original, stored_bytes, source, prompt, new_tokens, progress, task)
    del original

    with contextlib.ExitStack() as stack:
        root = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="marlin-qqq-demo-")))
        for name, group_size in FORMATS.items():

            def quantising(done: int, total: int, layer: str, name: str = name) -> None:
                progress.update(task, description=f"{name}: quantising layer {done} of {total}")

            quantized = quantize_model(copy.deepcopy(source.model), group_size, method, progress=quantising)
            progress.update(task, description=f"{name}: writing and reading back")
            folder = write_checkpoint(quantized, root / name.lower().replace(" ", "-"), source=source.folder)
            del quantized
            gc.collect()
            loaded = load_quantized_model(folder, device=source.device, dtype=source.run_dtype)
            yield _evaluate(name, loaded, linear_weight_bytes(loaded), source, prompt, new_tokens, progress, task)


def _evaluate(
    name: str,
    model: Any,
    linear_bytes: int,
    source: Source,
    prompt: str,
    new_tokens: int,
    progress: Progress,
    task: Any,
) -> Row:
    def advance(count: int) -> None:
        progress.advance(task, count)

    progress.update(task, description=f"{name}: perplexity")
    end = (progress.tasks[0].completed or 0) + num_windows(source.token_ids.numel(), source.window) + new_tokens
    windows: dict[str, Any] = {
        "window": source.window,
        "start_token": source.tokenizer.bos_token_id,
        "batch_size": source.batch_size,
    }
    # The first calls load kernels and allocate: they are not part of the speed.
    warm_up = source.window * (source.batch_size if source.device.type == "cuda" else 1)
    measure_perplexity(model, source.token_ids[:warm_up], **windows)
    perplexity = measure_perplexity(model, source.token_ids, on_window=advance, **windows)
    progress.update(task, description=f"{name}: continuing the prompt")
    continue_greedily(model, source.tokenizer, prompt, min(new_tokens, 4))
    continuation = continue_greedily(model, source.tokenizer, prompt, new_tokens, on_token=advance)
    progress.update(task, completed=end)  # a continuation may end early
    return Row(name, linear_bytes, perplexity, continuation)
