"""What would be called on a machine with GPUs: this one has none, so the calls are recorded."""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.core.errors import InputError
from distill.execution import devices
from distill.launch import gpus, sitecheck
from distill.protocols import Loss, Trained
from distill.spec.model import LaunchSpec, OptimizerSpec
from distill.training import saving
from distill.training.plain import PlainTrainable
from distill.training.turn_logs import TurnLogs
from distill.training.world import ALONE, World

CUDA = torch.device("cuda")


@pytest.fixture
def machine(monkeypatch):
    """A machine with GPUs, whose number and ids a test may change, and the calls that it got."""
    made = SimpleNamespace(count=4, uuids=["a", "b", "c", "d"], calls=[], store=distributed.HashStore(), rank=(0, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: made.count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.calls.append(("set_device", device)))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=made.uuids[device.index])
    )
    monkeypatch.setattr(
        distributed, "init_process_group", lambda *args, **kwargs: made.calls.append(("init", args, kwargs))
    )
    monkeypatch.setattr(distributed, "rendezvous", lambda *args, **kwargs: iter([(made.store, *made.rank)]))
    monkeypatch.setattr(devices, "set_numerics", lambda numerics: made.calls.append(("numerics", numerics)))
    return made


def join(machine, local_rank: int) -> None:
    World.join(CUDA, 1.0, local_rank, print)


@pytest.mark.parametrize(("count", "local_rank", "index"), [(4, 0, 0), (4, 3, 3), (1, 0, 0), (1, 3, 0)])
def test_a_rank_binds_its_own_gpu_also_if_it_sees_no_other(machine, count, local_rank, index):
    machine.count = count
    join(machine, local_rank)
    own = torch.device("cuda", index)
    (first, (name, (backend,), given)) = machine.calls
    assert first == ("set_device", own) and name == "init"
    assert backend == "cpu:gloo,cuda:nccl" and given["device_id"] == own
    assert given["timeout"].total_seconds() == 60


def test_ranks_without_gpus_bind_none(machine):
    World.join(torch.device("cpu"), 1.0, 0, print)
    [(_, (backend,), given)] = machine.calls
    assert backend == "gloo" and given["device_id"] is None


def test_a_gpu_that_two_ranks_would_share_is_refused_before_nccl_starts(machine):
    machine.count, machine.rank = 1, (0, 3)
    works = distributed.PrefixStore("works", machine.store)
    for rank, uuid in ((1, b"b"), (2, b"a")):
        works.set(f"gpu {rank}", uuid)
    with pytest.raises(InputError, match=r"ranks 0 and 2 have the same GPU; each process needs one of its own\. Start"):
        join(machine, 0)
    assert [name for name, *_ in machine.calls] == ["set_device"]


def test_a_task_of_slurm_may_see_only_its_own_gpu(machine, monkeypatch):
    machine.count = 1
    launch = LaunchSpec(procs=4)
    with pytest.raises(InputError, match="launch.procs=4, but there are only 1 GPUs"):
        devices.place(launch, 4)
    monkeypatch.setattr(devices.tasks, "is_task", lambda: True)
    assert devices.place(launch, 4).type == "cuda"
    assert devices.of_rank(launch, 3).type == "cuda" and machine.calls[-1] == ("set_device", torch.device("cuda", 0))


def test_a_device_is_exact_unless_the_spec_says_fast(machine):
    devices.place(LaunchSpec())
    devices.place(LaunchSpec(), numerics="fast")
    assert machine.calls == [("numerics", "exact"), ("numerics", "fast")]


def test_doctor_adds_up_ranks_by_nccl(machine, monkeypatch):
    """The sum of 0 and 1 is 1; a sum of 0 is a fault."""
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setattr(
        distributed, "new_group", lambda **given: machine.calls.append(("new_group", given)) or "the group"
    )
    total = {"now": 1}

    def reduced(tensor, group):
        assert group == "the group" and tensor.item() == 1
        tensor.fill_(total["now"])

    monkeypatch.setattr(distributed, "all_reduce", reduced)
    monkeypatch.setattr(torch, "tensor", lambda values, device: torch.as_tensor(values))
    assert sitecheck._nccl(1, 2) == "ok"
    own = torch.device("cuda", 1)
    assert machine.calls[0] == ("set_device", own)
    assert machine.calls[1][1]["backend"] == "nccl" and machine.calls[1][1]["device_id"] == own
    total["now"] = 0
    assert sitecheck._nccl(1, 2) == "the sum of the ranks is 0, not 1"

    def fails(**_):
        raise RuntimeError("NCCL error: unhandled system error\nmore")

    monkeypatch.setattr(distributed, "new_group", fails)
    assert sitecheck._nccl(1, 2) == "NCCL error: unhandled system error"


def test_adamw_is_fused_on_a_gpu():
    with FakeTensorMode():
        layer = nn.Linear(2, 2, device=CUDA)
        trainable = PlainTrainable("student", Trained(layer), OptimizerSpec())
    assert trainable.optimizers.each[0].defaults["fused"] is True and layer.weight.device.type == "cuda"


def test_logs_are_copied_to_pinned_memory_without_waiting(monkeypatch):
    events, pinned, copies = [], [], []

    class Event:
        def record(self, stream):
            events.append(("record", stream))

        def synchronize(self):
            events.append("synchronize")

    empty = torch.empty
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = Loss(torch.zeros((), device=CUDA), {"gap": torch.zeros((), device=CUDA)})
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")

        def pin(*shape, **options):
            if options.pop("pin_memory", False):
                pinned.append(shape)
            return empty(*shape, **options)

        monkeypatch.setattr(torch, "empty", pin)
        copy = torch.Tensor.copy_

        def noting(target, source, non_blocking=False):
            copies.append((target.device.type, source.device.type, non_blocking))
            return copy(target, source, non_blocking)

        monkeypatch.setattr(torch.Tensor, "copy_", noting)
        logs = TurnLogs.of("student", "step 0", [loss], torch.zeros((), device=CUDA), ALONE)
    assert logs.names == ["loss", "gap", "grad_norm"]
    assert pinned == [(3,)] and copies == [("cpu", "cuda", True)]
    assert events == [("record", "the stream")]


def test_the_copy_of_a_checkpoint_is_pinned_and_freed(monkeypatch):
    calls = []

    class Runtime:
        def cudaHostRegister(self, address, size, flags):
            calls.append(("register", address, size, flags))
            return 0

        def cudaHostUnregister(self, address):
            calls.append(("unregister", address))

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    made = saving._host_memory(4096, pinned=True)
    address = made.data_ptr()
    assert calls == [("register", address, 4096, 1)]
    del made
    assert calls[1:] == [("unregister", address)]
    saving._host_memory(16, pinned=False)
    assert len(calls) == 2


def test_own_is_the_only_gpu_that_is_seen(machine):
    assert gpus.own(2) == torch.device("cuda", 2)
    machine.count = 1
    assert gpus.own(2) == torch.device("cuda", 0)
