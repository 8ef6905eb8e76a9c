"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmds.

It needs Debian's package slurm-wlm, and root. All files, sockets and ports are its own, so that it
can run beside another Slurm.
"""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
# Names that every machine can resolve: the workers connect to each other's nodes by name.
NODES = ("127.0.0.2", "127.0.0.3")

_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job starts only when its credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=100000,batch_sched_delay=1
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} NodeHostname={host} NodeAddr={nodes[0]} Port={ports[1]} CPUs=1 RealMemory=1000
NodeName={nodes[1]} NodeHostname={host} NodeAddr={nodes[1]} Port={ports[2]} CPUs=1 RealMemory=1000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=high Nodes=ALL PriorityTier=10 MaxTime=INFINITE State=UP
"""


def missing():
    """Returns why the cluster cannot be started on this machine, or ""."""
    programs = [name for name in PROGRAMS if not shutil.which(name)]
    if programs:
        return f"not installed: {', '.join(programs)} (Debian: slurm-wlm)"
    return "" if os.geteuid() == 0 else "slurmd needs root"


class Slurm:
    """A running cluster.

    Attributes:
      environment: variables with which Slurm's commands reach it.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.environment = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command, stdin=None):
        """Runs one of Slurm's commands and returns its output."""
        done = subprocess.run(
            list(map(str, command)),
            input=stdin,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def job(self, job):
        """Returns the fields that `scontrol show job` prints."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job)))

    def wait_for(self, job, condition, seconds):
        """Waits until the job's fields meet a condition."""
        deadline = time.monotonic() + seconds
        while not condition(fields := self.job(job)):
            assert time.monotonic() < deadline, (fields, self.log())
            time.sleep(0.3)
        return fields

    def log(self):
        """Returns the end of the log of each daemon."""
        return {p.name: p.read_text()[-3000:] for p in self.folder.glob("*.log")}


@contextlib.contextmanager
def running_cluster(folder):
    """Starts the cluster in an empty folder and yields it; stops it at the end."""
    slurm = Slurm(folder)
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (slurm.folder / name).mkdir()
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    host = socket.gethostname().partition(".")[0]
    (slurm.folder / "slurm.conf").write_text(
        _CONFIG.format(folder=slurm.folder, host=host, ports=ports, nodes=NODES)
    )
    key = slurm.folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    # munged accepts a socket only in a folder that everyone can enter.
    for parent in (slurm.folder, *slurm.folder.parents[:-1]):
        parent.chmod(parent.stat().st_mode | 0o111)
    daemons = [
        [
            *("munged", "--foreground", "--force", f"--socket={slurm.folder}/munge.socket"),
            *(f"--key-file={key}", f"--pid-file={slurm.folder}/munged.pid"),
            *(f"--log-file={slurm.folder}/munged.log", f"--seed-file={slurm.folder}/munge.seed"),
        ],
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]
    processes = []
    try:
        for command in daemons:
            with open(slurm.folder / f"{command[0]}.out", "a") as output:
                processes.append(
                    subprocess.Popen(command, env=slurm.environment, stdout=output, stderr=output)
                )
            if command[0] == "munged":
                deadline = time.monotonic() + 20
                while not (slurm.folder / "munge.socket").exists():
                    assert time.monotonic() < deadline, slurm.log()
                    time.sleep(0.05)
        deadline = time.monotonic() + 60
        while not _is_idle(slurm):
            assert time.monotonic() < deadline, slurm.log()
            time.sleep(0.3)
        yield slurm
    finally:
        subprocess.run(["scancel", "--full", "-u", "root"], env=slurm.environment, timeout=30)
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_idle(slurm):
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%T %D", "--partition=low"],
        env=slurm.environment,
        capture_output=True,
        text=True,
    )
    return done.stdout.split() == ["idle", str(len(NODES))]
