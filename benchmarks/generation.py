"""Tokens a second of greedy generation, the model in its own type against QQQ.

    python benchmarks/generation.py demo/model                            # a folder with float weights
    python benchmarks/generation.py llama-3-8b --batch-size 1 16 64       # random weights of that architecture

Both run with a static cache; on a GPU, generate compiles the decoding step and replays it as a CUDA graph. Time is that
of generating --new-tokens after a prompt of --prompt-tokens, the prompt's pass included, median of --repeats runs after
a warm-up. Random weights generate nonsense at the speed of real ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from marlin_qqq import quantize_model
from marlin_qqq._files import write_json_atomically
from marlin_qqq.model_folder import load_model

# Published configurations; vocabulary and context do not matter here.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen2-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a folder, or one of {', '.join(ARCHITECTURES)}")
    parser.add_argument("--group-size", type=int, nargs="+", choices=(128, -1), default=[128, -1])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args(words)

    runs = [measure(arguments, None)] + [measure(arguments, group_size) for group_size in arguments.group_size]
    report = {
        "model": arguments.model,
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "runs": runs,
    }
    if arguments.output is not None:
        write_json_atomically(arguments.output, report)
    print(as_markdown(report))


def measure(arguments: argparse.Namespace, group_size: int | None) -> dict[str, Any]:
    """Builds the model anew (compiled graphs belong to one model), measures every batch size and frees it."""
    model = build(arguments)
    if group_size is not None:
        quantize_model(model, group_size)
    weight_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    speeds = {}
    for batch_size in arguments.batch_size:
        speed = speeds[str(batch_size)] = tokens_per_second(model, arguments, batch_size)
        print(
            f"{name_of(group_size, arguments.dtype)}, batch {batch_size}: {speed:.1f} tokens/s",
            flush=True,
        )
    del model
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"group_size": group_size, "weight_bytes": weight_bytes, "tokens_per_second": speeds}


def build(arguments: argparse.Namespace) -> Any:
    dtype = getattr(torch, arguments.dtype)
    if arguments.model not in ARCHITECTURES:
        return load_model(arguments.model, device=arguments.device, dtype=dtype)
    torch.manual_seed(0)
    with torch.device(arguments.device):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**ARCHITECTURES[arguments.model]), dtype=dtype
        ).eval()


@torch.inference_mode()
def tokens_per_second(model: Any, arguments: argparse.Namespace, batch_size: int) -> float:
    shape = (batch_size, arguments.prompt_tokens)
    generator = torch.Generator().manual_seed(batch_size)
    prompt = torch.randint(2, model.config.vocab_size, shape, generator=generator).to(arguments.device)
    seconds = []
    for repeat in range(arguments.repeats + 2):  # the first two compile and record
        begin = time.perf_counter()
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=arguments.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            cache_implementation="static",
        )
        assert tokens.cpu().shape[1] == arguments.prompt_tokens + arguments.new_tokens  # .cpu() waits for the device
        if repeat >= 2:
            seconds.append(time.perf_counter() - begin)
    return batch_size * arguments.new_tokens / statistics.median(seconds)


def name_of(group_size: int | None, dtype: str) -> str:
    return dtype if group_size is None else "QQQ, " + ("groups of 128" if group_size == 128 else "one scale a channel")


def as_markdown(report: dict[str, Any]) -> str:
    """A row a model, a column a batch size: tokens a second, and the factor over the unquantised model."""
    baseline = report["runs"][0]["tokens_per_second"]
    lines = [
        f"Tokens a second, {report['model']}, {report['prompt_tokens']} prompt and {report['new_tokens']} new tokens, "
        f"{report['device']}, torch {report['torch']}",
        "",
        "| model | weights | " + " | ".join(f"batch {size}" for size in baseline) + " |",
        "|---|---" + "|---" * len(baseline) + "|",
    ]
    for run in report["runs"]:
        cells = [
            f"{speed:.1f}" + ("" if run["group_size"] is None else f" ({speed / baseline[size]:.2f}x)")
            for size, speed in run["tokens_per_second"].items()
        ]
        name = name_of(run["group_size"], report["dtype"])
        lines.append(f"| {name} | {run['weight_bytes'] / 1e9:.2f} GB | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
