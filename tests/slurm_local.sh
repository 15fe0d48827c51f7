#!/bin/bash
# Slurm on this machine alone, for tests/test_slurm.py and for trying benchmark/slurm.sh. Debian or Ubuntu; nothing is
# installed, and neither root nor a Slurm that is already there is needed.
#     tests/slurm_local.sh download            unpacks Slurm and the libraries that are missing into .slurm, 10 MB
#     tests/slurm_local.sh start FOLDER        a cluster of one node; its settings, state and logs are in FOLDER
#     source FOLDER/env.sh                     sbatch, squeue, ... then talk to it
#     tests/slurm_local.sh stop FOLDER         cancels its jobs and ends it
# SLURM_LOCAL=elsewhere is used in place of .slurm. The node claims 32 CPUs, or SLURM_LOCAL_CPUS=16, and 1 TB, whatever
# is there: jobs of 8 CPUs run 4 at a time. It has no GPUs: env.sh takes --gres back, also where a script has it.
set -euo pipefail
cd "$(dirname "$0")/.."
SLURM=$(realpath -m "${SLURM_LOCAL:-.slurm}")
die() { echo "slurm_local.sh: $*" >&2; exit 1; }

# until_true SECONDS COMMAND...: tries until it succeeds
until_true() {
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 0.1
  done
}

# Each package is unpacked beside the others. Installed ones that Slurm needs are used as they are.
download() {
  local packages=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins)
  local needed
  # without root, simulating works too; Slurm itself may be installed and is fetched nevertheless
  needed=$(apt-get install --simulate --no-install-recommends "${packages[@]}" | awk '$1 == "Inst" {print $2}') ||
    die "apt-get knows no Slurm; apt-get update may help"
  rm -rf "$SLURM.part"
  mkdir -p "$SLURM.part/packages"
  (
    cd "$SLURM.part/packages"
    printf '%s\n' "${packages[@]}" $needed | sort -u | xargs apt-get download --quiet
    for package in *.deb; do dpkg --extract "$package" ..; done
  )
  rm -r "$SLURM.part/packages"
  rm -rf "$SLURM"
  mv "$SLURM.part" "$SLURM"
  echo "Slurm is in $SLURM"
}

answers() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2> /dev/null; }

settings() {
  local host user port
  host=$(hostname -s)
  user=$(id -un)
  port=$((20000 + RANDOM % 10000))
  while answers "$port" || answers $((port + 1)); do port=$((port + 2)); done
  # Times are short for the tests. A requeued job waits for cred_expire, usually 120 s (5 is the least). KillWait, else
  # 30 s, lies between SIGTERM and SIGKILL. MinJobAge, for how long a finished job is known, is the usual one.
  cat << END
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$((port + 1))
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
PluginDir=$PLUGINS
PlugStackConfig=$FOLDER/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
JobRequeue=1
MinJobAge=300
KillWait=5
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool
SlurmctldPidFile=$FOLDER/slurmctld.pid
SlurmdPidFile=$FOLDER/slurmd.pid
SlurmctldLogFile=$FOLDER/slurmctld.log
SlurmdLogFile=$FOLDER/slurmd.log
NodeName=node NodeHostname=$host NodeAddr=127.0.0.1 CPUs=${SLURM_LOCAL_CPUS:-32} RealMemory=1000000
PartitionName=all Nodes=node Default=YES MaxTime=INFINITE
END
}

start() {
  FOLDER=$1
  [ -e "$SLURM/usr/sbin/slurmctld-wlm" ] || die "no Slurm in $SLURM: tests/slurm_local.sh download"
  [ ! -e "$FOLDER/slurm.conf" ] || die "$FOLDER is of another cluster; choose a new folder"
  PLUGINS=$(dirname "$(find "$SLURM/usr/lib" -name auth_none.so)")
  mkdir -p "$FOLDER/state" "$FOLDER/spool"
  settings > "$FOLDER/slurm.conf"
  : > "$FOLDER/plugstack.conf"
  cat << END > "$FOLDER/env.sh"
unset "\${!SLURM_@}" "\${!SBATCH_@}" # of a job of another cluster
export SLURM_CONF='$FOLDER/slurm.conf'
export PATH='$SLURM/usr/bin':"\$PATH"
export LD_LIBRARY_PATH='$PLUGINS:$(dirname "$PLUGINS")'\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}
export SBATCH_GRES=none # in place of the GPUs that a script asks for
END
  source "$FOLDER/env.sh"
  # -D: in the foreground, so that $! is the daemon; setsid: Ctrl-C in the terminal is not for them
  setsid "$SLURM/usr/sbin/slurmctld-wlm" -D -f "$SLURM_CONF" < /dev/null &> "$FOLDER/slurmctld.out" &
  echo "$!" > "$FOLDER/pids"
  setsid "$SLURM/usr/sbin/slurmd-wlm" -D -f "$SLURM_CONF" -N node -d "$SLURM/usr/sbin/slurmstepd-wlm" \
    < /dev/null &> "$FOLDER/slurmd.out" &
  echo "$!" >> "$FOLDER/pids"
  until_true 30 up || { tail -n 5 "$FOLDER"/slurm*.{log,out} >&2; stop "$FOLDER"; die "the cluster did not come up"; }
}
up() { [ "$(sinfo --noheader --format %t 2> /dev/null)" = idle ]; }

stop() {
  FOLDER=$1
  source "$FOLDER/env.sh"
  timeout 30 scancel --quiet --user "$(id -un)" || true
  until_true 30 empty || echo "slurm_local.sh: jobs are left" >&2
  for pid in $(tac "$FOLDER/pids"); do
    if ours "$pid"; then kill "$pid"; fi
    until_true 10 gone "$pid" || kill -KILL "$pid"
  done
}
empty() { [ -z "$(timeout 30 squeue --noheader)" ]; } # jobs that still end are listed too
ours() { grep -q -s -F "$FOLDER/slurm.conf" "/proc/$1/cmdline"; }
gone() { ! ours "$1"; }

case "${1:-} $#" in
  "download 1") download ;;
  "start 2" | "stop 2") "$1" "$(realpath -m "$2")" ;;
  *) sed -n '2,9s/^# //p' "$0"; exit 2 ;;
esac
