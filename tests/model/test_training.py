"""Trainer and PEFT take the model for one of transformers' own."""

import peft
import pytest
import torch
from packaging import version
from peft import AdaptionPromptConfig, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import constants
from torch import nn
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from hf_scratch_gpt import ScratchGPTForCausalLM

from ..models import CLASSES, random_ids, random_model

# PEFT asks by a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def trainer(model, rows, folder, **arguments):
    """A Trainer on `rows`, which hold labels of different lengths."""
    quiet = dict(report_to="none", disable_tqdm=True, use_cpu=True, save_strategy="no")
    steps = dict(logging_steps=1, max_grad_norm=0.0, learning_rate=1e-2)
    arguments = TrainingArguments(output_dir=folder, **quiet, **steps, **arguments)
    return Trainer(model=model, train_dataset=rows, args=arguments)


def uneven_rows(count):
    rows = []
    for row in range(count):
        ids = random_ids(10)
        labels = ids.clone()
        labels[: 2 * row] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("batch", "steps", "chunked"), [(4, 1, False), (1, 4, False), (2, 2, False), (1, 4, True)]
)
def test_trainer_teaches_it_what_it_teaches_gpt2(
    batch, steps, chunked, smoothing, small_gpt2, tmp_path
):
    """By the loss of the large batch, of shifted labels, smoothed or not."""
    rows, ids, logits, losses = uneven_rows(4), random_ids(1, 12), [], []
    no_dropout = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    for model_class, sizes in [(GPT2LMHeadModel, (4, 1)), (ScratchGPTForCausalLM, (batch, steps))]:
        model = model_class.from_pretrained(small_gpt2, **no_dropout)
        model.loss_type = "ForCausalLM"  # which GPT-2 does not say of itself
        model.config.chunked_loss = chunked
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        options = dict(zip(names, sizes, strict=True), label_smoothing_factor=smoothing)
        run = trainer(model, rows, tmp_path, max_steps=2, optim="sgd", **options)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
        logits.append(model.eval()(ids).logits)
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_class", CLASSES[1:])
def test_trainer_keeps_the_column_of_token_types(model_class, tmp_path):
    columns = ("input_ids", "token_type_ids", "labels", "start_positions")
    rows = [dict.fromkeys((*columns, "text"), random_ids(4))]
    batch = next(iter(trainer(random_model(model_class), rows, tmp_path).get_train_dataloader()))
    assert "token_type_ids" in batch
    assert "text" not in batch


def test_training_learns_one_batch_by_heart_from_checkpointed_activations(tmp_path):
    model = random_model(ScratchGPTForCausalLM, drop_rate=0.0)
    options = dict(per_device_train_batch_size=2, max_steps=150, activation_checkpointing=True)
    run = trainer(model, uneven_rows(2), tmp_path, lr_scheduler_type="constant", **options)
    run.train()
    assert run.state.log_history[-2]["loss"] < 0.1


def test_norms_and_biases_are_not_decayed(tmp_path):
    model = random_model(ScratchGPTForCausalLM)
    optimizer = trainer(model, uneven_rows(1), tmp_path, weight_decay=0.1).create_optimizer()
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed = {
        names[parameter]
        for group in optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    matrices = {name for name in names.values() if not name.endswith("bias") and "norm" not in name}
    assert decayed == matrices
    assert len(matrices) == 2 + 3 * 6


def test_lora_trains_with_peft_defaults_and_reloads(tmp_path):
    base = random_model(ScratchGPTForCausalLM, drop_rate=0.0)
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM"))
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert {name.split(".")[-4] for name in trained} == {"q_proj", "v_proj"}
    rows = uneven_rows(2)
    run = trainer(adapted, rows, tmp_path, per_device_train_batch_size=2, max_steps=5)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]

    adapted.save_pretrained(tmp_path / "adapter")
    again = ScratchGPTForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(again, tmp_path / "adapter")
    ids = random_ids(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted.eval()(ids).logits)
        merged = again.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, atol=1e-5, rtol=0)


def llama():
    """Of the shapes of `random_model`, and one matrix more in each layer, `gate_proj`."""
    sizes = dict(vocab_size=97, hidden_size=32, intermediate_size=128, num_attention_heads=4)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, attention_bias=True, **sizes))


@pytest.mark.parametrize("method", ["LORA", "GLORA", "IA3", "OSF", "BEFT", "VERA"])
def test_peft_adapts_by_default_what_it_adapts_of_llama(method):
    adapted, ids = [], random_ids(1, 6)
    for model in (llama(), random_model(ScratchGPTForCausalLM)):
        model = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[method](task_type="CAUSAL_LM"))
        layers = [n for n, part in model.named_modules() if isinstance(part, BaseTunerLayer)]
        adapted.append({name for name in layers if "gate_proj" not in name})  # Llama's alone
        model(input_ids=ids, labels=ids).loss.backward()
        assert any(parameter.grad is not None for parameter in model.parameters())
    assert adapted[0] == adapted[1]


def test_peft_has_defaults_for_every_method_that_has_them_for_llama():
    random_model(ScratchGPTForCausalLM).config.to_dict()
    tables = {n: t for n, t in vars(constants).items() if n.startswith("TRANSFORMERS_MODELS_TO_")}
    lacking = [n for n, table in tables.items() if "llama" in table and "scratch_gpt" not in table]
    assert len(tables) > 30
    assert not lacking


@torch.no_grad()
def test_adaption_prompts_do_what_they_do_to_gpt2(small_gpt2):
    results, ids = [], random_ids(2, 6)
    for model_class in (GPT2LMHeadModel, ScratchGPTForCausalLM):
        model = model_class.from_pretrained(small_gpt2)
        results.append(model(ids).logits)
        prompt = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=2)
        model = get_peft_model(model, prompt).eval()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "adaption_" in name:
                parameter.normal_()
        results.append(model(input_ids=ids).logits)
    plain, expected, _, logits = results
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (logits - plain).abs().max() > 0.1


def test_tools_that_ask_for_the_exact_type_see_as_many_linear_layers_as_in_llama():
    """bitsandbytes, GLoRA and FLOP counters ask so, and pass over a subclass in silence."""
    counts = [
        sum(type(part) is nn.Linear and "gate_proj" not in name for name, part in m.named_modules())
        for m in (llama(), random_model(ScratchGPTForCausalLM))
    ]
    assert counts == [3 * 6 + 1] * 2


def test_transformers_loads_an_adapter_folder(saved_model, tmp_path):
    base = ScratchGPTForCausalLM.from_pretrained(saved_model)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    again = ScratchGPTForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(1, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted.eval()(ids).logits)


def test_an_adapter_of_gpt2_is_refused_with_the_remedy(small_gpt2, tmp_path):
    gpt2 = GPT2LMHeadModel.from_pretrained(small_gpt2)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(gpt2, lora).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"modules that transformers' GPT-2 has .* merge it"):
        ScratchGPTForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_prefix_tuning_hands_its_cache_over(gpt2_folder):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = []
    for model_class in (GPT2LMHeadModel, ScratchGPTForCausalLM):
        torch.manual_seed(0)
        tuned.append(get_peft_model(model_class.from_pretrained(gpt2_folder), config).eval())
    ids = random_ids(2, 6)
    with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
        expected, logits = (model(input_ids=ids).logits for model in tuned)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (logits - tuned[1].get_base_model()(ids).logits).abs().max() > 0.1


@pytest.mark.skipif(version.parse(peft.__version__) >= version.parse("0.22"), reason="mended there")
def test_generate_with_a_prefix_that_peft_hands_over_by_the_old_name_alone_is_refused():
    """Of two caches one would be dropped, and the text would be that of the model untuned."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = get_peft_model(random_model(ScratchGPTForCausalLM), config).eval()
    with pytest.raises(ValueError, match="Both `past_key_values` and `cache` are set"):
        tuned.generate(input_ids=random_ids(1, 6), max_new_tokens=4, do_sample=False)
