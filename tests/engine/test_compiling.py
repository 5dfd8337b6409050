"""The C++ is compiled once, kept where nobody else can write, and compiled anew on any doubt."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hf_scratch_gpt import ScratchGPTForCausalLM, optimize_for_generation
from hf_scratch_gpt.engine import compiling

from ..models import random_model


@pytest.fixture(scope="module")
def library():
    """The real library, as this session keeps it."""
    compiling.compiled()
    compiling.compiled.cache_clear()
    return Path(compiling.compiled()._name)


@pytest.fixture
def compiler(library, tmp_path, monkeypatch):
    """A compiler that counts its calls and hands out the real library; an empty cache."""
    calls, program = tmp_path / "calls", tmp_path / "compiler"
    program.write_text(
        "#!/bin/sh\n"
        'case "$*" in *" -v "*) echo version "$FAKE_VERSION" >&2; exit; esac\n'
        f'echo call >> {calls}\nfor out; do :; done\ncp {library} "$out"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def start():
        """How often a fresh process compiles."""
        before = len(calls.read_text().split()) if calls.exists() else 0
        compiling.compiled.cache_clear()
        assert compiling.compiled()["product"]
        return len(calls.read_text().split()) - before if calls.exists() else 0

    yield start
    compiling.compiled.cache_clear()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "hf_scratch_gpt"


def test_a_second_start_compiles_nothing(compiler, folder):
    assert [compiler(), compiler()] == [1, 0]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list(folder.iterdir())) == 1
    start = time.perf_counter()
    compiler()
    assert time.perf_counter() - start < 0.5  # it takes some milliseconds


def test_what_it_depends_on(compiler, monkeypatch, tmp_path):
    assert compiler() == 1
    monkeypatch.setenv("FAKE_VERSION", "2")
    assert [compiler(), compiler()] == [1, 0]
    monkeypatch.setattr(compiling, "_FLAGS", compiling._FLAGS + " -g")
    assert [compiler(), compiler()] == [1, 0]
    source = tmp_path / "more.h"
    source.write_text("// more")
    monkeypatch.setattr(compiling, "_SOURCES", [*compiling._SOURCES, source])
    assert [compiler(), compiler()] == [1, 0]


def open_to_others(folder):
    folder.chmod(0o770)


def parent_open_to_others(folder):
    folder.parent.chmod(0o777)


def of_another_place(folder):
    moved = folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(moved)


@pytest.mark.parametrize("doubt", [open_to_others, parent_open_to_others, of_another_place])
def test_a_folder_that_is_not_the_users_alone(compiler, folder, doubt):
    compiler()
    doubt(folder)
    assert [compiler(), compiler()] == [1, 1]


def test_of_another_user(compiler, monkeypatch):
    compiler()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert [compiler(), compiler()] == [1, 1]


def test_a_library_that_was_changed(compiler, folder):
    compiler()
    (kept,) = folder.iterdir()
    content = kept.read_bytes()
    kept.unlink()  # it is loaded: in place, the process would crash when it ends
    kept.write_bytes(content[:-1])
    assert [compiler(), compiler()] == [1, 0]


def test_nowhere_to_keep_it(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert [compiler(), compiler()] == [1, 1]
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert [compiler(), compiler()] == [1, 0]
    assert (tmp_path / "home" / ".cache" / "hf_scratch_gpt").is_dir()


def test_two_at_once(compiler, folder):
    """Each compiles, and all find what either has kept."""
    compiler()
    shutil.rmtree(folder)
    command = [os.environ["CXX"]]
    where, key = compiling._cache_folder(), compiling._key(command)
    with ThreadPoolExecutor(2) as pool:
        both = pool.map(lambda _: compiling._compile(command, where, key), range(2))
    assert all(each["product"] for each in both)
    assert len(list(folder.iterdir())) == 1
    assert compiler() == 0


def test_without_a_compiler(monkeypatch):
    compiling.compiled.cache_clear()
    model = random_model(ScratchGPTForCausalLM).eval()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FileNotFoundError, match=r"\(no-such-compiler\).* install g\+\+"):
        optimize_for_generation(model)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match=r"\(g\+\+, clang\+\+, c\+\+\)"):
        optimize_for_generation(model)
    assert type(model) is ScratchGPTForCausalLM  # and left as it was


@pytest.mark.usefixtures("compiler")
def test_with_a_compiler_that_fails(monkeypatch):
    monkeypatch.setenv("CXX", "g++ --no-such-option")
    with pytest.raises(RuntimeError, match=r"no-such-option.*failed; name another"):
        compiling.compiled()


@pytest.mark.usefixtures("compiler")
def test_with_what_is_not_a_compiler_of_cpp(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\nfor out; do :; done\necho "not a library" > "$out"\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(RuntimeError, match=r"if a symbol is missing, name a compiler of C\+\+"):
        compiling.compiled()
