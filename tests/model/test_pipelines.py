"""transformers' pipelines run on a converted model, and neither warn nor log an error."""

import pytest
from transformers import AutoTokenizer, pipeline

from hf_scratch_gpt import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
    ScratchGPTTokenizer,
)
from hf_scratch_gpt.checkpoints.commands import convert_command as convert

TEXTS = ["The cat", "A longer text, with a mat"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory, openai_tiny):
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    assert convert([str(openai_tiny), str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tokenizer(converted):
    return AutoTokenizer.from_pretrained(converted)


@pytest.mark.parametrize("do_sample", [False, True])
def test_text_generation(converted, do_sample):
    write = pipeline("text-generation", str(converted))
    assert type(write.model) is ScratchGPTForCausalLM
    assert type(write.tokenizer) is ScratchGPTTokenizer
    alone = [write(text, max_new_tokens=5, do_sample=do_sample) for text in TEXTS]
    batched = write(TEXTS, max_new_tokens=5, do_sample=do_sample, batch_size=2)
    for text, one, of_batch in zip(TEXTS, alone, batched, strict=True):
        assert one[0]["generated_text"].startswith(text)
        if not do_sample:
            assert one == of_batch


def test_feature_extraction(converted, tokenizer):
    model = ScratchGPTModel.from_pretrained(converted)
    features = pipeline("feature-extraction", model=model, tokenizer=tokenizer)(TEXTS[0])
    assert len(features[0]) == len(tokenizer(TEXTS[0]).input_ids)
    assert len(features[0][0]) == 48


def test_text_classification(converted, tokenizer):
    config = ScratchGPTConfig.from_pretrained(converted, num_labels=3)
    model = ScratchGPTForSequenceClassification(config).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    alone = [classify(text)[0] for text in TEXTS]
    batched = classify(TEXTS, batch_size=2)
    for one, of_batch in zip(alone, batched, strict=True):
        assert one["label"] == of_batch["label"]
        assert one["score"] == pytest.approx(of_batch["score"], abs=1e-5)


def test_token_classification(converted, tokenizer):
    config = ScratchGPTConfig.from_pretrained(converted, num_labels=3)
    model = ScratchGPTForTokenClassification(config).eval()
    mark = pipeline("token-classification", model=model, tokenizer=tokenizer)
    marks = mark(TEXTS[1])
    assert {mark["entity"] for mark in marks} <= {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert len(marks) == len(tokenizer(TEXTS[1]).input_ids)
