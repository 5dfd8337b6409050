"""Figures as a table and as a picture."""

import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_LONGEST = 3.0  # bars end here, so that a peer a hundred times slower leaves room for the others


_COLUMNS = "processor|line|ours, fast|ours, plain|GPT2LMHeadModel|best peer|ratio|limit|on"
_RULES = "---|---|---:|---:|---:|---|---:|---:|---"
_HEAD = "\n".join(f"| {row.replace('|', ' | ')} |" for row in (_COLUMNS, _RULES))


def processor() -> str:
    """The processor and the widest instructions that it has."""
    has = torch.cpu.get_capabilities()
    kinds = {"amx_bf16": "AMX", "avx512_bw": "AVX-512", "avx2": "AVX2"}
    kind = next((name for flag, name in kinds.items() if has.get(flag)), "")
    return f"{has.get('cpu_name', 'CPU')} {kind}, {torch.get_num_threads()} cores".strip()


def keep_standing(results: Mapping[str, Mapping[str, Any]], path: Path, machine: str) -> None:
    """Write a row for each of `results` into the table in `path`, in place of the older one."""
    text = path.read_text()
    found = re.search(re.escape(_HEAD) + r"\n((?:\|.*\n)*)", text)
    if found is None:
        raise ValueError(f"{path} has no table of the standing; it begins with {_HEAD!r}")
    rows = {tuple(row.split(" | ")[:2]): row for row in found[1].splitlines()}
    for line, result in results.items():
        values = {name: value["median"] for name, value in result.get("rates", {}).items()}
        peers = {name: value for name, value in values.items() if not name.startswith("ours")}
        if "ours, fast" not in values or not peers:
            continue
        best = max(peers, key=peers.__getitem__)
        numbers = [values.get(name) for name in ("ours, fast", "ours, plain", "GPT2LMHeadModel")]
        cells = [f"| {machine}", line, *("" if n is None else f"{n:.4g}" for n in numbers)]
        cells += [f"{best} {peers[best]:.4g}", f"{values['ours, fast'] / peers[best]:.2f}"]
        cells += [f"{result['limit']:.4g}" if "limit" in result else ""]
        rows[cells[0], line] = " | ".join([*cells, f"{datetime.date.today()} |"])
    table = "\n".join([_HEAD, *rows.values()]) + "\n"
    path.write_text(text[: found.start()] + table + text[found.end() :])


def best_peer(values: Mapping[str, Mapping[str, float]]) -> float:
    """The median of the fastest that is not ours."""
    return max(value["median"] for name, value in values.items() if not name.startswith("ours"))


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each way: median, spread, ratio to the best peer and to the limit."""
    lines = []
    for title, result in results.items():
        lines.append(title)
        values = result.get("rates", {})
        for name, value in values.items():
            peers = [peer for peer in values if not peer.startswith("ours")]
            line = f"  {name:32}{value['median']:10.4g} {result['unit']:12}"
            line += f"({value['lowest']:.4g} to {value['highest']:.4g})"
            if peers:
                line += f"  {value['median'] / best_peer(values):5.2f} of the best peer"
            if "limit" in result:
                line += f"  {value['median'] / result['limit']:5.2f} of the limit"
            lines.append(line)
        for key, more in result.items():
            if isinstance(more, Mapping) and more and key != "rates":
                lines.append(f"  {key}: " + ", ".join(f"{n} {v:.4g}" for n, v in more.items()))
            elif isinstance(more, list) and more:
                lines.append(f"  {key}: " + ", ".join(more))
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars of medians over the best peer's, one group for each measurement that has a peer."""
    from matplotlib.figure import Figure

    bars: list[tuple[str, float, str]] = []
    for title, result in results.items():
        values = result.get("rates", {})
        if all(name.startswith("ours") for name in values):
            continue
        for name, value in values.items():
            ratio = value["median"] / best_peer(values)
            text = f"{value['median']:,.4g} {result['unit']}, {ratio:.3g} times"
            bars.append((f"{title}: {name}", min(ratio, _LONGEST), text))
    figure = Figure(figsize=(9, 0.28 * len(bars) + 1), layout="constrained")
    axes = figure.add_subplot(xlabel=f"median over the fastest peer's; bars end at {_LONGEST:g}")
    for place, (name, length, text) in enumerate(bars):
        axes.barh(place, length, color="tab:orange" if ": ours" in name else "tab:gray")
        axes.text(length + 0.03, place, text, va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.4, y=0.01)
    figure.savefig(path, dpi=150)
