"""What `inspect` sees in a model, compared with GPT-2 on the same weights, and the page of it."""

import base64
import json
import re
import shutil
import subprocess
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.inspection import inspect, write_page
from hf_scratch_gpt.sizing import count_parameters

from .models import random_gpt2, random_model

# It ends the script that holds the data, if nothing is done about that.
TEXT = "To be</script><b>\n é?"
SIZES = dict(vocab_size=400, n_positions=64)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    model = random_gpt2(**SIZES)
    for block in model.transformer.h:
        block.attn.c_attn.weight.data *= 4  # heads that differ
    model.save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def seen(gpt2, tiny_tokenizer):
    model = ScratchGPTForCausalLM.from_pretrained(gpt2.name_or_path)
    return inspect(model, tiny_tokenizer, TEXT, likeliest=7)


def test_it_sees_what_gpt2_computes(seen, gpt2, tiny_tokenizer):
    ids = tiny_tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        outputs = gpt2(ids, output_attentions=True)
    expected = torch.stack([weights[0] for weights in outputs.attentions])
    torch.testing.assert_close(seen.attention, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(seen.attention.sum(-1), torch.ones(expected.shape[:-1]))
    assert not seen.attention.triu(1).any()
    probabilities = outputs.logits[0].softmax(-1)
    for row, likeliest in zip(probabilities, seen.likeliest, strict=True):
        assert [token.id for token in likeliest] == row.argsort(descending=True)[:7].tolist()
        for token in likeliest:
            assert token.probability == pytest.approx(row[token.id].item(), abs=1e-6)
            assert "\ufffd" not in token.token
    for place, probability in enumerate(seen.following):
        expected_one = probabilities[place, ids[0, place + 1]].item()
        assert probability == pytest.approx(expected_one, abs=1e-6)
    assert (seen.ids, len(seen.following)) == (ids[0].tolist(), ids.shape[1] - 1)


def test_blocks_have_their_parameters_and_shapes(seen):
    config = ScratchGPTConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, **SIZES)
    counts, tokens = count_parameters(config), len(seen.ids)
    blocks = {block.name: block for block in seen.blocks}
    whole = blocks["ScratchGPTForCausalLM"]
    assert (whole.parameters, whole.storage) == (counts.total, 4 * counts.total)
    assert blocks["embed_tokens"].parameters == counts.token_embedding
    assert 3 * blocks["self_attn"].parameters == counts.attention
    assert 3 * blocks["mlp"].parameters == counts.feed_forward
    assert blocks["layers.1-2, alike"].parameters == 2 * blocks["layers.0"].parameters
    assert blocks["lm_head"].is_shared
    assert not blocks["embed_tokens"].is_shared
    shapes = [(1, tokens), (1, tokens, 400), (1, tokens, 32), (1, tokens, 128)]
    assert (whole.input, whole.output) == tuple(shapes[:2])
    assert (blocks["layers.0"].input, blocks["layers.0"].output) == (shapes[2], shapes[2])
    assert (blocks["up_proj"].input, blocks["up_proj"].output) == (shapes[2], shapes[3])
    assert [block.name for block in seen.blocks if block.depth == 1] == ["model", "lm_head"]


def test_a_layer_that_differs_is_shown(tiny_tokenizer):
    model = random_model(ScratchGPTForCausalLM, vocab_size=400, num_hidden_layers=4)
    model.model.layers[2].mlp.up_proj.bias = None
    names = [block.name for block in inspect(model, tiny_tokenizer, "To be").blocks]
    assert [name for name in names if name.startswith("layers")] == [
        "layers.0", "layers.1, alike", "layers.2", "layers.3",
    ]  # fmt: skip


def test_looking_leaves_the_model_as_it_was(tiny_tokenizer):
    model = random_model(ScratchGPTForCausalLM, vocab_size=400)
    model.set_attn_implementation("sdpa")
    inspect(model, tiny_tokenizer, "To be")
    assert model.config._attn_implementation == "sdpa"
    assert not model.lm_head._forward_hooks


def test_bad_texts_are_refused(seen, tiny_tokenizer, tmp_path):
    model = random_model(ScratchGPTForCausalLM, vocab_size=400, max_position_embeddings=200)
    with pytest.raises(ValueError, match="makes 0 tokens of ''"):
        inspect(model, tiny_tokenizer, "")
    with pytest.raises(ValueError, match="likeliest=0 is below 1"):
        inspect(model, tiny_tokenizer, "To be", likeliest=0)
    with pytest.raises(ValueError, match=r"has 201 tokens, the model 200 positions"):
        inspect(model, tiny_tokenizer, "?" * 201)
    long = inspect(model, tiny_tokenizer, "?" * 129)
    with pytest.raises(ValueError, match="129 tokens, and a page shows at most 128"):
        write_page(long, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_the_page_holds_all_and_asks_for_nothing(seen, tmp_path):
    write_page(seen, tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    page = (tmp_path / "page.html").read_text("utf-8")
    assert not re.search(r"https?:|//\w+\.|src=|href=|@import", page)
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data = json.loads(found[0])
    assert (data["tokens"], data["ids"]) == (seen.tokens, seen.ids)
    assert (data["layers"], data["heads"]) == (3, 4)
    weights = np.frombuffer(base64.b64decode(data["attention"]), "<u2").reshape(3, 4, -1) / 65535
    rows, columns = np.tril_indices(len(seen.ids))
    np.testing.assert_allclose(weights, seen.attention[:, :, rows, columns], atol=1e-5)
    assert data["likeliest"][-1][0]["probability"] == seen.likeliest[-1][0].probability


# Presses keys and buttons as a reader does, and leaves in the page what he would see.
DRIVE = """
<pre id="seen"></pre><script>
const states = [], see = () => {
  const width = $("map").width, context = $("map").getContext("2d");
  const pixels = context.getImageData(0, 0, width, width).data;
  const middle = i => Math.floor((margin + (i + .5) * cell) * (window.devicePixelRatio || 1));
  const opacity = (query, key) => pixels[4 * (middle(query) * width + middle(key)) + 3];
  states.push({
    layer: $("layer").textContent, head: $("head").textContent, after: $("after").textContent,
    next: [...$("next").rows].map(row => row.innerText.split("\\t").map(t => t.trim())),
    squares: data.tokens.map((_, query) => data.tokens.map((_, key) => opacity(query, key))),
    following: $("following").textContent, weight: $("weight").textContent,
    tokens: [...$("tokens").children].map(button => button.textContent),
    elements: document.querySelectorAll("b").length,
    blocks: [...$("blocks").rows].map(row => row.cells[0].textContent)});
};
const press = (key, shiftKey = false) =>
  dispatchEvent(new KeyboardEvent("keydown", { key, shiftKey, cancelable: true }));
see(); press("ArrowRight"); see(); press("ArrowDown"); see(); $("head-back").click();
$("layer-back").click(); see(); press("ArrowLeft"); see(); $("tokens").children[1].click(); see();
press("ArrowRight", true); see();
const box = $("map").getBoundingClientRect();
$("map").dispatchEvent(new MouseEvent("mousemove", {
  clientX: box.left + margin + 1.5 * cell, clientY: box.top + margin + 2.5 * cell }));
see();
$("seen").textContent = encodeURIComponent(JSON.stringify(states));
</script>"""


@pytest.mark.long
def test_the_page_in_a_browser(seen, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on this machine; Debian has it as the package chromium")
    write_page(seen, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    (tmp_path / "driven.html").write_text(page.replace("</body>", DRIVE + "</body>"), "utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "driven.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    logged = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    # Chromium advises those who read pixels, which the page itself does not.
    assert all("willReadFrequently" in line for line in logged), logged
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-2000:]
    states = json.loads(unquote(found[1]))
    places = [(state["layer"], state["head"]) for state in states]
    expected = [(0, 0), (0, 1), (1, 1), (0, 0), (2, 3), (2, 3), (2, 3), (2, 3)]
    assert places == [(f"layer {layer}", f"head {head}") for layer, head in expected]
    tokens = len(seen.ids)
    for (layer, head), state in zip(expected[:5], states, strict=False):
        # The squares of the chosen row have a frame; its middle is as dark as the others'.
        shown = np.array(state["squares"]) / 255
        weights = seen.attention[layer, head].numpy()
        lower = np.tri(tokens, dtype=bool)
        np.testing.assert_allclose(shown[lower], 0.03 + 0.97 * weights[lower], atol=0.005)
        assert not shown[~lower].any()
    first, chosen, moved, pointed = states[0], *states[5:]
    assert f"token {tokens} of {tokens}" in first["after"]
    assert first["following"] == "The text ends here."
    assert f"token 2 of {tokens}" in chosen["after"]
    assert f"token 3 of {tokens}" in moved["after"]
    likeliest = seen.likeliest[1][0]
    assert float(chosen["next"][0][-1].rstrip(" %")) == pytest.approx(
        100 * likeliest.probability, abs=0.05
    )
    assert f"{100 * seen.following[1]:.2f}"[:3] in chosen["following"]
    assert f"{seen.attention[2, 3, 2, 1]:.4f}" in pointed["weight"]
    # What looks like HTML in the text is text: the page has its own two bold elements alone.
    assert "".join(first["tokens"]).startswith("To·be</script><b>⏎")
    assert first["elements"] == 2
    assert first["blocks"] == [block.name for block in seen.blocks]
