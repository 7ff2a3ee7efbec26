#!/usr/bin/env bash
# The lines of this directory's JSON files: benchmarks/results/learning/grid.sh all|options|combinations|ablations|tau|qsm|seconds [TASK]
# or double-ablations.
# Finished runs are skipped, so a grid that was stopped is continued by the same command.
cd "$(dirname "$0")/../../.." || exit
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824 MALLOC_TOP_PAD_=67108864

learn() { nice -n "${NICE:-0}" "$PYTHON" -m benchmarks.learning -m "$@"; }

# One change to NC-LQL with a learning rate of 3e-4, or (FAMILY=nclql_best LR=) to the preset best:
# change FILE NAME [section.key=value ...]
change() {
  local file=$1 name=$2
  shift 2
  learn algorithm="${FAMILY:-nclql}" task="$TASK" seed=0,1,2 "algorithm.name='$name'" \
    ${LR:+"+algorithm.options.optim.lr=$LR"} "${@/#/++algorithm.options.}" ${FRAMES:+task.total_frames=$FRAMES} \
    output="benchmarks/results/learning/$TASK-$file.jsonl"
}

LR=3e-4 FRAMES=${FRAMES:-}
TASK=${2:-Reacher-v5}
AUTHORS_CHAIN="sampler.num_levels=10 sampler.sigma_max=0.1 sampler.w=500"
case $1 in
  all) for seed in 0 1 2; do learn algorithm=sac,nclql,sql,td3,qsm,lql,nclql_best task="$TASK" seed=$seed; done ;;
  options) # what might make it better, one at a time
    change options "lr 3e-4"
    change options "lr 1e-3" optim.lr=1e-3
    change options "layer norm" network.layer_norm=true
    change options "reward scale 1" optim.reward_scale=1.0
    change options "summed update" optim.update=summed
    FAMILY=nclql_quantiles change options "quantiles"
    FAMILY=nclql_crossq change options "CrossQ"
    change options "3-step returns" optim.n_steps=3
    change options "w auto" sampler.w=auto
    change options "observation normalisation" network.normalize_observation=true
    change options "best of 8 when evaluating" sampler.deterministic_num_particles=8
    ;;
  combinations) # the preset best with the authors' chain, what helped alone with that, and the way to the chain of best
    FAMILY=nclql_best LR=
    change combinations "10 levels x 2, w 500" $AUTHORS_CHAIN
    change combinations "10 levels x 2, w 500, observation normalisation" $AUTHORS_CHAIN network.normalize_observation=true
    change combinations "10 levels x 2, w 50" $AUTHORS_CHAIN sampler.w=50
    change combinations "10 levels x 2, w 500, raw gradient" $AUTHORS_CHAIN sampler.normalize_gradient=false
    change combinations "5 levels x 2, w 500" sampler.w=500
    change combinations "5 levels x 2, w 500, delay_actor" sampler.w=500 optim.delay_actor=true
    change combinations "5 levels x 2, w 50" sampler.w=50
    change combinations "7 levels x 2, w 50" sampler.num_levels=7 sampler.sigma_max=0.0316 sampler.w=50
    ;;
  tau) # is it the tuning? SAC with the targets, and with the learning rate, of nclql_best
    for lr in 3e-4 1e-3; do
      learn algorithm=sac task="$TASK" "algorithm.name='sac, lr $lr'" +algorithm.options.lr=$lr task.tau=0.02 seed=0,1,2 \
        output="benchmarks/results/learning/$TASK-tau.jsonl"
    done
    ;;
  qsm) # is it the factor on the gradient? Q-score matching with less of it, and with the targets and rate of nclql_best
    scaled_qsm() {
      learn algorithm=qsm task="$TASK" seed=0,1,2 "algorithm.name='$1'" "${@:2}" \
        output="benchmarks/results/learning/$TASK-qsm.jsonl"
    }
    scaled_qsm "qsm, M_q 5" +algorithm.options.gradient_scale=5
    scaled_qsm "qsm, M_q 0.5" +algorithm.options.gradient_scale=0.5
    scaled_qsm "qsm, M_q 0.5, lr 1e-3" +algorithm.options.gradient_scale=0.5 +algorithm.options.lr=1e-3 task.tau=0.02
    ;;
  seconds) # SAC's update compiled, as NC-LQL's is. FRAMES=45000 gives it the seconds of nclql_best on the larger tasks
    compiled_sac() {
      learn algorithm=sac task="$TASK" seed=0,1,2 +algorithm.options.compile_update=true "algorithm.name='$1'" "${@:2}" \
        ${FRAMES:+task.total_frames=$FRAMES} output="benchmarks/results/learning/$TASK-seconds.jsonl"
    }
    compiled_sac "sac, compiled"
    compiled_sac "sac, lr 1e-3, compiled" +algorithm.options.lr=1e-3 task.tau=0.02
    ;;
  ablations) # of "lr 3e-4" in the options, which is 10 levels of 2 steps. Every schedule can mix: at least
    # 0.5 (sigma_l / sigma_(l+1))^2 steps per level.
    change ablations "w 50" sampler.w=50
    change ablations "raw gradient" sampler.normalize_gradient=false
    change ablations "LQL, step 1e-3" sampler.num_levels=1 sampler.steps_per_level=20 sampler.step_lr=1e-3
    change ablations "5 levels x 2" sampler.num_levels=5 sampler.sigma_max=0.01
    change ablations "10 x 4" sampler.steps_per_level=4
    change ablations "sigma_max 0.3" sampler.sigma_max=0.3 sampler.num_levels=13
    change ablations "w 5000" sampler.w=5000
    change ablations "sigma_max 0.03" sampler.sigma_max=0.03
    change ablations "10 x 1" sampler.steps_per_level=1 sampler.sigma_max=0.02
    change ablations "20 levels x 2" sampler.num_levels=20
    change ablations "raw gradient, w 50" sampler.normalize_gradient=false sampler.w=50
    ;;
  double-ablations) # the ablations of a second task, of the preset best with w 500: the first 7,000 steps
    TASK=InvertedDoublePendulum-v5 FAMILY=nclql_best LR= FRAMES=7000
    change ablations "10 levels x 2, raw gradient" $AUTHORS_CHAIN sampler.normalize_gradient=false
    change ablations "10 levels x 2, w 50" $AUTHORS_CHAIN sampler.w=50
    change ablations "10 levels x 4" $AUTHORS_CHAIN sampler.steps_per_level=4
    change ablations "13 levels x 2, sigma_max 0.3" sampler.sigma_max=0.3 sampler.num_levels=13 sampler.w=500
    change ablations "5 levels x 2" sampler.w=500
    change ablations "LQL, step 1e-3" $AUTHORS_CHAIN sampler.num_levels=1 sampler.steps_per_level=20 sampler.step_lr=1e-3
    ;;
  *) echo "expected all, options, combinations, tau, qsm, seconds, ablations or double-ablations" >&2; exit 2 ;;
esac
