#!/usr/bin/env bash
# Tests of several ranks: the same run with every number of ranks and ZeRO stage; ranks that are killed, hang or
# disagree; a network that is cut. Also what ends or skips a step: signals and spikes.
#   test/test_comm.sh [--long]       programs from $BIN (default: the project's folder); ends with "N passed, N failed"
# Needs Open MPI, and root for network namespaces, which stand for separate machines. A line says what is skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.}
train=$(realpath "$bin/train_t6")
tokenize=$(realpath "$bin/data/tokenize")
kills=20
[ "${1:-}" = --long ] && kills=100
tmp=$(mktemp -d)
hosts=t6$$         # names of the network namespaces: ${hosts}a and ${hosts}b
cleanup() {
    for h in a b; do
        for p in $(ip netns pids $hosts$h 2>/dev/null); do kill -9 "$p" 2>/dev/null; done
        ip netns del $hosts$h 2>/dev/null
    done
    rm -rf "$tmp"
}
trap 'cd /; cleanup' EXIT
. test/checks.sh

# ---- data: English text as bytes, and models that take a few milliseconds per step
english 110000 >"$tmp/text.txt"
shards d --bytes --val-tokens 5000 --shard-size 20000 "$tmp/text.txt"
data=(-i "$tmp/d/t_train_*.bin" -j "$tmp/d/t_val_*.bin" -s 0 -u 2 -t 32 --threads 1)
# 4 micro-batches per step
small=("$train" "${data[@]}" --n-layer 2 --n-embd 32 --n-head 3 --head-dim 8 -b 2 -d 256 -m 0 -v 25 -x 50 -n 25)
endless=("${small[@]}" -x 100000 -n 100000 -v 0)

# until_step N FILE: waits until the run that writes FILE has done step N, at most 30 s.
until_step() { for _ in $(seq 300); do grep -q "^step $1/" "$2" && return; sleep 0.1; done; }
weights() { cat "$1/model.safetensors" 2>/dev/null | sha256sum; }
steps_done() { grep -c '"loss"' "$1/metrics.jsonl"; }
curve() { grep -o '"\(step\|loss\|norm\|val_loss\)":[^,}]*' "$1/metrics.jsonl"; }
# losses N FOLDER: the first N lines of loss and norm, two per step.
losses() { curve "$2" | grep -v step | head -"$1"; }

# same NAME FOLDER: the run in FOLDER has the losses of the single process, to 1e-6, and its last weights, bit for bit.
same() {
    local worst
    worst=$(paste <(curve "$tmp/one") <(curve "$2") | tr ':' '\t' | awk '
        { d = $2 - $4; if (d < 0) d = -d; n++
          if ($2 != 0 && d / ($2 < 0 ? -$2 : $2) > w) w = d / $2 }
        END { print (n < 100 ? 1 : w + 0) }')
    check "$1: the losses of one process" "$(awk -v w="$worst" 'BEGIN { print (w <= 1e-6) ? 1 : 0 }')" \
        "they differ by $worst"
    check "$1: its weights, bit for bit" \
        "$([ "$(weights "$2/step_00000050")" = "$(weights "$tmp/one/step_00000050")" ] && echo 1)"
}

# resumes NAME FOLDER COMMAND...: the run in FOLDER, stopped by a signal, has left a checkpoint; resumed for a moment,
# it has the losses of the run that was never stopped.
resumes() {
    local name=$1 folder=$2 last n
    shift 2
    last=$(sed -n 's/^stopped by a signal at step \([0-9]*\);.*/\1/p' "$folder/main.log" | tail -1)
    check "$name: a checkpoint is there" \
        "$([ -n "$last" ] && [ -d "$folder/$(printf 'step_%08d' "$last")" ] && echo 1)" "$(tail -1 "$folder/main.log")"
    "$@" -o "$folder" -y >"$tmp/log" 2>&1 &
    local pid=$!
    for _ in $(seq 600); do [ "$(steps_done "$folder")" -gt $((last + 20)) ] && break; sleep 0.05; done
    kill -9 $pid; wait $pid 2>/dev/null
    n=$((2 * last + 30))
    check "$name: resumed, it continues bit for bit" \
        "$([ "$(losses $n "$folder")" = "$(losses $n "$tmp/never_stopped")" ] &&
           [ "$(steps_done "$folder")" -gt $((last + 15)) ] && echo 1)" "$(tail -1 "$tmp/log")"
}

# ---- signals to one process
"${small[@]}" -o "$tmp/one" >"$tmp/log" 2>&1 || bad "one process" "$(tail -1 "$tmp/log")"
"${endless[@]}" -o "$tmp/never_stopped" >/dev/null 2>&1 &
never=$!
for signal in TERM USR1; do
    "${endless[@]}" -o "$tmp/$signal" >"$tmp/log" 2>&1 &
    pid=$!
    until_step 5 "$tmp/log"
    kill -$signal $pid
    wait $pid
    check "SIG$signal: exit code 0" "$([ $? = 0 ] && echo 1)" "$(tail -1 "$tmp/log")"
done
for _ in $(seq 300); do [ "$(steps_done "$tmp/never_stopped")" -gt 1500 ] && break; sleep 0.1; done
kill -9 $never; wait $never 2>/dev/null
for signal in TERM USR1; do resumes "SIG$signal" "$tmp/$signal" "${endless[@]}"; done

# ---- spikes: a run of one letter that occurs nowhere else, planted where step 101 reads
planted() {
    head -c 25600 "$tmp/text.txt"
    head -c "$1" /dev/zero | tr '\0' '~'
    tail -c +25600 "$tmp/text.txt" | head -c 20000
}
for n in 250 5000; do
    planted $n >"$tmp/planted.txt"
    "$tokenize" --bytes --val-tokens 0 -o "$tmp/d/planted$n" "$tmp/planted.txt" >/dev/null 2>&1
done
spiky=("${small[@]}" -i "$tmp/d/planted250_train_*.bin" --shuffle 0 -v 0 -x 120 -n 100)
"${spiky[@]}" -o "$tmp/taken" >"$tmp/log" 2>&1
check "spikes: none is skipped unless asked" "$(grep -q SKIPPED "$tmp/log" || echo 1)"
"${spiky[@]}" --skip-spikes 8 -o "$tmp/skipped" >"$tmp/log" 2>&1
check "spikes: the planted one is skipped, and no other" \
    "$([ "$(grep -c SKIPPED "$tmp/log")" = 1 ] && grep SKIPPED "$tmp/log" | grep -q 'step 101/' && echo 1)" \
    "$(grep SKIPPED "$tmp/log")"
rm -r "$tmp/skipped/step_00000120"
"${spiky[@]}" --skip-spikes 8 -o "$tmp/skipped" -y >"$tmp/log" 2>&1
check "spikes: a resumed run remembers the window" "$(grep SKIPPED "$tmp/log" | grep -q 'step 101/' && echo 1)" \
    "$(tail -1 "$tmp/log")"
"${spiky[@]}" -i "$tmp/d/planted5000_train_*.bin" --skip-spikes 8 -o "$tmp/many" >/dev/null 2>"$tmp/stderr"
check "spikes: ten in a row end the run" "$([ $? = 1 ] && grep -q '10 steps in a row' "$tmp/stderr" && echo 1)" \
    "$(cat "$tmp/stderr")"

# ---- several ranks
if ! command -v mpirun >/dev/null || ! grep -q MPI_Init "$train"; then
    echo "skip several ranks: there is no MPI, or the program was built without it"
    finish
    exit
fi
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none
mpi() { timeout -k 5 60 mpirun -np "$@"; }        # it may hang, deaf to SIGTERM, when ranks are killed
for np in 1 2 3 4 5 8; do       # with 5 and 8, some ranks have no micro-batch
    for zero in 0 1 2; do
        mpi $np "${small[@]}" -z $zero -o "$tmp/np$np.$zero" >"$tmp/log" 2>&1 ||
            bad "$np ranks, -z $zero" "$(grep -v '^-' "$tmp/log" | tail -3)"
        same "$np ranks, -z $zero" "$tmp/np$np.$zero"
    done
done
for kind in $(attention_kinds "$train"); do
    for np in 1 3; do
        mpi $np "${small[@]}" --attn $kind --n-kv-head 3 -z 2 -x 10 -n 10 -o "$tmp/$kind$np" >"$tmp/log" 2>&1
    done
    one=$tmp/${kind}1/step_00000010 three=$tmp/${kind}3/step_00000010
    check "$kind on 3 ranks: the weights of one process" \
        "$([ -d "$three" ] && [ "$(weights "$one")" = "$(weights "$three")" ] && echo 1)" "$(tail -1 "$tmp/log")"
done
mpi 3 "${spiky[@]}" --skip-spikes 8 -z 1 -o "$tmp/spiky3" >"$tmp/log" 2>&1
check "spikes: 3 ranks skip the same step" \
    "$([ "$(weights "$tmp/spiky3/step_00000120")" = "$(weights "$tmp/skipped/step_00000120")" ] &&
       grep -q 'step 101/.*SKIPPED' "$tmp/log" && echo 1)" "$(tail -1 "$tmp/log")"

# ---- checkpoints do not depend on the number of ranks
for zero in 0 1 2; do
    for np in 1 3 8; do
        rm -rf "$tmp/moved"; cp -r "$tmp/np4.$zero" "$tmp/moved"; rm -r "$tmp/moved/step_00000050"
        mpi $np "${small[@]}" -z $((2 - zero)) -o "$tmp/moved" -y >"$tmp/log" 2>&1
        same "saved on 4 with -z $zero, resumed on $np" "$tmp/moved"
    done
done
rm -rf "$tmp/moved"; cp -r "$tmp/one" "$tmp/moved"; rm -r "$tmp/moved/step_00000050"
mpi 4 "${small[@]}" -z 2 -o "$tmp/moved" -y >"$tmp/log" 2>&1
same "saved by one process, resumed on 4" "$tmp/moved"

check "--version and --help as several ranks" \
    "$(mpi 2 "$train" --version >"$tmp/log" 2>&1 && mpi 2 "$train" --help >>"$tmp/log" 2>&1 && echo 1)" \
    "$(tail -3 "$tmp/log")"

# ---- ranks that disagree are refused: exit code 2, and one line that says which rank and about what
# disagree NAME WORD MPIRUN'S ARGUMENTS...
disagree() {
    local name=$1 word=$2 rc
    shift 2
    timeout 60 mpirun "$@" >"$tmp/stdout" 2>"$tmp/stderr"
    rc=$?
    check "refused: $name" "$([ $rc = 2 ] && [ "$(grep -c "^train_t6.*$word" "$tmp/stderr")" = 1 ] && echo 1)" \
        "code $rc: $(head -3 "$tmp/stderr")"
}
run=("${small[@]}" -o "$tmp/x")
disagree "another learning rate on rank 2" "rank 2 on .*--lr 0.005 here, --lr 0.003 on rank 0" \
    -np 2 "${run[@]}" : -np 1 "${run[@]}" -l 5e-3
disagree "other shards on rank 1" "rank 1 on .*training shards" \
    -np 1 "${run[@]}" : -np 2 "${run[@]}" -i "$tmp/d/planted250_train_*.bin"
disagree "another attention on rank 1" "rank 1 on .*mha" -np 1 "${run[@]}" : -np 1 "${run[@]}" --attn mha
disagree "a missing shard on rank 1" "rank 1 on .*no such file" -np 1 "${run[@]}" : -np 1 "${run[@]}" -i /nothing
disagree "a nonsense flag on rank 1" "rank 1 on .*--lr" -np 1 "${run[@]}" : -np 1 "${run[@]}" -l x
disagree "a nonsense flag on all ranks, said once" "rank 0.*--lr" -np 3 "${run[@]}" -l x
disagree "the folder of a run without --resume, said once" "resume" -np 3 "${small[@]}" -o "$tmp/one"

# ---- a rank that hangs: each of the others says where it waited, and the job ends
mpi 4 "${endless[@]}" -z 1 --comm-timeout 2 -o "$tmp/hangs" >"$tmp/log" 2>&1 &
job=$!
ranks_of() { pgrep -f "^$train .* -o $1\$"; }
until_step 20 "$tmp/log"
victim=$(ranks_of "$tmp/hangs" | sed -n 2p)
kill -STOP "$victim"
start=$SECONDS
wait $job
rc=$?
check "a rank that hangs ends the job within the deadline" \
    "$([ $rc != 0 ] && [ $((SECONDS - start)) -le 6 ] && echo 1)" \
    "code $rc after $((SECONDS - start)) s"
gave_up='rank . of 4.*gave up in ".*" at step [0-9]*: no answer for 2 s'
check "the other three say in which collective they waited" \
    "$([ "$(grep -c "$gave_up" "$tmp/log")" -ge 3 ] && echo 1)" "$(grep 'rank' "$tmp/log" | tail -4)"
kill -9 "$victim" 2>/dev/null

# ---- samples: rank 0 works alone for longer than the deadline, one token at a time
slow=("$train" "${data[@]}" -s 1 --n-layer 6 -b 1 -t 512 -d 1024 -v 0 -n 0 -x 1)
start=$SECONDS
mpi 2 "${slow[@]}" -g 450 --comm-timeout 2 -o "$tmp/samples" >"$tmp/log" 2>&1
rc=$?
check "a sample that takes longer than --comm-timeout does not end the job" \
    "$([ $rc = 0 ] && [ $((SECONDS - start)) -gt 3 ] && echo 1)" \
    "code $rc after $((SECONDS - start)) s: $(tail -1 "$tmp/log")"

# ---- signals to a job: to one rank, and to mpirun, which passes SIGUSR1 on
# signalled NAME FOLDER rank|mpirun SIGNAL
signalled() {
    mpi 3 "${endless[@]}" -z 2 -o "$2" >"$tmp/log" 2>&1 &
    local job=$!
    until_step 5 "$tmp/log"
    if [ "$3" = rank ]; then kill -"$4" "$(ranks_of "$2" | sed -n 2p)"
    else kill -"$4" "$(pgrep -f "^mpirun .* -o $2\$")"; fi
    wait $job
    check "$1: exit code 0" "$([ $? = 0 ] && echo 1)" "$(tail -1 "$tmp/log")"
    resumes "$1" "$2" "${endless[@]}"
}
signalled "SIGTERM to one of 3 ranks" "$tmp/term3" rank TERM
signalled "SIGUSR1 to mpirun" "$tmp/usr3" mpirun USR1

# run_mpirun.sh passes a signal on to mpirun and its ranks
echo "localhost slots = 3" >"$tmp/hosts"
env HOSTS="$tmp/hosts" OUT="$tmp/script" TRAINER="$train" scripts/multi_node/run_mpirun.sh --model tiny \
    "${endless[@]:1}" >"$tmp/log" 2>&1 &
job=$!
until_step 5 "$tmp/log"
kill $job
wait $job
check "SIGTERM to run_mpirun.sh: exit code 0" "$([ $? = 0 ] && echo 1)" "$(tail -1 "$tmp/log")"
resumes "SIGTERM to run_mpirun.sh" "$tmp/script" "${endless[@]}"

# ---- ranks that mpirun binds to fewer cores than they could have
# note YES|NO MPIRUN'S ARGUMENTS...
note() {
    local want=$1 found=NO
    shift
    rm -rf "$tmp/bound"
    timeout 60 mpirun "$@" "${small[@]}" --threads 0 -x 1 -n 0 -v 0 -o "$tmp/bound" >"$tmp/log" 2>&1
    grep -q '^note: mpirun has bound .*--bind-to none' "$tmp/bound/main.log" && found=YES
    equal "mpirun $*: a note" "$found" "$want"
}
if [ "$(nproc)" -gt 1 ]; then
    note YES --bind-to core -np 1
    note NO --bind-to none -np 1
    note NO --bind-to core -np "$(nproc)"
fi

# ---- one rank or all of them killed at random moments, most of them during a save, and resumed by another number of
# ranks each time
RANDOM=11
big=("$train" "${data[@]}" --n-layer 2 --n-embd 64 --n-head 3 --head-dim 16 -b 1 -d 128 -v 0 -x 150 -n 1 --keep 2)
"${big[@]}" -o "$tmp/alone" >"$tmp/log" 2>&1
want=$(weights "$tmp/alone/step_00000150")
done_kills=0 tries=0 slow=0 silent=0 alive=0
while [ $done_kills -lt $kills ] && [ $tries -lt 200 ]; do
    tries=$((tries + 1)) np=$((RANDOM % 3 + 2))
    mpi $np "${big[@]}" -z $((RANDOM % 3)) -o "$tmp/killed" --resume --comm-timeout 5 >"$tmp/log" 2>&1 &
    job=$!
    sleep "$(printf '0.%03d' $((RANDOM % 500 + 300)))"
    pids=$(pgrep -f "^$train .* -o $tmp/killed ")
    victims=$pids
    if [ $((tries % 3)) != 0 ]; then victims=$(echo "$pids" | sed -n "$((RANDOM % np + 1))p"); fi
    # shellcheck disable=SC2086
    if [ -n "$victims" ] && kill -9 $victims 2>/dev/null; then
        start=$(date +%s%N)
        wait $job
        rc=$?
        if [ $rc != 0 ]; then
            done_kills=$((done_kills + 1))
            [ $(($(date +%s%N) - start)) -lt 8000000000 ] || slow=$((slow + 1))
            grep -q 'rank [0-9].*exited on signal 9' "$tmp/log" || { silent=$((silent + 1)); tail -5 "$tmp/log"; }
            pgrep -f "^$train .* -o $tmp/killed " >/dev/null && alive=$((alive + 1))
        fi
    else wait $job; fi
    [ -d "$tmp/killed/step_00000150" ] && rm -rf "$tmp/killed"
done
check "ranks killed $kills times: each job ended within 8 s and left no rank behind" \
    "$([ $done_kills = $kills ] && [ $slow = 0 ] && [ $alive = 0 ] && echo 1)" \
    "$done_kills kills, $slow slow, $alive with survivors"
check "ranks killed $kills times: a line says which rank" "$([ $silent = 0 ] && echo 1)" "$silent times there was none"
mpi 3 "${big[@]}" -z 1 -o "$tmp/killed" --resume >"$tmp/log" 2>&1
check "ranks killed $kills times: it ends with the weights of one process" \
    "$([ "$(weights "$tmp/killed/step_00000150")" = "$want" ] && echo 1)" "$(tail -1 "$tmp/log")"

# ---- two machines: network namespaces with a cable between them, which is cut in the middle of a run
# connect_machines: returns 1 where namespaces are not allowed
connect_machines() {
    local h i=0
    ip netns add ${hosts}a 2>/dev/null && ip netns add ${hosts}b || return 1
    ip link add v${hosts}a netns ${hosts}a type veth peer name v${hosts}b netns ${hosts}b 2>/dev/null || return 1
    for h in a b; do
        i=$((i + 1))
        ip -n $hosts$h addr add 10.77.0.$i/24 dev v$hosts$h
        ip -n $hosts$h link set v$hosts$h up
        ip -n $hosts$h link set lo up
    done
    # how mpirun reaches the other machine, instead of ssh; each machine has its own host name
    printf '#!/bin/sh\nshift\nexec ip netns exec %s unshare --uts sh -c "hostname %s; $*"\n' ${hosts}b ${hosts}b \
        >"$tmp/agent"
    chmod +x "$tmp/agent"
    sleep 0.5
}
# two_machines COMMAND...: two ranks on each. mpirun notices a lost machine by its keep-alives, which take five minutes
# by default.
two_machines() {
    timeout 60 ip netns exec ${hosts}a unshare --uts sh -c "hostname ${hosts}a; exec \"\$@\"" sh \
        mpirun -np 4 --host 10.77.0.1:2,10.77.0.2:2 --mca plm_rsh_agent "$tmp/agent" \
        --mca btl tcp,self --mca btl_tcp_if_include 10.77.0.0/24 --mca oob_tcp_if_include 10.77.0.0/24 \
        --mca oob_tcp_keepalive_time 1 --mca oob_tcp_keepalive_intvl 1 --mca oob_tcp_keepalive_probes 1 "$@"
}
if connect_machines; then
    two_machines "${small[@]}" -z 2 -o "$tmp/machines" >"$tmp/log" 2>&1
    check "two machines over TCP" "$(grep -q "^rank 3 on ${hosts}b: " "$tmp/log" && echo 1)" \
        "$(grep -v '^-' "$tmp/log" | tail -3)"
    same "two machines over TCP" "$tmp/machines"

    longer=("${big[@]}" -x 3000 -n 10)
    two_machines "${longer[@]}" -z 1 --comm-timeout 5 -o "$tmp/cut" >"$tmp/log" 2>&1 &
    job=$!
    until_step 40 "$tmp/log"
    ip -n ${hosts}a link set v${hosts}a down
    start=$SECONDS
    wait $job
    rc=$?
    check "a cut cable ends the job within 12 s" \
        "$([ $rc != 0 ] && [ $rc != 124 ] && [ $((SECONDS - start)) -le 12 ] && echo 1)" \
        "code $rc after $((SECONDS - start)) s"
    waited='rank [01] of 4 on .*\(gave up\|waiting for another rank\) in "'
    check "the ranks on this side say where they waited" "$([ "$(grep -c "$waited" "$tmp/log")" = 2 ] && echo 1)" \
        "$(grep -v '^step' "$tmp/log" | tail -5)"
    check "no rank is left on either side" "$(pgrep -f "^$train .* -o $tmp/cut" >/dev/null || echo 1)"

    last=$(ls "$tmp/cut" | sed -n 's/^step_0*\([0-9]*\)$/\1/p' | tail -1)
    "${longer[@]}" -o "$tmp/uncut" >/dev/null 2>&1 &
    uncut=$!
    "${longer[@]}" -o "$tmp/cut" -y >"$tmp/log" 2>&1 &
    cut=$!
    goal=$(printf 'step_%08d' $((last + 20)))
    for _ in $(seq 600); do [ -d "$tmp/cut/$goal" ] && [ -d "$tmp/uncut/$goal" ] && break; sleep 0.1; done
    kill -9 $cut $uncut 2>/dev/null
    wait $cut $uncut 2>/dev/null
    n=$((2 * (last + 20)))
    check "resumed after the cut, the run is the one that was not cut" \
        "$([ "$(losses $n "$tmp/cut")" = "$(losses $n "$tmp/uncut")" ] && [ "$last" -gt 20 ] && echo 1)" \
        "$(tail -1 "$tmp/log")"
else
    echo "skip two machines: no network namespaces here (they need root)"
fi

finish
