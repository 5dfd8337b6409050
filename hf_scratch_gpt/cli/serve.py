"""`hf-scratch-gpt serve`: a model behind the HTTP interface of OpenAI's API."""

from typing import Annotated

import typer

from . import speed


def serve(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Folder or Hub id of a model of ours or a GPT-2."),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen at; 0 takes a free one.")
    ] = 8000,
    at_once: Annotated[
        int, typer.Option(help="Texts to write together, by continuous batching.")
    ] = 1,
    plain: speed.Plain = False,
    fast: speed.Fast = False,
    weights: speed.Weights = None,
) -> None:
    """Serve a model to clients of OpenAI's API.

    The server is transformers' own. Completions are at /v1/completions, chat at
    /v1/chat/completions. A request that does not say how many tokens it wants gets as many as
    fit; one that goes past the last position is refused.
    """
    optimize = speed.wanted(plain, fast, weights)
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ImportError(
            "serving needs fastapi, uvicorn and openai: pip install 'hf_scratch_gpt[serve]'"
        )
    if at_once < 1:
        raise ValueError(f"--at-once {at_once} is below 1; write at least one text at a time")
    _check_can_listen(host, port)
    import uvicorn

    from .server import build_app

    app = build_app(model, at_once, fast=optimize, weights=weights)
    # Unlike `uvicorn.run`, this ends with Ctrl-C's exit code.
    uvicorn.Server(uvicorn.Config(app, host=host, port=port)).run()


def _check_can_listen(host: str, port: int) -> None:
    """Raise an OSError if nothing can listen at the address, before the model takes its time."""
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(
            f"cannot listen at {host}, port {port}: {error.strerror}; give another --port or --host"
        ) from None
