"""What a command tells of an error: one short line, whatever names and texts files have put in."""

_TOLD = (OSError, ValueError, RuntimeError, MemoryError, ImportError)
_BEGIN, _END = 800, 400  # characters to show of a long message


def is_told(error: BaseException) -> bool:
    """Whether a line tells of `error`; another is a mistake of ours, and shows where it is."""
    from huggingface_hub.errors import StrictDataclassError  # which takes a tenth of a second

    return isinstance(error, (*_TOLD, StrictDataclassError))


def printable(text: str) -> str:
    """`text` with what would steer a terminal written as escapes."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def one_line(error: BaseException) -> str:
    """What `error` says, in one line; the middle of a long one is left out."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    whole = len(text) <= 2 * _BEGIN
    parts = [text] if whole else [text[:_BEGIN], text[-_BEGIN:]]
    line = " ... ".join(printable(" ".join(part.split())) for part in parts)
    return line if len(line) <= _BEGIN + _END else f"{line[:_BEGIN]} ... {line[-_END:]}"
