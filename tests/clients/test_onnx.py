"""Export to ONNX by both of torch's exporters, computed by onnxruntime, beside GPT2LMHeadModel."""

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import GPT2LMHeadModel

from hf_scratch_gpt import ScratchGPTForCausalLM


class Logits(torch.nn.Module):
    """A model as a function of tensors that gives a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


# The exporters warn of their own age, and of each size that a trace takes for fixed.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Exporting aten", "ignore:# The axis name")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize(
    "dynamo", [False, pytest.param(True, marks=pytest.mark.long)], ids=["older", "dynamo"]
)
def test_logits_of_an_export_are_those_of_gpt2(
    dynamo, dtype, ours, gpt2_with_tokenizer, tmp_path, record, logged_warnings
):
    model = Logits(ScratchGPTForCausalLM.from_pretrained(ours))
    ids, mask = torch.randint(0, 398, (3, 9)), torch.ones(3, 9, dtype=torch.int64)
    axes = {"input_ids": {0: "B", 1: "T"}, "attention_mask": {0: "B", 1: "T"}}
    torch.onnx.export(
        model.eval(),
        (ids, mask.to(dtype)),
        tmp_path / "model.onnx",
        input_names=[*axes],
        output_names=["logits"],
        dynamo=dynamo,
        **({"dynamic_shapes": axes} if dynamo else {"dynamic_axes": axes}),
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    # Another size, one text padded on the left and one on the right.
    ids, mask = torch.randint(0, 398, (2, 14)), torch.ones(2, 14, dtype=torch.int64)
    mask[0, :4] = mask[1, -3:] = 0
    fed = {"input_ids": ids.numpy(), "attention_mask": mask.to(dtype).numpy()}
    (logits,) = session.run(None, fed)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    gpt2 = GPT2LMHeadModel.from_pretrained(gpt2_with_tokenizer).eval()
    with torch.no_grad():
        expected = gpt2(ids, attention_mask=mask, position_ids=positions).logits
    read = mask.bool().numpy()
    distance = np.abs(logits[read] - expected.numpy()[read]).max()
    assert distance < 1e-4
    which = "torch.export" if dynamo else "the older exporter"
    record(
        "onnxruntime",
        f"logits of an export by {which}, mask of {str(dtype).removeprefix('torch.')}",
        f"within {distance:.0e} of GPT-2's",
    )
