#!/bin/bash
# One run as a Slurm job; benchmark/matrix.py --backend slurm submits arrays of them. Edit what a job gets: "#SBATCH" is
# read, "##SBATCH" is a comment.
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
##SBATCH --partition=NAME
##SBATCH --account=NAME
# Without GPUs: comment --gres out.
# A run may be longer than --time: two minutes before its end the job goes back into the queue, and the run goes on from
# its checkpoint. Slurm may send that signal a minute early; --time has to be more than three minutes.
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

# sbatch --array=1-N benchmark/slurm.sh COMMANDS, from the root of the repository. Line i of the file COMMANDS is job i:
# RUN_FOLDER, a tab, a command for bash. The file is read when a job starts, and again after a requeue: leave it so.
# A job has the environment of sbatch, with an activated .venv for example. What else it needs, like "module load", goes
# here:

child=
# Requeueing by $SLURM_JOB_ID would be wrong: for one job of an array that is the number of the whole array too.
requeue() {
  trap '' USR1
  echo "$(date '+%F %T') time is nearly up: back into the queue"
  if [ -n "$child" ]; then
    kill "$child"
    wait "$child" # it holds the lock of the run folder, which the next attempt needs
  fi
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" || exit 1
  exit 0 # not a success: a job that is back in the queue has no status
}
trap requeue USR1

line=$(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
folder=${line%%$'\t'*}
command=${line#*$'\t'}
if [ -z "$folder" ] || [ "$folder" = "$line" ]; then
  echo "line $SLURM_ARRAY_TASK_ID of $1 is not RUN_FOLDER<TAB>COMMAND" >&2
  exit 2
fi
mkdir -p "$folder" || exit
echo "$(date '+%F %T') job ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID on $(hostname): $folder"

# In the background, since bash runs a trap only between commands, and during wait.
bash -c "$command" >> "$folder/log.txt" 2>&1 &
child=$!
wait "$child"
status=$?
trap '' USR1 # nothing is left to requeue
if [ "$status" -eq 0 ]; then
  # The sign that the run is complete, by which matrix.py skips it: never half written, hence the rename.
  printf '%s\n' "$command" > "$folder/done.part" && mv "$folder/done.part" "$folder/done" || exit
fi
echo "$(date '+%F %T') status $status"
exit "$status"
