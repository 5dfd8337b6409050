"""Where models of transformers' own fall short of the contract, and why."""

SWALLOWED = "forward(**kwargs) takes what nobody reads"
CONV1D = "its matrices are transformers' Conv1D, which is transposed and no nn.Linear"
NO_PLAN = "it has no parallel plan, as query, key and value are one matrix"
COUNTED = "positions without position_ids are counted on the row, padding included"

LATER_MASK = (
    "a later stage makes its mask for the first layer of the cache, which is empty there; "
    "`generate` goes wrong where a batch is padded"
)

UNKNOWN = "test_clients.py::test_unknown_arguments_are_refused"
PIPELINE = "test_parallel.py::test_two_processes_agree_with_one[pp]"

SHORTFALLS = {
    "LlamaForCausalLM": {UNKNOWN: SWALLOWED, PIPELINE: LATER_MASK},
    "Qwen3ForCausalLM": {UNKNOWN: SWALLOWED, PIPELINE: LATER_MASK},
    "PhiForCausalLM": {
        UNKNOWN: SWALLOWED,
        PIPELINE: "its last norm is called `final_layernorm`, so each stage applies it",
    },
    "Olmo2ForCausalLM": {
        UNKNOWN: SWALLOWED,
        PIPELINE: LATER_MASK,
        "test_training.py::test_lora_trains_and_reloads[default]": "PEFT's tables lack it",
    },
    "GPT2LMHeadModel": {
        UNKNOWN: SWALLOWED,
        "test_padding_and_caches.py::test_padding_changes_nothing[left-eager]": COUNTED,
        "test_padding_and_caches.py::test_padding_changes_nothing[left-sdpa]": COUNTED,
        "test_padding_and_caches.py::test_padded_steps_need_no_positions": COUNTED,
        "test_padding_and_caches.py::test_the_cache_is_the_fourth_argument": (
            "its second argument is the cache"
        ),
        "test_padding_and_caches.py::test_past_the_last_position_the_error_is_clear": (
            "the embedding raises a bare IndexError"
        ),
        "test_structure.py::test_matrices_of_blocks_are_plain_linear_layers": CONV1D,
        "test_structure.py::test_every_linear_layer_is_in_the_plan": NO_PLAN,
        "test_parallel.py::test_two_processes_agree_with_one[tp]": NO_PLAN,
        PIPELINE: NO_PLAN,
    },
}
