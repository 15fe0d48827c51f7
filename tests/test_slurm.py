"""Runs as Slurm jobs: benchmark/slurm.sh by itself, and on a cluster of this machine alone (`make faults`).

The jobs run toy commands. That a run may be killed at any time, which they rely on, is tested in test_resume.py.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))
import matrix  # noqa: E402

JOB = ROOT / "benchmark" / "slurm.sh"
LOCAL = ROOT / "tests" / "slurm_local.sh"

# The first attempt stays until it is ended, which takes it a while; the second one goes on and succeeds. One at a time.
TOY = r"""
exec 9> "$1/lock"
flock --nonblock 9 || { echo "in use by another process"; exit 1; }
trap 'sleep 0.5; echo "ended slowly"; exit 143' TERM
echo $$ > "$1/pid"
attempts=$(cat "$1/progress" 2> /dev/null || echo 0)
echo $((attempts + 1)) > "$1/progress"
if [ "$attempts" -eq 0 ]; then while :; do sleep 0.1; done; fi
echo "attempt $((attempts + 1)) succeeds"
"""
WENT_ON = ["ended slowly", "attempt 2 succeeds"]


@pytest.fixture
def folder(tmp_path):
    """Where the commands of a test run."""
    (tmp_path / "toy.sh").write_text(TOY)
    return tmp_path


def until(condition, seconds=60):
    """Waits until the condition holds -> what it returns."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def write_lines(folder, commands):
    """The file of the commands {run folder: command}, whose name is that of the first folder."""
    path = folder / f"{next(iter(commands))}.txt"
    path.write_text("".join(f"{run}\t{command}\n" for run, command in commands.items()))
    return path


def has_started(folder, run):
    """Whether the first attempt of toy.sh is under way."""
    path = folder / run / "progress"
    return path.exists() and path.read_text() == "1\n"


def log(folder, run):
    """The lines of a run's log that toy.sh wrote."""
    lines = (folder / run / "log.txt").read_text().splitlines()
    return [line for line in lines if line in WENT_ON or "in use" in line]


# --- the job by itself, with a scontrol that only writes down what it is told ---
def start(folder, commands, scontrol_status=0):
    """Line 2 of the commands as a job -> its process."""
    (folder / "bin").mkdir()
    scontrol = folder / "bin" / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> said.txt\ncat b/log.txt >> said.txt\nexit {scontrol_status}\n')
    scontrol.chmod(0o755)
    env = dict(os.environ, PATH=f"{folder}/bin:{os.environ['PATH']}")
    env |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "7"}
    return subprocess.Popen(["bash", JOB, write_lines(folder, commands)], cwd=folder, env=env)


@pytest.mark.parametrize(("end", "status"), [("true", 0), ("exit 3", 3), ("kill -9 $$", 137)])
def test_a_job_ends_as_its_command_does(folder, end, status):
    command = f"""A='x  "y"' && echo "$A" && echo error >&2; {end}"""
    (folder / "b").mkdir()
    (folder / "b" / "log.txt").write_text("before\n")
    assert start(folder, {"a": "false", "b": command}).wait() == status
    assert (folder / "b" / "log.txt").read_text() == 'before\nx  "y"\nerror\n'
    assert not (folder / "a").exists()
    files = {path.name: path.read_text() for path in (folder / "b").iterdir() if path.name != "log.txt"}
    assert files == ({} if status else {"done": f"{command}\n"})


@pytest.mark.parametrize("commands", [{"a": "true"}, {"a": "true", "": "true"}, {"a": "true", "no tab\nb": "true"}])
def test_a_line_that_is_none(folder, commands):
    assert start(folder, commands).wait() == 2


@pytest.mark.parametrize("status", [0, 1])
def test_a_command_has_ended_before_its_job_is_requeued(folder, status):
    process = start(folder, {"a": "false", "b": "bash toy.sh b"}, scontrol_status=status)
    until(lambda: has_started(folder, "b"))
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == status
    assert (folder / "said.txt").read_text() == "requeue 7_2\nended slowly\n"
    assert not (folder / "b" / "done").exists()


# --- on a cluster ---
@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which sbatch and the other commands talk to a cluster of this machine."""
    if not (Path(os.environ.get("SLURM_LOCAL", ROOT / ".slurm")) / "usr" / "bin" / "sbatch").exists():
        pytest.skip("no Slurm; on Debian or Ubuntu: tests/slurm_local.sh download")
    cluster = tmp_path_factory.mktemp("slurm")
    subprocess.run([LOCAL, "start", cluster], check=True)
    shell = ["bash", "-c", 'source "$1/env.sh"; env --null', "bash", cluster]
    lines = subprocess.run(shell, check=True, capture_output=True, text=True).stdout.split("\0")
    yield dict(line.split("=", 1) for line in lines if line)
    subprocess.run([LOCAL, "stop", cluster], check=True)


def call(slurm, *command, **options):
    """Runs a command of Slurm -> what it says."""
    return subprocess.run(command, check=True, env=slurm, stdout=subprocess.PIPE, text=True, **options).stdout.strip()


def submit(slurm, folder, commands, *flags, needs=()):
    """An array of the commands {run folder: command}, which starts after the jobs it needs -> {run folder: job}."""
    (folder / "slurm").mkdir(exist_ok=True)
    lines = write_lines(folder, commands)
    flags = [f"--array=1-{len(commands)}", f"--job-name={lines.stem}", "--output=slurm/%x-%a.txt", *flags]
    if needs:
        flags += ["--dependency=" + ":".join(["afterok", *needs]), "--kill-on-invalid-dep=yes"]
    array = call(slurm, "sbatch", "--parsable", *flags, JOB, lines, cwd=folder)
    return {run: f"{array}_{task}" for task, run in enumerate(commands, start=1)}


def state(slurm, job):
    """PENDING, RUNNING, COMPLETED, FAILED, ..."""
    return re.search(r"JobState=(\w+)", call(slurm, "scontrol", "--oneliner", "show", "job", job))[1]


def wait_for(slurm, jobs):
    """Waits until none of the jobs is queued or runs -> their states."""
    command = ["squeue", "--noheader", "--array", "--format=%i"]
    until(lambda: not set(jobs) & set(call(slurm, *command).split()), 120)
    return [state(slurm, job) for job in jobs]


@pytest.mark.faults
def test_arrays_wait_for_what_they_need(slurm, folder):
    first = {name: f"sleep 1; date +%s.%N > {name}/time" for name in ("a", "b", "c")}
    needed = submit(slurm, folder, first)
    second = {name: f"date +%s.%N > {name}/time; cat a/time c/time" for name in ("d", "e")}
    jobs = submit(slurm, folder, second, needs=[needed["a"], needed["c"]])
    assert wait_for(slurm, [*needed.values(), *jobs.values()]) == ["COMPLETED"] * 5
    for name, command in (first | second).items():
        assert (folder / name / "done").read_text() == f"{command}\n"
    times = {name: float((folder / name / "time").read_text()) for name in first | second}
    assert min(times["d"], times["e"]) > max(times["a"], times["c"])


@pytest.mark.faults
def test_a_failure_stops_only_what_needs_it(slurm, folder):
    needed = submit(slurm, folder, {"a": "sleep 1", "b": "sleep 1; exit 3"})
    of_b = submit(slurm, folder, {"c": "true", "d": "true"}, needs=[needed["b"]])
    of_both = submit(slurm, folder, {"e": "true"}, needs=[needed["a"], needed["b"]])
    of_e = submit(slurm, folder, {"f": "true"}, needs=[of_both["e"]])
    of_a = submit(slurm, folder, {"g": "true"}, needs=[needed["a"]])
    states = wait_for(slurm, [job for jobs in (needed, of_b, of_both, of_e, of_a) for job in jobs.values()])
    assert states == ["COMPLETED", "FAILED"] + ["CANCELLED"] * 4 + ["COMPLETED"]
    assert {path.parent.name for path in folder.glob("*/done")} == {"a", "g"}
    assert not any((folder / name).exists() for name in "cdef")
    late = submit(slurm, folder, {"h": "true"}, needs=[needed["a"]])  # of a job that has ended
    never = submit(slurm, folder, {"i": "true"}, needs=[needed["b"]])
    assert wait_for(slurm, [*late.values(), *never.values()]) == ["COMPLETED", "CANCELLED"]


@pytest.mark.faults
def test_a_job_goes_on_after_its_time_limit(slurm, folder):
    # Slurm looks at the limits every 30 s, and no limit is shorter than a minute
    jobs = submit(slurm, folder, {"a": "bash toy.sh a"}, "--time=1", "--signal=B:USR1@50")
    after = submit(slurm, folder, {"b": "cat a/progress"}, needs=[jobs["a"]])
    assert wait_for(slurm, [jobs["a"], after["b"]]) == ["COMPLETED", "COMPLETED"]
    assert log(folder, "a") == WENT_ON
    assert (folder / "b" / "log.txt").read_text() == "2\n"  # started only after the second attempt
    assert (folder / "a" / "done").read_text() == "bash toy.sh a\n"


@pytest.mark.faults
def test_only_the_job_that_got_the_signal_is_requeued(slurm, folder):
    jobs = submit(slurm, folder, {name: f"bash toy.sh {name}" for name in ("a", "b", "c")})
    until(lambda: all(has_started(folder, name) for name in jobs))
    call(slurm, "scancel", "--batch", "--signal=USR1", jobs["c"])  # the last of an array has the array's number
    assert wait_for(slurm, [jobs["c"]]) == ["COMPLETED"]
    assert log(folder, "c") == WENT_ON
    assert [state(slurm, jobs[name]) for name in "ab"] == ["RUNNING", "RUNNING"]
    assert has_started(folder, "a") and has_started(folder, "b")
    call(slurm, "scancel", jobs["a"], jobs["b"])
    assert wait_for(slurm, [jobs["a"], jobs["b"]]) == ["CANCELLED", "CANCELLED"]


@pytest.mark.faults
@pytest.mark.parametrize("cause", ["kill", "scancel", "scontrol requeue"])
def test_what_was_killed_goes_on_when_it_is_requeued(slurm, folder, cause):
    jobs = submit(slurm, folder, {"a": "bash toy.sh a"})
    until(lambda: has_started(folder, "a"))
    if cause == "kill":  # as when there is no memory left
        os.kill(int((folder / "a" / "pid").read_text()), signal.SIGKILL)
    else:
        call(slurm, *cause.split(), jobs["a"])
    if cause != "scontrol requeue":
        assert wait_for(slurm, [jobs["a"]]) == [{"kill": "FAILED", "scancel": "CANCELLED"}[cause]]
        assert not (folder / "a" / "done").exists()
        call(slurm, "scontrol", "requeue", jobs["a"])
    assert wait_for(slurm, [jobs["a"]]) == ["COMPLETED"]
    assert log(folder, "a")[-1] == WENT_ON[-1] and "in use" not in "".join(log(folder, "a"))
    assert (folder / "a" / "done").read_text() == "bash toy.sh a\n"


@pytest.mark.faults
def test_a_matrix_of_every_stage(slurm, tmp_path, monkeypatch):
    """benchmark/matrix.py on the cluster: Table 1 of tiny runs, one of which is killed and goes on, and one fails."""
    for name in [name for name in os.environ if name not in slurm]:
        monkeypatch.delenv(name)
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    plan = SimpleNamespace(**matrix.SCALES["toy"], scale_name="toy", folder=os.path.relpath(tmp_path / "toy", ROOT))
    tiny = "--channels 4 --batch-size 4 --num-simulations 2 --unroll-steps 1 --eval-episodes 2 --checkpoint-every 8"
    plan.online = f"{tiny} --total-timesteps 48 --learning-starts 16 --offline-batch-size 4"
    plan.teacher = plan.student = f"{tiny} --num-updates 16"
    jobs = matrix.plan_runs(plan, ["table1"], ["Storm-v0"], [1])
    failing = f"{plan.folder}/teacher__Rocks-v0__1"
    good, jobs[failing].words = jobs[failing].words, [*jobs[failing].words, "--gamma", "2"]

    def submit_all():
        matrix.run_slurm(jobs, plan.folder, plan.environment, dry_run=False)
        return dict(reversed(line.split()) for line in (tmp_path / "toy/slurm/submitted.txt").read_text().splitlines())

    ids = submit_all()
    assert ids.keys() == jobs.keys()
    first = f"{plan.folder}/efficientzero__Storm-v0__1"
    until((tmp_path / "toy" / os.path.basename(first) / "checkpoint.pt").exists, 120)
    call(slurm, "scontrol", "requeue", ids[first])
    assert submit_all() == ids  # all are queued
    wait_for(slurm, ids.values())
    done = {path.parent.name for path in tmp_path.glob("toy/*/done")}
    scratch = [
        "efficientzero__Storm-v0",
        "efficientzero__Fruit-v0",
        "efficientzero__Rocks-v0",
        "efficientzero-l__Storm-v0",
    ]
    assert done == {f"{name}__1" for name in [*scratch, "teacher__Fruit-v0"]}
    assert (tmp_path / "toy" / os.path.basename(first) / "log.txt").read_text().count("run folder:") == 2
    jobs[failing].words = good
    again = submit_all()
    wait_for(slurm, again.values())
    assert {path.parent.name for path in tmp_path.glob("toy/*/done")} == {os.path.basename(name) for name in jobs}
