#!/bin/sh
# What to run first on a GPU that these scripts have not seen: is it right, then is it fast. Each command is bounded.
#     PYTHON=.venv/bin/python OUT=runs/gpu sh benchmark/gpu.sh tests paths chain speed profile
# tests    the tests that need a GPU, and those of what they stand on
# paths    30 updates of each script with less and less of what makes a GPU fast: the losses side by side
# chain    every stage once with a small network, and a run that is killed and goes on
# speed    benchmark/speed.py with 20,000 and 90,000 stored steps
# profile  the 15 kernels that take longest in EfficientZero and XTRA
# SMALL=1  toy networks, to try all this without a GPU
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/gpu-$(date +%Y%m%d-%H%M%S)}
EVAL="--eval-episodes 2 --eval-max-frames 400"
NET="--channels 16 --batch-size 8 --num-simulations 4"
TINY="$NET $EVAL"
SIZE="${SMALL:+$NET} $EVAL"
QUICK=${SMALL:+--quick --repeats 1}
mkdir -p "$OUT"
nvidia-smi > "$OUT/nvidia-smi.txt" 2>&1 || echo "no GPU: nvidia-smi says no"

bounded() { # seconds, command: what fails or takes longer says so, and the next one runs
    timeout "$@" || echo "ended with $?: $*"
}

prepare() { # a small game, and a teacher who hardly knows it
    [ ! -e "$OUT/teacher/targets.npz" ] || return 0
    $PYTHON finetune.py --env-id PhoenixNoFrameskip-v4 --total-timesteps 1920 --steps-per-update 40 $TINY \
        --learning-starts 1600 --save-dataset "$OUT/phoenix.npz" --run-dir "$OUT/data"
    $PYTHON pretrain_teacher.py --datasets "$OUT/phoenix.npz" --num-updates 40 $TINY --run-dir "$OUT/teacher"
}

losses() { # run folders: the loss of each update, a column a folder
    $PYTHON - "$@" << 'END'
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
columns = []
for folder in sys.argv[1:]:
    events = EventAccumulator(folder).Reload()
    columns.append([event.value for event in events.Scalars("losses/loss")])
for update, row in enumerate(zip(*columns)):
    print(f"{update:>4}", *[f"{loss:12.5f}" for loss in row])
END
}

for step in "$@"; do
    echo "=== $step"
    case $step in
    tests)
        bounded 300 $PYTHON -m pytest -q tests -k "cuda or gpu or record or compile or bfloat16"
        ;;
    paths)
        prepare
        for script in finetune pretrain_teacher distill; do
            runs=
            for path in plain recorded compiled; do
                case $script in
                finetune) flags="--env-id AssaultNoFrameskip-v4 --teachers $OUT/teacher --num-envs 1 --total-timesteps 30" ;;
                pretrain_teacher) flags="--datasets $OUT/phoenix.npz --cycle 1 --num-updates 30" ;;
                distill) flags="--teachers $OUT/teacher --cycle 1 --num-updates 30" ;;
                esac
                [ $script != finetune ] || flags="$flags --learning-starts 20 --similarity-start 20 --similarity-updates 2"
                [ $path = compiled ] || flags="$flags --no-compile"
                [ $path != plain ] || flags="$flags --no-cudagraphs --no-search-cudagraphs"
                bounded 150 $PYTHON $script.py $flags $SIZE --eval-every 1000 --run-dir "$OUT/$script-$path" \
                    > "$OUT/$script-$path.txt" 2>&1
                runs="$runs $OUT/$script-$path"
            done
            echo "$script.py: losses, plain, recorded, and compiled too"
            losses $runs
        done
        ;;
    chain)
        prepare
        bounded 120 $PYTHON distill.py --teachers "$OUT/teacher" --num-updates 40 $TINY --run-dir "$OUT/student"
        xtra="finetune.py --env-id AssaultNoFrameskip-v4 --pretrained $OUT/student --total-timesteps 400 $TINY"
        xtra="$xtra --offline-batch-size 8 --learning-starts 160 --eval-every 200 --checkpoint-every 80 --run-dir $OUT/xtra"
        $PYTHON $xtra &
        process=$!
        while kill -0 $process 2> /dev/null && [ ! -e "$OUT/xtra/checkpoint.pt" ]; do sleep 1; done
        kill -9 $process || true
        wait $process || echo "killed, with status $?; now --resume"
        bounded 200 $PYTHON $xtra --resume
        cat "$OUT/xtra/evaluations.csv"
        ;;
    speed)
        bounded 280 $PYTHON benchmark/speed.py $QUICK --output "$OUT/speed-20000.csv"
        [ -n "$QUICK" ] || bounded 300 $PYTHON benchmark/speed.py --stored-steps 90000 --output "$OUT/speed-90000.csv"
        ;;
    profile)
        bounded 280 $PYTHON benchmark/speed.py $QUICK --profile --cases efficientzero xtra --output "$OUT/profile.csv"
        ;;
    *)
        echo "error: $step, expected tests, paths, chain, speed or profile" && exit 1
        ;;
    esac
done
