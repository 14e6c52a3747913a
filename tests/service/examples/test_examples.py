"""The examples, as real processes: with the service, and without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from placement.io import read_placement
from tests.service.examples.conftest import Service, placement_file
from tests.service.server import eventually, free_port

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples"
BYTE16 = ROOT / "placement" / "samples" / "byte16"


def run(
    command: Sequence[str], environment: Mapping[str, str] | None = None, *, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would, with our command on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MOE_", "SLURM_"))}
    return subprocess.run(
        list(command),
        env={**clean, "PATH": path, "OMP_NUM_THREADS": "1", **(environment or {})},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def down() -> str:
    """Return the URL of a service that is down."""
    return f"http://127.0.0.1:{free_port()}"


# torchrun


def launcher(example: str, *arguments: str, processes: int = 2) -> list[str]:
    """Return the command that trains on this machine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    rendezvous = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    return [*torchrun, *rendezvous, str(EXAMPLES / example / "train.py"), *arguments]


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("example", ["torchrun", "trainer"])
def test_training(training: Service, example: str, tmp_path: Path) -> None:
    """Two ranks run with the placement of the service, post what they counted, and change over."""
    options = {
        "MOE_PLACEMENT_DEPLOYMENT": training.deployment,
        "MOE_PLACEMENT_URL": training.url,
        "MOE_PLACEMENT_CACHE_DIR": str(tmp_path / "cache"),
    }
    found: list[subprocess.CompletedProcess[str]] = []
    job = threading.Thread(
        target=lambda: found.append(run(launcher(example, "--steps", "60"), options, cwd=tmp_path))
    )
    job.start()
    # Once both ranks have posted a window it is judged.
    deployment = training.deployment
    judged = eventually(
        lambda: (training.client.deployment(deployment).document["drift"] or {}).get("version"),
        120,
        what="windows were judged",
    )
    assert judged == 1
    training.promote(1, devices=2, swapped=True)
    job.join(200)
    (done,) = found
    assert done.returncode == 0, done.stderr
    assert "placement of the service, version 1" in done.stdout
    assert "step 1 loss" in done.stdout
    assert "version 2" in done.stdout, done.stdout
    assert (tmp_path / "cache" / f"{training.deployment}.placement").exists()


@pytest.mark.model
@pytest.mark.slow
def test_torchrun_without_the_service() -> None:
    """Training starts all the same, with experts in order, and says so."""
    soon = ("--deployment", "chat", "--url", down(), "--timeout", "3")
    done = run(launcher("torchrun", "--steps", "1", *soon, processes=1))
    assert done.returncode == 0, done.stderr
    assert "placement of the contiguous" in done.stdout
    assert "WARNING: no placement of chat" in done.stderr


# SLURM


def prolog(rank: int, shared: Path, url: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the prolog of a task."""
    environment = {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "MOE_PLACEMENT_DEPLOYMENT": "chat",
        "MOE_PLACEMENT_SHARED": str(shared),
        "MOE_PLACEMENT_URL": url,
        "MOE_PLACEMENT_TIMEOUT": "20",
        **more,
    }
    return run(["bash", str(EXAMPLES / "slurm" / "task_prolog.sh")], environment)


def exported(done: subprocess.CompletedProcess[str]) -> Path | None:
    """Return the file that a prolog set for its task."""
    lines = [line for line in done.stdout.splitlines() if line.startswith("export MOE_PLACEMENT_FILE=")]
    return Path(lines[0].partition("=")[2]) if lines else None


def test_slurm(service: Service, tmp_path: Path) -> None:
    """Task 0 fetches, the others find it; all have the same file, which does not change under the job."""
    named = {"MOE_PLACEMENT_DEPLOYMENT": service.deployment}
    first = prolog(0, tmp_path, service.url, **named)
    service.promote(2)
    second = prolog(1, tmp_path, service.url, **named)
    file = exported(first)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert file is not None
    assert exported(second) == file
    assert file.read_bytes() == placement_file(1)
    again = exported(prolog(0, tmp_path, service.url, SLURM_RESTART_COUNT="1", **named))
    assert again is not None
    assert again.read_bytes() == placement_file(2)


def test_slurm_without_the_service(service: Service, tmp_path: Path) -> None:
    """The job starts with the last good one, or with experts in order, or without; strict holds it back."""
    named = {"MOE_PLACEMENT_DEPLOYMENT": service.deployment}
    soon = {"MOE_PLACEMENT_TIMEOUT": "1"}
    model = {"MOE_PLACEMENT_TOPOLOGY": "h100:1x4", "MOE_PLACEMENT_MODEL": str(BYTE16)}
    prolog(0, tmp_path / "a", service.url, **named)
    kept = exported(prolog(0, tmp_path / "a", down(), SLURM_RESTART_COUNT="1", **soon, **named))
    assert kept is not None
    assert kept.read_bytes() == placement_file(1)
    in_order = prolog(0, tmp_path / "b", down(), **soon, **named, **model)
    file = exported(in_order)
    assert file is not None
    assert read_placement(file).physical_to_logical_map_LS[0].tolist() == list(range(16))
    assert "print moe-placement: WARNING" in in_order.stdout
    without = prolog(0, tmp_path / "c", down(), **soon, **named)
    assert (without.returncode, exported(without)) == (0, None)
    assert prolog(1, tmp_path / "c", down(), **soon, **named).returncode == 0
    strict = prolog(0, tmp_path / "d", down(), MOE_PLACEMENT_STRICT="1", **soon, **named, **model)
    assert strict.returncode == 5


def test_slurm_leaves_other_jobs_alone(tmp_path: Path) -> None:
    """A job that names no deployment gets nothing, not even a folder."""
    done = prolog(0, tmp_path / "x", down(), MOE_PLACEMENT_DEPLOYMENT="")
    assert (done.returncode, done.stdout) == (0, "")
    assert not (tmp_path / "x").exists()


# Kubernetes


def manifest() -> Any:
    """Return the pod that the manifest describes."""
    return yaml.safe_load((EXAMPLES / "kubernetes" / "deployment.yaml").read_text())["spec"]["template"][
        "spec"
    ]


def init_container(
    volumes: Path, *extra: str, token: str = "mp_of_nobody", **variables: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """Run the init container's command as a process, with folders in the place of its volumes."""
    container = manifest()["initContainers"][0]
    values = {entry["name"]: entry["value"] for entry in container["env"]} | variables
    command = container["command"]
    for mount in container["volumeMounts"]:
        (volumes / mount["name"]).mkdir(parents=True, exist_ok=True)
        command = [part.replace(mount["mountPath"], str(volumes / mount["name"])) for part in command]
    for name, value in values.items():
        command = [part.replace(f"$({name})", value) for part in command]
    secret = volumes / "token" / "token"
    secret.write_text(token)
    secret.chmod(0o440)
    return run([*command, *extra], values), volumes / "placement" / "location.json"


def test_kubernetes(guarded: Service, token: str, tmp_path: Path) -> None:
    """The init container writes the engine's own file, with the token that is mounted."""
    done, file = init_container(
        tmp_path / "volumes",
        token=token,
        PLACEMENT_DEPLOYMENT=guarded.deployment,
        PLACEMENT_SERVICE=guarded.url,
        PLACEMENT_TOPOLOGY="h100:1x4",
        PLACEMENT_MODEL=str(BYTE16),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["physical_to_logical_map"][0][:3] == [15, 0, 1]


def test_kubernetes_without_the_service(tmp_path: Path) -> None:
    """The manifest as it is, with the service unreachable: the pod starts; --strict holds it back."""
    soon = "--timeout=3"
    done, file = init_container(tmp_path / "a", soon, PLACEMENT_SERVICE=down(), PLACEMENT_DEPLOYMENT="chat")
    assert done.returncode == 0, done.stderr
    assert json.loads(file.read_text())["physical_to_logical_map"][5] == list(range(256))
    assert "WARNING" in done.stderr
    strict, file = init_container(tmp_path / "b", soon, "--strict", PLACEMENT_SERVICE=down())
    assert strict.returncode == 5
    assert not file.exists()


def test_kubernetes_manifest_is_careful() -> None:
    """No variable of a Service meets a setting, no secret is for everybody, every mount has its volume."""
    pod = manifest()
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for container in pod["initContainers"] + pod["containers"]:
        assert not any(entry["name"].endswith("_PORT") for entry in container.get("env", ()))
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
    assert volumes["token"]["secret"]["defaultMode"] & 0o007 == 0


# Ray


@pytest.mark.model
@pytest.mark.slow
def test_ray(service: Service) -> None:
    """Two actors get the placement through the object store, and post."""
    options = ["--deployment", service.deployment, "--url", service.url, "--workers", "2"]
    # A cluster of its own: without an address Ray joins any that runs here, such as that of another test.
    alone = {"RAY_ADDRESS": "local"}
    done = run([sys.executable, str(EXAMPLES / "ray" / "actors.py"), *options], alone)
    assert done.returncode == 0, done.stderr
    assert "placement of the service, version 1" in done.stdout
    assert "posted; version 1 should run" in done.stdout
