#!/usr/bin/env bash
# Tests of train_t6cu on several ranks: NCCL with one rank and with as many as there are GPUs, and ranks that share one
# GPU over MPI, each compared with one process; checkpoints moved between numbers of ranks; memcheck of the collectives.
# About three minutes on one GPU. Needs a build in fp32: in bf16, the order of sums alone makes runs differ by a percent
# (dev/results/scaling.md).
#   make OUT=build/fp32 PRECISION=FP32 build/fp32/train_t6cu && make tokenize
#   test/test_comm_gpu.sh
# Runs the program $TRAIN. Losses must be equal to a relative $LARGEST (1e-4). Ends with "N passed, N failed".
set -uo pipefail
cd "$(dirname "$0")/.."
program=$(realpath "${TRAIN:-build/fp32/train_t6cu}") tokenize=data/tokenize
largest=${LARGEST:-1e-4}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. test/checks.sh
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
mpi() { timeout 120 mpirun -np "$@"; }

# ---- English text as bytes; 16 micro-batches per step
english 550000 >"$tmp/text.txt"
shards d --bytes --val-tokens 20000 --shard-size 100000 "$tmp/text.txt"
train=("$program" -i "$tmp/d/t_train_*.bin" -j "$tmp/d/t_val_*.bin" -e tiny -b 4 -d 16384 -x 20 -n 10 -v 20 -m 0 -s 0
       -u 2 --comm-timeout 60)
curve() { grep -o '"\(loss\|val_loss\)":[^,}]*' "$1/metrics.jsonl" 2>/dev/null | cut -d: -f2; }
# same NAME FOLDER: the 20 losses and the last validation of the run in FOLDER are those of one process.
same() {
    local worst
    worst=$(paste <(curve "$tmp/one") <(curve "$2") | awk '
        { d = $1 - $2; if (d < 0) d = -d; if (d / $1 > w) w = d / $1; if (NF == 2) n++ }
        END { print (n < 21 ? "not all there" : w + 0) }')
    check "$1: losses within $worst of one process" \
        "$(awk -v w="$worst" -v t="$largest" 'BEGIN { print (w == w + 0 && w <= t) ? 1 : 0 }')" \
        "at most $largest; $(tail -1 "$tmp/log")"
}
"${train[@]}" -o "$tmp/one" >"$tmp/log" 2>&1 || { echo "FAIL one process: $(tail -1 "$tmp/log")"; exit 1; }

# ---- NCCL. -z 0: all-reduce; 1 and 2: reduce-scatter and all-gather
for zero in 0 1 2; do
    "${train[@]}" --comm nccl -z $zero -o "$tmp/nccl$zero" >"$tmp/log" 2>&1
    same "NCCL, one rank, -z $zero" "$tmp/nccl$zero"
done
RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 \
    "${train[@]}" --comm nccl --comm-file "$tmp/id" -z 2 -o "$tmp/file" >"$tmp/log" 2>&1
same "NCCL, --comm-file" "$tmp/file"
check "--comm-file: removed" "$([ ! -e "$tmp/id" ] && echo 1)"
gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
for np in 2 4 8; do
    if [ "$gpus" -lt $np ]; then echo "skip NCCL with $np ranks: $gpus GPUs"; continue; fi
    for zero in 0 1 2; do
        mpi $np "${train[@]}" --comm nccl -z $zero -o "$tmp/nccl$np.$zero" >"$tmp/log" 2>&1
        same "NCCL, $np ranks, -z $zero" "$tmp/nccl$np.$zero"
    done
    for rank in $(seq 0 $((np - 1))); do
        RANK=$rank WORLD_SIZE=$np LOCAL_RANK=$rank timeout 120 \
            "${train[@]}" --comm nccl --comm-file "$tmp/id$np" -z 2 -o "$tmp/file$np" >"$tmp/log$rank" 2>&1 &
    done
    wait
    cp "$tmp/log0" "$tmp/log"
    same "NCCL, $np ranks that meet by --comm-file" "$tmp/file$np"
done

# ---- ranks that share a GPU; with 3, not every rank has a micro-batch in the last round
for np in 2 3 4; do
    for zero in 0 1 2; do
        mpi $np "${train[@]}" --comm mpi -z $zero -o "$tmp/mpi$np.$zero" >"$tmp/log" 2>&1
        same "$np ranks over MPI, -z $zero" "$tmp/mpi$np.$zero"
    done
done
for np in 1 2; do       # from the checkpoint of step 10
    cp -r "$tmp/mpi4.2" "$tmp/moved$np"
    rm -rf "$tmp/moved$np/step_00000020"
    mpi $np "${train[@]}" --comm mpi -z $((np - 1)) -y -o "$tmp/moved$np" >"$tmp/log" 2>&1
    same "saved on 4 with -z 2, resumed on $np" "$tmp/moved$np"
done
mpi $((gpus + 1)) "${train[@]}" --comm nccl -o "$tmp/share" >"$tmp/log" 2>&1
check "more ranks than GPUs over NCCL: refused, with a hint" \
    "$(grep -q 'if ranks share a GPU, add --comm mpi' "$tmp/log" && echo 1)" "$(tail -3 "$tmp/log")"

# ---- memcheck. API errors are not reported, because NCCL asks for kernels that it lacks. Ours end the program, so the
# last step must be reached
for zero in 0 2; do
    command -v compute-sanitizer >/dev/null || { echo "skip memcheck: no compute-sanitizer"; break; }
    timeout 120 compute-sanitizer --tool memcheck --report-api-errors no \
        "${train[@]}" --comm nccl -z $zero -d 2048 -x 2 -v 0 -n 2 -o "$tmp/memcheck$zero" >"$tmp/log" 2>&1
    check "memcheck, NCCL, -z $zero" \
        "$(grep -q 'ERROR SUMMARY: 0 errors' "$tmp/log" && grep -q '^step 2/2 ' "$tmp/log" && echo 1)" \
        "$(tail -3 "$tmp/log")"
done
finish
