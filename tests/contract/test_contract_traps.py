"""Each trap of a plugin for transformers, put into a copy of our model, is caught by its test."""

import re

import pytest

from .contracts import MODEL, copy_of_model, run_contract

MODELING, BLOCKS, CONFIGURATION = "modeling", "blocks", "configuration"
POSITIONS = "positions"

LEAF_FLAG = (BLOCKS, "is_residual_projection = True", "is_nothing = True")
SCALED = 'if getattr(module, "is_residual_projection", False):'
SCALED_WEIGHT = "init.normal_(module.weight, mean=0.0, std=std)"
VIEWS = """self.o_proj.is_residual_projection = True
        joint = torch.empty(2 * config.hidden_size, config.hidden_size)
        self.k_proj.weight = nn.Parameter(joint[: config.hidden_size])
        self.v_proj.weight = nn.Parameter(joint[config.hidden_size :])
"""
BRANCH = """if hidden_states.max() > 1e9:
            raise ValueError
        shortcut = hidden_states
        gathered"""
# What is wrong: which texts of which files are replaced by what, and the test that must fail.
TRAPS = {
    "tied weights are a list": (
        [(MODELING, '{"lm_head.weight": "model.embed_tokens.weight"}', '["lm_head.weight"]')],
        "test_tied_weights_are_declared[True]",
    ),
    "__init__ does not end with post_init": (
        [
            (
                MODELING,
                "bias=False)\n        self.post_init()\n\n    @dep",
                "bias=False)\n\n    @dep",
            )
        ],
        "test_fresh_weights",
    ),
    "the attention initialises its projection": (
        [
            LEAF_FLAG,
            (MODELING, SCALED, 'if hasattr(module, "o_proj"):'),
            (MODELING, SCALED_WEIGHT, SCALED_WEIGHT.replace("weight", "o_proj.weight")),
        ],
        "test_all_of_init_weights_is_done",
    ),
    "a field is derived before aliases arrive": (
        [
            (
                CONFIGURATION,
                "super().__post_init__(**kwargs)",
                "self._derive()\n        super().__post_init__(**kwargs)",
            )
        ],
        "test_another_name_of_a_field_sets_the_field",
    ),
    "blocks take hidden states by name": (
        [
            (
                MODELING,
                "hidden_states, causal_mask, ",
                "hidden_states=hidden_states, attention_mask=causal_mask, ",
            )
        ],
        "test_hidden_states_and_attentions",
    ),
    "so checkpointed activations have no gradient": (
        [
            (
                MODELING,
                "hidden_states, causal_mask, ",
                "hidden_states=hidden_states, attention_mask=causal_mask, ",
            )
        ],
        "test_lora_learns_from_checkpointed_activations[True]",
    ),
    "attentions are not recorded": (
        [(MODELING, ', "attentions": MultiHeadAttention', "")],
        "test_hidden_states_and_attentions",
    ),
    "keywords do not reach the attention": (
        [
            (
                BLOCKS,
                "if self.training else 0.0,\n            **kwargs,",
                "if self.training else 0.0,",
            )
        ],
        "test_arguments_reach_the_attention_function",
    ),
    "keywords do not reach the loss": (
        [
            (
                MODELING,
                "vocab_size=self.config.vocab_size, **kwargs",
                "vocab_size=self.config.vocab_size",
            )
        ],
        "test_the_loss_is_divided_by_num_items_in_batch",
    ),
    "logits_to_keep has another name": (
        [
            (MODELING, "logits_to_keep: int", "kept: int"),
            (MODELING, "last_hidden_state, logits_to_keep)", "last_hidden_state, kept)"),
        ],
        "test_logits_of_some_tokens",
    ),
    "a later stage adds positions again": (
        [(MODELING, "if first_layer == 0:", "if True:")],
        "test_two_processes_agree_with_one[pp]",
    ),
    "a later stage makes its mask by a layer that it does not hold": (
        [(MODELING, "layer_idx=first_layer,", "layer_idx=0,")],
        "test_two_processes_agree_with_one[pp]",
    ),
    "the last norm has another name": (
        [(MODELING, "self.norm", "self.final_layernorm")],
        "test_two_processes_agree_with_one[pp]",
    ),
    "a layer that narrows is split as one that widens": (
        [(CONFIGURATION, 'mlp.down_proj": "rowwise"', 'mlp.down_proj": "colwise"')],
        "test_two_processes_agree_with_one[tp]",
    ),
    "a layer is missing in the plan": (
        [(CONFIGURATION, '"layers.*.mlp.up_proj": "colwise",', "")],
        "test_every_linear_layer_is_in_the_plan",
    ),
    "the code imports its package by name": (
        [(MODELING, "from .positions", "from PACKAGE.positions")],
        "test_code_outside_transformers_travels_with_the_model",
    ),
    "only the saved class is in auto_map": (
        [(CONFIGURATION, "self.auto_map = dict(_AUTO_MAP)", "")],
        "test_code_outside_transformers_travels_with_the_model",
    ),
    "a buffer is not saved": (
        [
            (
                MODELING,
                "self.gradient_checkpointing = False",
                'self.register_buffer("scale", torch.tensor(2.0), persistent=False)',
            )
        ],
        "test_a_model_reloads_bit_by_bit",
    ),
    "a mask is filled with minus infinity": (
        [
            (
                BLOCKS,
                "scores = scores + attention_mask",
                "scores = scores.masked_fill(attention_mask < 0, -math.inf)",
            )
        ],
        "test_padding_changes_nothing[left-eager]",
    ),
    "a norm is not called one": (
        [(BLOCKS, "input_layernorm", "ln_1")],
        "test_what_is_decayed",
    ),
    "PEFT knows no defaults": (
        [(CONFIGURATION, "_offer_peft_defaults(self.model_type)", "")],
        "test_lora_trains_and_reloads[default]",
    ),
    "the last position is not checked": (
        [(POSITIONS, "total_length > limit:\n        raise", "False:\n        raise")],
        "test_past_the_last_position_the_error_is_clear",
    ),
    "positions count padding": (
        [(POSITIONS, "if padding_mask is None:\n        return", "if True:\n        return")],
        "test_padding_changes_nothing[left-sdpa]",
    ),
    "and in steps": (
        [(POSITIONS, "if padding_mask is None:\n        return", "if True:\n        return")],
        "test_padded_steps_need_no_positions",
    ),
    "no table has the name": (
        [(MODELING, "_table.setdefault(", "dict().setdefault(")],
        "test_tables_know_the_class",
    ),
    "so smoothed labels are not shifted": (
        [(MODELING, "_table.setdefault(", "dict().setdefault(")],
        "test_smoothed_labels_are_shifted",
    ),
    "linear layers are of a subclass": (
        [
            (BLOCKS, "nn.Linear(", "Linear("),
            (BLOCKS, "class LayerNorm", "class Linear(nn.Linear):\n    pass\n\n\nclass LayerNorm"),
        ],
        "test_matrices_of_blocks_are_plain_linear_layers",
    ),
    "unknown keywords are swallowed": (
        [(POSITIONS, "if not unknown:", "if True:")],
        "test_unknown_arguments_are_refused",
    ),
    "parameters are views of one storage": (
        [(BLOCKS, "self.o_proj.is_residual_projection = True", VIEWS)],
        "test_safetensors_writes_the_model",
    ),
    "the cache is swallowed": (
        [
            (
                MODELING,
                "position_ids=position_ids,\n            cache=cache,",
                "position_ids=position_ids,",
            )
        ],
        "test_steps_with_a_cache_equal_one_pass[dynamic-no]",
    ),
    "so generated text is wrong": (
        [
            (
                MODELING,
                "position_ids=position_ids,\n            cache=cache,",
                "position_ids=position_ids,",
            )
        ],
        "test_greedy_generation_of_a_padded_batch[static]",
    ),
    "packed texts see each other": (
        [(MODELING, "position_ids=position_ids,\n            layer_idx", "layer_idx")],
        "test_packed_texts_equal_single_texts[sdpa]",
    ),
    "blocks keep their activations": (
        [(BLOCKS, "TransformerBlock(GradientCheckpointingLayer)", "TransformerBlock(nn.Module)")],
        "test_checkpointed_activations[False]",
    ),
    "a value of a tensor decides": (
        [(BLOCKS, "shortcut = hidden_states\n        gathered", BRANCH)],
        "test_it_compiles_as_one_graph",
    ),
    "a new tensor has a dtype of its own": (
        [
            (
                MODELING,
                "hidden_states = self.dropout(hidden_states)",
                "hidden_states = self.dropout(hidden_states) + torch.zeros(1)",
            )
        ],
        "test_half_precision_is_close",
    ),
    "the embedding is scaled outside of it": (
        [
            (
                MODELING,
                "inputs_embeds = self.embed_tokens(input_ids)",
                "inputs_embeds = 2 * self.embed_tokens(input_ids)",
            )
        ],
        "test_embeddings_in_place_of_ids",
    ),
}


def test_what_is_replaced_is_there():
    """Whoever changes the model changes the traps too."""
    for trap, (replaced, _) in TRAPS.items():
        for kind, old, _ in replaced:
            assert old in (MODEL / f"{kind}_scratch_gpt.py").read_text(), trap


@pytest.mark.release
def test_a_renamed_copy_passes(tmp_path, monkeypatch, logged_warnings):
    """So whatever fails below does by what was changed."""
    monkeypatch.syspath_prepend(tmp_path)
    name = copy_of_model(tmp_path / "renamed", [])
    reports = run_contract(tmp_path, name, "-m", "not contract_slow")
    assert not reports.failed


@pytest.mark.release
@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_caught(trap, tmp_path, monkeypatch, logged_warnings):
    replaced, test = TRAPS[trap]
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / f"broken{list(TRAPS).index(trap)}"
    name = copy_of_model(package, replaced)
    reports = run_contract(tmp_path, name, "-k", re.sub(r"\[.*", "", test))
    assert test in {failed.split("::")[1] for failed in reports.failed}
