#!/usr/bin/env bash
# Every line of this directory's JSON files: benchmarks/results/learning/grid.sh pendulum|inverted|reacher|options|tau|halfcheetah|ablations
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

# One change to NC-LQL with a learning rate of 3e-4: ablation NAME [section.key=value ...]
ablation() {
  local name=$1
  shift
  learn algorithm=nclql task=Reacher-v5 "algorithm.name='$name'" +algorithm.options.optim.lr=3e-4 \
    "${@/#/+algorithm.options.}" output=benchmarks/results/learning/Reacher-v5-ablations.jsonl
}

ALL=sac,nclql,sql,td3,qsm,lql,nclql_best
case $1 in
  pendulum) for seed in 0 1 2; do learn algorithm=$ALL task=Pendulum-v1 seed=$seed; done ;;
  inverted) for seed in 0 1 2; do learn algorithm=$ALL task=InvertedPendulum-v5 seed=$seed; done ;;
  reacher) for seed in 0 1 2; do learn algorithm=nclql,sac,nclql_best,lql,td3,sql,qsm task=Reacher-v5 seed=$seed; done ;;
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
  ablations) # every schedule can mix: at least 0.5 (sigma_l / sigma_(l+1))^2 steps per level
    ablation "10 x 2"
    ablation "5 levels x 2" sampler.num_levels=5 sampler.sigma_max=0.01
    ablation "20 levels x 2" sampler.num_levels=20
    ablation "10 x 1" sampler.steps_per_level=1 sampler.sigma_max=0.02
    ablation "10 x 4" sampler.steps_per_level=4
    ablation "sigma_max 0.3" sampler.sigma_max=0.3 sampler.num_levels=13
    ablation "sigma_max 0.03" sampler.sigma_max=0.03
    ablation "w 50" sampler.w=50
    ablation "w 5000" sampler.w=5000
    ablation "raw gradient" sampler.normalize_gradient=false
    ablation "raw gradient, w 50" sampler.normalize_gradient=false sampler.w=50
    ablation "LQL, step 1e-3" sampler.num_levels=1 sampler.steps_per_level=20 sampler.step_lr=1e-3
    ablation "summed update" optim.update=summed
    ablation "8 particles when evaluating" sampler.deterministic_num_particles=8
    ;;
  *) echo "expected pendulum, inverted, reacher, options, tau, halfcheetah or ablations" >&2; exit 2 ;;
esac
