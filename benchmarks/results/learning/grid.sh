#!/usr/bin/env bash
# Every line of this directory's JSON files: benchmarks/results/learning/grid.sh pendulum|inverted|options|tau|halfcheetah
# Finished runs are skipped, so a grid that was stopped is continued by the same command.
cd "$(dirname "$0")/../../.." || exit
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=67108864

learn() { nice -n "${NICE:-0}" "$PYTHON" -m benchmarks.learning -m "$@"; }

# One setting of NC-LQL beside a learning rate of 1e-3: option NAME [section.key=value ...]
option() {
  local name=$1
  shift
  learn algorithm=nclql task=InvertedPendulum-v5 "algorithm.name='$name'" +algorithm.options.optim.lr=1e-3 \
    "${@/#/+algorithm.options.}" output=benchmarks/results/learning/InvertedPendulum-v5-options.jsonl
}

ALL=sac,nclql,sql,td3,qsm,lql,nclql_best
case $1 in
  pendulum) for seed in 0 1 2; do learn algorithm=$ALL task=Pendulum-v1 seed=$seed; done ;;
  inverted) for seed in 0 1 2; do learn algorithm=$ALL task=InvertedPendulum-v5 seed=$seed; done ;;
  halfcheetah) for seed in 0 1 2; do learn algorithm=nclql,sac,qsm,nclql_best task=HalfCheetah-v5 seed=$seed; done ;;
  options)
    option "lr 1e-3"
    option "raw gradient, w 50" sampler.normalize_gradient=false sampler.w=50
    option "w auto" sampler.w=auto
    option "w 50" sampler.w=50
    option "reward scale 1" optim.reward_scale=1.0
    option "summed update" optim.update=summed
    option "raw gradient, w 500" sampler.normalize_gradient=false
    option "sigma_max 0.03, 8 levels" sampler.sigma_max=0.03 sampler.num_levels=8
    option "gradient of the lowest critic" sampler.ensemble_reduction=min
    ;;
  tau) # target networks that follow four times as fast
    learn algorithm=nclql,sac,nclql_best task=InvertedPendulum-v5 task.tau=0.02 \
      output=benchmarks/results/learning/InvertedPendulum-v5-tau.jsonl
    ;;
  *) echo "expected pendulum, inverted, options, tau or halfcheetah" >&2; exit 2 ;;
esac
