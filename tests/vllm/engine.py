"""Runs vLLM's engine in a process of its own: `python engine.py JOBS RESULTS` works off a list, one engine a job.

A job is `{"model": folder, "prompts": [[ids]], "num_tokens": n, "options": {arguments of vllm.LLM}, "reload": folder}`
(the last two may be missing), a result `{"tokens": [[ids]], "layers": {name: {...}}, "reloaded": [[ids]]}` or
`{"error": text}`.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Models this small gain nothing from threads, and threads that wait for each other in a loop lose a lot on a busy
    # machine.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def run(
    jobs: list[dict[str, Any]], folder: Path, *, compiled: bool = False, timeout: float = 600, **environment: str
) -> list[dict[str, Any]]:
    """Starts the process, waits, and returns one result a job."""
    names = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} | ENVIRONMENT | environment
    for job in jobs:
        job.setdefault("options", {})["enforce_eager"] = not compiled
    if compiled:
        names["VLLM_DISABLE_COMPILE_CACHE"] = (
            "1"  # storing compiled code takes a third of the time, and no one reads it
        )
    else:
        names["TORCHDYNAMO_DISABLE"] = "1"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, __file__, str(folder / "jobs.json"), str(folder / "results.json")]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.run(
            command, env=os.environ | names, stdout=log, stderr=subprocess.STDOUT, timeout=timeout, cwd=folder
        )
    text = (folder / "log.txt").read_text()
    assert process.returncode == 0, f"the engine's process ended with {process.returncode}:\n{text[-6000:]}"
    results = json.loads((folder / "results.json").read_text())
    return [result | {"log": text} for result in results]


def layer_facts(model: Any) -> dict[str, dict[str, Any]]:
    """What became of every linear layer of the engine's model; runs inside the engine."""
    from vllm.model_executor.layers.linear import LinearBase

    return {
        name: {
            "method": type(module.quant_method).__name__,
            "parameters": {key: type(value).__name__ for key, value in module.named_parameters(recurse=False)},
        }
        for name, module in model.named_modules()
        if isinstance(module, LinearBase)
    }


def _run_job(job: dict[str, Any]) -> dict[str, Any]:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    try:
        return _work(job)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


def _work(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    options = {"max_model_len": 128, "max_num_seqs": 16, "seed": 0, "skip_tokenizer_init": True} | job["options"]
    sampling = SamplingParams(temperature=0.0, max_tokens=job["num_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    llm = LLM(model=job["model"], **options)

    def generate() -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, sampling, use_tqdm=False)]

    result: dict[str, Any] = {"tokens": generate()}
    if options.get("tensor_parallel_size", 1) == 1:
        result["layers"] = llm.apply_model(layer_facts)[0]
    if job.get("reload"):
        llm.reset_prefix_cache()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": job["reload"]})
        result["reloaded"] = generate()
    llm.llm_engine.engine_core.shutdown()
    return result


if __name__ == "__main__":
    loaded = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([_run_job(job) for job in loaded]))
