"""The model split over two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .subject import PADDING, Subject, left_padded


@pytest.mark.contract_slow
@pytest.mark.parametrize("kind", ["tp", "pp"])
def test_two_processes_agree_with_one(subject: Subject, kind: str, tmp_path: Path) -> None:
    """Tensor (tp) and pipeline (pp) parallelism give the logits and the text of one process.

    Serves large models. Cure: for tp, `base_model_tp_plan`, query, key and value as layers of
    their own, and -1 for the number of heads in `view`; for pp, `base_model_pp_plan`, and nothing
    added to `inputs_embeds` in later stages, which get hidden states by that name.
    """
    config = subject.config()
    if not getattr(config, f"base_model_{kind}_plan"):
        pytest.fail(f"the configuration has no base_model_{kind}_plan")
    model = subject.random()
    model.save_pretrained(tmp_path)
    ids, mask = left_padded(model)
    inputs = {"input_ids": ids, "attention_mask": mask}
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PADDING}
    with torch.no_grad():
        expected = {"logits": model(**inputs).logits, "generated": model.generate(**inputs, **how)}
    torch.save({**expected, "inputs": inputs, "how": how}, tmp_path / "expected.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = ["-m", f"{__package__}.two_processes", kind, subject.name, str(tmp_path)]
    paths = os.pathsep.join(filter(None, sys.path))
    run = subprocess.run(
        [*command, *worker],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
