#!/usr/bin/env bash
# Tests of one run per output folder: starts at the same time, locks of other machines, stale and broken ones, and kills
# of a wrapper script, of ranks and of mpirun, with restarts while the killed ones are still dying.
#   test/test_lock.sh [--long]       programs from $BIN (default: the project's folder); ends with "N passed, N failed"
# Parts need Open MPI, a C compiler, or root for mounts. A line says what is skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.}
train=$(realpath "$bin/train_t6")
tokenize=$(realpath "$bin/data/tokenize")
long=0 starts=10 kills=8 steps=60
[ "${1:-}" = --long ] && long=1 starts=50 kills=100 steps=300
tmp=$(mktemp -d)
# pids_of FOLDER [PROGRAM]: mpirun and the ranks of an output folder
pids_of() { pgrep -f "^${2:-(mpirun|$train)} .*--?o(ut)? $1( |\$)"; }
cleanup() {
    for p in $(pids_of "$tmp/.*"); do kill -9 "$p" 2>/dev/null; done
    umount "$tmp/read_only" "$tmp/full" 2>/dev/null
    rm -rf "$tmp"
}
trap 'cd /; cleanup' EXIT
. test/checks.sh

# ---- data: English text as bytes, and a model that takes a few milliseconds per step
english 110000 >"$tmp/text.txt"
shards d --bytes --val-tokens 5000 --shard-size 20000 "$tmp/text.txt"
data=(-i "$tmp/d/t_train_*.bin" -j "$tmp/d/t_val_*.bin" -s 0 -u 2 -v 0 --threads 1)
run=("$train" "${data[@]}" --n-layer 2 --n-embd 32 --n-head 3 --head-dim 8 -t 32 -b 2 -d 64 -n 50 -x 100000)

weights() { cat "$1/model.safetensors" 2>/dev/null | sha256sum; }
curve() { grep -o '"\(step\|loss\|norm\)":[^,}]*' "$1/metrics.jsonl"; }
steps_done() { cat "$1/metrics.jsonl" 2>/dev/null | wc -l; }
# until_steps N FOLDER: waits until the run there has logged N steps, at most 30 s
until_steps() { for _ in $(seq 600); do [ "$(steps_done "$2")" -ge "$1" ] && return; sleep 0.05; done; }
checkpoints() { ls "$1" | grep -x 'step_[0-9]*'; }
contents() { (cd "$1" && find . -type f ! -name lock | sort | xargs sha256sum); }
has_lock() { [ -s "$1/lock" ]; }
host=$(hostname)

# whole FOLDER COMMAND...: prints what is wrong with the folder of a run that COMMAND started: a step that was logged
# twice or not at all, a checkpoint that does not match its checksums, a left-over.
whole() {
    local c copy=$1.copy
    sed 's/{"step":\([0-9]*\),.*/\1/' "$1/metrics.jsonl" | cmp -s - <(seq "$(steps_done "$1")") || echo "metrics.jsonl"
    ls "$1" | grep -vxE 'lock|main.log|metrics.jsonl|step_[0-9]{8}'
    for c in $(checkpoints "$1"); do        # a run that resumes checks all files
        mkdir "$copy"; cp -r "$1/$c" "$copy/"
        "${@:2}" -o "$copy" -y -x 1 2>&1 >/dev/null
        rm -r "$copy"
    done
}

# ---- a file system without flock: the lines alone decide. The first line's beat takes a while.
printf '%s\n' '#include <errno.h>' 'int flock(int, int);' 'int flock(int fd, int how) { (void)fd, (void)how;' \
    'errno = ENOLCK; return -1; }' >"$tmp/no_flock.c"
second=""
if ${CC:-cc} -shared -fPIC -o "$tmp/no_flock.so" "$tmp/no_flock.c" 2>/dev/null; then
    no_flock=(env LD_PRELOAD="$tmp/no_flock.so" "${run[@]}" -n 1000)
    "${no_flock[@]}" -o "$tmp/no_flock" >/dev/null 2>&1 &
    first=$!
    until_steps 5 "$tmp/no_flock"
    "${no_flock[@]}" -o "$tmp/no_flock" >/dev/null 2>"$tmp/second" &
    second=$!
else
    echo "skip file systems without flock: there is no C compiler"
fi

# ---- two starts at the same time: one runs, the other is refused, and the one that runs does not notice.
"${run[@]}" -o "$tmp/alone" >/dev/null 2>&1 &
alone=$!
# pair FOLDER: prints what went wrong
pair() {
    local dir=$1 pids=() winner loser rc
    for i in 0 1; do
        "${run[@]}" -o "$dir" >"$dir.stdout$i" 2>"$dir.stderr$i" &
        pids[i]=$!
    done
    while kill -0 "${pids[0]}" 2>/dev/null && kill -0 "${pids[1]}" 2>/dev/null; do sleep 0.1; done
    loser=0; kill -0 "${pids[0]}" 2>/dev/null && loser=1
    winner=$((1 - loser))
    wait "${pids[loser]}"
    rc=$?
    [ $rc = 2 ] && [ "$(wc -l <"$dir.stderr$loser")" = 1 ] &&
        grep -q -- "--out: .* in use by a run on $host, process ${pids[winner]}, since 2" "$dir.stderr$loser" ||
        echo "code $rc: $(cat "$dir.stderr$loser")"
    until_steps 60 "$dir"
    kill -TERM "${pids[winner]}"
    wait "${pids[winner]}" || echo "the winner failed: $(cat "$dir.stderr$winner")"
    [ "$(curve "$dir" | head -180)" = "$(curve "$tmp/alone" | head -180)" ] || echo "other losses"
    [ "$(weights "$dir/step_00000050")" = "$(weights "$tmp/alone/step_00000050")" ] || echo "other weights"
    [ "$(grep -c '^step ' "$dir/main.log")" = "$(steps_done "$dir")" ] || echo "main.log"
    has_lock "$dir" && echo "the lock is not empty"
    whole "$dir" "${run[@]}"
}
until_steps 70 "$tmp/alone"
kill -9 $alone; wait $alone 2>/dev/null
for batch in $(seq 1 10 $starts); do
    jobs=()
    for i in $(seq "$batch" $((batch + 9))); do
        pair "$tmp/pair$i" >"$tmp/pair$i.wrong" 2>&1 &
        jobs+=($!)
    done
    wait "${jobs[@]}"
done
equal "two starts, $starts times: one runs as if it were alone, one is refused" "$(cat "$tmp"/pair*.wrong | head -5)" ""

# ---- who needs no lock, and what a refused run leaves
"${run[@]}" -o "$tmp/live" >/dev/null 2>&1 &
live=$!
until_steps 60 "$tmp/live"
"${run[@]}" -o "$tmp/live" --plan >/dev/null 2>"$tmp/stderr"
equal "--plan needs no lock" "$? $(cat "$tmp/stderr")" "0 "
"${run[@]}" -o "$tmp/planned" --plan >/dev/null 2>&1
check "--plan makes no folder" "$([ ! -e "$tmp/planned" ] && echo 1)"
"$train" "${data[@]}" -t 32 -b 2 -d 64 -x 1 -e "$tmp/live/step_00000050" -o "$tmp/from" >/dev/null 2>"$tmp/stderr"
equal "reading a checkpoint needs no lock" "$? $(cat "$tmp/stderr")" "0 "
refuses "a live run's folder, with --resume" 2 "process $live" "${run[@]}" -o "$tmp/live" -y

# ---- killed, and resumed at once
start=$(date +%s%N)
disown $live
kill -9 $live
"${run[@]}" -o "$tmp/live" -y >"$tmp/log" 2>&1 &
live=$!
for _ in $(seq 100); do grep -q '^step ' "$tmp/log" && break; sleep 0.05; done
check "after kill -9 the next run starts at once" \
    "$([ $(($(date +%s%N) - start)) -lt 2000000000 ] && grep -q '^step ' "$tmp/log" && echo 1)" "$(tail -1 "$tmp/log")"
check "and its log names the one before" "$(grep -q 'in use by a run on .*, which did not end' "$tmp/live/main.log" &&
    echo 1)" "$(head -3 "$tmp/log")"
kill -9 $live; wait $live 2>/dev/null

# ---- left-overs of killed runs, also one that cannot be removed
mkdir -p "$tmp"/live/step_00000050.tmp "$tmp"/live/step_00000060.0123456789abcdef.tmp "$tmp"/live/step_00000070.x.tmp/d
touch "$tmp"/live/step_00000050.tmp/model.safetensors "$tmp/live/step_00000060.0123456789abcdef.tmp/optimizer"
last=$(checkpoints "$tmp/live" | tail -1)
"${run[@]}" -o "$tmp/live" -y -x $((10#${last#step_} + 2)) >"$tmp/log" 2>&1
equal "the next run removes left-overs" "$? $(ls "$tmp/live" | grep -c tmp)" "0 1"
rm -r "$tmp/live/step_00000070.x.tmp"

# ---- the weights before the first step are saved once: there is no moment without them
"${run[@]}" -o "$tmp/initial" -x 0 >/dev/null 2>&1
initial=$tmp/initial/step_00000000
before=$(ls -id "$initial"; contents "$initial")
"${run[@]}" -o "$tmp/initial" -x 0 -y >/dev/null 2>"$tmp/stderr"
equal "a step that is there is not saved again" "$? $(cat "$tmp/stderr")" "0 "
equal "it stays as it is" "$(ls -id "$initial"; contents "$initial")" "$before"

# ---- a run of another machine: its line names another boot id, and its flock may not reach here
foreign() { echo "run fedcba9876543210 beat $1 process 4321 on elsewhere since 2026-01-31 12:00:00 boot other"; }
foreign 0000000000 >"$tmp/live/lock"
before=$(contents "$tmp/live")
(for i in $(seq 1000000001 1000001000); do foreign "$i" 1<>"$tmp/live/lock"; sleep 0.3; done) &
beats=$!
refuses "a run on another machine that beats" 2 "in use by a run on elsewhere, process 4321," \
    "${run[@]}" -o "$tmp/live" -y
kill $beats; wait $beats 2>/dev/null
equal "the refused run has changed nothing" "$(contents "$tmp/live")" "$before"
if [ $long = 1 ]; then
    start=$SECONDS
    "${run[@]}" -o "$tmp/live" -y -x $((10#${last#step_} + 4)) >"$tmp/log" 2>&1
    equal "a stale lock of another machine" "$? $((SECONDS - start >= 30)) $((SECONDS - start < 35))" "0 1 1"
    check "a note and the log say so" "$(grep -q '^note: .*elsewhere, process 4321.*30 s' "$tmp/log" &&
        grep -q 'in use by a run on elsewhere' "$tmp/live/main.log" && echo 1)" "$(cat "$tmp/log")"
fi
rm "$tmp/live/lock"

# ---- a run that slept while its lock was taken: it ends without another word in the folder
# loses NAME FLAG VALUE COMMAND...: what COMMAND does to the lock of a run that is stopped, with another flag
loses() {
    local name=$1 dir=$tmp/loses pid rc before
    rm -rf "$dir"
    "${run[@]}" -o "$dir" "$2" "$3" >/dev/null 2>"$tmp/stderr" &
    pid=$!
    until_steps 30 "$dir"
    kill -STOP $pid
    (cd "$dir" && "${@:4}")
    before="$(steps_done "$dir") $(checkpoints "$dir" | xargs)"
    kill -CONT $pid
    wait $pid
    rc=$?
    check "$name: the run ends with one line" "$([ $rc = 1 ] && [ "$(wc -l <"$tmp/stderr")" = 1 ] &&
        grep -q 'lock no longer names this run' "$tmp/stderr" && echo 1)" "code $rc: $(cat "$tmp/stderr")"
    equal "$name: nothing is written any more" "$(steps_done "$dir") $(checkpoints "$dir" | xargs)" "$before"
}
take() { foreign 0000000000 1<>lock; }
take_anew() { rm lock; foreign 0000000000 >lock; }
loses "a lock taken" -n 100000 take
loses "a lock replaced" -n 100000 take_anew
loses "a lock removed" -n 100000 rm lock
loses "a lock taken during a save" -n 1 take

# ---- what is not a lock, and folders where nothing can be written
mkdir -p "$tmp/odd"
not_lock() { refuses "$1" 2 "lock: $2" "${run[@]}" -o "$tmp/odd"; rm -r "$tmp/odd/lock"; }
mkdir "$tmp/odd/lock"; not_lock "lock is a folder" "cannot open for writing: Is a directory"
mkfifo "$tmp/odd/lock"; not_lock "lock is a pipe" "not a regular file"
ln -s "$tmp/text.txt" "$tmp/odd/lock"; not_lock "lock is a link" "cannot open for writing"
ln -s "$tmp/nothing" "$tmp/odd/lock"; not_lock "lock is a link to nothing" "cannot open for writing"
equal "none of them has left anything" "$(ls "$tmp/odd")" ""
mkdir "$tmp/read_only" "$tmp/full"
if mount -t tmpfs tmpfs "$tmp/read_only" 2>/dev/null; then
    mount -o remount,ro "$tmp/read_only"
    refuses "a read-only file system" 2 "Read-only" "${run[@]}" -o "$tmp/read_only"
    mount -t tmpfs -o size=64k tmpfs "$tmp/full"
    head -c 100000 /dev/zero >"$tmp/full/fill" 2>/dev/null
    refuses "a full disk" 1 "lock: cannot write: No space left" "${run[@]}" -o "$tmp/full"
    equal "a full disk: no part of a line is left" "$(cat "$tmp/full/lock")" ""
    umount "$tmp/read_only" "$tmp/full"
    mount -t tmpfs -o nr_inodes=2 tmpfs "$tmp/full"
    mkdir "$tmp/full/x"
    refuses "no inodes for the lock" 1 "lock: cannot open for writing: No space left" "${run[@]}" -o "$tmp/full"
    refuses "no inodes for the folder" 1 "No space left" "${run[@]}" -o "$tmp/full/y"
    umount "$tmp/full"
else
    chmod 555 "$tmp/read_only"
    if [ -w "$tmp/read_only" ]; then echo "skip folders that cannot be written to: no mounts here"
    else refuses "a folder of somebody else" 2 "lock: cannot open" "${run[@]}" -o "$tmp/read_only"; fi
fi

# ---- without flock, continued
if [ -n "$second" ]; then
    wait $second
    rc=$?
    check "without flock: a second run is refused after the first one's beat" \
        "$([ $rc = 2 ] && grep -q "in use by a run on $host, process $first," "$tmp/second" && echo 1)" \
        "code $rc: $(cat "$tmp/second")"
    kill -TERM $first
    wait $first
    "${no_flock[@]}" -o "$tmp/no_flock" -y -x 10 >/dev/null 2>&1
    check "without flock: a clean end frees the folder" "$([ $? = 0 ] && echo 1)"
fi

# ---- several ranks
if ! command -v mpirun >/dev/null || ! grep -q MPI_Init "$train"; then
    echo "skip several ranks: there is no MPI, or the program was built without it"
    finish
    exit
fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_orte_tmpdir_base=$tmp
if unshare -m mount -t tmpfs tmpfs "$tmp/full" 2>/dev/null; then
    mkdir "$tmp/apart" "$tmp/mpi"
    hidden=(unshare -m sh -c 'mount -t tmpfs tmpfs "$0" && exec "$@"' "$tmp/apart")
    # two mpirun at once must not make the same folder for their sockets
    OMPI_MCA_orte_tmpdir_base=$tmp/mpi timeout 60 mpirun -np 1 "${hidden[@]}" "${run[@]}" -o "$tmp/apart" : \
        -np 2 "${run[@]}" -o "$tmp/apart" >"$tmp/log" 2>&1 &
    other=$!
    timeout 60 mpirun -np 2 "${run[@]}" -o "$tmp/apart" : -np 1 "${hidden[@]}" "${run[@]}" -o "$tmp/apart" \
        >"$tmp/stdout" 2>"$tmp/stderr"
    rc=$?
    check "a rank that has another folder under the same name" "$([ $rc = 2 ] &&
        [ "$(grep -c '^train_t6.*rank 2 on .*--out: .* is not the folder that rank 0 writes' "$tmp/stderr")" = 1 ] &&
        echo 1)" "code $rc: $(head -3 "$tmp/stderr")"
    wait $other
    equal "rank 0 has another folder, the others see one with somebody's lock" "$?" 2
else
    echo "skip a rank with another output folder: no mount namespaces here (they need root)"
fi

# ---- random kills of a wrapper script, of mpirun and of ranks, most of them during a save. The next wrapper starts at
# once, while the killed ones are dying or the others go on: it is refused, or it resumes.
RANDOM=5
echo "localhost slots=2" >"$tmp/hosts"
export HOSTS=$tmp/hosts TRAINER=$train PAUSE=1
model=(--model 124M "${data[@]}" --n-layer 2 --n-embd 64 --n-head 3 --head-dim 16 -t 32 -b 1 -d 128 -x $steps -n 1
       --keep 2)
last=$(printf 'step_%08d' $steps)
wrapper() { OUT=$tmp/killed exec bash scripts/multi_node/run_mpirun.sh "${model[@]}" --comm-timeout 5; }
"$train" "${model[@]}" -z 1 -o "$tmp/whole" >"$tmp/log" 2>&1 || bad "the run that is not killed" "$(tail -1 "$tmp/log")"
# ended: prints what is wrong with the run that has ended
ended() {
    [ "$(weights "$tmp/killed/$last")" = "$(weights "$tmp/whole/$last")" ] || echo "other weights"
    [ "$(curve "$tmp/killed")" = "$(curve "$tmp/whole")" ] || echo "other losses"
    whole "$tmp/killed" "$train" "${model[@]}"
}
wrappers=() done_kills=0 refused=0 resumed=0 rounds=0 wrong="" n=0
declare -A killed=([wrapper]=0 [mpirun]=0 [rank]=0)
# starts a wrapper, and counts those that have ended
start_wrapper() {
    n=$((n + 1))
    (wrapper) >"$tmp/wrapper$n" 2>&1 &
    wrappers+=($!)
    disown $!
}
parent() { [ -n "$1" ] && ps -o ppid= -p "$1" | tr -d ' '; }
alive() { for w in "${wrappers[@]}"; do kill -0 "$w" 2>/dev/null && echo "$w"; done; }
start_wrapper
for _ in $(seq 2000); do
    [ $done_kills = $kills ] && break
    sleep "$(printf '%d.%03d' $((RANDOM % (1 + long))) $((RANDOM % 1000)))"
    kind=$(printf '%s\n' rank wrapper rank mpirun | sed -n "$((done_kills % 4 + 1))p")
    owner=$(sed -n 's/.* process \([0-9]*\) .*/\1/p' "$tmp/killed/lock" 2>/dev/null)
    job=$(parent "$owner")          # the mpirun of the run that has the folder
    case $kind in                   # mostly a part of that run, otherwise any
        wrapper) victim=$( (parent "$job"; alive) | sed -n "$((RANDOM % 4 / 3 + 1))p") ;;
        mpirun) victim=$( (echo "$job"; pids_of "$tmp/killed" mpirun) | grep . | head -1) ;;
        rank) victim=$( (pgrep -P "${job:-0}"; pids_of "$tmp/killed" "$train") | sed -n "$((RANDOM % 4 + 1))p") ;;
    esac
    case " ${wrappers[*]} $(pids_of "$tmp/killed" | xargs) " in *" $victim "*) ;; *) victim="" ;; esac
    if [ -n "$victim" ] && kill -9 "$victim" 2>/dev/null; then
        done_kills=$((done_kills + 1)) killed[$kind]=$((killed[$kind] + 1))
        start_wrapper
    elif [ -z "$(alive)" ] && [ -z "$(pids_of "$tmp/killed")" ]; then
        if [ -d "$tmp/killed/$last" ]; then
            wrong+=$(ended)
            rounds=$((rounds + 1))
            rm -r "$tmp/killed"
        fi
        start_wrapper
    fi
done
for _ in $(seq 600); do [ -z "$(alive)$(pids_of "$tmp/killed")" ] && break; sleep 0.1; done
(wrapper) >"$tmp/log" 2>&1
wrong+=$(ended)
refused=$(cat "$tmp"/wrapper* | grep -c 'in use by a run on')
resumed=$(cat "$tmp"/wrapper* | grep -c '^resumed from')
echo "     $done_kills kills: ${killed[wrapper]} of a wrapper, ${killed[mpirun]} of mpirun, ${killed[rank]} of a" \
    "rank; $((rounds + 1)) runs, $resumed times resumed, $refused times refused"
equal "killed $kills times, every run ends as if it had not been" "$done_kills $wrong" "$kills "

finish
