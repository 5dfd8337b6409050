"""`hf-scratch-gpt serve`, asked over HTTP by OpenAI's client, beside GPT2LMHeadModel."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import entry_points

import openai
import pytest
import requests
import transformers
import uvicorn
from transformers.cli.serve import Serve

from hf_scratch_gpt import ScratchGPTForCausalLM
from hf_scratch_gpt.cli.server import build_app
from hf_scratch_gpt.engine import generation
from hf_scratch_gpt.engine.one_token import OneToken

PROMPTS = ["The cat", "A model that writes", "1 2 3", "Once upon a time there"]
POSITIONS = 64


def free_socket():
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    return listening, listening.getsockname()[1]


def client_of(port):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)


@contextmanager
def serving(*arguments, **options):
    """A client of a server in a thread of this process."""
    app = build_app(*arguments, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    listening, port = free_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield client_of(port)
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module", params=["plain", "at once", "fast"])
def client(request, ours):
    """Served one text after another, several at once, and by the engine."""
    at_once = 3 if request.param == "at once" else 1
    with serving(str(ours), at_once, fast=request.param == "fast") as client:
        client.model, client.at_once = str(ours), at_once
        yield client


def complete(client, prompt, tokens=8, **others):
    others = {"temperature": 0, "max_tokens": tokens, **others}
    return client.completions.create(model=client.model, prompt=prompt, **others)


def test_completions_are_those_of_gpt2(client, greedy, record, logged_warnings):
    for prompt in PROMPTS:
        answer = complete(client, prompt)
        assert answer.choices[0].text == greedy(prompt, 8)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 8
    way = "by continuous batching" if client.at_once > 1 else "one after another"
    same = f"{len(PROMPTS)} of {len(PROMPTS)} equal"
    record("openai", f"`hf-scratch-gpt serve`, {way}: texts of greedy search, with GPT-2's", same)


def test_streams(client, greedy, logged_warnings):
    parts = [part.choices[0].text for part in complete(client, PROMPTS[1], stream=True)]
    assert len(parts) > 3
    assert "".join(parts) == greedy(PROMPTS[1], 8)


def test_chat(client, greedy, logged_warnings):
    messages = [{"role": "user", "content": "Hello"}]
    asked = {"model": client.model, "messages": messages, "max_tokens": 8, "temperature": 0}
    expected = greedy("user: Hello\nassistant:", 8)
    answer = client.chat.completions.create(**asked)
    assert answer.choices[0].message.content == expected
    parts = client.chat.completions.create(**asked, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected


def test_several_requests_at_once(client, greedy, logged_warnings):
    prompts = PROMPTS * 3
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: complete(client, prompt), prompts))
    assert [answer.choices[0].text for answer in answers] == [greedy(each, 8) for each in prompts]


def test_no_limit_means_as_many_as_fit(client, greedy, logged_warnings):
    answer = complete(client, "The cat", tokens=openai.omit)
    assert answer.choices[0].text == greedy("The cat", POSITIONS - answer.usage.prompt_tokens)
    assert answer.usage.total_tokens == POSITIONS


@pytest.mark.parametrize("stream", [False, True])
def test_what_goes_past_the_end_is_refused_and_others_go_on(
    client, greedy, logged_warnings, stream
):
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(complete, client, "The cat", 40)
        for asked, message in [
            (("The cat", POSITIONS), "ask for 1 to 6., as the model has 64 positions"),
            (("The cat " * 99, 1), "the prompt has .* tokens; give 1 to 63"),
            (("", 1), "the prompt has 0 tokens"),
            (("The cat", 0), "0 tokens are asked for"),
        ]:
            with pytest.raises(openai.BadRequestError, match=message):
                complete(client, *asked, stream=stream)
    assert beside.result().choices[0].text == greedy("The cat", 40)
    assert complete(client, "1 2 3").choices[0].text == greedy("1 2 3", 8)
    assert requests.get(client.base_url.join("/health")).json() == {"status": "ok"}


def test_a_temperature_samples_and_what_texts_cannot_share_is_refused(client, logged_warnings):
    """transformers' server would go on greedily, or by the settings of the first request."""
    for settings in [{"temperature": 1.5, "seed": 1}, {"temperature": 1.5, "top_p": 0.9}]:
        if client.at_once > 1:
            with pytest.raises(openai.BadRequestError, match="without --at-once"):
                complete(client, "The cat", 20, **settings)
        else:
            texts = {
                complete(client, "The cat", 20, **settings, user=u).choices[0].text for u in "ab"
            }
            assert texts != {complete(client, "The cat", 20).choices[0].text}
            assert len(texts) == (1 if "seed" in settings else 2)


def test_a_stop_string(client, greedy, logged_warnings):
    text = greedy("The cat", 20)
    stop = text[5:7]
    if client.at_once > 1:
        with pytest.raises(openai.BadRequestError, match="share the model's stop_strings"):
            complete(client, "The cat", 20, stop=[stop])
    else:
        answer = complete(client, "The cat", 20, stop=[stop]).choices[0]
        assert text.startswith(answer.text)
        assert stop in answer.text
        assert answer.finish_reason == "stop"


def test_a_model_that_was_unloaded_comes_back(client, greedy, logged_warnings):
    requests.post(client.base_url.join("/reset"))
    assert complete(client, "The cat").choices[0].text == greedy("The cat", 8)


def test_the_engine_writes_what_is_served(ours, monkeypatch, logged_warnings):
    """The server hands its tokenizer to every call of `generate`."""
    taken = []
    monkeypatch.setattr(generation, "OneToken", lambda *given: taken.append(1) or OneToken(*given))
    with serving(str(ours), fast=True) as client:
        client.model = str(ours)
        complete(client, "The cat")
        assert len(taken) == 1
        complete(client, "The cat", stop=["."])
        assert len(taken) == 1


def test_a_gpt2_is_converted(gpt2_with_tokenizer, greedy, logged_warnings):
    with serving(str(gpt2_with_tokenizer)) as client:
        client.model = str(gpt2_with_tokenizer)
        assert complete(client, "The cat").choices[0].text == greedy("The cat", 8)
        with pytest.raises(openai.BadRequestError, match="chat_template is not set"):
            client.chat.completions.create(model=client.model, messages=[])


def test_transformers_own_command_finds_the_class_by_its_name(ours, greedy, logged_warnings):
    listening, port = free_socket()
    listening.close()
    serve = Serve(str(ours), host="127.0.0.1", port=port, non_blocking=True)
    try:
        while not serve.server.started:
            time.sleep(0.05)
        client = client_of(port)
        client.model = str(ours)
        assert complete(client, "The cat").choices[0].text == greedy("The cat", 8)
    finally:
        serve.kill_server()


def test_the_plugin_for_vllm_makes_the_classes_known(monkeypatch):
    (plugin,) = entry_points(group="vllm.general_plugins", name="scratch_gpt")
    monkeypatch.delattr(transformers, "ScratchGPTForCausalLM")
    plugin.load()()
    assert transformers.ScratchGPTForCausalLM is ScratchGPTForCausalLM
