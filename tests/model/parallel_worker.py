"""Run in two processes by test_parallel.py: saved models, split over the processes.

The single process's logits and generated ids were computed by the test and lie in `expected.pt`.
"""

import gc
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from hf_scratch_gpt import ScratchGPTForCausalLM


def compare_all(kinds: Sequence[str], folders: Sequence[Path]) -> None:
    """Compare what this process sees of each model with the expected results."""
    for folder in folders:
        for kind in kinds:
            _compare(kind, folder)
            # A model of several stages refers to itself and to the process groups, whose threads
            # live as long as they do. If these are ended by an interpreter that is ending itself,
            # it may abort.
            gc.collect()
            print(f"{folder.name} {kind} agrees", flush=True)
    dist.destroy_process_group()


def _compare(kind: str, folder: Path) -> None:
    """Compare logits and generated ids; rank 0 saves the model again."""
    expected = torch.load(folder / "expected.pt")
    model = ScratchGPTForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(**{f"{kind}_size": 2})
    )
    inputs = {"input_ids": expected["input_ids"], "attention_mask": expected["attention_mask"]}
    kept = expected["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs).logits
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    torch.testing.assert_close(logits[kept], expected["logits"][kept], atol=1e-5, rtol=0)

    generated = model.generate(**inputs, **expected["options"])
    assert torch.equal(generated.sequences, expected["sequences"]), generated.sequences
    torch.testing.assert_close(
        torch.stack(generated.logits), expected["step_logits"], atol=1e-5, rtol=0
    )
    if kind != "pp":
        model.save_pretrained(folder / kind)
    dist.barrier()
