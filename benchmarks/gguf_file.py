"""A file of llama.cpp's, made of a GPT-2 of transformers'."""

from pathlib import Path

import numpy
from transformers import GPT2LMHeadModel

# llama.cpp's names of a block's modules.
GGUF_NAMES = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(folder: Path, path: Path, kind: str) -> None:
    """Write the GPT-2 in `folder` as llama.cpp reads it, matrices as `kind`."""
    import gguf

    model = GPT2LMHeadModel.from_pretrained(folder)
    config, form = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(config.vocab_size - 1)
    names = {
        "wte": "token_embd",
        "lm_head": "output",
        "wpe": "position_embd",
        "ln_f": "output_norm",
    }
    for i in range(config.n_layer):
        names |= {f"h.{i}.{name}": f"blk.{i}.{ggufs}" for name, ggufs in GGUF_NAMES.items()}
    for name, tensor in model.state_dict().items():
        module, _, part = name.removeprefix("transformer.").rpartition(".")
        is_matrix = tensor.ndim == 2 and module != "wpe"
        tensor = tensor.T if is_matrix and module.startswith("h.") else tensor
        values = numpy.ascontiguousarray(tensor.float().numpy())
        if is_matrix and kind != "F32":
            values = gguf.quants.quantize(values, form)
            writer.add_tensor(f"{names[module]}.{part}", values, raw_dtype=form)
        else:
            writer.add_tensor(f"{names[module]}.{part}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
