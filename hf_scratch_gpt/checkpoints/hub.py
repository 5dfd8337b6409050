"""Fetch a GPT-2 from the Hub; OpenAI's own are known by their digests."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..model.presets_scratch_gpt import PRESET_ALIASES

# With the card, which states the licence.
_TEXTS = ["*.json", "*.txt", "*.tiktoken", "*.model", "README.md"]


# The SHA-256 of OpenAI's weights, the `model.safetensors` of these repositories.
DIGESTS = {
    "openai-community/gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "openai-community/gpt2-medium": (
        "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd"
    ),
    "openai-community/gpt2-large": (
        "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce"
    ),
    "openai-community/gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
}


def hub_id(name: str) -> str:
    """What `name` is called on the Hub, where 124M, gpt2-medium and the like are OpenAI's."""
    presets = {alias.lower(): preset for alias, preset in PRESET_ALIASES.items()}
    official = f"openai-community/{presets.get(name.lower(), name.lower())}"
    return official if official in DIGESTS else name


def fetch(source: str) -> Path:
    """The folder to which the Hub's `source` was fetched, with one kind of weight files.

    Args:
        source: an id, or a name of OpenAI's, as `hub_id` takes it.

    Raises:
        ValueError: there is no such model.
        OSError: it cannot be fetched, and was not before.
    """
    repository = hub_id(source)
    for weights in ("*.safetensors", "*.bin"):
        patterns = [*_TEXTS, weights]
        try:
            folder = Path(snapshot_download(repository, allow_patterns=patterns))
        except (HFValidationError, RepositoryNotFoundError):
            raise ValueError(
                f"{source} is neither a file nor a folder, and the Hub has no such model; for a "
                "private one, log in by `hf auth login`"
            ) from None
        except Exception as error:  # those of its HTTP library have no class in common
            raise OSError(
                f"{repository} cannot be fetched from the Hub: {_reason(error)}; give the folder "
                "of a GPT-2 on this machine"
            ) from None
        if any(folder.glob(weights)):
            break
    return folder


def _reason(error: Exception) -> str:
    """What kept the Hub's client from fetching, in one line."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and it was not fetched before"
    return str(cause or error).partition("\n")[0] or type(error).__name__
