"""OpenVINO by optimum-intel, in an environment of its own, as that wants an older transformers.

`python -m venv ov; ov/bin/pip install optimum-intel openvino torch; ov/bin/pip uninstall
torchvision`, and then `python -m benchmarks --openvino ov/bin/python`. This file runs on both
sides: there it reads requests from its standard input, a line of JSON each.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def start(python: str, folder: Path, weights: str, threads: int) -> Any:
    """Start it on the GPT-2 in `folder`; returns a function of lists of ids and how many to write.

    Raises:
        RuntimeError: it ended; its last line says why.
    """
    converted = folder.parent / f"{folder.name}-openvino-{weights}"
    # Isolated: neither this package nor its environment is to be found there.
    command = [python, "-I", __file__, str(folder), str(converted), weights, str(threads)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def answer() -> Any:
        line = process.stdout.readline()  # type: ignore[union-attr]
        while line and not line.startswith("["):
            line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            told = process.stderr.read().strip().splitlines() or ["nothing"]  # type: ignore[union-attr]
            raise RuntimeError(f"OpenVINO's process ended; it said: {told[-1]}")
        return json.loads(line)

    answer()  # that it has started

    def write(ids: list[list[int]], count: int) -> list[list[int]]:
        process.stdin.write(json.dumps([ids, count]) + "\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return answer()

    return write


def serve(folder: str, converted: str, weights: str, threads: str) -> None:
    """Convert the model if that has not been done, and answer requests."""
    import torch
    from optimum.intel import OVModelForCausalLM

    if not Path(converted).exists():
        exported = OVModelForCausalLM.from_pretrained(
            folder, export=True, compile=False, load_in_8bit=weights == "int8"
        )
        exported.save_pretrained(converted)
    settings = {
        "INFERENCE_NUM_THREADS": int(threads),
        "INFERENCE_PRECISION_HINT": "bf16" if weights == "bfloat16" else "f32",
    }
    model = OVModelForCausalLM.from_pretrained(converted, ov_config=settings)
    model.generation_config.eos_token_id = None
    print("[]", flush=True)
    for line in sys.stdin:
        ids, count = json.loads(line)
        given = torch.tensor(ids)
        whole = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        print(json.dumps(whole[:, given.shape[1] :].tolist()), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
