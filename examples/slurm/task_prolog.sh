#!/usr/bin/env bash
# Gives every task of a SLURM job the placement of a deployment, as MOE_PLACEMENT_FILE.
#
# For TaskProlog= in slurm.conf, or srun --task-prolog. What it prints as "export NAME=value" is set for the
# task, what it prints as "print ..." goes to the task's output. A prolog that fails holds up the job: it ends
# with 0 whatever happens, unless MOE_PLACEMENT_STRICT=1.
#
# From the job's environment:
#   MOE_PLACEMENT_DEPLOYMENT   deployment; without it nothing is done
#   MOE_PLACEMENT_SHARED       folder that all nodes see; default: $HOME/.moe-placement
#   MOE_PLACEMENT_URL, MOE_PLACEMENT_TOKEN_FILE   the service
#   MOE_PLACEMENT_TOPOLOGY, MOE_PLACEMENT_MODEL   what the job is, to put experts in order as a last resort
#   MOE_PLACEMENT_FORMAT       format of the file; default: native
#   MOE_PLACEMENT_TIMEOUT      seconds until the service counts as down; default: 30
set -uo pipefail

[[ -n ${MOE_PLACEMENT_DEPLOYMENT:-} ]] || exit 0

timeout=${MOE_PLACEMENT_TIMEOUT:-30}
shared=${MOE_PLACEMENT_SHARED:-$HOME/.moe-placement}
# A requeued job is another start: it does not take what the first one left.
run="$shared/run-${SLURM_JOB_ID:-0}.${SLURM_STEP_ID:-0}.${SLURM_RESTART_COUNT:-0}"
file="$run/placement.json"

give_up() {
    echo "print moe-placement: $1"
    [[ ${MOE_PLACEMENT_STRICT:-0} == 1 ]] && exit 5
    exit 0
}

fetch() {
    local options=(--deployment "$MOE_PLACEMENT_DEPLOYMENT" -o "$file" --format "${MOE_PLACEMENT_FORMAT:-native}")
    options+=(--cache "$shared/cache" --timeout "$timeout")
    [[ -n ${MOE_PLACEMENT_TOPOLOGY:-} ]] && options+=(-t "$MOE_PLACEMENT_TOPOLOGY")
    [[ -n ${MOE_PLACEMENT_MODEL:-} ]] && options+=(--model "$MOE_PLACEMENT_MODEL")
    [[ ${MOE_PLACEMENT_STRICT:-0} == 1 ]] && options+=(--strict)
    moe-placement fetch "${options[@]}"
}

mkdir -p "$run" 2>/dev/null || give_up "$run cannot be made; running without a placement"

if [[ ${SLURM_PROCID:-0} == 0 ]]; then
    # The file appears whole or not at all; the mark tells the others that there will be none.
    if ! said=$(fetch 2>&1); then
        touch "$run/failed"
    fi
    while IFS= read -r line; do echo "print $line"; done <<<"$said"
else
    # One task asks and all run the same: the others wait for it, a little longer than it may take.
    for ((i = 0; i < (timeout + 30) * 5; i++)); do
        [[ -e $file || -e $run/failed ]] && break
        sleep 0.2
    done
fi

[[ -e $file ]] || give_up "no placement; running without one"
echo "export MOE_PLACEMENT_FILE=$file"
exit 0
