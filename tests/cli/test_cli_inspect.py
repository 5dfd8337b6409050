"""`hf-scratch-gpt inspect`: what it prints, and what it refuses."""


def test_it_shows_tokens_blocks_shapes_and_what_comes_next(converted_tiny, tmp_path, run):
    page = tmp_path / "page.html"
    code, out, error = run("inspect", converted_tiny, "To be\x1b[31m", "--top", 3, "--html", page)
    assert (code, error) == (0, "")
    assert page.read_text().startswith("<!doctype html>")
    lines = [line.rstrip() for line in out.splitlines()]
    assert max(map(len, lines[:-1])) <= 80
    assert "\x1b" not in out
    rows = [line.split() for line in lines]
    tokens = int(lines[0].rpartition("(")[2].rstrip("):"))
    assert ["├", "model", f"1×{tokens}", f"1×{tokens}×48"] in [row[:4] for row in rows]
    assert ["└", "lm_head", f"1×{tokens}×48", f"1×{tokens}×400", "shared"] in rows
    assert next(row for row in rows if "activation" in row)[-2:] == [f"1×{tokens}×192"] * 2
    heading = next(i for i, line in enumerate(lines) if line.startswith("likeliest next"))
    probabilities = [float(line.split("%")[0].split()[-1]) for line in lines[heading + 1 : -1]]
    assert len(probabilities) == 3
    assert probabilities == sorted(probabilities, reverse=True)


def test_it_refuses(converted_tiny, tmp_path, assert_refused):
    assert_refused("--top 0 is below 1", "inspect", converted_tiny, "To be", "--top", 0)
    assert_refused("makes 0 tokens of ''", "inspect", converted_tiny, "")
    assert_refused("cannot be loaded", "inspect", tmp_path, "To be")
    for place in (tmp_path, tmp_path / "nowhere" / "page.html"):
        assert_refused("is not a file", "inspect", converted_tiny, "To be", "--html", place)
    assert_refused("32", "inspect", converted_tiny, "?" * 40)
