#!/usr/bin/env bash
# Trains on several machines with mpirun (Open MPI; the machines need ssh without a password). Edit the three places
# below. Flags given here are passed to the trainer. All machines must see the program, the shards and the output folder
# under the same path (NFS, for example).
#
#   kill -USR1 $(pgrep -x mpirun)      saves a checkpoint and ends the run. SIGTERM and Ctrl-C do not: mpirun then kills
#                                      the ranks within a second.
#
# Run again, it resumes from the last checkpoint; the number of machines may have changed.
set -euo pipefail
cd "$(dirname "$0")/../.."

# 1. The machines: a file with lines "NAME slots=GPUS"
hosts=${HOSTS:-scripts/multi_node/hosts}

# 2. What to train
flags=(--model 124M --batch-size 15 --tokens-per-step 491520 --seq-len 1024 --zero 1
       --train-data 'data/fineweb_edu_100B/*_train_*.bin' --val-data 'data/fineweb_edu_100B/*_val_*.bin'
       --save-every 1000 --keep 2 --val-every 250 --sample-every 0 --comm-timeout 300)

# 3. The output folder
out=${OUT:-out/t6_124M_many}

trainer=${TRAINER:-./train_t6cu}
ranks=$(sed 's/#.*//' "$hosts" | awk '
    NF { n = 1; for (i = 2; i <= NF; i++) if ($i ~ /^slots=/) n = substr($i, 7); sum += n }
    END { print sum + 0 }')
# mpirun notices a lost machine by keep-alive messages: after half a minute with these settings, before --comm-timeout.
mpi=(mpirun -np "$ranks" --hostfile "$hosts" --bind-to none -x PATH ${LD_LIBRARY_PATH:+-x LD_LIBRARY_PATH}
     --mca oob_tcp_keepalive_time 15 --mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 3)

# A failure of a machine (exit code 1: a lost rank, a full disk) is retried, up to ten times; bad input (2) is not.
pause=${PAUSE:-20}
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    code=0
    "${mpi[@]}" "$trainer" "${flags[@]}" --out "$out" --resume "$@" || code=$?
    [ $code = 0 ] || [ $code = 2 ] && exit $code
    ended="run_mpirun: attempt $attempt ended with exit code $code"
    [ $attempt = 10 ] && break
    echo "$ended; resuming from the last checkpoint in $pause s" >&2
    sleep "$pause"
done
echo "$ended; giving up" >&2
exit 1
