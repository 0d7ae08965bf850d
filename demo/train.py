"""Train the demo model: a small LLaMA-architecture language model of Python source.

    python demo/train.py --out demo/model            # on a machine with a GPU; about four minutes
    python demo/train.py --out /tmp/m --tiny         # on a CPU: proves that the script runs, not that the model is good

Every in_features is a multiple of 128 and every out_features a multiple of 64, so that QQQ needs no padding.
The schedule follows the clock: the learning rate reaches zero when the time (`--minutes`, set-up included) or the
passes over the text (`--max-epochs`) are used up, whichever comes first. The weights kept are those with the lowest
validation loss. Needs torch, transformers, tokenizers and safetensors; no network.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import sys
import sysconfig
import time
from pathlib import Path

START = time.monotonic()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402
from torch import nn  # noqa: E402
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from card import write_card  # noqa: E402
from corpus import Corpus, read_corpus  # noqa: E402

END_OF_TEXT = "<|endoftext|>"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; flat")
    parser.add_argument("--stdlib", type=Path, help="standard library to read (default: the running interpreter's)")
    parser.add_argument("--stdlib-label", help="what the card calls that text, e.g. 'CPython 3.12.1 with its tests'")
    parser.add_argument("--minutes", type=float, default=4.0, help="wall clock for everything, set-up included")
    parser.add_argument("--max-epochs", type=float, default=30.0, help="stop after this many passes over the text")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C compiler)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512, help="tokens in a training window")
    parser.add_argument("--batch", type=int, default=64, help="windows in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--library-share", type=float, default=0.5, help="share of windows that are not test modules")
    parser.add_argument("--evaluations", type=int, default=40, help="validation runs in the whole training")
    parser.add_argument(
        "--patience", type=int, default=12, help="validation runs without a better loss before stopping"
    )
    parser.add_argument("--tiny", action="store_true", help="a small model and few steps, to try the script on a CPU")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.layers, arguments.batch, arguments.context, arguments.evaluations = 2, 4, 128, 4
        arguments.minutes, arguments.max_epochs = min(arguments.minutes, 1.0), 1.0
    if arguments.hidden_size % 128 or arguments.intermediate_size % 128:
        parser.error(
            f"--hidden-size {arguments.hidden_size}, --intermediate-size {arguments.intermediate_size}: "
            "both must be multiples of 128"
        )
    return arguments


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


# Text to tokens


def train_tokenizer(corpus: Corpus, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The library itself decides the merges: the test modules would fill the vocabulary with assertEqual.
    tokenizer.train_from_iterator(corpus.library, trainer)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, end_of_text)],
    )
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str], device: str) -> torch.Tensor:
    """All documents in one row of token ids, each after an end-of-text token."""
    encodings = tokenizer.encode_batch(documents)
    ids = np.concatenate([np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings])
    return torch.from_numpy(ids).to(device)


class Windows:
    """Random windows of a token row. Position 0 is always end-of-text: an anchor that a prompt has as well."""

    def __init__(self, tokens: torch.Tensor, context: int, end_of_text: int) -> None:
        self.tokens, self.context, self.end_of_text = tokens, context, end_of_text
        self.steps = torch.arange(context + 1, device=tokens.device)

    def draw(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        last_start = self.tokens.numel() - self.context - 1
        starts = torch.randint(max(last_start, 1), (count, 1), generator=generator, device=self.tokens.device)
        return self.split(self.tokens[starts + self.steps])

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = rows[:, :-1].long()
        inputs[:, 0] = self.end_of_text
        return inputs, rows[:, 1:].long()


# Model


def build_model(arguments: argparse.Namespace, end_of_text: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=64,
        max_position_embeddings=2 * arguments.context,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=None,
        attention_dropout=0.0,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # GPT-2: keep the residual sum's variance with depth
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * arguments.layers))
    if arguments.dropout > 0:  # LlamaConfig has no residual dropout
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj", "embed_tokens")):
                module.register_forward_hook(lambda layer, _, y: F.dropout(y, arguments.dropout, layer.training))
    return model.to(arguments.device)


def autocast(device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, dtype=torch.bfloat16)


def loss_of(
    model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, device: str, reduction: str = "mean"
) -> torch.Tensor:
    with autocast(device):
        logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction=reduction)


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: torch.Tensor, arguments: argparse.Namespace, end_of_text: int) -> float:
    """Nats a token over consecutive windows; the tail that does not fill a window is left out."""
    model.eval()
    windows = Windows(tokens, arguments.context, end_of_text)
    count = (tokens.numel() - 1) // arguments.context
    total = 0.0
    for first in range(0, count, arguments.batch):
        starts = (
            torch.arange(first, min(first + arguments.batch, count), device=tokens.device)[:, None] * arguments.context
        )
        inputs, targets = windows.split(tokens[starts + windows.steps])
        total += loss_of(model, inputs, targets, arguments.device, "sum").item()
    model.train()
    return total / (count * arguments.context)


def train(
    model: LlamaForCausalLM,
    streams: dict[str, torch.Tensor],
    arguments: argparse.Namespace,
    end_of_text: int,
) -> dict:
    """Train in place, leave the best weights in the model, return the facts of the run."""
    device, batch = arguments.device, arguments.batch
    generator = torch.Generator(device=device).manual_seed(arguments.seed)
    sources = {
        name: Windows(streams[name], arguments.context, end_of_text) for name in ("library", "tests") if name in streams
    }
    if "tests" in sources:
        from_library = min(max(round(batch * arguments.library_share), 1), batch - 1)
        shares = {"library": from_library, "tests": batch - from_library}
    else:
        shares = {"library": batch}
    tokens_in_corpus = sum(windows.tokens.numel() for windows in sources.values())

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": arguments.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    network = torch.compile(model) if arguments.compile else model

    max_steps = max(int(arguments.max_epochs * tokens_in_corpus / (batch * arguments.context)), 1)
    begin = time.monotonic()
    reserve = 12.0 if device == "cuda" else 20.0  # evaluation, samples, writing
    seconds = max(arguments.minutes * 60 - (begin - START) - reserve, 5.0)
    best = {"validation_loss": math.inf, "step": 0}
    best_weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    evaluations_done, stale, step, progress = 0, 0, 0, 0.0
    say(f"training: at most {max_steps} steps of {batch * arguments.context} tokens, at most {seconds:.0f} s")
    model.train()
    while progress < 1.0:
        if step % 10 == 0 and device == "cuda":
            torch.cuda.synchronize()  # the clock below must see the work, not the queue
        progress = max((time.monotonic() - begin) / seconds, step / max_steps)
        warm_up = min((step + 1) / 200, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * warm_up * (0.01 + 0.99 * cosine)
        drawn = [sources[name].draw(count, generator) for name, count in shares.items()]
        inputs, targets = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        try:
            loss = loss_of(network, inputs, targets, device)
        except Exception as error:  # no C compiler, no Triton: slower, but the same model
            if network is model:
                raise
            say(f"torch.compile failed ({type(error).__name__}); going on without it")
            network = model
            loss = loss_of(network, inputs, targets, device)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1

        if progress >= (evaluations_done + 1) / arguments.evaluations or progress >= 1.0:
            evaluations_done = max(int(progress * arguments.evaluations), evaluations_done + 1)
            validation_loss = mean_loss(model, streams["validation"], arguments, end_of_text)
            train_loss = loss.item()
            if not math.isfinite(train_loss):
                raise SystemExit(f"error: the training loss is {train_loss} at step {step}")
            if validation_loss < best["validation_loss"]:
                best, stale = {"validation_loss": validation_loss, "step": step, "train_loss": train_loss}, 0
                for name, value in model.state_dict().items():
                    best_weights[name].copy_(value)
            else:
                stale += 1
            say(f"step {step:6d}  {progress:4.0%}  train {train_loss:.4f}  validation {validation_loss:.4f}")
            if stale >= arguments.patience:
                say(f"no better validation loss for {stale} evaluations: stopping")
                break
    elapsed = time.monotonic() - begin
    model.load_state_dict(best_weights)
    tokens_seen = step * batch * arguments.context
    return best | {
        "steps": step,
        "training_seconds": elapsed,
        "tokens_seen": tokens_seen,
        "tokens_in_corpus": tokens_in_corpus,
        "epochs": tokens_seen / tokens_in_corpus,
    }


# Result


def write_model(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path) -> None:
    model = model.cpu().half()
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id, do_sample=False
    )
    for value in model.state_dict().values():
        if not torch.isfinite(value).all():
            raise SystemExit("error: a weight is not finite in fp16")
    model.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)


def command_line() -> str:
    """The command as somebody else would give it: without the folders of this machine."""
    given = {"--out": "demo/model", "--stdlib": "LIB", "--stdlib-label": "TEXT"}
    words = [given.get(before, word) for before, word in zip(sys.argv, sys.argv[1:], strict=False)]
    return "python demo/train.py " + shlex.join(words)


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    arguments.out.mkdir(parents=True, exist_ok=True)
    device_name = (
        torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or platform.machine()
    )
    say(f"torch {torch.__version__}, Python {platform.python_version()}, {device_name}")

    standard_library = arguments.stdlib or Path(sysconfig.get_paths()["stdlib"])
    corpus = read_corpus(standard_library)
    say(f"{len(corpus.library)} library and {len(corpus.tests)} test modules, {corpus.train_bytes() / 1e6:.1f} MB")
    tokenizer = train_tokenizer(corpus, arguments.vocab_size)
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    documents = {
        "library": corpus.library,
        "tests": corpus.tests,
        "validation": corpus.validation,
        "held_out": corpus.held_out,
    }
    streams = {name: encode(tokenizer, texts, arguments.device) for name, texts in documents.items() if texts}
    if streams.get("tests") is not None and streams["tests"].numel() <= 4 * arguments.context:
        del streams["tests"]
    say("tokens: " + ", ".join(f"{name} {tokens.numel():,}" for name, tokens in streams.items()))

    model = build_model(arguments, end_of_text)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"model: {parameters:,} parameters")
    facts = train(model, streams, arguments, end_of_text)
    held_out_loss = mean_loss(model, streams["held_out"], arguments, end_of_text)
    say(f"best step {facts['step']}; held-out loss {held_out_loss:.4f}, perplexity {math.exp(held_out_loss):.3f}")
    write_model(model, tokenizer, arguments.out)
    held_out_text = "\n\n".join(corpus.held_out)
    (arguments.out / "heldout.txt").write_text(held_out_text, encoding="utf-8")
    if (standard_library / "LICENSE.txt").is_file():  # distributions put it elsewhere
        shutil.copyfile(standard_library / "LICENSE.txt", arguments.out / "LICENSE-PSF.txt")
    facts |= {
        "seed": arguments.seed,
        "held_out_loss": held_out_loss,
        "held_out_perplexity": math.exp(held_out_loss),
        "held_out_modules": corpus.held_out_names,
        "held_out_bytes": len(held_out_text.encode()),
        "validation_modules": corpus.validation_names,
        "parameters": parameters,
        "parameters_linear": sum(
            m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
        ),
        "corpus": arguments.stdlib_label or f"the standard library of CPython {platform.python_version()}",
        "corpus_modules": len(corpus.train),
        "corpus_bytes": corpus.train_bytes(),
        "bytes_per_token": sum(len(t.encode()) for t in corpus.held_out) / streams["held_out"].numel(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name,
        "command": command_line(),
        "settings": {key: value for key, value in vars(arguments).items() if isinstance(value, (int, float))},
        "wall_seconds": time.monotonic() - START,
    }
    (arguments.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    write_card(arguments.out)
    print((arguments.out / "README.md").read_text(encoding="utf-8"))
    say("wrote " + ", ".join(f"{p.name} ({p.stat().st_size:,} bytes)" for p in sorted(arguments.out.iterdir())))


if __name__ == "__main__":
    main()
