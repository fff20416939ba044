"""Who is on this machine? Each launcher's variables, those of another job, contradictions, and silence."""

from __future__ import annotations

import pytest

from ray_streamer.api.launchers import find_layout
from ray_streamer.api.membership import find_membership
from ray_streamer.errors import SettingsError

TORCHRUN = {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7))
FOURS = ((0, 1, 2, 3), (4, 5, 6, 7))
ALL = ((0, 1, 2, 3, 4, 5, 6, 7),)


def _nodes(environment: dict[str, str], rank: int = 5) -> tuple[tuple[int, ...], ...]:
    said = {"RANK": str(rank), "WORLD_SIZE": "8"}
    return find_layout(rank, 8, said | environment).topology.nodes


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [
        pytest.param(TORCHRUN, PAIRS, id="torchrun"),
        pytest.param({"LOCAL_WORLD_SIZE": "4"}, FOURS, id="local-world-size-alone"),
        pytest.param(OPEN_MPI, FOURS, id="open-mpi"),
        pytest.param(MPICH, FOURS, id="mpich"),
        pytest.param(
            {
                "MV2_COMM_WORLD_RANK": "5",
                "MV2_COMM_WORLD_SIZE": "8",
                "MV2_COMM_WORLD_LOCAL_RANK": "1",
                "MV2_COMM_WORLD_LOCAL_SIZE": "2",
            },
            PAIRS,
            id="mvapich",
        ),
        pytest.param({"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4"}, FOURS, id="pals"),
        pytest.param(SLURM, FOURS, id="slurm"),
        pytest.param(
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "3,4,1", "SLURM_LOCALID": "2"},
            ((0, 1, 2), (3, 4, 5, 6), (7,)),
            id="slurm-uneven",
        ),
        pytest.param(
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "2(x4)"}, PAIRS, id="slurm-job"
        ),
        pytest.param({"LOCAL_SIZE": "4", "LOCAL_RANK": "1"}, FOURS, id="deepspeed"),
        pytest.param({"PET_NNODES": "8"}, tuple((rank,) for rank in range(8)), id="kubeflow-one-process-per-pod"),
        pytest.param({"PET_NNODES": "2", "PET_NPROC_PER_NODE": "4"}, FOURS, id="kubeflow"),
        pytest.param({"NNODES": "4"}, PAIRS, id="nodes-counted-by-hand"),
        pytest.param(TORCHRUN | OPEN_MPI | SLURM, PAIRS, id="torchrun-inside-of-others"),
        pytest.param({}, ALL, id="nothing"),
        pytest.param(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "2"}, ALL, id="open-mpi-of-another-job"),
        pytest.param(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"}, ALL, id="open-mpi-of-another-process"),
        pytest.param(SLURM | {"SLURM_NTASKS": "1"}, ALL, id="slurm-that-started-the-launcher"),
        pytest.param(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x"}, ALL, id="slurm-garbled"),
        pytest.param(SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4,3"}, ALL, id="slurm-that-does-not-add-up"),
        pytest.param({"PET_NNODES": "1:4"}, ALL, id="elastic"),
        pytest.param({"NNODES": "3"}, ALL, id="nodes-that-do-not-divide"),
        pytest.param({"NNODES": "0"}, ALL, id="no-nodes"),
        pytest.param({"MASTER_ADDR": "127.0.0.1"}, ALL, id="master-is-here"),
        pytest.param({"MASTER_ADDR": "localhost"}, ALL, id="master-is-here-by-name"),
        pytest.param({"MASTER_ADDR": "no such host.invalid"}, ALL, id="master-that-nobody-knows"),
    ],
)
def test_who_shares_a_machine(environment, nodes):
    assert _nodes(environment) == nodes


@pytest.mark.parametrize(
    ("environment", "sign"),
    [
        pytest.param({"MASTER_ADDR": "192.0.2.1"}, "MASTER_ADDR=192.0.2.1 is another machine", id="master-elsewhere"),
        pytest.param({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 for RANK=5", id="fifth-rank-but-first-here"),
    ],
)
def test_ranks_that_cannot_all_be_here_are_told_at_once(environment, sign):
    with pytest.raises(SettingsError) as caught:
        _nodes(environment)
    assert sign in str(caught.value)
    assert "set LOCAL_WORLD_SIZE" in str(caught.value)


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        pytest.param({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "LOCAL_RANK=0", id="torchrun"),
        pytest.param(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "LOCAL_RANK=2", id="open-mpi-by-node"),
        pytest.param(SLURM | {"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2", id="slurm-cyclic"),
        pytest.param({"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "7"}, "LOCAL_RANK=7", id="beyond-the-node"),
    ],
)
def test_ranks_that_are_dealt_out_over_nodes_in_turn_are_refused(environment, name):
    """They would look for each other on the wrong machines."""
    with pytest.raises(SettingsError) as caught:
        _nodes(environment)
    assert name in str(caught.value)
    assert "number the ranks of a node in a row" in str(caught.value)


@pytest.mark.parametrize("size", ["0", "3", "16"])
def test_a_size_that_does_not_divide(size):
    with pytest.raises(SettingsError, match="LOCAL_WORLD_SIZE dividing it"):
        _nodes({"LOCAL_WORLD_SIZE": size})


@pytest.mark.parametrize(
    ("environment", "words"),
    [({}, "nothing says how many of the 8 ranks are on this machine"), (SLURM, "SLURM_STEP_TASKS_PER_NODE says")],
)
def test_what_was_concluded_from_what_is_said(environment, words):
    assert words in find_layout(5, 8, {"RANK": "5", "WORLD_SIZE": "8"} | environment).explanation


@pytest.mark.parametrize("local_world_size", [2, 0, -1])
def test_several_ranks_on_this_machine_of_a_job_that_nobody_started_are_refused(monkeypatch, local_world_size):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match=f"local_world_size={local_world_size}, and nothing says"):
        find_membership(None, None, local_world_size, None)
    assert find_membership(None, None, 1, None).topology.num_ranks == 1
