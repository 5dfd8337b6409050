"""The GPT-2 that comes with this package: tiny, in OpenAI's format, with OpenAI's logits of it."""

from pathlib import Path

import numpy as np
import torch

from ..files import destination
from ..model.modeling_scratch_gpt import ScratchGPTForCausalLM
from .convert import convert
from .readers import open_source

# A checkpoint that TensorFlow wrote, of random weights, and a vocabulary of 400 tokens.
BUNDLED = Path(__file__).parents[1] / "openai-tiny"
# Token ids, and the logits that OpenAI's published code computes of them with these weights.
LOGITS = "reference_logits.npz"


@torch.no_grad()
def convert_bundled(out: Path) -> float:
    """Convert the bundled GPT-2 to the folder `out`, and compare its logits with OpenAI's.

    Returns:
        The largest difference.

    Raises:
        ValueError: `out` cannot be made.
    """
    convert(open_source(str(BUNDLED)), destination(out, overwrite=True))
    model = ScratchGPTForCausalLM.from_pretrained(out)
    reference = np.load(BUNDLED / LOGITS)
    logits = model(torch.from_numpy(reference["input_ids"]).long()).logits  # (B, T, V)
    return float((logits - torch.from_numpy(reference["logits"])).abs().max())
