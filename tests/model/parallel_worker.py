"""Run under torchrun by test_parallel.py: one saved model, split over the processes.

The single process's logits and generated ids were computed by the test and lie in `expected.pt`.
"""

import gc
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from hf_scratch_gpt import ScratchGPTForCausalLM


def main() -> None:
    """Compare what this process sees with the expected results; rank 0 saves the model again."""
    kind, folder = sys.argv[1], Path(sys.argv[2])
    expected = torch.load(folder / "expected.pt")
    sizes = {"tp": {"tp_size": 2}, "pp": {"pp_size": 2}, "fsdp": {"fsdp_size": 2}}[kind]
    model = ScratchGPTForCausalLM.from_pretrained(
        folder / "model", distributed_config=DistributedConfig(**sizes)
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
        model.save_pretrained(folder / "again")
    dist.barrier()
    # A model of several stages refers to itself and to the process groups, whose threads live as
    # long as they do. If these are ended by an interpreter that is ending itself, it may abort.
    del model, generated
    gc.collect()
    dist.destroy_process_group()
    print(f"{kind} agrees")


if __name__ == "__main__":
    main()
