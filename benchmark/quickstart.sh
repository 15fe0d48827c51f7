#!/bin/sh
# The paper's claim in miniature, learned while you watch, then every stage once on real Atari. 2 cores, no GPU.
#     PYTHON=.venv/bin/python sh benchmark/quickstart.sh
# The same commands with other games and without $TOY or $TINY are the paper's runs (README.md).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1 # two runs at a time, one thread each
export PYTHONPATH=tests  # the folder of the toy games
RUN=runs/quickstart-$(date +%Y%m%d-%H%M%S)
mkdir -p "$RUN"
started=$(date +%s)
heading() { printf '\n=== %4d s  %s\n' $(($(date +%s) - started)) "$*"; }

# run NAME SCRIPT FLAGS starts a script in the background, its lines with its name before them
run() {
  name=$1
  shift
  ("$PYTHON" "$@" --run-dir "$RUN/$name" 2> "$RUN/$name.log" || touch "$RUN/failed") |
    while IFS= read -r line; do printf '%-21s %s\n' "$name:" "$line"; done &
}
# both waits for them
both() {
  wait
  if [ -e "$RUN/failed" ]; then tail -n 3 "$RUN"/*.log; exit 1; fi
}

TOY="--channels 16 --blocks 1 --batch-size 16 --learning-rate 0.04 --num-simulations 16 --unroll-steps 2 --td-steps 3
  --eval-episodes 16"
ONLINE="--learning-starts 96 --target-interval 48 $TOY"
OFFLINE="--num-updates 160 --eval-every 160 $TOY"

heading "1/7 EfficientZero from scratch on two games, where fruit is to be caught and rocks to be dodged: the offline data"
run fruit finetune.py --env-id toy_env:Fruit-v0 --save-dataset "$RUN/fruit.npz" --total-timesteps 160 --eval-every 160 $ONLINE
run rocks finetune.py --env-id toy_env:Rocks-v0 --save-dataset "$RUN/rocks.npz" --total-timesteps 160 --eval-every 160 $ONLINE
both

heading "2/7 a teacher for each: offline RL on those data"
run teacher-fruit pretrain_teacher.py --datasets "$RUN/fruit.npz" --target-interval 48 $OFFLINE
run teacher-rocks pretrain_teacher.py --datasets "$RUN/rocks.npz" --target-interval 48 $OFFLINE
both

heading "3/7 a student of both teachers; beside it a run from scratch on Storm, where leaves fall too"
run student distill.py --teachers "$RUN/teacher-fruit" "$RUN/teacher-rocks" $OFFLINE
run scratch-1 finetune.py --env-id toy_env:Storm-v0 --seed 1 --total-timesteps 416 --eval-every 52 $ONLINE
both

heading "4/7 the student finetuned on Storm: XTRA, which trains on the offline games too"
ETA="--offline-batch-size 16 --similarity-start 48 --similarity-interval 48 --similarity-updates 16"
run xtra-1 finetune.py --env-id toy_env:Storm-v0 --seed 1 --pretrained "$RUN/student" --total-timesteps 208 --eval-every 52 $ETA $ONLINE
