#!/usr/bin/env bash
# Trains on several machines with mpirun (Open MPI, ssh without a password between them). Edit the three places below; flags given here go
# to the trainer. The program, the shards and the output folder must be seen under the same path by all machines (NFS, say).
#
#   kill -USR1 $(pgrep -x mpirun)      saves a checkpoint and ends cleanly (mpirun gives ranks a second only after SIGTERM or Ctrl-C)
#
# Run again, it goes on from the last checkpoint, with as many machines as there are then.
set -euo pipefail
cd "$(dirname "$0")/../.."

# 1. The machines: a file of lines "NAME slots=GPUS"
hosts=${HOSTS:-scripts/multi_node/hosts}

# 2. What to train
flags=(--model 124M --batch-size 15 --tokens-per-step 491520 --seq-len 1024 --zero 1
       --train-data 'data/fineweb_edu_100B/*_train_*.bin' --val-data 'data/fineweb_edu_100B/*_val_*.bin'
       --save-every 1000 --keep 2 --val-every 250 --sample-every 0 --comm-timeout 300)

# 3. Where it goes
out=${OUT:-out/t6_124M_many}

trainer=${TRAINER:-./train_t6cu}
ranks=$(sed 's/#.*//' "$hosts" | awk '{ n = 1; for (i = 2; i <= NF; i++) if ($i ~ /^slots=/) n = substr($i, 7); if (NF) sum += n } END { print sum + 0 }')
# A machine that is gone is noticed by mpirun's keep-alives, here after half a minute, and must be before --comm-timeout is over.
mpi=(mpirun -np "$ranks" --hostfile "$hosts" --bind-to none -x PATH ${LD_LIBRARY_PATH:+-x LD_LIBRARY_PATH}
     --mca oob_tcp_keepalive_time 15 --mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 3)

# A run that the machines ended (exit code 1: a lost rank, a full disk) is started again, ten times; bad input (2) is not.
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    code=0
    "${mpi[@]}" "$trainer" "${flags[@]}" --out "$out" --resume "$@" || code=$?
    [ $code = 0 ] || [ $code = 2 ] && exit $code
    echo "run_mpirun: ended with code $code (attempt $attempt); going on from the last checkpoint in 20 s" >&2
    sleep "${PAUSE:-20}"
done
exit 1
