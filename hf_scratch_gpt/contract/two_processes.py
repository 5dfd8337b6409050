"""Run under torchrun by test_parallel.py: one saved model, split over the processes."""

import gc
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from .subject import Subject


def compare(kind: str, subject: Subject, folder: Path) -> None:
    """Assert that this process sees the logits and the text of the model in one process."""
    expected = torch.load(folder / "expected.pt")
    inputs, kept = expected["inputs"], expected["inputs"]["attention_mask"].bool()
    sizes: dict[str, Any] = {f"{kind}_size": 2}
    model: Any = subject.model_class.from_pretrained(
        folder, distributed_config=DistributedConfig(**sizes)
    )
    with torch.no_grad():
        logits = model(**inputs).logits
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    torch.testing.assert_close(logits[kept], expected["logits"][kept], atol=1e-4, rtol=1e-4)
    generated = model.generate(**inputs, **expected["how"])
    assert torch.equal(generated, expected["generated"]), "generate writes something else"


def main() -> None:
    """Compare each kind of parallelism; what went wrong is written to a file of its name."""
    name, folder, *kinds = sys.argv[1:]
    logging.disable_progress_bar()
    for kind in kinds:
        report = ""
        try:
            compare(kind, Subject.of(name), Path(folder))
        except Exception:
            report = traceback.format_exc(limit=-4)
        Path(folder, f"{kind}-{os.environ['RANK']}.txt").write_text(report)
        # What refers to the process groups must go before them, or the interpreter may abort.
        gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
