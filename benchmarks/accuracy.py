r"""Perplexity of a model in its own type and in every QQQ variant: a table in Markdown, everything in JSON.

    python benchmarks/accuracy.py demo/model --text demo/model/heldout.txt --output benchmarks/results/accuracy/demo \
        --document docs/convert.md

Without --calibration, GPTQ reads modules of the running Python's standard library, which suits the demo model; modules
that the model's training.json lists as held out are left out. Variants are made by `marlin_qqq.convert` and measured by
the functions behind `marlin-qqq perplexity`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from marlin_qqq._files import write_json_atomically, write_text_atomically
from marlin_qqq.convert import convert
from marlin_qqq.evaluation import measure_perplexity
from marlin_qqq.model_folder import load_model, load_tokenizer, read_tokens
from marlin_qqq.verify import verify_checkpoint

# Name -> options of the converter.
METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn", "clip": False},
    "RTN, clipped": {"method": "rtn", "clip": True},
    "GPTQ": {"method": "gptq", "clip": False},
    "GPTQ, clipped": {"method": "gptq", "clip": True},
}
GROUP_SIZES = (-1, 128)
BEGIN, END = "<!-- accuracy:begin -->", "<!-- accuracy:end -->"
STANDARD_LIBRARY_BYTES = 2_000_000


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder with float weights and a tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to measure on")
    parser.add_argument("--calibration", type=Path, help="UTF-8 text for GPTQ; not the text to measure on")
    parser.add_argument("--output", type=Path, required=True, help="written with .json and .md added")
    parser.add_argument("--document", type=Path, help="Markdown file whose accuracy table is replaced")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--window", type=int, default=512, help="tokens of a measured window and of a calibration one")
    parser.add_argument("--max-tokens", type=int, help="measure on the first tokens only")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args(words)

    with tempfile.TemporaryDirectory() as scratch:
        calibration = arguments.calibration or _standard_library_text(arguments.model, Path(scratch))
        report = measure(arguments, calibration, Path(scratch))
    table = as_markdown(report)
    write_json_atomically(arguments.output.with_name(arguments.output.name + ".json"), report)
    write_text_atomically(arguments.output.with_name(arguments.output.name + ".md"), table)
    if arguments.document is not None:
        write_text_atomically(arguments.document, fill(arguments.document.read_text(encoding="utf-8"), table))
    print(table)


def measure(arguments: argparse.Namespace, calibration: Path, scratch: Path) -> dict[str, Any]:
    """Measures the original, then every variant; one model is in memory at a time."""
    tokenizer = load_tokenizer(arguments.model)
    tokens = read_tokens(tokenizer, arguments.text)[: arguments.max_tokens]

    def perplexity(folder: Path) -> dict[str, Any]:
        model = load_model(folder, device=arguments.device, dtype=arguments.dtype)
        result = measure_perplexity(
            model, tokens, arguments.window, start_token=tokenizer.bos_token_id, batch_size=arguments.batch_size
        )
        print(f"{folder.name}: {result.value:.4f} ({result.seconds:.0f} s)", flush=True)
        return {"perplexity": result.value, "loss": result.loss, "seconds": result.seconds}

    rows = [{"method": "original", "group_size": None} | perplexity(arguments.model)]
    for group_size in GROUP_SIZES:
        for name, options in METHODS.items():
            folder = scratch / f"{name.replace(', ', '-').lower()}-{'channel' if group_size == -1 else group_size}"
            if options["method"] == "gptq":
                options = options | {
                    "calibration": calibration,
                    "num_samples": arguments.samples,
                    "sequence_length": arguments.window,
                }
            result = convert(arguments.model, folder, group_size=group_size, device=arguments.device, **options)
            layers = verify_checkpoint(folder, against=arguments.model).layers
            rows.append(
                {"method": name, "group_size": group_size}
                | perplexity(folder)
                | {
                    "convert_seconds": result.seconds,
                    "mean_weight_error": sum(layer.relative_error or 0.0 for layer in layers) / len(layers),
                    "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
                }
            )
    return {
        "model": arguments.model.name if arguments.model.name != "model" else str(arguments.model),
        "text": {"file": arguments.text.name, "sha256": _sha256(arguments.text), "tokens": int(tokens.numel())},
        "calibration": {
            "file": calibration.name,
            "sha256": _sha256(calibration),
            "samples": arguments.samples,
            "sequence_length": arguments.window,
        },
        "window": arguments.window,
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "rows": rows,
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The table: a row a method, a column a group size, with the change against the original."""
    text, original = report["text"], report["rows"][0]["perplexity"]
    found = {(row["method"], row["group_size"]): row for row in report["rows"][1:]}
    lines = [
        f"Perplexity on {text['tokens']:,} tokens of {text['file']}, windows of {report['window']}. "
        f"Original: **{original:.3f}**.",
        "",
        "| weights | one scale a channel | groups of 128 |",
        "|---|---|---|",
    ]
    for method in METHODS:
        cells = []
        for group_size in GROUP_SIZES:
            value = found[method, group_size]["perplexity"]
            cells.append(f"{value:.3f} ({100 * (value / original - 1):+.1f} %)")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    calibration = report["calibration"]
    lines += [
        "",
        f"Activations are int8 per token in all of them. GPTQ: {calibration['samples']} sequences of "
        f"{calibration['sequence_length']} tokens of {calibration['file']}. Made on {report['device']} with torch "
        f"{report['torch']}, {report['date']}, by `benchmarks/accuracy.py`.",
        "",
    ]
    return "\n".join(lines)


def fill(document: str, table: str) -> str:
    """The document with the table between its marks."""
    start, end = document.index(BEGIN) + len(BEGIN), document.index(END)
    return f"{document[:start]}\n{table}{document[end:]}"


def _standard_library_text(model: Path, scratch: Path) -> Path:
    """A text like the demo model's training text, without the modules that it is measured on."""
    training = model / "training.json"
    facts = json.loads(training.read_text()) if training.exists() else {}
    held_out = {*facts.get("held_out_modules", ()), *facts.get("validation_modules", ())}
    library = Path(sysconfig.get_paths()["stdlib"])
    pieces, size = [], 0
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        name = path.relative_to(library).as_posix()
        if name in held_out or name.split("/")[0] in ("site-packages", "dist-packages", "test", "idlelib", "lib2to3"):
            continue
        pieces.append(path.read_text(encoding="utf-8", errors="ignore"))
        size += len(pieces[-1])
        if size > STANDARD_LIBRARY_BYTES:
            break
    file = scratch / f"python-{platform.python_version()}-standard-library.txt"
    file.write_text("\n".join(pieces), encoding="utf-8")
    return file


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
