import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import GPT2Config

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.model.presets_scratch_gpt import PRESETS


def test_presets_multiply_out_and_take_overrides_under_any_name():
    assert len(PRESETS) == 12
    for name in PRESETS:
        config = ScratchGPTConfig.from_preset(name)
        assert config.head_dim * config.num_attention_heads == config.hidden_size
        assert config.intermediate_size == 4 * config.hidden_size
    config = ScratchGPTConfig.from_preset("gpt3-xl", n_layer=2, context_length=512)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (2, 512)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match=r"'gpt2-mediun'.*gpt2-medium"):
        ScratchGPTConfig.from_preset("gpt2-mediun")


def test_aliases_of_gpt2_and_of_the_textbook_set_and_read_the_same_fields():
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    standard = ScratchGPTConfig(max_position_embeddings=128, intermediate_size=200, **sizes)
    gpt2 = ScratchGPTConfig(n_embd=64, n_layer=2, n_head=4, n_positions=128, n_inner=200)
    textbook = ScratchGPTConfig(
        emb_dim=64, n_layers=2, n_heads=4, context_length=128, intermediate_size=200
    )
    assert standard.to_dict() == gpt2.to_dict() == textbook.to_dict()
    assert (standard.n_embd, standard.n_ctx, standard.emb_dim, standard.n_heads) == (64, 128, 64, 4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"drop_rate": 0.3},
            dict(embedding_dropout=0.3, hidden_dropout=0.3, attention_dropout=0.3, drop_rate=0.3),
        ),
        ({"n_embd": 64, "n_head": 4, "n_inner": None}, {"intermediate_size": 256}),
        ({"n_ctx": 1024, "n_positions": 64}, {"max_position_embeddings": 64}),
        ({}, {"eos_token_id": 50256}),
        ({"vocab_size": 100}, {"eos_token_id": None}),
        ({"vocab_size": 100, "eos_token_id": 99}, {"eos_token_id": 99}),
    ],
    ids=str,
)
def test_fields_that_follow_from_others(fields, expected):
    config = ScratchGPTConfig(**fields)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, r"hidden_size=30.*4.*multiple"),
        ({"n_layer": 0}, r"num_hidden_layers=0.*below 1"),
        ({"vocab_size": -5}, r"vocab_size=-5.*below 1"),
        ({"drop_rate": 1.5}, r"embedding_dropout=1.5.*0 to 1"),
        ({"hidden_act": "gelo"}, r"hidden_act='gelo'.*gelu_new"),
        ({"head_dim": 80}, r"head_dim=80.*leave it out"),
        ({"drop_rate": 0.3, "hidden_dropout": 0.2}, r"drop_rate=0.3 and hidden_dropout=0.2"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps=0.0.*not above 0"),
        ({"add_cross_attention": True}, r"add_cross_attention=True.*drop the field"),
        ({"n_embd": 64, "emb_dim": 96}, r"n_embd=64 and emb_dim=96.*give one"),
        ({"hidden_size": 96, "n_embd": 64}, r"hidden_size=96 and n_embd=64.*give one"),
        # the default, said by name
        ({"hidden_size": 768, "n_embd": 64}, r"hidden_size=768 and n_embd=64.*give one"),
    ],
)
def test_bad_values_are_refused_with_value_limit_and_remedy(fields, message):
    with pytest.raises(ValueError, match=message):
        ScratchGPTConfig(**fields)


@pytest.mark.parametrize("way", ["preset", "update", "load"])
def test_two_names_with_two_values_are_refused_wherever_fields_are_set(way, tmp_path):
    ScratchGPTConfig().save_pretrained(tmp_path)
    set_fields = {
        "preset": lambda **fields: ScratchGPTConfig.from_preset("gpt2", **fields),
        "update": lambda **fields: ScratchGPTConfig().update(fields),
        "load": lambda **fields: ScratchGPTConfig.from_pretrained(tmp_path, **fields),
    }[way]
    with pytest.raises(ValueError, match=r"hidden_size=64 and n_embd=96 .* give one"):
        set_fields(hidden_size=64, n_embd=96)
    with pytest.raises(StrictDataclassFieldValidationError, match="'hidden_size' expected int"):
        set_fields(n_embd="64")


@pytest.mark.parametrize("way", ["set", "update", "load ours", "load gpt2"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"n_embd": 64, "n_head": 4}, {"intermediate_size": 256}),
        ({"n_inner": 100, "n_embd": 64, "n_head": 4}, {"intermediate_size": 100}),
        ({"hidden_size": 64, "n_head": 4, "n_inner": 3072}, {"intermediate_size": 3072}),
        ({"intermediate_size": None}, {"intermediate_size": 3072}),
        ({"vocab_size": 100}, {"eos_token_id": None, "pad_token_id": None}),
        ({"drop_rate": 0.0}, {"embedding_dropout": 0.0, "hidden_dropout": 0.0}),
        ({"context_length": 64}, {"max_position_embeddings": 64}),
    ],
    ids=str,
)
def test_fields_that_are_set_later_take_along_what_follows_from_them(
    way, fields, expected, tmp_path
):
    config = ScratchGPTConfig()
    at_once = dict(reversed(fields.items()))  # of which the order does not matter
    if way == "set":
        for name, value in fields.items():
            setattr(config, name, value)
    elif way == "update":
        config.update(at_once)
    else:
        (config if way == "load ours" else GPT2Config()).save_pretrained(tmp_path)
        config = ScratchGPTConfig.from_pretrained(tmp_path, **at_once)
    config.check()
    assert {name: getattr(config, name) for name in expected} == expected


def test_fields_changed_later_are_checked_when_a_model_is_made():
    config = ScratchGPTConfig(hidden_size=32, num_attention_heads=4)
    config.num_attention_heads = 5
    with pytest.raises(ValueError, match="hidden_size=32"):
        ScratchGPTForCausalLM(config)


def test_save_and_load_give_the_same_configuration(tmp_path):
    config = ScratchGPTConfig(
        n_embd=48, n_head=3, qkv_bias=False, fused_kernels=False, num_labels=5, vocab_size=300
    )
    config.save_pretrained(tmp_path)
    loaded = ScratchGPTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert ScratchGPTConfig.from_pretrained(tmp_path, n_layer=2).num_hidden_layers == 2


def test_first_of_several_ends_pads(tmp_path):
    GPT2Config(vocab_size=100, eos_token_id=[97, 98], bos_token_id=97).save_pretrained(tmp_path)
    config = ScratchGPTConfig.from_pretrained(tmp_path)
    assert (config.eos_token_id, config.pad_token_id) == ([97, 98], 97)


def test_gpt2_file_is_read_as_ours_without_a_warning(tmp_path):
    GPT2Config(n_layer=5, n_inner=100, resid_pdrop=0.2, n_ctx=7).save_pretrained(tmp_path)
    config = ScratchGPTConfig.from_pretrained(tmp_path)
    assert config.model_type == "scratch_gpt"
    assert (config.num_hidden_layers, config.intermediate_size) == (5, 100)
    assert config.max_position_embeddings == 1024
    assert config.hidden_dropout == 0.2
    assert config.pad_token_id == 50256
    assert not [name for name in config.to_dict() if name.startswith(("n_", "summary"))]
