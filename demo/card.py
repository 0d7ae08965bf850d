"""The demo model's card (README.md), written from the facts of the training run."""

from __future__ import annotations

from pathlib import Path

_TEMPLATE = """---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
tags: [llama, python, demo]
---
# A small language model of Python source

A LLaMA-architecture causal language model with {parameters:,} parameters ({parameters_linear:,} of them in the linear
layers of the decoder), made so that `make demo` has a real, trained model to quantise. It writes text that reads like
Python; it is no coding assistant.

## How it was made

| | |
|---|---|
| script | `{command}` |
| text | {corpus}: {corpus_modules:,} modules, {corpus_bytes:,} bytes, {tokens_in_corpus:,} tokens |
| tokenizer | byte-level BPE, {settings[vocab_size]} entries, trained on the same text; {bytes_per_token:.2f} bytes a token on held-out text |
| architecture | hidden {settings[hidden_size]}, intermediate {settings[intermediate_size]}, {settings[layers]} layers, {settings[heads]} query and {settings[kv_heads]} key/value heads of 64, tied embeddings, context {settings[context]} |
| training | {steps:,} steps, {tokens_seen:,} tokens ({epochs:.1f} passes), {training_seconds:.0f} s on one {device}; bf16 autocast, AdamW, cosine schedule from {settings[learning_rate]:g}, weight decay {settings[weight_decay]:g}, dropout {settings[dropout]:g}, seed {seed} |
| software | Python {python}, torch {torch} |
| kept weights | step {step:,}, the lowest validation loss: {validation_loss:.4f} nats a token |
| held-out loss | {held_out_loss:.4f} nats a token: perplexity {held_out_perplexity:.3f} (bf16 autocast, windows of {settings[context]} tokens) |
| weights stored in | float16 |

Held-out modules ({held_out_bytes:,} bytes, `heldout.txt`), never seen by the tokenizer or by training:
{held_out}.
Validation modules, which chose the step: {validation}.
The test modules of both are left out of training as well. All facts of the run: `training.json`.

## Greedy continuations
{samples}
## Licence

The training text and `heldout.txt` are part of CPython: Copyright (c) 2001 Python Software Foundation; All Rights
Reserved; used under the [PSF License Agreement](https://docs.python.org/3/license.html). `heldout.txt` is the unchanged text of
the modules named above, one after the other (line ends and tabs normalised).
"""


def write_card(out: Path, facts: dict, samples: dict[str, str]) -> None:
    blocks = "".join(f"\n```python\n{text.rstrip()}\n```\n" for text in samples.values())
    text = _TEMPLATE.format(
        **facts,
        held_out=", ".join(f"`{name}`" for name in facts["held_out_modules"]),
        validation=", ".join(f"`{name}`" for name in facts["validation_modules"]),
        samples=blocks,
    )
    (out / "README.md").write_text(text, encoding="utf-8")
