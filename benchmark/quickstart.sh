#!/bin/sh
# The whole pipeline on real Atari at toy scale on the CPU: every stage runs, nothing has time to learn.
#     PYTHON=.venv/bin/python sh benchmark/quickstart.sh
# The same commands without $SMALL and with other games are the paper's runs (README.md).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1 # on a shared CPU more threads would wait for each other
SMALL="--channels 16 --blocks 1 --batch-size 8 --num-simulations 8 --unroll-steps 3
  --eval-every 200 --eval-episodes 4 --eval-max-frames 800"
RUN=runs/quickstart-$(date +%Y%m%d-%H%M%S)
started=$(date +%s)
heading() { printf '\n=== %4d s  %s\n' $(($(date +%s) - started)) "$*"; }

heading "1/5 EfficientZero from scratch, which collects the offline data: Phoenix"
$PYTHON finetune.py --env-id PhoenixNoFrameskip-v4 --total-timesteps 400 --learning-starts 200 \
  --save-dataset $RUN/phoenix.npz --run-dir $RUN/efficientzero-phoenix $SMALL
heading "1/5 EfficientZero from scratch, which collects the offline data: DemonAttack"
$PYTHON finetune.py --env-id DemonAttackNoFrameskip-v4 --total-timesteps 400 --learning-starts 200 \
  --save-dataset $RUN/demonattack.npz --run-dir $RUN/efficientzero-demonattack $SMALL
heading "2/5 teachers: offline, one game each"
$PYTHON pretrain_teacher.py --datasets $RUN/phoenix.npz --num-updates 200 \
  --run-dir $RUN/teacher-phoenix $SMALL
$PYTHON pretrain_teacher.py --datasets $RUN/demonattack.npz --num-updates 200 \
  --run-dir $RUN/teacher-demonattack $SMALL
heading "3/5 student: both teachers distilled into one network"
$PYTHON distill.py --teachers $RUN/teacher-phoenix $RUN/teacher-demonattack \
  --num-updates 200 --run-dir $RUN/student $SMALL
heading "4/5 XTRA: the student finetuned on a game it has not seen, its eta measured at updates 200 and 400"
$PYTHON finetune.py --env-id AssaultNoFrameskip-v4 --pretrained $RUN/student --total-timesteps 504 --learning-starts 200 \
  --offline-batch-size 8 --similarity-start 200 --similarity-interval 200 --similarity-updates 20 \
  --run-dir $RUN/xtra-assault $SMALL
heading "5/5 report"
$PYTHON benchmark/report.py $RUN/efficientzero-phoenix $RUN/efficientzero-demonattack $RUN/teacher-phoenix \
  $RUN/teacher-demonattack $RUN/student $RUN/xtra-assault --output $RUN/report.png
heading "done: $RUN"
