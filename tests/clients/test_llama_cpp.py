"""llama.cpp's converter on an export; `LLAMA_CPP_DIR` names a checkout of its sources."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hf_scratch_gpt import ScratchGPTForCausalLM, ScratchGPTTokenizer
from hf_scratch_gpt.checkpoints.convert import export

from ..models import random_model

# The converter knows GPT-2's vocabulary by what it makes of a text.
NEEDED = ("LLAMA_CPP_DIR", "GPT2_RELEASE_DIR")


@pytest.mark.clients
def test_the_converter_keeps_every_tensor(tmp_path, record):
    if lacking := [name for name in NEEDED if name not in os.environ]:
        pytest.skip(f"{' and '.join(lacking)} must name folders")
    from gguf import GGUFReader

    sources, release = (Path(os.environ[name]) for name in NEEDED)
    torch.manual_seed(0)
    folder, out, file = tmp_path / "ours", tmp_path / "gpt2", tmp_path / "model.gguf"
    random_model(ScratchGPTForCausalLM, vocab_size=50257).save_pretrained(folder)
    tokenizer = ScratchGPTTokenizer(str(release / "encoder.json"), str(release / "vocab.bpe"))
    tokenizer.save_pretrained(folder)
    export(folder, out)
    command = [sys.executable, str(sources / "convert_hf_to_gguf.py"), str(out)]
    subprocess.run([*command, "--outfile", str(file), "--outtype", "f32"], check=True)
    exported = load_file(out / "model.safetensors")
    written = [np.asarray(tensor.data) for tensor in GGUFReader(file).tensors]
    kept = [
        any(np.array_equal(data, weight) or np.array_equal(data, weight.T) for data in written)
        for weight in exported.values()
    ]
    assert all(kept)
    assert len(written) == len(kept)
    record("gguf", "llama.cpp's converter: tensors", f"{sum(kept)} of {len(kept)} equal")
