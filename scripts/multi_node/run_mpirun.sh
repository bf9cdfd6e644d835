#!/usr/bin/env bash
# Trains on several machines with mpirun (Open MPI; the machines need ssh without a password). Edit the three places
# below. Flags given here are passed to the trainer. All machines must see the program, the shards and the output folder
# under the same path (NFS, for example).
#
# Ctrl-C saves a checkpoint and ends the run, and so do SIGTERM, SIGHUP and SIGUSR1 to this script. A second Ctrl-C ends
# it at once. Only SIGUSR1 may go to mpirun itself: after any other signal it kills the ranks within two seconds.
#
# Run again, it resumes from the last checkpoint; the number of machines may have changed.
set -euo pipefail
cd "$(dirname "$0")/../.."

# 1. The machines: a file with lines "NAME slots=GPUS"; mpirun starts one rank per slot
hosts=${HOSTS:-scripts/multi_node/hosts}

# 2. What to train
flags=(--model 124M --batch-size 15 --tokens-per-step 491520 --seq-len 1024 --zero 1
       --train-data 'data/fineweb_edu_100B/*_train_*.bin' --val-data 'data/fineweb_edu_100B/*_val_*.bin'
       --save-every 1000 --keep 2 --val-every 250 --sample-every 0 --comm-timeout 300)

# 3. The output folder
out=${OUT:-out/t6_124M_many}

trainer=${TRAINER:-./train_t6cu}
# mpirun notices a lost machine by keep-alive messages: after half a minute with these settings, before --comm-timeout.
mpi=(mpirun --hostfile "$hosts" --bind-to none -x PATH ${LD_LIBRARY_PATH:+-x LD_LIBRARY_PATH}
     --mca oob_tcp_keepalive_time 15 --mca oob_tcp_keepalive_intvl 5 --mca oob_tcp_keepalive_probes 3)

refuse() { echo "run_mpirun: $*" >&2; exit 2; }
[ -s "$hosts" ] || refuse "$hosts: no such file; HOSTS=FILE names another"
! grep -q $'\r' "$hosts" || refuse "$hosts has Windows line ends, which mpirun does not read: sed -i 's/\r\$//' $hosts"
line=$(awk '{ sub(/#.*/, "") } NF && !/[ \t]slots[ \t]*=/ { print NR; exit }' "$hosts")
[ -z "$line" ] || refuse "$hosts, line $line: slots=GPUS is missing; mpirun would start a rank on each core"
case " $* " in *" -o "* | *" --out "* | *" --out="*) refuse "OUT=FOLDER sets the output folder, not --out" ;; esac

# A signal goes to mpirun as SIGUSR1, which the ranks get too: they save and end. It is sent again and again, because it
# is lost while mpirun starts. Two Ctrl-C within a second are one: some programs pass on what the terminal has already
# sent to all.
job="" stopped="" signals=0 interrupted=""
ask() { while kill -USR1 $job; do sleep 5; done >/dev/null 2>&1 & }
finish() { { kill $job; sleep 5; kill -KILL $job; } >/dev/null 2>&1 & }     # an mpirun that lost a rank may hang
pass_on() {
    signals=$((signals + 1))
    if [ "$1" = INT ] && [ -n "$interrupted" ] && [ $SECONDS -gt "$interrupted" ]; then finish; fi
    if [ "$1" = INT ]; then interrupted=${interrupted:-$SECONDS}; fi
    if [ -n "$job" ] && [ -z "$stopped" ]; then ask; fi
    stopped=yes
}
for name in INT TERM HUP USR1; do trap "pass_on $name" $name; done

# run COMMAND...: runs it and sets $code. It has a session of its own, so that the terminal's Ctrl-C does not reach it.
run() {
    local seen=""
    setsid "$@" </dev/null &
    job=$!
    [ -z "$stopped" ] || ask
    until [ "$seen" = $signals ]; do        # a signal ends wait before the command has ended
        seen=$signals code=0
        wait $job || code=$?
    done
    job=""
}
newest() { printf '%s\n' "$out"/step_???????? | tail -1; }

# Started again after a failure, unless it would fail again: bad input (2); a program that is missing, lacks a library
# or was built for another processor (126, 127, 132); twice in a row no new checkpoint.
fruitless=0
while :; do
    before=$(newest)
    run "${mpi[@]}" "$trainer" "${flags[@]}" --out "$out" --resume "$@"
    [ -z "$stopped" ] || exit $code
    case $code in
        0 | 2) exit $code ;;
        126 | 127 | 132) refuse "$trainer cannot run here (exit code $code): it is missing, lacks a library, or was" \
            "built for another processor" ;;
    esac
    fruitless=$((fruitless + 1))
    [ "$(newest)" = "$before" ] || fruitless=0
    if [ $fruitless = 2 ]; then
        echo "run_mpirun: exit code $code, twice in a row without a new checkpoint; giving up" >&2
        exit $code
    fi
    echo "run_mpirun: exit code $code; resuming from the last checkpoint in ${PAUSE:-20} s" >&2
    failed=$code
    run sleep "${PAUSE:-20}"
    [ -z "$stopped" ] || exit $failed
done
