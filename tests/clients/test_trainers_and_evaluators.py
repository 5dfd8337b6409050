"""Programs that train and measure, once with a model of ours and once with GPT2LMHeadModel."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from hf_scratch_gpt import ScratchGPTForCausalLM

pytestmark = pytest.mark.clients
TEXTS = ["The cat sat on the mat.", "A model that writes what was read.", "1 2 3 4 5 6 7 8"]


@pytest.fixture
def pair(ours, gpt2_with_tokenizer):
    loaded = {ScratchGPTForCausalLM: ours, GPT2LMHeadModel: gpt2_with_tokenizer}
    without = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return [loader.from_pretrained(folder, **without).eval() for loader, folder in loaded.items()]


def test_lm_eval(pair, tiny_tokenizer, record, logged_warnings):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [Instance("loglikelihood", {}, (text[:7], text[7:]), 0) for text in TEXTS]
    # Longer than the 64 positions: read in windows.
    rolling = [Instance("loglikelihood_rolling", {}, (text * 9,), 0) for text in TEXTS]
    found = []
    for model in pair:
        measured = HFLM(pretrained=model, tokenizer=tiny_tokenizer, batch_size=2, device="cpu")
        scores = [score for score, _ in measured.loglikelihood(asked)]
        found.append(
            torch.tensor([*scores, *measured.loglikelihood_rolling(rolling)], dtype=torch.float64)
        )
    far = (found[0] / found[1] - 1).abs().max().item()
    assert far < 1e-5
    record(
        "lm_eval",
        "log-likelihoods of 6 texts, 3 of them longer than the window",
        f"within {far:.0e}",
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of TRL's: transformers renamed options
def test_trl_fine_tunes(pair, tiny_tokenizer, tmp_path, record, logged_warnings):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    pair[1].loss_type = "ForCausalLM"  # GPT-2's own divides by labels before they are shifted
    losses = []
    for model in pair:
        model.config.pad_token_id = tiny_tokenizer.pad_token_id
        settings = SFTConfig(
            str(tmp_path), max_steps=8, learning_rate=1e-2, logging_steps=1, use_cpu=True,
            report_to="none", per_device_train_batch_size=2, max_length=32, bf16=False,
            save_strategy="no",
        )  # fmt: skip
        trainer = SFTTrainer(
            model, settings, train_dataset=Dataset.from_dict({"text": TEXTS * 4}),
            processing_class=tiny_tokenizer,
        )  # fmt: skip
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0][-1] < losses[0][0]
    far = max(abs(a - b) for a, b in zip(*losses, strict=True))
    assert far < 1e-3 * losses[0][0]
    record(
        "trl", "losses of 8 steps of SFTTrainer", f"within {far:.0e} of GPT-2's {losses[1][-1]:.2f}"
    )
