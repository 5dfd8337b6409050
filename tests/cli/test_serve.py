"""`hf-scratch-gpt serve`: its options. What it answers is in tests/clients."""

import pytest
import uvicorn
from fastapi import FastAPI


def test_serves_at_the_address_that_is_given(run, monkeypatch, converted_tiny):
    served = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: served.append(server.config))
    code, _, error = run("serve", converted_tiny, "--port", 8123)
    assert code == 0, error
    (config,) = served
    assert isinstance(config.app, FastAPI)
    assert (config.host, config.port) == ("127.0.0.1", 8123)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--at-once", 0], "--at-once 0 is below 1"),
        (["--plain", "--fast"], "--plain turns off what --fast and --weights ask for"),
        ([], "there is no folder '/nowhere'; give the folder of a saved model"),
    ],
)
def test_bad_options_are_refused(options, message, assert_refused):
    assert_refused(message, "serve", "/nowhere", *options)


def test_the_extra_is_named_where_it_is_missing(run, monkeypatch):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    code, _, error = run("serve", "gpt2")
    assert code == 1
    assert error.endswith("pip install 'hf_scratch_gpt[serve]'\n")
