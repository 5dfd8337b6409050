"""Run under torchrun by test_parallel.py: one saved model, split over the processes."""

import gc
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from .subject import Subject


def main() -> None:
    """Compare this process's logits and text with those of the model in one process."""
    kind, name, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    logging.disable_progress_bar()
    expected = torch.load(folder / "expected.pt")
    inputs, kept = expected["inputs"], expected["inputs"]["attention_mask"].bool()
    sizes: dict[str, Any] = {f"{kind}_size": 2}
    model: Any = Subject.of(name).model_class.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes)
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    torch.testing.assert_close(logits[kept], expected["logits"][kept], atol=1e-4, rtol=1e-4)
    generated = model.generate(**inputs, **expected["how"])
    assert torch.equal(generated, expected["generated"]), "generate writes something else"
    dist.barrier()
    # What refers to the process groups must go before them, or the interpreter may abort.
    del model
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
