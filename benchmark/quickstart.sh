#!/bin/sh
# The paper's claim in miniature, learned while you watch, then every stage once on real Atari. 2 cores, no GPU.
#     PYTHON=.venv/bin/python sh benchmark/quickstart.sh
# The same commands with other games and without $TOY or $TINY are the paper's runs (README.md).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1      # two runs at a time, one thread each
export CUDA_VISIBLE_DEVICES= # on a GPU each run would compile for a minute
export PYTHONPATH=tests:${PYTHONPATH:-} # the folder of the toy games
trap 'trap - TERM; kill 0' INT TERM # Ctrl-C ends what runs in the background too
RUN=runs/quickstart-$(date +%Y%m%d-%H%M%S)
mkdir -p "$RUN"
started=$(date +%s)
heading() { printf '\n=== %4d s  %s\n' $(($(date +%s) - started)) "$*"; }

# run NAME SCRIPT FLAGS: shows the evaluations, with the name before them since two runs go on at a time. NAME.log has
# all that it says, NAME.err its bars and errors.
run() {
  name=$1
  shift
  ("$PYTHON" "$@" --run-dir "$RUN/$name" 2> "$RUN/$name.err" || touch "$RUN/$name.failed") |
    while IFS= read -r line; do
      printf '%s\n' "$line" >> "$RUN/$name.log"
      case $line in
        update*) printf '%4d s  %-15s %s\n' $(($(date +%s) - started)) "$name" "$line" ;;
      esac
    done
  [ ! -e "$RUN/$name.failed" ]
}
# both: waits for what runs in the background, and ends here if a run failed
both() {
  wait
  for failed in "$RUN"/*.failed; do
    if [ -e "$failed" ]; then tail -n 3 "${failed%.failed}.err" >&2; exit 1; fi
  done
}

TOY="--channels 16 --blocks 1 --batch-size 16 --learning-rate 0.04 --num-simulations 16 --unroll-steps 2 --td-steps 3
  --eval-episodes 16"
ONLINE="--learning-starts 96 --target-interval 48 $TOY"
SOURCE="--total-timesteps 160 --eval-every 160 $ONLINE"
TEACHER="--num-updates 160 --eval-every 160 --target-interval 48 $TOY"
STORM="--env-id toy_env:Storm-v0 --eval-every 52 $ONLINE"
ETA="--offline-batch-size 16 --similarity-start 48 --similarity-interval 48 --similarity-updates 16"

heading "1/5 two games with a teacher each: Fruit, which is to be caught, and Rocks, which are to be dodged"
(
  run fruit finetune.py --env-id toy_env:Fruit-v0 --save-dataset "$RUN/fruit.npz" $SOURCE
  run teacher-fruit pretrain_teacher.py --datasets "$RUN/fruit.npz" $TEACHER
) &
(
  run rocks finetune.py --env-id toy_env:Rocks-v0 --save-dataset "$RUN/rocks.npz" $SOURCE
  run teacher-rocks pretrain_teacher.py --datasets "$RUN/rocks.npz" $TEACHER
) &
both

heading "2/5 one student of both, then Storm, where it hails too: XTRA, finetuning alone, and from scratch"
(
  run student distill.py --teachers "$RUN/teacher-fruit" "$RUN/teacher-rocks" --num-updates 160 --eval-every 160 $TOY
  run xtra-1 finetune.py --seed 1 --pretrained "$RUN/student" --total-timesteps 208 $ETA $STORM
  run xtra-2 finetune.py --seed 2 --pretrained "$RUN/student" --total-timesteps 208 $ETA $STORM
  run alone-1 finetune.py --seed 1 --pretrained "$RUN/student" --no-cross-task --total-timesteps 208 $STORM
) &
(
  run scratch-1 finetune.py --seed 1 --total-timesteps 416 $STORM
  run scratch-2 finetune.py --seed 2 --total-timesteps 416 $STORM
  run alone-2 finetune.py --seed 2 --pretrained "$RUN/student" --no-cross-task --total-timesteps 208 $STORM
) &
both

TINY="--channels 16 --blocks 1 --batch-size 8 --num-simulations 4 --unroll-steps 2 --eval-episodes 2
  --eval-max-frames 200"
ATARI="--total-timesteps 32 --learning-starts 24 $TINY"

heading "3/5 real Atari: every stage runs, nothing has time to learn"
(
  run phoenix finetune.py --env-id PhoenixNoFrameskip-v4 --save-dataset "$RUN/phoenix.npz" $ATARI
  run teacher-phoenix pretrain_teacher.py --datasets "$RUN/phoenix.npz" --num-updates 16 $TINY
) &
(
  run demon finetune.py --env-id DemonAttackNoFrameskip-v4 --save-dataset "$RUN/demonattack.npz" $ATARI
  run teacher-demon pretrain_teacher.py --datasets "$RUN/demonattack.npz" --num-updates 16 $TINY
) &
both
heading "4/5 and the student on Assault"
(
  run student-atari distill.py --teachers "$RUN/teacher-phoenix" "$RUN/teacher-demon" --num-updates 16 $TINY
  run xtra-assault finetune.py --env-id AssaultNoFrameskip-v4 --pretrained "$RUN/student-atari" --offline-batch-size 8 \
    --capture-video $ATARI
) &
both

heading "5/5 report"
set -- # the run folders, in the order of the table
for name in fruit rocks teacher-fruit teacher-rocks student xtra-1 xtra-2 alone-1 alone-2 scratch-1 scratch-2 \
  phoenix demon teacher-phoenix teacher-demon student-atari xtra-assault; do
  set -- "$@" "$RUN/$name"
done
"$PYTHON" benchmark/report.py "$@" --game Storm-v0 --threshold 12 --output "$RUN/report.png"

heading "done. Next, after: source .venv/bin/activate"
cat << END
tensorboard --logdir $RUN
PYTHONPATH=tests python finetune.py --env-id toy_env:Storm-v0 --pretrained $RUN/xtra-1 --total-timesteps 0 \
  --capture-video
python finetune.py --env-id PhoenixNoFrameskip-v4   # EfficientZero at the paper's size; wants a GPU
END
