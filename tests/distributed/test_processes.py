"""Whose fault an error is: another process's that has gone, or this one's."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, Dataset

from cheaper.distributed.processes import lost_another


class Broken(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        raise RuntimeError("connection reset while reading s3://bucket/shard")


def test_a_data_workers_own_error_is_not_a_lost_process():
    with pytest.raises(RuntimeError) as caught:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert "connection reset" in str(caught.value)
    assert lost_another(caught.value) is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234", "Connection closed by peer"),
        ("[pair.cc:1] Read error [::1]:2: Connection reset by peer", "Connection reset by peer"),
        ("Timed out waiting 1800000ms for recv operation to complete", "Timed out waiting"),
        ("NCCL error in: NCCLUtils.cpp:328, remote process exited or there was a network error\nLast error:", "remote"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "DataLoader worker"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "DataLoader worker"),
    ],
)
def test_what_is_said_when_a_process_has_gone(message, reason):
    assert reason in lost_another(RuntimeError(message))


@pytest.mark.parametrize("message", ["NCCL Error 5: invalid usage", "size mismatch\n connection closed", ""])
def test_other_errors_keep_their_traceback(message):
    assert lost_another(RuntimeError(message)) is None
