"""transformers' pipelines run on a converted model, and neither warn nor log an error."""

import pytest
from transformers import pipeline

from hf_scratch_gpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTModel,
    ScratchGPTTokenizer,
)

TEXTS = ["The cat", "A longer text, with a mat"]


@pytest.mark.parametrize("do_sample", [False, True])
def test_text_generation(converted_tiny, do_sample):
    write = pipeline("text-generation", str(converted_tiny))
    assert type(write.model) is ScratchGPTForCausalLM
    assert type(write.tokenizer) is ScratchGPTTokenizer
    alone = [write(text, max_new_tokens=5, do_sample=do_sample) for text in TEXTS]
    batched = write(TEXTS, max_new_tokens=5, do_sample=do_sample, batch_size=2)
    for text, one, of_batch in zip(TEXTS, alone, batched, strict=True):
        assert one[0]["generated_text"].startswith(text)
        if not do_sample:
            assert one == of_batch


def test_feature_extraction(converted_tiny, tiny_tokenizer):
    model = ScratchGPTModel.from_pretrained(converted_tiny)
    features = pipeline("feature-extraction", model=model, tokenizer=tiny_tokenizer)(TEXTS[0])
    assert len(features[0]) == len(tiny_tokenizer(TEXTS[0]).input_ids)
    assert len(features[0][0]) == 48


def test_text_classification(converted_tiny, tiny_tokenizer):
    config = ScratchGPTConfig.from_pretrained(converted_tiny, num_labels=3)
    model = ScratchGPTForSequenceClassification(config).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tiny_tokenizer)
    alone = [classify(text)[0] for text in TEXTS]
    batched = classify(TEXTS, batch_size=2)
    for one, of_batch in zip(alone, batched, strict=True):
        assert one["label"] == of_batch["label"]
        assert one["score"] == pytest.approx(of_batch["score"], abs=1e-5)
