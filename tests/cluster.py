"""A real Slurm cluster of several nodes on this machine, with its own munged, slurmctld and slurmds. A context manager.

Each node is a slurmd with its own port at 127.0.0.1. The CPUs and GPUs that it declares need not exist. Partitions:
batch (default), low (preempted by high and then requeued), high.
"""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import daemons

PATH = daemons.path("slurm")
missing = daemons.missing("slurm", PATH)

CONF = """
ClusterName=test{port}
SlurmctldHost=localhost(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
DefMemPerCPU=100
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=1
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{parameters}
{plugins}
JobRequeue=1
KillWait=20
MinJobAge={min_job_age}
SlurmdTimeout=30
SlurmctldTimeout=30
InactiveLimit=0
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobcomp.log
AccountingStorageType=accounting_storage/none
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL DefaultTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=60 State=UP PriorityTier=20 PreemptMode=OFF
"""


class Cluster:
    """Nodes n1 ... nN. grace: seconds that a preempted job has; user_signal: whether its script is told at once."""

    def __init__(self, nodes=2, *, gpus=2, grace=0, user_signal=True, forgets=3600):
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short name: sockets' paths end at 108 characters
        self.names = [f"n{i}" for i in range(1, nodes + 1)]
        self.port = _free_ports(nodes + 1)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in ("munge", "spool", "log", "run", "state", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(mode=0o755)
        self.folder.chmod(0o755)
        with_gpus = f" Gres=gpu:{gpus}" if gpus and self._write_gpus(gpus) else ""
        lines = [
            f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={self.port + i} CPUs=4 RealMemory=32000 "
            f"{with_gpus} State=UNKNOWN"
            for i, name in enumerate(self.names, start=1)
        ]
        parameters = "SlurmctldParameters=preempt_send_user_signal" if user_signal else ""
        unpacked = daemons.unpacked("slurm")
        plugins = f'PluginDir="{next(unpacked.glob("usr/lib/**/auth_munge.so")).parent}"' if unpacked else ""
        fields = {"folder": self.folder, "port": self.port, "user": getpass.getuser(), "nodes": "\n".join(lines)}
        fields |= {"parameters": parameters, "plugins": plugins, "grace": grace, "min_job_age": forgets}
        (self.folder / "slurm.conf").write_text(CONF.format(**fields))

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        files = {"socket": "sock", "key-file": "key", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge/{name}" for option, name in files.items()]
        logs = [f"--log-file={self.folder}/log/munged.log", f"--pid-file={self.folder}/run/munged.pid"]
        self._daemon("munged", "--force", *options, *logs)
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        self.wait(lambda: self.idle() == len(self.names), 30, "the nodes")

    def start_controller(self) -> None:
        self._daemon("slurmctld")
        self.wait(lambda: " is UP" in self.run("scontrol", "ping", check=False), 30, "slurmctld")

    def stop_controller(self) -> None:
        pid = int((self.folder / "run" / "slurmctld.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        self.wait(lambda: not Path(f"/proc/{pid}").exists(), 30, "the end of slurmctld")

    def start_node(self, name: str) -> None:
        self._daemon("slurmd", "-N", name)

    def idle(self) -> int:
        return len(self.run("sinfo", "--noheader", "--partition=batch", "--states=idle", "-N", "-o", "%N").split())

    def run(self, *command: str, check: bool = True) -> str:
        """A Slurm command's output."""
        done = subprocess.run(
            command, env=self.env, cwd=self.folder, capture_output=True, text=True, timeout=30, check=False
        )  # a batch job writes where it was submitted
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        line = self.run("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(field.split("=", 1) for field in line.split() if "=" in field)

    def wait(self, condition, seconds: float, what: str):
        """Until condition() is true: its value."""
        end = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < end, f"{what} did not come within {seconds:.0f} s\n{self.tails()}"
            time.sleep(0.1)
        return found

    def wait_state(self, job: str, *states: str, seconds: float = 180) -> str:
        return self.wait(
            lambda: (state := self.show(job)["JobState"]) in states and state, seconds, f"job {job} in {states}"
        )

    def tails(self) -> str:
        """What the daemons said last."""
        logs = sorted((self.folder / "log").glob("*.log"))
        return "\n".join(f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-8:]) for path in logs)

    def _daemon(self, *command: str) -> None:
        with (self.folder / "log" / f"{command[0]}.out").open("ab") as out:
            done = subprocess.run(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=30, check=False
            )
        assert done.returncode == 0, f"{command}: {self.tails()}"

    def _write_gpus(self, count: int) -> bool:
        """Null devices that stand for GPUs; where they cannot be made, terminals do: nobody opens them."""
        (self.folder / "dev").mkdir()
        paths = [self.folder / "dev" / f"gpu{i}" for i in range(count)]
        try:
            for path in paths:
                os.mknod(path, 0o20666, os.makedev(1, 3))
        except PermissionError:
            paths = [Path(f"/dev/tty{i}") for i in range(count)]
        names = f"{str(paths[0])[:-1]}[0-{count - 1}]"
        (self.folder / "gres.conf").write_text(f"Name=gpu File={names}\n")
        return True

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--quiet", f"--user={getpass.getuser()}"], env=self.env, timeout=20, check=False)
        pids = [int(path.read_text()) for path in (self.folder / "run").glob("*.pid") if path.read_text().strip()]
        for pid in [*pids, *self._ours()]:
            _kill(pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while self._ours() and time.monotonic() < end:
            time.sleep(0.1)
        while left := self._ours():
            assert time.monotonic() < end + 20, f"processes {left} do not end"
            for pid in left:
                _kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        shutil.rmtree(self.folder)

    def _ours(self) -> list[int]:
        """Daemons and what jobs have left, by the configuration in their environment."""
        mark, found = f"SLURM_CONF={self.folder}/".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "environ").read_bytes():
                    found.append(int(path.name))
            except OSError:
                continue
        return found


def _kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _free_ports(count: int) -> int:
    """The first of some consecutive ports that nobody has, below those of outgoing connections."""
    for first in range(20000 + os.getpid() % 100 * 100, 32000, 50):
        sockets = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
        except OSError:
            continue
        else:
            return first
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")
