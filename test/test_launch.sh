#!/usr/bin/env bash
# Tests of how runs are started and stopped, without MPI: processes that each believe they are alone, signals, a screen
# that is gone, the scripts of scripts/multi_node with stand-ins for mpirun and Slurm, and the scripts around a trainer.
#   test/test_launch.sh        programs from $BIN (default: the project's folder), and the trainer $ALONE, built without
#                              MPI, if that is set; ends with "N passed, N failed"
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.}
train=$(realpath "$bin/train_t6")
tokenize=$(realpath "$bin/data/tokenize")
tmp=$(mktemp -d)
trap 'cd /; rm -rf "$tmp"' EXIT
. test/checks.sh
for name in $(env | sed -n 's/^\(\(SLURM\|OMPI\|PMI\|PMIX\)_[A-Z_]*\|\(LOCAL_\)\?RANK\|WORLD_SIZE\)=.*/\1/p'); do
    unset "$name"
done

english 60000 >"$tmp/text.txt"
shards d --bytes --val-tokens 5000 "$tmp/text.txt"
small=(-i "$tmp/d/t_train_*.bin" --n-layer 1 --n-embd 16 --n-head 1 --head-dim 8 -s 0 -u 2 -t 32 -b 2 -d 128 -m 0 -v 0
       --threads 1)
endless=("$train" "${small[@]}" -x 10000000 -n 10000000)
# until_line FILE WORD: waits until FILE has it, at most 30 s
until_line() { for _ in $(seq 300); do grep -q "$2" "$1" 2>/dev/null && return; sleep 0.1; done; }
saved() { compgen -G "$1/step_????????" >/dev/null; }       # saved FOLDER

# ---- processes that each believe they are alone: what says that there are several, and is it a number?
for program in "$train" ${ALONE:+"$ALONE"}; do
    one=("$program" "${small[@]}" -x 1 -n 0 -o "$tmp/one")
    for set in OMPI_COMM_WORLD_SIZE=4 PMI_SIZE=4 SLURM_STEP_NUM_TASKS=4 "WORLD_SIZE=4 RANK=3" \
        "SLURM_STEP_NUM_TASKS=1 WORLD_SIZE=4 RANK=0" "OMPI_COMM_WORLD_SIZE=1 PMI_SIZE=4"; do
        # shellcheck disable=SC2086
        refuses "one of 4: $set" 2 "started 4 processes.*built with.*unset" env $set "${one[@]}"
    done
    for set in PMI_SIZE=abc PMI_SIZE=0 PMI_SIZE=-4 OMPI_COMM_WORLD_SIZE=99999999999999999999 SLURM_STEP_NUM_TASKS=4x \
        "WORLD_SIZE=four RANK=0"; do
        # shellcheck disable=SC2086
        refuses "not a number of processes: $set" 2 "unset ${set%%=*}" env $set "${one[@]}"
    done
    for set in PMI_SIZE= PMI_SIZE=1 WORLD_SIZE=4 "WORLD_SIZE=1 RANK=0" \
        "OMPI_COMM_WORLD_SIZE=1 SLURM_STEP_NUM_TASKS=4"; do
        # shellcheck disable=SC2086
        check "a single process: $set" "$(env $set "${one[@]}" >"$tmp/log" 2>&1 && echo 1)" "$(tail -1 "$tmp/log")"
        rm -rf "$tmp/one"
    done
done
# an srun without PMIx, as Open MPI recognizes it by these variables: not its page, but one line
refuses "srun without PMIx" 2 "srun started 4" env SLURM_JOBID=7 SLURM_JOB_ID=7 SLURM_STEPID=0 SLURM_STEP_ID=0 \
    SLURM_NODELIST=n SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=4 "$train" "${small[@]}" -o "$tmp/one"

# ---- --comm-file: RANK and WORLD_SIZE win over Slurm's numbers
slurm=(SLURM_NTASKS=8 SLURM_PROCID=5 SLURM_LOCALID=1)
one=("$train" "${small[@]}" -o "$tmp/one" --comm-file "$tmp/id")
refuses "--comm-file: Slurm's ranks" 2 "rank 5 of 8" env "${slurm[@]}" "${one[@]}"
refuses "--comm-file: RANK wins over Slurm's" 2 "rank 2 of 3" \
    env "${slurm[@]}" WORLD_SIZE=3 RANK=2 LOCAL_RANK=0 "${one[@]}"
refuses "--comm-file: LOCAL_RANK from Slurm" 2 "rank 2 of 3" env "${slurm[@]}" WORLD_SIZE=3 RANK=2 "${one[@]}"
refuses "--comm-file: WORLD_SIZE without RANK" 2 "rank 5 of 8" env "${slurm[@]}" WORLD_SIZE=3 "${one[@]}"
refuses "--comm-file: a rank too high" 2 "RANK is 3 and WORLD_SIZE is 3" \
    env "${slurm[@]}" WORLD_SIZE=3 RANK=3 LOCAL_RANK=0 "${one[@]}"
refuses "--comm-file: a rank that is no number" 2 "RANK in the environment is \"x\"" \
    env WORLD_SIZE=3 RANK=x LOCAL_RANK=0 "${one[@]}"
refuses "--comm-file: shortened" 2 "rank 2 of 3" env WORLD_SIZE=3 RANK=2 LOCAL_RANK=0 \
    "$train" "${small[@]}" -o "$tmp/one" --comm-f "$tmp/id"
refuses "--comm-file: 4 tasks that are each told to be the only one" 2 "started 4" \
    env SLURM_STEP_NUM_TASKS=4 WORLD_SIZE=1 RANK=0 LOCAL_RANK=0 "${one[@]}"

# ---- threads and cores
[ "$(nproc)" -gt 1 ] && {
    taskset -c 0 "$train" "${small[@]}" --threads 0 -x 1 -n 0 -o "$tmp/one" >"$tmp/log" 2>&1
    check "a process that is bound by its user gets no note" "$(grep -q '^note' "$tmp/log" || echo 1)"
    taskset -c 0 "$train" "${small[@]}" --threads 2 -x 1 -n 0 -o "$tmp/two" >"$tmp/log" 2>&1
    check "more --threads than cores: a note in the log" \
        "$(grep -q '^note: --threads 2 .*may use: 1' "$tmp/two/main.log" && echo 1)" "$(tail -1 "$tmp/log")"
}

# ---- signals
# begin NAME WORD COMMAND...: starts it as $pid with its output in $tmp/NAME.log, and waits until that has WORD. Job
# control (set -m) lets it get SIGINT, as from a terminal; other background jobs of a script ignore that.
begin() {
    local log=$tmp/$1.log word=$2
    shift 2
    rm -f "$log"        # of the last one: a signal must not come before the command has begun
    set -m
    "$@" >"$log" 2>&1 &
    pid=$!
    set +m
    until_line "$log" "$word"
}
# ends NAME CODE: the command of `begin` ends within 20 s, with that exit code
ends() {
    local rc
    for _ in $(seq 200); do kill -0 $pid 2>/dev/null || break; sleep 0.1; done
    kill -9 $pid 2>/dev/null
    wait $pid 2>/dev/null
    rc=$?
    check "$1" "$([ $rc = "$2" ] && echo 1)" "exit code $rc instead of $2"
}
for signal in INT HUP; do
    begin $signal '^step' "${endless[@]}" -o "$tmp/$signal"
    kill -$signal $pid
    ends "SIG$signal: exit code 0" 0
    check "SIG$signal: a checkpoint" "$(saved "$tmp/$signal" && echo 1)"
done
check "SIGINT: a line says what a second one does" "$(grep -q 'Ctrl-C again' "$tmp/INT.log" && echo 1)"

begin twice '^disk' "$train" "${small[@]}" -x 10 -n 10 -d 6400000 -o "$tmp/twice"       # steps of minutes
sleep 1
kill -INT $pid; sleep 1; kill -INT $pid
ends "a second SIGINT ends the run at once, as by default" 130

begin both '^step' timeout -s INT 2 "${endless[@]}" -o "$tmp/both"
ends "timeout(1) sends SIGINT twice at once" 124
check "timeout(1) sends SIGINT twice at once: a checkpoint" "$(saved "$tmp/both" && echo 1)" \
    "$(tail -1 "$tmp/both.log")"

for signal in INT HUP; do
    begin ignored '^step' sh -c "trap '' $signal; exec \"\$@\"" sh "${endless[@]}" -o "$tmp/ignored$signal"
    kill -$signal $pid; sleep 0.5
    check "SIG$signal stays ignored, as with nohup" "$(kill -0 $pid && ! saved "$tmp/ignored$signal" && echo 1)"
    kill $pid
    ends "SIG$signal ignored: SIGTERM saves" 0
done

# ---- a screen that is gone: the run and its log go on
"$train" "${small[@]}" -x 300 -n 300 -o "$tmp/head" 2>"$tmp/stderr" | head -1 >/dev/null
equal "train_t6 | head: it ends" "${PIPESTATUS[0]}" 0
check "train_t6 | head: main.log has the last step" "$(grep -q '^step 300/300' "$tmp/head/main.log" && echo 1)"
(ulimit -f 20; exec "$train" "${small[@]}" --n-embd 64 -x 5 -n 5 -o "$tmp/limit") >"$tmp/log" 2>&1
equal "a limit on the size of files: exit code" $? 1
check "a limit on the size of files: a line" "$(tail -1 "$tmp/log" | grep -q 'File too large' && echo 1)" \
    "$(tail -1 "$tmp/log")"

# ---- run_mpirun.sh, with a stand-in for mpirun: it writes its arguments and its process to $LOG and runs $FAKE
mkdir "$tmp/bin"
cat >"$tmp/bin/mpirun" <<'END'
#!/bin/bash
echo "start $*" >>"$LOG"
echo $$ >"$LOG.pid"
trap 'echo USR1 >>"$LOG"; mkdir -p "$OUT/step_00000009"; exit ${SAVED:-0}' USR1
trap 'echo TERM >>"$LOG"; exit 1' TERM
trap 'echo hit by $? >>"$LOG"' INT HUP
steps() { mkdir -p "$OUT"; echo "step $1/10 | loss" >>"$OUT/main.log"; }
checkpoint() { steps $1; mkdir -p "$OUT/step_$(printf %08d $1)"; }
long() { echo begun; for _ in $(seq 100); do sleep 0.1; done; }
starts=$(grep -c ^start "$LOG")
eval "$FAKE"
END
for name in srun scancel scontrol setup; do cp "$tmp/bin/mpirun" "$tmp/bin/$name"; done
chmod +x "$tmp"/bin/*
printf '#!/bin/bash\necho "scancel $*" >>"$LOG"; kill -USR1 $(cat "$LOG.pid")\n' >"$tmp/bin/scancel"
printf '#!/bin/bash\necho "scontrol $*" >>"$LOG"\n' >"$tmp/bin/scontrol"
stand=(env "PATH=$tmp/bin:$PATH" "LOG=$tmp/calls" "OUT=$tmp/o" PAUSE=0 "HOSTS=$tmp/hosts")
echo "node1 slots=8" >"$tmp/hosts"
# again NAME CODE STARTS FAKE: run_mpirun.sh ends with CODE after so many starts of mpirun
again() {
    rm -rf "$tmp/o"; : >"$tmp/calls"
    timeout 20 "${stand[@]}" "FAKE=$4" scripts/multi_node/run_mpirun.sh >"$tmp/log" 2>&1
    equal "run_mpirun.sh, $1" "code $?, $(grep -c ^start "$tmp/calls") starts" "code $2, $3 starts"
}
again "a run that ends" 0 1 'exit 0'
again "bad input" 2 1 'exit 2'
for code in 126 127 132; do again "a program that cannot run, $code" 2 1 "exit $code"; done
again "a failure without a new checkpoint, twice" 1 2 'exit 1'
again "failures with new checkpoints" 0 5 '[ $starts = 5 ] && exit 0; checkpoint $starts; exit 137'
again "two failures in a row, later" 137 4 '[ $starts -lt 3 ] && checkpoint $starts; exit 137'
again "one failure between new checkpoints" 0 4 \
    '[ $starts = 4 ] && exit 0; [ $starts = 2 ] || checkpoint $starts; exit 1'

# hosts NAME WORD TEXT: the file is refused; with the WORD "" it is taken
hosts() {
    printf "$3" >"$tmp/hosts"
    if [ -n "$2" ]; then refuses "hosts: $1" 2 "$2" "${stand[@]}" FAKE= scripts/multi_node/run_mpirun.sh
    else check "hosts: $1" "$("${stand[@]}" FAKE= scripts/multi_node/run_mpirun.sh >"$tmp/log" 2>&1 && echo 1)"; fi
}
hosts "blanks around =" "" 'a slots = 8\n'
hosts "max_slots, comments, empty lines" "" '# two\n\na slots=8 max_slots=8 # ten\n\tb\tslots=8\n  # c\n'
hosts "IPv6, no last line end" "" 'fe80::1 slots=8'
hosts "no slots" "line 2: slots=GPUS" 'a slots=8\nb # slots=8\n'
hosts "only max_slots" "line 1: slots=GPUS" 'a max_slots=8\n'
hosts "Windows line ends" "Windows line ends" 'a slots=8\r\nb slots=8\r\n'
hosts "an empty file" "no such file" ''
hosts "good again" "" 'a slots=8\n'
refuses "run_mpirun.sh --out" 2 "OUT=FOLDER" "${stand[@]}" FAKE= scripts/multi_node/run_mpirun.sh -x 5 --out "$tmp/x"

# told NAME CODE SIGNALS CALLS [FAKE]: run_mpirun.sh gets the signals, a second apart, and ends with CODE; mpirun got
# CALLS, and was started once
told() {
    local name=$1 signal
    rm -rf "$tmp/o"; : >"$tmp/calls"
    begin told '^begun' "${stand[@]}" SAVED=$2 "FAKE=${5:-long}" scripts/multi_node/run_mpirun.sh
    for signal in $3; do
        kill -${signal#0} -$pid
        [ "$signal" = "${3##* }" ] && [ "$3" != "INT INT" ] || [[ $signal = 0* ]] || sleep 1.1
    done
    ends "run_mpirun.sh, $name: exit code" $2
    equal "run_mpirun.sh, $name: mpirun" "$(sed 's/^start.*/start/' "$tmp/calls" | xargs)" "start $4"
}
for signal in INT TERM HUP USR1; do told "SIG$signal" 0 $signal USR1; done
told "the run's exit code" 1 TERM USR1
told "two SIGINT at once" 0 "0INT INT" USR1
told "a second SIGINT" 1 "INT INT" "TERM" "trap '' USR1; long"
told "SIGUSR1 lost at the start" 0 TERM USR1 \
    'trap "" USR1; echo begun; sleep 1; trap "echo USR1 >>$LOG; exit 0" USR1; long'
rm -rf "$tmp/o"; : >"$tmp/calls"
begin told 'resuming' "${stand[@]}" PAUSE=30 FAKE='exit 1' scripts/multi_node/run_mpirun.sh
kill $pid
ends "run_mpirun.sh, SIGTERM in the pause: exit code" 1
equal "run_mpirun.sh, SIGTERM in the pause: starts" "$(grep -c ^start "$tmp/calls")" 1

# ---- run_slurm.sbatch, with stand-ins
# slurm NAME CODE requeued|not FAKE [WORD]: a job ends with CODE, and is requeued or not, for a reason that has WORD
slurm() {
    local rc requeued=not
    : >"$tmp/calls"
    timeout 20 "${stand[@]}" SLURM_JOB_ID=77 "FAKE=$4" bash scripts/multi_node/run_slurm.sbatch >"$tmp/log" 2>&1
    rc=$?
    grep -q 'scontrol requeue 77' "$tmp/calls" && requeued=requeued
    equal "run_slurm.sbatch, $1" "$rc $requeued" "$2 $3"
    check "run_slurm.sbatch, $1: the reason" "$(tail -1 "$tmp/log" | grep -q "exit code $2, .*${5:-}" && echo 1)" \
        "$(tail -1 "$tmp/log")"
}
rm -rf "$tmp/o"
slurm "srun without PMIx" 1 not 'exit 1' "before its first step"
slurm "a missing program" 127 not 'exit 127' missing
slurm "a program that cannot be started" 126 not 'exit 126' missing
slurm "another processor" 132 not 'steps 1; exit 132' processor
slurm "bad input" 2 not 'steps 1; exit 2' "bad input"
slurm "a run that ended" 0 not 'checkpoint 1; exit 0' ended
slurm "a failure after a new checkpoint" 1 requeued 'checkpoint 2; exit 1'
slurm "a failure after steps" 1 requeued 'steps 3; exit 1'
slurm "the same again" 1 not 'steps 4; exit 1' "twice in a row"
slurm "killed after a new checkpoint" 137 requeued 'checkpoint 5; exit 137'
slurm "killed" 137 requeued 'exit 137'
slurm "killed again" 137 not 'exit 137' "twice in a row"
slurm "an abort before the first step" 134 not 'exit 134' "before its first step"
stop='kill -USR1 $PPID; long'
slurm "the time limit" 0 requeued "rm -rf \$OUT/step_00000009; $stop"
slurm "the time limit, nothing saved" 0 requeued "trap 'exit 0' USR1; steps 7; $stop"
slurm "the same again" 0 not "trap 'exit 0' USR1; steps 8; $stop" "twice in a row"
rm -rf "$tmp/o" "$tmp/o.requeued"
slow='trap "" USR1; kill -USR1 $PPID; sleep 0.7; kill -USR1 $PPID; sleep 0.7; checkpoint 6; echo saved >>$LOG; exit 0'
slurm "two SIGUSR1" 0 requeued "$slow"
check "run_slurm.sbatch, two SIGUSR1: it waited for the save" \
    "$(tail -1 "$tmp/calls" | grep -q requeue && grep -q saved "$tmp/calls" && echo 1)" "$(xargs <"$tmp/calls")"
refuses "run_slurm.sbatch --out" 2 "OUT=FOLDER" "${stand[@]}" SLURM_JOB_ID=77 FAKE= \
    bash scripts/multi_node/run_slurm.sbatch --out=x

# ---- the scripts around one trainer: a copy in a folder with stand-ins
mkdir -p "$tmp/p/scripts" "$tmp/p/data/toy"
cp scripts/run_t6_*.sh scripts/quickstart.sh "$tmp/p/scripts"
printf '#!/bin/bash\nexit 0\n' | tee "$tmp/p/scripts/setup.sh" >"$tmp/bin/make"
echo '{}' >"$tmp/p/data/toy/toy_manifest.json"
cat >"$tmp/p/train_t6" <<'END'
#!/bin/bash
trap 'sleep 0.2; echo saved; exit 0' TERM
echo begun
for _ in $(seq 100); do sleep 0.1; done
END
cp "$tmp/p/train_t6" "$tmp/p/train_t6cu"
printf '#!/bin/bash\nexit 1\n' >"$tmp/bin/nvidia-smi"
chmod +x "$tmp"/p/scripts/* "$tmp"/p/train_t6* "$tmp"/bin/*
for script in "$tmp"/p/scripts/run_t6_*.sh "$tmp/p/scripts/quickstart.sh"; do
    code=0 name=$(basename "$script")
    [ "$name" = quickstart.sh ] && code=130
    begin script begun "${stand[@]}" "$script"
    kill $pid
    ends "$name, SIGTERM: exit code" $code
    equal "$name, SIGTERM: the trainer has saved, and nothing came after" "$(tail -1 "$tmp/script.log")" saved
done
begin script begun "${stand[@]}" "$tmp/p/scripts/quickstart.sh"
kill -INT -$pid
ends "quickstart.sh, Ctrl-C: exit code" 130
equal "quickstart.sh, Ctrl-C: the trainer has saved" "$(tail -1 "$tmp/script.log")" saved

finish
