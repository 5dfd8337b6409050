"""What is built of the package: the wheel works alone, and nothing is missing in the archive."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import openai
import pytest
import torch

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_scratch_gpt"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SITE = Path(torch.__file__).parents[1]  # where the packages of this environment are
GENERATED = ("PKG-INFO", "setup.cfg", ".egg-info")


def imported(path: Path) -> set[str]:
    """The top names of what a file imports from other packages."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module).partition(".")[0])
    return names - set(sys.stdlib_module_names)


def test_what_is_imported_is_declared():
    extras = [
        PROJECT["optional-dependencies"][name] for name in ("train", "serve", "contract", "torchao")
    ]
    wanted = [*PROJECT["dependencies"], *chain(*extras)]
    declared = {re.split(r"[^\w.-]", name)[0].lower().replace("_", "-") for name in wanted}
    homes = packages_distributions()
    for name in set().union(*map(imported, PACKAGE.rglob("*.py"))):
        home = homes.get(name, [name])[0].lower().replace("_", "-")
        assert home in declared, f"{name} is imported, and {home} is not declared"


def test_extras_that_errors_name_are_there():
    texts = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    named = set(re.findall(r"pip install 'hf_scratch_gpt\[(\w+)\]'", texts))
    assert {"train", "serve"} <= named <= PROJECT["optional-dependencies"].keys()


def run(command, cwd, code=0, **more):
    """Run a command without anything of this clone; its output."""
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"} | more
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What is in the archive of sources, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    clone = folder / "clone"
    if (ROOT / ".git").exists():
        run(["git", "clone", "--quiet", ROOT, clone], folder)
    else:
        shutil.copytree(ROOT, clone)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})"
    run([sys.executable, "-W", "ignore", "-c", code], clone)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """The wheel that is built of the archive."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    run([sys.executable, "-W", "ignore", "-c", code], sources)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_(wheel, tmp_path_factory):
    """The programs of an environment with the wheel; it sees the packages of this one, not ours."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    run([folder / "bin" / "pip", "install", "-q", "--no-deps", "--no-index", wheel], folder)
    (own,) = folder.glob("lib/python*/site-packages")
    (own / "of_this_environment.pth").write_text(f"{SITE}\n")  # whose own .pth files are not read
    return folder / "bin"


@pytest.fixture(scope="module")
def empty(tmp_path_factory, bin_, openai_tiny):
    """A folder with a text, a converted model, and a training of that."""
    folder = tmp_path_factory.mktemp("empty")
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    (folder / "text.txt").write_text((text * 3)[:20_000])
    told = run([bin_ / "hf-scratch-gpt", "convert", openai_tiny, "tiny"], folder)
    assert "logits differ by" in told
    return folder


@pytest.mark.release
def test_the_archive_holds_all_that_git_does(sources):
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a clone")
    names = set(run(["git", "ls-files"], ROOT).split("\n")) - {""}
    links = {name for name in names if (ROOT / name).is_symlink()}  # what they name is packed
    listed = names - links
    packed = {str(path.relative_to(sources)) for path in sources.rglob("*") if path.is_file()}
    assert packed >= listed
    known = (*GENERATED, *links)
    assert all(any(mark in name for mark in known) for name in packed - listed)


@pytest.mark.release
def test_tests_run_from_the_archive(sources):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    told = run([*command, "tests/test_readme.py", "tests/checkpoints/test_export.py"], sources)
    assert re.search(r"^\d+ passed", told, re.MULTILINE)


@pytest.mark.release
def test_the_wheel_holds_the_package_and_no_more(wheel, sources):
    built = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in built if ".dist-info/" not in name} == {
        "_hf_scratch_gpt_contract.py",  # pytest's options; see its docstring
        *(
            str(path.relative_to(sources))
            for path in (sources / "hf_scratch_gpt").rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        ),
    }


@pytest.mark.release
def test_the_wheel_is_what_runs(bin_, empty):
    code = "import hf_scratch_gpt; print(hf_scratch_gpt.__file__, hf_scratch_gpt.__version__)"
    place, version = run([bin_ / "python", "-c", code], empty).split()
    assert Path(place).is_relative_to(bin_.parent)
    assert run([bin_ / "hf-scratch-gpt", "--version"], empty).strip() == version


@pytest.mark.release
@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("verify RELEASE tiny", "logits differ by"),
        ("export tiny gpt2", "logits differ by"),
        ("info gpt2 tiny", "124,439,808"),
        ("generate tiny Hello --max-new-tokens 4", "Hello"),
        ("eval tiny text.txt", "bits per byte"),
        ("inspect tiny Hello --html page.html", "page.html"),
        ("train text.txt --output-dir run --model tiny --max-steps 4 --use-cpu", "4 steps, loss"),
        ("demo --help", "Train a small GPT"),
    ],
)
def test_commands_of_the_wheel(command, told, bin_, empty, openai_tiny):
    arguments = [openai_tiny if part == "RELEASE" else part for part in command.split()]
    assert told in run([bin_ / "hf-scratch-gpt", *arguments], empty)


@pytest.mark.release
def test_the_wheel_serves_openais_client(bin_, empty):
    command = [bin_ / "hf-scratch-gpt", "serve", "tiny", "--port", "0"]
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
    with subprocess.Popen(
        command, cwd=empty, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines = iter(process.stderr.readline, "")
            address = next(filter(None, (re.search(r"http://127\.0\.0\.1:\d+", x) for x in lines)))
            client = openai.OpenAI(base_url=f"{address[0]}/v1", api_key="none", max_retries=0)
            asked = dict(model="tiny", prompt="Hello", max_tokens=4, temperature=0)
            answer = client.completions.create(**asked)
        finally:
            process.terminate()
    written = run(
        [bin_ / "hf-scratch-gpt", "generate", "tiny", "Hello", "--temperature", "0"], empty
    )
    assert answer.choices[0].text
    assert written.startswith("Hello" + answer.choices[0].text)


@pytest.mark.release
def test_without_a_compiler_one_line_says_what_to_install(bin_, empty, tmp_path):
    code = (
        "from transformers import AutoModelForCausalLM as Auto\n"
        "from hf_scratch_gpt import optimize_for_generation as optimize\n"
        "try:\n    optimize(Auto.from_pretrained('tiny'))\n"
        "except FileNotFoundError as error:\n    print(f'TOLD {error}')"
    )
    paths = dict(PATH=str(bin_), XDG_CACHE_HOME=str(tmp_path), CXX="")
    told = run([bin_ / "python", "-c", code], empty, **paths)
    line = next(line for line in told.splitlines() if line.startswith("TOLD"))
    assert "install g++" in line
    assert line.endswith("environment variable CXX")


def interpreters():
    """Other Pythons that are at hand, by version."""
    for version in ("3.12", "3.13", "3.14"):
        kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
        found = shutil.which(f"python{version}") if not kept else str(kept[-1])
        yield pytest.param(
            found, id=version, marks=pytest.mark.skipif(not found, reason="is not here")
        )


@pytest.mark.release
@pytest.mark.parametrize("python", list(interpreters()))
def test_newer_pythons_start_the_command(python, bin_, empty):
    """torch is here for one Python only; what starts the command needs none of it."""
    (own,) = bin_.parent.glob("lib/python*/site-packages")
    paths = dict(PYTHONPATH=f"{own}{os.pathsep}{SITE}", PYTHONDONTWRITEBYTECODE="1")
    command = [python, "-W", "error::SyntaxWarning", "-m", "hf_scratch_gpt"]
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run([*command, "--version"], empty, **paths))
    assert "convert" in run([*command, "--help"], empty, **paths)
    compiled = f"import compileall; print(compileall.compile_dir({str(own / 'hf_scratch_gpt')!r}))"
    prefix = dict(PYTHONPYCACHEPREFIX=str(empty / "compiled"))
    assert "True" in run([python, "-W", "error", "-c", compiled], empty, **prefix)
