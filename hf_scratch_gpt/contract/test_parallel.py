"""The model split over two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .subject import PADDING, Subject, left_padded

KINDS = ("tp", "pp")
LIMIT = 300  # seconds; processes that disagree may wait for each other


def plan(subject: Subject, kind: str) -> object:
    """How the configuration says that the base model is split."""
    return getattr(subject.config(), f"base_model_{kind}_plan", None)


@pytest.fixture(scope="module")
def folder(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With what went wrong in two processes, a file for each kind and process."""
    folder = tmp_path_factory.mktemp("parallel")
    torch.manual_seed(0)
    model = subject.random()
    model.save_pretrained(folder)
    ids, mask = left_padded(model)
    inputs = {"input_ids": ids, "attention_mask": mask}
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PADDING}
    with torch.no_grad():
        expected = {"logits": model(**inputs).logits, "generated": model.generate(**inputs, **how)}
    torch.save({**expected, "inputs": inputs, "how": how}, folder / "expected.pt")
    kinds = [kind for kind in KINDS if plan(subject, kind)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    worker = ["-m", f"{__package__}.two_processes", subject.name, str(folder), *kinds]
    paths = os.pathsep.join(filter(None, sys.path))
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    if kinds:
        with open(folder / "log", "w") as log:
            subprocess.run(
                [*command, *worker],
                env={**os.environ, **settings},
                stdout=log,
                stderr=log,
                timeout=LIMIT,
            )
    return folder


@pytest.mark.contract_slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_agree_with_one(subject: Subject, kind: str, folder: Path) -> None:
    """Tensor (tp) and pipeline (pp) parallelism give the logits and the text of one process.

    Serves large models. Cure: for tp, `base_model_tp_plan`, query, key and value as layers of
    their own, and -1 for the number of heads in `view`; for pp, `base_model_pp_plan`, the last norm
    called `norm`, nothing added to `inputs_embeds` in later stages, which get hidden states by that
    name, and the stage's first layer as `layer_idx` of `create_causal_mask`.
    """
    assert plan(subject, kind), f"the configuration has no base_model_{kind}_plan"
    reports = [file.read_text() for file in sorted(folder.glob(f"{kind}-?.txt"))]
    assert len(reports) == 2, (folder / "log").read_text()[-4000:]
    assert not any(reports), reports[0] or reports[1]
