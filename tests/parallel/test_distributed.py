"""How processes find one another, and real processes on loopback."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from loopback import ROOT, Processes, environment_of, free_port
from numpy.testing import assert_allclose
from safetensors.numpy import load_file

from dpo.config import DistributedConfig
from dpo.outcomes import HANG, NO_PROGRESS, PEER_LOST
from dpo.parallel import cluster, distributed
from dpo.parallel.cluster import Cluster, find_cluster
from dpo.parallel.joining import bind_address

SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[007,010-012],other3",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
GKE = {"TPU_WORKER_HOSTNAMES": "slice-0.dpo,slice-1.dpo", "TPU_WORKER_ID": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}


def find(environment, **settings):
    return find_cluster(DistributedConfig(**settings), environment)


def test_alone_when_nothing_says_otherwise():
    assert find({}) is None
    assert find({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None  # the batch script
    assert find(SLURM, cluster="none") is None
    assert find({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None


def test_slurm_meets_at_its_first_node():
    assert find(SLURM) == Cluster("node007:61443", 4, 2, "slurm")
    one_host = SLURM | {"SLURM_STEP_NODELIST": "gpu1", "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "2"}
    assert find(one_host) == Cluster("gpu1:61443", 4, 2, "slurm", local_device=2)


def test_open_mpi_4_says_where_it_was_started_and_5_on_one_host_only():
    uri = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
    found = find(OPENMPI | uri)
    assert found is not None
    assert str(found.coordinator).startswith("10.96.0.1:")
    assert found[1:] == (4, 3, "openmpi", 1)
    local = find(OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    assert local is not None
    assert str(local.coordinator).startswith("127.0.0.1:")
    with pytest.raises(
        ValueError, match=r"one of several processes \(openmpi\), but coordinator is not known"
    ):
        find(OPENMPI)


def test_a_tpu_slice_of_gke_and_several_of_them():
    assert find(GKE) == Cluster("slice-0.dpo:8482", 2, 1, "gke-tpu")
    several = {
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "2",
        "MEGASCALE_COORDINATOR_ADDRESS": "first.dpo:8080",
    }
    assert find(GKE | several) == Cluster("first.dpo:8482", 6, 5, "gke-tpu")


def test_an_indexed_job_takes_the_rest_from_its_manifest():
    environment = KUBERNETES | {"JAX_COORDINATOR_ADDRESS": "dpo-0.dpo:8476"}
    assert find(environment, num_processes=2) == Cluster("dpo-0.dpo:8476", 2, 1, "kubernetes")
    with pytest.raises(ValueError, match="num_processes is not known"):
        find(environment)


def test_settings_come_before_what_is_found():
    given = {"coordinator": "here:1", "num_processes": 8, "process_id": 7}
    assert find(SLURM, **given) == Cluster("here:1", 8, 7, "slurm")
    assert find({}, **given) == Cluster("here:1", 8, 7, "settings")
    said = SLURM | {"JAX_COORDINATOR_ADDRESS": "there:2"}
    assert find(said) == Cluster("there:2", 4, 2, "slurm")
    assert find(said, **given) == Cluster("here:1", 8, 7, "slurm")
    with pytest.raises(ValueError, match=r"coordinator, process_id is not known.*JAX_COORDINATOR_ADDRESS"):
        find({}, num_processes=2)
    with pytest.raises(ValueError, match="coordinator, process_id is not known") as refused:
        find({"JAX_COORDINATOR_ADDRESS": "there:2"}, cluster="none", num_processes=2)
    assert "JAX_COORDINATOR_ADDRESS" not in str(refused.value), "it is not looked at there"
    with pytest.raises(ValueError, match="process 2 of 2"):
        find({}, coordinator="here:1", num_processes=2, process_id=2)
    with pytest.raises(ValueError, match="cluster is slurm, but its variables are not"):
        find({}, cluster="slurm")


def test_settings_come_before_what_jax_would_find_on_a_cloud_tpu(monkeypatch):
    monkeypatch.setitem(cluster._LAUNCHERS, "tpu", lambda _: Cluster(None, None, None, "tpu"))
    given = {"coordinator": "here:1", "num_processes": 8, "process_id": 7}
    assert find({}) == Cluster(None, None, None, "tpu")
    assert find({}, **given) == Cluster("here:1", 8, 7, "tpu")
    assert find({}, num_processes=1) is None
    with pytest.raises(ValueError, match=r"\(tpu\), but num_processes, process_id is not known"):
        find({}, coordinator="here:1")


def test_settings_hold_where_no_launcher_is_asked():
    given = {"coordinator": "here:1", "num_processes": 8, "process_id": 7}
    assert find(SLURM, cluster="none", **given) == Cluster("here:1", 8, 7, "settings")


def test_a_coordinator_on_the_loopback_listens_there_alone(monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    assert bind_address("127.0.0.1:8476") == "127.0.0.1:8476"
    assert bind_address("[::1]:8476") == "[::1]:8476"
    assert bind_address("node007:8476") is None
    assert bind_address(None) is None


LISTENING = """
import os, sys
import jax
import numpy as np
from jax.experimental import multihost_utils
from dpo.config import DistributedConfig
from dpo.parallel.joining import joined

def addresses():
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    mine = {os.readlink(link) for link in links if os.path.lexists(link)}
    rows = [row.split() for name in ("tcp", "tcp6") for row in open(f"/proc/net/{name}").readlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in mine]

coordinator, number = sys.argv[1], int(sys.argv[2])
print("alone", *addresses())
with joined(DistributedConfig(coordinator=coordinator, num_processes=2, process_id=number)):
    multihost_utils.process_allgather(np.asarray(number))
    print("joined", *addresses())
"""


@pytest.mark.slow
def test_who_meets_on_the_loopback_listens_there_and_where_sums_are_taken(tmp_path):
    """Process 0 at the coordinator's port, and each at one more, by which Gloo connects them."""
    port = free_port()
    environment = {**environment_of(1, tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LISTENING, f"127.0.0.1:{port}"]
    both = [
        subprocess.Popen([*command, str(number)], env=environment, stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    lines = [[line.split() for line in text.splitlines()] for text in said]
    known = [{line[0]: line[1:] for line in mine if line[0] in ("alone", "joined")} for mine in lines]
    assert [mine["alone"] for mine in known] == [[], []]
    coordinator = [address for address in known[0]["joined"] if address.endswith(f":{port:04X}")]
    assert [re.sub("^0+(FFFF0+)?", "", address.partition(":")[0]) for address in coordinator] == ["100007F"]
    assert len(known[0]["joined"]) == 2
    assert len(known[1]["joined"]) == 1


ALONE = """
import sys
from dpo.config import DistributedConfig
from dpo.parallel.joining import joined
given = {"coordinator": sys.argv[1], "num_processes": 2, "process_id": int(sys.argv[2]), "start_timeout": 2.0}
with joined(DistributedConfig(**given)):
    print("met somebody")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_who_waits_in_vain_says_that_it_did_not_meet_the_others(number, tmp_path):
    """JAX aborts a process that nobody comes to; what it says before is ours, and so is its code."""
    where = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", ALONE, where, str(number)],
        env={**environment_of(1, tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == PEER_LOST.code
    begins = f"dpo train: {PEER_LOST.begins}: process {number} of 2 (settings) "
    assert f"{begins}did not meet the others at {where} within 2 s (distributed.start_timeout)" in done.stderr
    assert "met somebody" not in done.stdout


@pytest.mark.parametrize(
    "given", [{1: "a"}, [{"b": {2: "c"}}], {"path": Path()}, {"set": {1}}, np.float32(1)]
)
def test_the_main_process_passes_on_plain_json_or_says_what_is_none(given, monkeypatch):
    monkeypatch.setattr(distributed, "is_alone", lambda: False)
    monkeypatch.setattr(distributed, "is_main", lambda: True)
    monkeypatch.setattr(distributed, "from_main", lambda arrays: arrays)
    plain = {"a": [1, "b", None, {"c": 0.5}]}
    assert distributed.on_main(lambda: (plain, [])) == [plain, []]
    with pytest.raises(TypeError, match="JSON"):
        distributed.on_main(lambda: given)


# ---- processes ----


@pytest.fixture
def make_config(tmp_path, tiny_model_dir):
    data = tmp_path / "train.jsonl"
    rows = [
        {"prompt": f"number {i}", "responses": ["yes, very good", "perhaps", "no"][: 2 + i % 2]}
        for i in range(24)
    ]
    rows = [row | {"ranks": list(range(1, 1 + len(row["responses"])))} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(name, **training):
        settings = {
            "run_dir": str(tmp_path / name),
            "model": {"source": str(tiny_model_dir)},
            "data": {"train": str(data), "eval": str(data), "max_eval": 5, "max_length": 128},
            "objective": {"name": "plackett_luce", "beta": 0.5},
            "optimizer": {
                "learning_rate": 1e-2,
                "epsilon": 1e-2,
                "schedule": "constant",
                "warmup_fraction": 0.0,
            },
            "training": {"batch_size": 8, "steps": 6} | training,
            "mesh": {"data": -1, "fsdp": 2},
            "distributed": {"start_timeout": 60.0, "heartbeat_timeout": 10.0, "step_timeout": 30.0},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return make


def wait_for(path, seconds=600.0):
    """Until a file that is not empty, or a directory, is there."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)


def metrics_of(config):
    run_dir = yaml.safe_load(config.read_text())["run_dir"]
    rows = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens/s")} for row in rows]


def weights_of(config):
    return load_file(Path(yaml.safe_load(config.read_text())["run_dir"], "export", "model.safetensors"))


def assert_same_run(config, other):
    """Metrics within 1e-4, weights within 1e-4 of an array's largest; with `-s`, the largest differences."""
    largest = {"metrics": 0.0, "weights": 0.0}
    for ours, theirs in zip(metrics_of(config), metrics_of(other), strict=True):
        for name in theirs.keys() - {"rewards/accuracies", "eval/rewards/accuracies"}:  # δ is 0 at first
            assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-5, err_msg=name)
            difference = abs(ours[name] - theirs[name]) / max(1.0, abs(theirs[name]))
            largest["metrics"] = max(largest["metrics"], difference)
    weights = weights_of(config)
    for name, array in weights_of(other).items():
        assert_allclose(weights[name], array, atol=1e-4 * np.abs(array).max(), err_msg=name)
        difference = np.abs(weights[name] - array).max() / np.abs(array).max()
        largest["weights"] = max(largest["weights"], float(difference))
    print(f"largest differences of {config.stem} to {other.stem}: {largest}", flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_as_one(count, make_config, tmp_path):
    samples = {"eval_every": 3, "eval_samples": 4, "eval_max_new_tokens": 8}
    alone, together = make_config("alone", **samples), make_config("together", **samples)
    assert Processes(1, 4, alone, tmp_path).wait() == [0]
    processes = Processes(count, 4 // count, together, tmp_path)
    assert processes.wait() == [0] * count, processes.text(0) + processes.text(1)
    assert_same_run(together, alone)
    assert "eval/samples/kl" in metrics_of(together)[-1]
    assert "step 6/6" in processes.text(0)
    assert "step" not in processes.text(1), "only the main process speaks"


@pytest.mark.ci
@pytest.mark.parametrize(
    ("given", "names"),
    [
        ([["--objective.beta=0.1"], ["--objective.beta=0.2"]], ["objective.beta"]),
        ([[], ["--objective={name: sft}"]], ["objective.beta", "objective.name"]),  # which has no beta
    ],
)
def test_processes_with_other_settings_stop_at_the_start_and_say_which(given, names, make_config, tmp_path):
    config = make_config("run")
    processes = Processes(2, 1, config, tmp_path, extra=lambda i: given[i])
    assert processes.wait() == [2, 2], processes.text(0) + processes.text(1)
    said = "; ".join(f"{name} of process 1" for name in names)
    for i in range(2):
        assert f"do not agree: {said} differs" in " ".join(processes.text(i).split())


def test_facts_that_one_process_alone_has_differ_too(monkeypatch):
    """As the main process sees it: the others' digests are what they sent."""
    facts = [{"a": 1, "b": [2]}, {"a": 1, "b": [2]}, {"c": None, "a": 1, "b": [3]}, {"a": 1}]
    sent = list[bytes]()

    def from_all(mine):
        sent.append(mine())
        return sent

    monkeypatch.setattr(distributed, "from_all", from_all)
    distributed.agree(facts[0])  # alone: nothing is sent
    assert sent == []
    monkeypatch.setattr(distributed, "is_alone", lambda: False)
    for one in facts[:2]:
        distributed.agree(one)
    for one, said in zip(
        facts[2:], ["b of process 2; c of process 2", "b of process 2, 3; c of process 2"], strict=True
    ):
        with pytest.raises(ValueError, match=f"do not agree: {said} differs from process 0's"):
            distributed.agree(one)


@pytest.mark.ci
def test_a_bad_line_that_one_process_reads_ends_all_with_its_place(make_config, tmp_path):
    config = make_config("run")
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "x", "chosen": "y", "rejected": ""}\n')
    processes = Processes(2, 1, config, tmp_path)
    assert processes.wait() == [2, 2], processes.text(0) + processes.text(1)
    for i in range(2):
        text = "".join(processes.text(i).split())
        assert "1of25rowsaremalformed" in text
        assert "train.jsonl:25:field'rejected'" in text


@pytest.mark.slow
@pytest.mark.parametrize("killed", [1, 0])
def test_a_killed_process_ends_the_others_and_a_new_start_goes_on(killed, make_config, tmp_path):
    whole, config = (make_config(name, steps=40, save_every=10) for name in ("whole", "killed"))
    assert Processes(2, 2, whole, tmp_path).wait() == [0, 0]
    processes = Processes(2, 2, config, tmp_path)
    wait_for(tmp_path / "killed" / "checkpoints" / "10")
    processes.all[killed].send_signal(signal.SIGKILL)
    start = time.monotonic()
    codes = processes.wait(90)
    print(f"{time.monotonic() - start:.1f} s after the kill: exit codes {codes}", flush=True)
    assert time.monotonic() - start < 60
    assert codes[killed] == -signal.SIGKILL
    other = " ".join(processes.text(1 - killed).split())
    assert codes[1 - killed] == PEER_LOST.code, other
    assert "the same command goes on from the newest checkpoint" in other.lower()
    again = Processes(2, 2, config, tmp_path)
    assert again.wait() == [0, 0], again.text(0)
    assert "resumed after step" in again.text(0)
    assert_same_run(config, whole)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_at_the_same_step(make_config, tmp_path):
    config = make_config("run", steps=2000)
    processes = Processes(2, 1, config, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(metrics)
    processes.all[1].send_signal(signal.SIGTERM)
    assert processes.wait(90) == [75, 75], processes.text(0) + processes.text(1)
    assert "goes on from there" in processes.text(0)


@pytest.mark.parametrize(
    ("fruitless", "outcome"),
    [
        ("False", HANG),
        ("True", NO_PROGRESS),
        pytest.param("open('/no/such/run')", HANG, marks=pytest.mark.slow),
    ],
)
def test_a_step_that_takes_too_long_ends_with_all_stacks(fruitless, outcome, tmp_path):
    program = (
        "import time\n"
        "from dpo.parallel.deadline import Deadline\n"
        "def hang():\n    time.sleep(60)\n"
        f"with Deadline(0.3, fruitless=lambda: {fruitless}) as watch:\n"
        "    watch.step(1)\n"  # a new shape, which has its time to compile
        "    time.sleep(0.5)\n"
        "    watch.pause()\n"
        "    time.sleep(0.5)\n"
        "    print('still here', flush=True)\n"
        "    watch.step(1)\n"
        "    hang()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment_of(1, tmp_path),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == outcome.code
    assert f"dpo train: {outcome.begins}: process 0 of 1: a step" in result.stderr
    assert "still here" in result.stdout
    assert "longer than 0.3 s (distributed.step_timeout)" in result.stderr
    assert "in hang" in result.stderr
