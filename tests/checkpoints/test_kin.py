"""Sources that lie a little beside the formats: each is read right, or refused with what to do."""

import json
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

import hf_scratch_gpt

from ..commands import convert as main
from ..commands import export as export
from ..commands import verify as verify
from ..models import random_gpt2
from .checkpoints import (
    HEADS,
    LAYERS,
    POSITIONS,
    VOCABULARY,
    WIDTH,
    assert_converts,
    assert_refused,
    forward,
    nanogpt,
    random_weights,
    write_hf,
)

TEXT = "to be:\n\tor  \r\n \u00e9 e\u0301 \U0001f600"


@dataclass
class GPTConfig:
    """As in train_gpt2.py of build-nanoGPT, which is pickled with the weights."""

    block_size: int = POSITIONS
    vocab_size: int = VOCABULARY
    n_layer: int = LAYERS
    n_head: int = HEADS
    n_embd: int = WIDTH


def change_nanogpt(path, change):
    content = torch.load(path, weights_only=False)
    torch.save(change(content) or content, path)


@pytest.fixture
def weights():
    return random_weights()


# Without a field `bias`, a checkpoint dates from when nanoGPT computed the tanh form.
@pytest.mark.parametrize(
    ("has_bias", "chosen", "form"),
    [
        (True, None, "none"),
        (True, "tanh", "tanh"),
        (False, None, "tanh"),
        (False, "exact", "none"),
    ],
)
def test_nanogpts_activation(has_bias, chosen, form, weights, tmp_path, capsys):
    def change(content):
        if not has_bias:
            del content["model_args"]["bias"]

    for short in weights:  # as large as shows the forms' difference
        if ".fc." in short:
            weights[short] *= 4
    nanogpt(tmp_path / "ckpt.pt", weights)
    change_nanogpt(tmp_path / "ckpt.pt", change)
    arguments = ["--activation", chosen] if chosen else []
    out = tmp_path / "out"
    model = assert_converts(tmp_path, out, lambda ids: forward(weights, ids, form), *arguments)
    name = {"none": "exact", "tanh": "tanh"}[form]
    reason = "as --activation says" if chosen else "as nanoGPT computes it since May 2023"
    if chosen is None and not has_bias:
        reason = "as nanoGPT computed it until January 2023"
    assert f"took     the {name} form of GELU, {reason}" in capsys.readouterr().out
    # A result that has the other form is noticed.
    config = json.loads((out / "config.json").read_text())
    config["hidden_act"] = {"gelu": "gelu_new", "gelu_new": "gelu"}[model.config.hidden_act]
    (out / "config.json").write_text(json.dumps(config))
    assert verify([str(tmp_path), str(out), *arguments]) == 1
    assert "activation_function=" in capsys.readouterr().err


def test_build_nanogpt(weights, tmp_path, capsys):
    path = tmp_path / "model_05000.pt"
    nanogpt(path, weights)
    change_nanogpt(
        path,
        lambda content: dict(model=content["model"], config=GPTConfig(), step=5000, val_loss=3.1),
    )
    assert_converts(path, tmp_path / "out", lambda ids: forward(weights, ids, "tanh"))
    assert "(build-nanoGPT)" in capsys.readouterr().out
    assert_refused([str(tmp_path)], tmp_path / "no", r".*did you mean \S+model_05000\.pt", capsys)


@pytest.mark.parametrize("kind", ["minGPT", "nested", "safetensors", "transformers"])
def test_weights_alone(kind, weights, tmp_path, capsys):
    """minGPT's layout is that of nn.Linear, with a head of its own; transformers' is Conv1D's."""
    head = torch.randn(VOCABULARY, WIDTH) * 0.2
    path = tmp_path / "model.pth"
    nanogpt(path, weights)
    state = torch.load(path)["model"] | {"lm_head.weight": head}
    if kind == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    elif kind == "transformers":
        for name in state:
            if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
                state[name] = state[name].T.contiguous()
        torch.save(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if kind == "nested" else state, path)

    def expected(ids):
        return forward(weights, ids, "tanh", head)

    assert_converts(path, tmp_path / "out", expected, "--num-heads", str(HEADS))
    assert "took     the tanh form of GELU, as in GPT-2, minGPT" in capsys.readouterr().out
    assert_refused([str(path)], tmp_path / "no", r".*pass --num-heads or --preset", capsys)


@pytest.mark.parametrize("kind", ["nanogpt", "hf"])
def test_a_head_without_the_embedding_that_it_shares(kind, weights, tmp_path, capsys):
    if kind == "nanogpt":
        nanogpt(tmp_path / "ckpt.pt", weights)

        def remove(content):
            del content["model"]["transformer.wte.weight"]

        change_nanogpt(tmp_path / "ckpt.pt", remove)

        def expected(ids):
            return forward(weights, ids, "none")
    else:
        write_hf(tmp_path, "safetensors")
        theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

        def expected(ids):
            return theirs(ids).logits

    with torch.no_grad():
        assert_converts(tmp_path, tmp_path / "out", expected)
    assert "as the token embedding too, which is missing" in capsys.readouterr().out


@torch.no_grad()
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_file_in_the_folder_instead_of_the_folder(name, tmp_path):
    write_hf(tmp_path / "source", "bin" if name.endswith("bin") else "safetensors")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "source")
    assert_converts(tmp_path / "source" / name, tmp_path / "out", lambda ids: theirs(ids).logits)


def test_files_of_a_release_instead_of_its_folder(openai_tiny, converted_tiny, tmp_path, capsys):
    for name in ("hparams.json", "checkpoint", "model.ckpt.index"):
        out = tmp_path / f"out of {name}"
        assert main([str(openai_tiny / name), str(out)]) == 0
        weights = [folder / "model.safetensors" for folder in (out, converted_tiny)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    # gpt-2-simple keeps its releases one folder deeper.
    shutil.copytree(openai_tiny, tmp_path / "checkpoint" / "run1")
    arguments, message = [str(tmp_path / "checkpoint")], r".*did you mean \S+checkpoint/run1\?"
    assert_refused(arguments, tmp_path / "out", message, capsys)


def test_heads_and_adapters_and_other_files_say_what_to_do(tmp_path, capsys):
    for task, kind in (("SequenceClassification", "score"), ("QuestionAnswering", "qa_outputs")):
        theirs = getattr(__import__("transformers"), f"GPT2For{task}")
        random_gpt2(theirs).save_pretrained(tmp_path / task)
        message = rf"\S+{task} has the head of another task, {kind}\.weight; load it with "
        message += rf"ScratchGPTFor{task}\.from_pretrained"
        assert_refused([str(tmp_path / task)], tmp_path / "out", message, capsys)
        model_class = getattr(hf_scratch_gpt, f"ScratchGPTFor{task}")
        _, report = model_class.from_pretrained(tmp_path / task, output_loading_info=True)
        assert not any(report.values())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    fields = {"peft_type": "LORA", "base_model_name_or_path": "openai-community/gpt2"}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    message = r".*adapter of openai-community/gpt2; merge it first"
    assert_refused([str(adapter)], tmp_path / "out", message, capsys)
    (tmp_path / "gpt2.gguf").write_bytes(b"GGUF\x03\0\0\0")
    message = r"\S+gpt2\.gguf is a GGUF file; load it with GPT2LMHeadModel.*gguf_file"
    assert_refused([str(tmp_path / "gpt2.gguf")], tmp_path / "out", message, capsys)
    nanogpt(tmp_path / "ckpt.pt", random_weights())
    arguments, message = (
        [str(tmp_path), "--num-heads", "3"],
        r".*says itself what --num-heads would",
    )
    assert_refused(arguments, tmp_path / "out", message, capsys)


ENCODE_ALONE = """
import sys
sys.modules["hf_scratch_gpt"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(tokenizer(sys.argv[2]).input_ids)
"""


@pytest.mark.long
def test_characters_of_nanogpt_become_a_tokenizer(tmp_path, capsys):
    signs = sorted(set(TEXT))
    ids = {sign: number for number, sign in enumerate(signs)}
    meta = dict(vocab_size=len(ids), stoi=ids, itos=dict(enumerate(signs)))
    nanogpt(tmp_path / "ckpt.pt", random_weights(vocabulary=len(ids)), vocabulary=len(ids))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    out = tmp_path / "out"
    assert main([str(tmp_path), str(out)]) == 0
    # By remote code too, where this package cannot be imported.
    code = (
        "import sys; sys.modules['hf_scratch_gpt'] = None\nfrom transformers import AutoTokenizer\n"
    )
    code += "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
    code += "print(tokenizer(sys.argv[2]).input_ids)"
    command = [sys.executable, "-c", code, str(out), TEXT]
    alone = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(out)
    expected = [ids[sign] for sign in TEXT]
    assert tokenizer(TEXT).input_ids == expected == json.loads(alone.stdout or alone.stderr)
    assert tokenizer.decode(expected) == TEXT
    assert tokenizer.model_max_length == POSITIONS

    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": {"a": 0}}))
    capsys.readouterr()
    assert main([str(tmp_path), str(tmp_path / "other")]) == 0
    assert "meta.pkl: it has 1 characters, and the model" in capsys.readouterr().out
    for content in (b"text", pickle.dumps(GPTConfig()), pickle.dumps({"stoi": {"ab": 0}})):
        (tmp_path / "meta.pkl").write_bytes(content)
        assert_refused([str(tmp_path)], tmp_path / "no", r"\S+meta\.pkl: ", capsys)


def write_bert(folder):
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TEXT.split()])
    )
    fields = json.loads((folder / "config.json").read_text()) | {"tokenizer_class": "BertTokenizer"}
    (folder / "config.json").write_text(json.dumps(fields))
    return BertTokenizer(str(folder / "vocab.txt"))


def write_metaspace(folder):
    """As KoGPT2's: BPE of characters, with spaces written as U+2581."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(
        TEXT.split(), trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>"])
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("write", [write_bert, write_metaspace])
def test_other_vocabularies_are_copied_as_they_are(write, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    write_hf(source, "safetensors")
    expected = write(source)(TEXT).input_ids
    assert main([str(source), str(out)]) == 0
    assert "as they are: not a vocabulary of GPT-2's kind" in capsys.readouterr().out
    assert export([str(out), str(tmp_path / "back")]) == 0
    for folder in (out, tmp_path / "back"):
        for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
            if (source / name).exists():
                assert (folder / name).read_bytes() == (source / name).read_bytes()
        assert AutoTokenizer.from_pretrained(folder)(TEXT).input_ids == expected


FOREIGN = {
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "compression_config": {"quant_method": "compressed-tensors"},
    "custom_generate": "owner/name",
    "is_encoder_decoder": True,
    "distributed_config": {"tp_size": 2},
    "text_config": {"n_embd": 3},
    "layer_types": ["x"],
    "return_dict": False,
    "output_attentions": True,
}


@torch.no_grad()
def test_fields_of_other_code_are_left_out_and_told(tmp_path, capsys):
    write_hf(tmp_path / "source", "safetensors")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | FOREIGN))
    model = assert_converts(tmp_path / "source", tmp_path / "out", lambda ids: theirs(ids).logits)
    ids = torch.ones(1, 3, dtype=torch.long)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
    assert f"left out {', '.join(sorted(FOREIGN))} of config.json" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not [name for name, value in FOREIGN.items() if written.get(name) == value]


def test_of_two_conversions_into_one_new_folder_one_wins(
    openai_tiny, tmp_path, capsys, monkeypatch
):
    out, place = tmp_path / "out", "hf_scratch_gpt.checkpoints.convert.verify"
    codes = []

    def convert_meanwhile(source, folder):
        monkeypatch.undo()
        codes.append(main([str(openai_tiny), str(out)]))
        (out / "first").touch()
        return "in the meantime"

    monkeypatch.setattr(place, convert_meanwhile)
    assert main([str(openai_tiny), str(out)]) == 2
    assert codes == [0]
    assert "out was made by another command meanwhile" in capsys.readouterr().err
    assert (out / "first").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr(place, convert_meanwhile)
    assert main([str(openai_tiny), str(out), "--overwrite"]) == 0
    assert codes == [0, 2]
    assert not (out / "first").exists()
