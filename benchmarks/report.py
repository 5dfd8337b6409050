"""Figures as a table and as a picture."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LONGEST = 3.0  # bars end here, so that a peer a hundred times slower leaves room for the others


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
            elif isinstance(more, float):
                lines.append(f"  {key}: {more:.4g}")
    return "\n".join(lines)


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Bars of medians over the best peer's, one group for each measurement."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {title: result for title, result in results.items() if "rates" in result}
    shown = {
        title: result
        for title, result in shown.items()
        if any(not name.startswith("ours") for name in result["rates"])
    }
    rows = sum(len(result["rates"]) + 1 for result in shown.values())
    figure, axes = pyplot.subplots(figsize=(9, 0.28 * rows + 1), layout="constrained")
    place, ticks, names = 0.0, [], []
    for title, result in shown.items():
        values = result["rates"]
        for name, value in values.items():
            ratio = value["median"] / best_peer(values)
            is_ours = name.startswith("ours")
            length = min(ratio, _LONGEST)
            axes.barh(place, length, color="tab:orange" if is_ours else "tab:gray")
            text = f"{value['median']:,.4g} {result['unit']}, {ratio:.3g} times"
            axes.text(length + 0.03, place, text, va="center", fontsize=7)
            ticks.append(place)
            names.append(f"{title}: {name}")
            place += 1
        place += 1
    axes.axvline(1, color="black", linewidth=0.8, zorder=0)
    axes.set_yticks(ticks, names, fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.4, y=0.01)
    axes.set_xlabel(f"median, in units of the fastest peer's; bars end at {_LONGEST:g}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
