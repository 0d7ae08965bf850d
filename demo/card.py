"""The demo model's card (README.md), written from the facts of the training run and from the stored weights.

train.py calls it at its end; `python demo/card.py demo/model` writes the card again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# No prompt ends in a space: a space belongs to the token of the word after it.
_PROMPTS = (
    "def main():\n    parser = argparse.ArgumentParser(",
    "def read_config(path):",
    "class Node:\n    def __init__(self, name, value):\n        self.name = name\n",
)

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
| text (LIB) | {corpus}: {corpus_modules:,} modules, {corpus_bytes:,} bytes, {tokens_in_corpus:,} tokens |
| tokenizer | byte-level BPE, {settings[vocab_size]} entries, {bytes_per_token:.2f} bytes a token on held-out text |
| architecture | {architecture} |
| training | {steps:,} steps, {tokens_seen:,} tokens ({epochs:.1f} passes), {training_seconds:.0f} s on {device} |
| recipe | {recipe} |
| software | Python {python}, torch {torch} |
| kept weights | step {step:,}, the lowest validation loss: {validation_loss:.4f} nats a token |
| held-out loss | {held_out_loss:.4f} nats a token: perplexity {held_out_perplexity:.3f} |
| weights stored in | float16 |

Held-out modules ({held_out_bytes:,} bytes, `heldout.txt`), never seen by the tokenizer or by training:
{held_out}.
Validation modules, which chose the step: {validation}.
The test modules of both are left out of training as well. All facts of the run: `training.json`.

## Greedy continuations
{samples}
## Licence

The training text and `heldout.txt` are part of CPython: Copyright (c) 2001 Python Software Foundation; All Rights
Reserved; used under the PSF License Agreement (`LICENSE-PSF.txt`, also https://docs.python.org/3/license.html).
`heldout.txt` is the text of the modules named above, one after the other, unchanged but for line ends and tabs.
"""


@torch.inference_mode()
def greedy_continuations(folder: Path, new_tokens: int = 64) -> list[str]:
    """Prompt and continuation, by the stored weights in fp32 on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    texts = []
    for prompt in _PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True))
    return texts


def write_card(folder: Path) -> None:
    """README.md of a folder that holds the model and its training.json."""
    facts = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    settings = facts["settings"]
    architecture = (
        f"hidden {settings['hidden_size']}, intermediate {settings['intermediate_size']}, {settings['layers']} layers, "
        f"{settings['heads']} query and {settings['kv_heads']} key/value heads of 64, tied embeddings, "
        f"trained on windows of {settings['context']} tokens"
    )
    recipe = (
        f"bf16 autocast, AdamW, learning rate {settings['learning_rate']:g} falling as a cosine, "
        f"weight decay {settings['weight_decay']:g}, dropout {settings['dropout']:g}, "
        f"{settings['batch']} windows a step, seed {facts['seed']}"
    )
    text = _TEMPLATE.format(
        **facts,
        architecture=architecture,
        recipe=recipe,
        held_out=", ".join(f"`{name}`" for name in facts["held_out_modules"]),
        validation=", ".join(f"`{name}`" for name in facts["validation_modules"]),
        samples="".join(f"\n```python\n{text.rstrip()}\n```\n" for text in greedy_continuations(folder)),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_card(Path(sys.argv[1]))
