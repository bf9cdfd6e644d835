#!/usr/bin/env bash
# Tests of the training program from the command line: bad and damaged input, resuming, kills, a full disk, plots.
#   test/test_train.sh [--long]      programs from $BIN (default: the project's folder); ends with "N passed, N failed"
# The training runs are tiny: the tests are about what surrounds training.
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.}
train=$(realpath "$bin/train_t6")
tokenize=$(realpath "$bin/data/tokenize")
long=0
[ "${1:-}" = --long ] && long=1
tmp=$(mktemp -d)
trap 'cd /; umount "$tmp/small" 2>/dev/null; rm -rf "$tmp"' EXIT
. test/checks.sh

# ---- data: English text as bytes, and a model so small that a step takes a few milliseconds
mkdir -p "$tmp/d" "$tmp/flat"
english 110000 >"$tmp/text.txt"
shards d --bytes --val-tokens 5000 --shard-size 20000 "$tmp/text.txt"
data=(-i "$tmp/d/t_train_*.bin" -j "$tmp/d/t_val_*.bin")
small=("${data[@]}" --n-layer 2 --n-embd 32 --n-head 3 --head-dim 8 -t 32 -b 4 -d 256 -m 256 -u 2)
run=("$train" "${small[@]}" -v 0 -s 0)

# ---- flags
program=$train
texts=" train-data val-data vocab model attn head-act out schedule comm comm-file "
switches=" shuffle reset-data overfit resume plan table a-contextual b-contextual share-kv-b out-gate kv-shift qk-norm "
negative=" recompute "
nonzero=" seq-len n-layer n-embd n-head head-dim q-rank k-rank v-rank n-kv-head hidden vocab-size rope-base rms-eps"
nonzero+=" q-lora kv-lora rope-dim order b-dim"
nonzero+=" batch-size tokens-per-step lr decay-steps adam-eps sample-tokens "
test_flags 40 "$train" "${small[@]}" --plan
equal "--table: a line for each preset and kind" "$("$train" --table | grep -c '^| [1-9t].*|$')" 40
refuses "an unknown attention" 2 "no_such" "${run[@]}" --attn no_such
refuses "an unknown transport" 2 "auto, nccl or mpi" "${run[@]}" --comm pigeons
refuses "an unknown model" 2 "no_such" "${run[@]}" --model no_such
refuses "an odd head_dim" 2 "head_dim" "${run[@]}" --head-dim 7
refuses "key/value heads that do not divide the heads" 2 "n_kv_head" "${run[@]}" --attn gqa --n-kv-head 2
variant() { refuses "$*" 2 "$1" "${run[@]}" "${@:2}"; }      # WORD FLAGS...
variant "none, sigmoid or softmax" --head-act relu
variant "needs --b-dim" --order 3
variant "belongs to --order 3" --b-dim 4
variant "divide head_dim" --order 3 --b-dim 6
variant "mha has none" --attn mha --share-kv-b
variant "both false" --a-contextual 0 --b-contextual 0
variant "a_contextual is false" --a-contextual 0 --head-act sigmoid
variant "must be equal" --share-kv-b --k-rank 3
variant "b_contextual is false" --b-contextual 0 --kv-shift
variant "b_contextual is false" --b-contextual 0 --order 3 --b-dim 4
variant "does not go with mla" --attn mla --qk-norm
variant "does not go with mla" --attn mla --kv-shift
variant "rope_dim" --attn mla --rope-dim 3
refuses "tokens per step that are not whole micro-batches" 2 "tokens-per-step" "${run[@]}" -d 1000
refuses "an unknown schedule" 2 "wsd or constant" "${run[@]}" --schedule step
refuses "--decay-steps without wsd" 2 "wsd" "${run[@]}" --decay-steps 5
refuses "more --decay-steps than steps after the warm-up" 2 "18 of --steps 20" \
    "${run[@]}" -x 20 --schedule wsd --decay-steps 19
refuses "--min-lr above --lr" 2 "min-lr" "${run[@]}" --lr 1e-4 --min-lr 1e-3
refuses "a vocabulary smaller than the data's" 2 "vocab-size" "${run[@]}" --vocab-size 100 -o "$tmp/x"
refuses "a model larger than memory" 2 "GiB" "${run[@]}" -e 1.5B --n-embd 65536 --n-layer 1024 -o "$tmp/x"
rm -rf "$tmp/x"

# ---- shards
good=$(ls "$tmp"/d/t_train_*.bin | head -1)
t="$tmp/flat/s.bin"     # has no manifest
shard() { refuses "shard: $1" 2 "$2" "${run[@]}" -o "$tmp/x" -i "$3"; }
shard "missing" "no such file" "$tmp/nothing.bin"
shard "a folder" "not a regular file" "$tmp/flat"
mkfifo "$tmp/pipe"                  # opening one for reading waits for its other end
shard "a pipe" "not a regular file" "$tmp/pipe"
: >"$t"; shard "empty" "$t" "$t"
head -c 1023 "$good" >"$t"; shard "cut in the header" "$t" "$t"
head -c 3001 "$good" >"$t"; shard "cut" "was cut" "$t"
head -c 1024 "$good" >"$t"; shard "header only" "was cut" "$t"
{ printf 'PK\003\004'; tail -c +5 "$good"; } >"$t"; shard "wrong magic" "not a token shard" "$t"
{ head -c 4 "$good"; printf '\002'; tail -c +6 "$good"; } >"$t"; shard "wrong version" "version 2" "$t"
{ head -c 8 "$good"; printf '\144\000\000\000'; head -c 1012 /dev/zero; head -c 200 "$good"; } >"$t"
refuses "shard: token beyond the vocabulary" 2 "beyond the vocabulary" \
    "${run[@]}" -o "$tmp/x" -i "$t" -t 8 -b 1 -d 8 -x 20
{ head -c 8 "$good"; printf '\024\000\000\000'; head -c 1012 /dev/zero; tail -c 40 "$good"; } >"$t"
shard "fewer tokens than one batch" "fewer than one batch" "$t"
mkdir "$tmp/damaged"; cp "$tmp"/d/* "$tmp/damaged/"
first=$(ls "$tmp"/damaged/t_train_*.bin | head -1)
printf 'x' | dd of="$first" bs=1 seek=5001 conv=notrunc 2>/dev/null
refuses "shard: damaged, with a checksum in the manifest" 2 "checksum" \
    "${run[@]}" -o "$tmp/damaged/out" -x 200 -i "$first"
head -c 100 "$tmp/d/t_manifest.json" >"$tmp/damaged/t_manifest.json"
refuses "manifest: cut" 2 "manifest" "${run[@]}" -o "$tmp/x" -i "$tmp/damaged/t_train_*.bin"
rm "$tmp/damaged/t_manifest.json"; mkfifo "$tmp/damaged/t_manifest.json"
refuses "manifest: a pipe" 2 "not a regular file" "${run[@]}" -o "$tmp/x" -i "$tmp/damaged/t_train_*.bin"
rm -rf "$tmp/x"

# ---- output folder
refuses "--out inside a file" 2 "--out" "${run[@]}" -o "$good/out"
refuses "--out where no folder can be made" 2 "--out" "${run[@]}" -o /proc/no_such/out

# ---- resuming
weights() { (cd "$1" && cat model.safetensors optimizer-*.safetensors | sha256sum); }
"${run[@]}" -o "$tmp/whole" -x 12 -n 4 >/dev/null 2>"$tmp/stderr" || bad "training run" "$(cat "$tmp/stderr")"
want=$(weights "$tmp/whole/step_00000012")
"${run[@]}" -o "$tmp/again" -x 12 -n 4 >/dev/null 2>&1
equal "two runs with the same seed give the same bits" "$(weights "$tmp/again/step_00000012")" "$want"
"${run[@]}" -o "$tmp/one" -x 12 -n 12 --threads 1 >/dev/null 2>&1
equal "one thread gives the same bits as all" "$(weights "$tmp/one/step_00000012")" "$want"
rm -r "$tmp/again/step_00000012" "$tmp/again/step_00000008"
"${run[@]}" -o "$tmp/again" -x 12 -n 4 -y >"$tmp/stdout" 2>&1
equal "resumed from step 4, it ends with the same bits" "$(weights "$tmp/again/step_00000012")" "$want"
equal "metrics of a resumed run have each step once" "$(grep -c '"loss"' "$tmp/again/metrics.jsonl")" 12
refuses "--out with a run in it, without --resume" 2 "resume" "${run[@]}" -o "$tmp/whole" -x 12
refuses "resuming with a different model" 2 "n_layer" "${run[@]}" -o "$tmp/whole" -y -x 12 --n-layer 3
refuses "resuming with a different sequence length" 2 "seq-len" "${run[@]}" -o "$tmp/whole" -y -x 14 -t 16
refuses "resuming with a different seed" 2 "seed" "${run[@]}" -o "$tmp/whole" -y -x 14 --seed 5
refuses "resuming with different shards" 2 "train-data" "${run[@]}" -o "$tmp/whole" -y -x 14 -i "$good"
cp -r "$tmp/whole" "$tmp/reset"
"${run[@]}" -o "$tmp/reset" -y -x 14 -i "$good" --reset-data >/dev/null 2>&1
check "--reset-data resumes with different shards" "$([ $? = 0 ] && echo 1)" "failed"
"${run[@]}" -o "$tmp/keep" -x 12 -n 2 --keep 2 --keep-every 6 >/dev/null 2>&1
equal "--keep 2 --keep-every 6" "$(ls "$tmp/keep" | grep step_ | xargs)" "step_00000006 step_00000010 step_00000012"
mkdir -p "$tmp/whole/step_00000016.tmp"; echo half >"$tmp/whole/step_00000016.tmp/model.safetensors"
"${run[@]}" -o "$tmp/whole" -x 12 -n 4 -y >"$tmp/stdout" 2>&1 && grep -q "resumed from .*step_00000012" "$tmp/stdout"
check "a half-written checkpoint is ignored" "$([ $? = 0 ] && echo 1)" "$(tail -1 "$tmp/stdout")"
head_is() { equal "$1: the log's first line names the commit" "$(head -1 "$2/main.log" | cut -d, -f 1-2)" \
    "$("$train" --version)"; }
head_is "a new run" "$tmp/one"
equal "a resumed run's log names the commit again" "$(grep -c "^train_t6, commit " "$tmp/again/main.log")" 2
from=("$train" "${data[@]}" -t 32 -b 4 -d 256 -v 0 -s 0 -x 1)
"${from[@]}" -e "$tmp/whole/step_00000012" -o "$tmp/init" >/dev/null 2>"$tmp/stderr"
check "--model takes the folder of a checkpoint" "$([ $? = 0 ] && echo 1)" "$(cat "$tmp/stderr")"
"${from[@]}" -e "$tmp/whole" -o "$tmp/init_run" >"$tmp/stdout" 2>"$tmp/stderr"
check "--model takes the folder of a run, for its last checkpoint" \
    "$(grep -q "^weights from $tmp/whole/step_00000012$" "$tmp/stdout" &&
       [ "$(weights "$tmp/init_run/step_00000001")" = "$(weights "$tmp/init/step_00000001")" ] && echo 1)" \
    "$(cat "$tmp/stderr")"
check "--model: the log says whose recipe it is" "$(grep -q "recipe: preset 124M's" "$tmp/init/main.log" && echo 1)"
cp -r "$tmp/whole/step_00000012" "$tmp/flipped"; flip "$tmp/flipped/model.safetensors"
refuses "--model: a flipped bit" 2 "CHECKSUMS" "${from[@]}" -e "$tmp/flipped" -o "$tmp/x"
refuses "--model: a folder without a checkpoint" 2 "holds no checkpoint" "${from[@]}" -e "$tmp/flat" -o "$tmp/x"
refuses "--model: a file" 2 "not the folder" "${from[@]}" -e "$good" -o "$tmp/x"

# ---- what a refused start leaves, and odd folders
mkdir "$tmp/odd"
"${run[@]}" -o "$tmp/odd/logs" -x 5 -n 0 >/dev/null 2>&1
before=$(cat "$tmp"/odd/logs/*.* | sha256sum)
refuses "--out with the log of a run without checkpoints" 2 "without checkpoints" "${run[@]}" -o "$tmp/odd/logs" -x 5
equal "that log is as it was" "$(cat "$tmp"/odd/logs/*.* | sha256sum)" "$before"
"${run[@]}" -o "$tmp/odd/logs" -x 3 -n 0 -y >/dev/null 2>&1
equal "with --resume it starts again" "$(grep -c '"loss"' "$tmp/odd/logs/metrics.jsonl")" 3
cp -r "$tmp/whole" "$tmp/odd/run"; rm -r "$tmp/odd/run/step_00000012"
refuses "resuming with a different seed, after a later step was lost" 2 "seed" "${run[@]}" -o "$tmp/odd/run" -y --seed 5
equal "a refused --resume drops no metrics" "$(grep -c '"loss"' "$tmp/odd/run/metrics.jsonl")" 12
mkdir "$tmp/odd/run/step_99"; touch "$tmp/odd/run/step_00000099"; ln -s nowhere "$tmp/odd/run/step_00000098"
"${run[@]}" -o "$tmp/odd/run" -x 12 -n 4 -y >"$tmp/stdout" 2>&1
equal "what is not named or made as a checkpoint is none" "$(weights "$tmp/odd/run/step_00000012")" "$want"
check "an orderly end, refused starts included, frees the folder" \
    "$(grep -q "did not end cleanly" "$tmp/odd/run/main.log" || echo 1)" "$(grep cleanly "$tmp/odd/run/main.log")"
"${run[@]}" -o "$tmp/odd/run" -x 12 -n 4 -y >"$tmp/stdout" 2>&1
check "resumed after its last step, it says that nothing is to do" "$(grep -q "nothing to do" "$tmp/stdout" && echo 1)"
mv "$tmp/odd/run/step_00000008" "$tmp/odd/run/step_00000020"
refuses "a checkpoint in a folder of another step" 2 "of step 8; give" "${run[@]}" -o "$tmp/odd/run" -x 24 -y
reset=("${run[@]}" -i "$good" --reset-data -x 20 -n 2 -y -o)
for i in a b; do cp -r "$tmp/whole" "$tmp/odd/$i"; "${reset[@]}" "$tmp/odd/$i" >/dev/null 2>&1; done
rm -r "$tmp"/odd/b/step_0000001[68] "$tmp/odd/b/step_00000020"
"${reset[@]}" "$tmp/odd/b" >/dev/null 2>&1
equal "--reset-data counts once: the same command, resumed, gives the same weights" \
    "$(weights "$tmp/odd/b/step_00000020")" "$(weights "$tmp/odd/a/step_00000020")"

# ---- flags that change on resume
restart() { rm -rf "$tmp/changed"; cp -r "$1" "$tmp/changed"; rm -r "$tmp/changed/step_00000012"; }
changes() { grep '^changed since' "$tmp/stdout" | sed 's/changed since //' | sort | xargs -d ';' echo | tr '\n' ';'; }
restart "$tmp/whole"
"${run[@]}" -o "$tmp/changed" -x 12 -n 4 -y >"$tmp/stdout" 2>&1
equal "resumed with the same flags, nothing has changed" "$(changes)" ";"
restart "$tmp/whole"
"${run[@]}" -o "$tmp/changed" -x 14 -n 4 -l 1e-3 -b 2 --threads 1 -y >"$tmp/stdout" 2>&1
equal "resumed with other flags, the log says which" "$(changes)" \
    "step 8: --batch-size 4, now 2;step 8: --lr 0.003, now 0.001;step 8: --steps 12, now 14;;"
"${run[@]}" -o "$tmp/stored" -x 12 -n 4 --shuffle 0 >/dev/null 2>&1
restart "$tmp/stored"
refuses "resuming with a different batch size and --shuffle 0" 2 "batch-size" \
    "${run[@]}" -o "$tmp/changed" -x 12 -n 4 --shuffle 0 -b 2 -y
"${run[@]}" -o "$tmp/changed" -x 12 -n 4 --shuffle 0 -y >/dev/null 2>&1
equal "--shuffle 0, resumed with the same batch size" "$(weights "$tmp/changed/step_00000012")" \
    "$(weights "$tmp/stored/step_00000012")"
for schedule in linear wsd constant; do
    "${run[@]}" -o "$tmp/$schedule" -x 12 -n 4 --schedule $schedule --min-lr 3e-4 >/dev/null 2>&1
    restart "$tmp/$schedule"
    "${run[@]}" -o "$tmp/changed" -x 12 -n 4 --schedule $schedule --min-lr 3e-4 -y >/dev/null 2>&1
    equal "--schedule $schedule, resumed" "$(weights "$tmp/changed/step_00000012")" \
        "$(weights "$tmp/$schedule/step_00000012")"
done
equal "--schedule wsd: rates of 12 steps, 2 of warm-up and 2 of decay" \
    "$(sed -n 's/^step .* lr \([^ ]*\) .*/\1/p' "$tmp/wsd/main.log" | xargs)" \
    "1.50e-03 $(for _ in $(seq 10); do printf '3.00e-03 '; done)1.65e-03"

# ---- what is evaluated
evaluated() { grep -o '"step":[0-9]*,"\(val_loss\|sample_tokens\)":[0-9.]*' "$1/metrics.jsonl"; }
val_loss() { grep -o '"val_loss":[0-9.]*' "$1/metrics.jsonl" | cut -d : -f 2; }
for b in 1 2 4 8; do
    "$train" "${small[@]}" -b $b -x 0 -v 1 -s 0 -m 320 -o "$tmp/val$b" >/dev/null 2>&1
    check "-b $b does not choose the validation set" "$(paste <(val_loss "$tmp/val1") <(val_loss "$tmp/val$b") |
        awk '{ d = ($1 - $2) / $1; print (d < 1e-6 && -d < 1e-6) }')" "$(val_loss "$tmp/val$b")"
done
"$train" "${small[@]}" -x 0 -v 1 -s 0 -m 0 -o "$tmp/all" >/dev/null 2>&1
"$train" "${small[@]}" -x 0 -v 1 -s 0 -m 999999 -o "$tmp/more" >/dev/null 2>&1
equal "--val-tokens 0 is all, as is more than there are" "$(val_loss "$tmp/all")" "$(val_loss "$tmp/more")"
check "--val-tokens 320 is not all" "$([ "$(val_loss "$tmp/all")" != "$(val_loss "$tmp/val1")" ] && echo 1)"
"$train" "${small[@]}" -x 6 -n 3 -v 3 -s 3 -g 8 -o "$tmp/evaluated" >/dev/null 2>&1
for kept in 6 7 8; do       # killed after the save, after the validation, after the sample
    rm -rf "$tmp/changed"; cp -r "$tmp/evaluated" "$tmp/changed"
    { grep -v '"step":6' "$tmp/evaluated/metrics.jsonl"; grep '"step":6' "$tmp/evaluated/metrics.jsonl" |
        head -$((kept - 5)); } >"$tmp/changed/metrics.jsonl"
    "$train" "${small[@]}" -x 6 -n 3 -v 3 -s 3 -g 8 -o "$tmp/changed" -y >/dev/null 2>&1
    equal "killed with $((kept - 5)) lines of its last step, a run is evaluated as if it had not been" \
        "$(evaluated "$tmp/changed")" "$(evaluated "$tmp/evaluated")"
done
"$train" "${small[@]}" --vocab-size 65536 -x 0 -v 0 -s 1 -g 20 --temperature 100 -o "$tmp/padded" >"$tmp/stdout" 2>&1
check "a sample of a padded vocabulary is text" "$(sed -n '/^--- sample/,/^---$/p' "$tmp/stdout" |
    tail -n +2 | head -n -1 | tr -d '\n' | wc -c | awk '{ print ($1 > 10 && $1 < 25) }')" "$(tail -5 "$tmp/stdout")"
"${run[@]}" -x 60 -l 1e-2 -d 128 --overfit -o "$tmp/overfit" >/dev/null 2>&1
check "--overfit learns its batch" "$(sed -n 's/^step 60.* | loss \([0-9.]*\) .*/\1/p' "$tmp/overfit/main.log" |
    awk '{ print ($1 < 2) }')" "$(tail -1 "$tmp/overfit/main.log")"
bits() { sed -n "s/^$1.* loss \([0-9.]*\) | \([0-9.]*\) bits.*/\1 \2/p" "$tmp/evaluated6/main.log"; }
"$train" "${small[@]}" -s 0 -v 2 -x 6 -n 6 -o "$tmp/evaluated6" >/dev/null 2>&1
for kind in step val; do    # of bytes: loss / ln 2, but that end-of-text has no bytes
    check "bits per byte in the log's lines of $kind" "$(bits $kind | awk '
        { r = $2 / ($1 / log(2)); if (r < 0.9999 || r > 1.01) bad = 1 }
        END { print (NR >= 3 && !bad) }')" "$(bits $kind)"
done

for kind in $(attention_kinds "$train"); do
    "${run[@]}" --attn $kind --n-kv-head 3 -o "$tmp/kind_$kind" -x 40 -n 40 -l 3e-3 >"$tmp/stdout" 2>&1
    learnt=$(sed -n 's/^step .* | loss \([0-9.]*\) .*/\1/p' "$tmp/stdout" |
        awk 'NR == 1 { first = $1 } { last = $1 } END { print NR == 40 && last < first - 1 }')
    check "$kind learns" "$learnt" "$(tail -1 "$tmp/stdout")"
done

# OpenBLAS takes a processor that it does not know for one of 2004.
if grep -qw avx2 /proc/cpuinfo && grep -qw fma /proc/cpuinfo; then
    core=$(env -u OPENBLAS_CORETYPE OPENBLAS_VERBOSE=2 "$train" --help 2>&1 >/dev/null | sed -n 's/^Core: //p')
    check "OpenBLAS uses AVX" "$([ "$core" != Prescott ] && echo 1)" "$core"
fi

# Preset tiny has kv_shift and qk_norm on, but not where they mean nothing.
switched() {    # KEYS FLAGS...: kv_shift, qk_norm in config.json
    rm -rf "$tmp/x"
    "$train" "${data[@]}" -o "$tmp/x" -x 0 "${@:2}" >/dev/null 2>"$tmp/stderr"
    equal "tiny ${*:2}: kv_shift, qk_norm" \
        "$(grep -oE '"(kv_shift|qk_norm)":\s*[a-z]*' "$tmp"/x/step_00000000/config.json |
            grep -oE '[a-z]*$' | xargs)" "$1"
}
for kind in $(attention_kinds "$train"); do
    if [ $kind = mla ]; then switched "false false" --attn mla; else switched "true true" --attn $kind; fi
done
switched "false true" --b-contextual 0
switched "false true" --kv-shift 0
switched "true false" --qk-norm 0
rm -rf "$tmp/x"

# ---- the plot of losses. A stand-in for gnuplot keeps what it is told to draw.
mkdir "$tmp/stub" "$tmp/nothing"
printf '#!/bin/sh\ncat >"%s"\n' "$tmp/script" >"$tmp/stub/gnuplot"
chmod +x "$tmp/stub/gnuplot"
plot=(env PATH="$tmp/stub:$PATH" scripts/plot_log.sh)
# drawn I: the tokens of the points of run I: training, then validation
drawn() { sed -n "/^\$run$1 /,/^END/p" "$tmp/script" | sed -nE 's/^([0-9]+) [0-9.]+$/\1/p' | xargs; }
"$train" "${small[@]}" -s 0 -v 2 -x 6 -n 6 -o "$tmp/it's" >/dev/null 2>&1
"${plot[@]}" "$tmp/again" >"$tmp/stdout"
equal "plot: a resumed run of 12 steps of 256 tokens" "$(drawn 0)" "$(seq -s ' ' 256 256 3072)"
equal "plot: the file of one run" "$(cat "$tmp/stdout")" "$tmp/again/loss.png"
"${plot[@]}" --output "$tmp/both.png" "$tmp/again" "$tmp/it's" >"$tmp/stdout"
equal "plot: 6 steps and 3 validations of a second run" "$(drawn 1)" "$(seq -s ' ' 256 256 1536) 512 1024 1536"
legend="title 'again', .* title 'it''s', .* title 'it''s, validation'"
equal "plot: the legend names the runs' folders" "$(grep -c "$legend" "$tmp/script")" 1
equal "plot: the file of --output" "$(cat "$tmp/stdout")" "$tmp/both.png"
mkdir "$tmp/twice"
{ cat "$tmp/again/metrics.jsonl"; sed -n 5,7p "$tmp/again/metrics.jsonl"; } >"$tmp/twice/metrics.jsonl"
"${plot[@]}" "$tmp/twice" >/dev/null
equal "plot: steps logged twice are drawn once" "$(drawn 0)" "$(seq -s ' ' 256 256 1792)"
refuses "plot: no run" 2 "usage" "${plot[@]}"
refuses "plot: no such folder" 2 "no such folder" "${plot[@]}" "$tmp/again" "$tmp/no_such"
refuses "plot: a folder without metrics" 2 "missing or empty" "${plot[@]}" "$tmp/again" "$tmp/flat"
mkdir "$tmp/unfinished"; echo '{"step":0,"val_loss":5.5}' >"$tmp/unfinished/metrics.jsonl"
refuses "plot: a run without a finished step" 2 "no finished step" "${plot[@]}" "$tmp/unfinished"
refuses "plot: a file that cannot be written" 1 "cannot write" "${plot[@]}" --output "$tmp/no_such/x.png" "$tmp/again"
refuses "plot: no gnuplot" 1 "setup.sh" env PATH="$tmp/nothing" "$BASH" scripts/plot_log.sh "$tmp/again"
if command -v gnuplot >/dev/null; then
    scripts/plot_log.sh --output "$tmp/both.png" "$tmp/again" "$tmp/it's" >"$tmp/stdout" 2>"$tmp/stderr"
    equal "plot: a PNG file" "$(head -c 4 "$tmp/both.png" | tail -c 3)" PNG
    equal "plot: the terminal" "$(grep -c "it's, validation" "$tmp/stdout")" 1
    equal "plot: no warnings" "$(cat "$tmp/stderr")" ""
else
    echo "skip plots: there is no gnuplot"
fi

# ---- damaged checkpoints. The checksums find any flipped bit.
flips=10; [ $long = 1 ] && flips=100
RANDOM=7
missed=0
for i in $(seq $flips); do
    rm -rf "$tmp/flip"; mkdir "$tmp/flip"; cp -r "$tmp/whole/step_00000012" "$tmp/flip/"
    files=("$tmp"/flip/step_00000012/*)
    f=${files[$((i % ${#files[@]}))]}
    flip "$f"
    "${run[@]}" -o "$tmp/flip" -y -x 13 >/dev/null 2>"$tmp/stderr"
    [ $? = 2 ] && [ "$(wc -l <"$tmp/stderr")" = 1 ] || { missed=$((missed + 1)); echo "     $f: $(cat "$tmp/stderr")"; }
done
check "checkpoint: $flips flipped bits are refused" "$([ $missed = 0 ] && echo 1)" "$missed were accepted"
foreign() {     # a checkpoint without CHECKSUMS, as from another program: the reader itself must find the damage
    refuses "model.safetensors: $1" 2 "$2" "${from[@]}" -e "$tmp/foreign" -o "$tmp/x"
    rm -rf "$tmp/foreign"; mkdir "$tmp/foreign"
    cp "$tmp/whole/step_00000012/"{config.json,model.safetensors} "$tmp/foreign/"
}
mkdir "$tmp/foreign"; m="$tmp/foreign/model.safetensors"
foreign "missing" "holds no checkpoint"
head -c 20000 "$tmp/whole/step_00000012/model.safetensors" >"$m"; foreign "cut" "cut"
head -c 5 "$tmp/whole/step_00000012/model.safetensors" >"$m"; foreign "five bytes" "too short"
printf '\377\377\377\377\377\377\377\177' | dd of="$m" bs=1 conv=notrunc 2>/dev/null
foreign "header longer than the file" "header claims"
printf '{}}}' | dd of="$m" bs=1 seek=8 conv=notrunc 2>/dev/null; foreign "header that is not JSON" "$m"
sed -i 's/"F32"/"I64"/' "$m"; foreign "wrong dtype" "$m"
sed -i 's/\[257,32\]/[32,257]/' "$m"; foreign "wrong shape" "lm_head"
sed -i 's/lm_head.weight/lm_heap.weight/' "$m"; foreign "a missing tensor" "lm_head"
head -c 100 /dev/zero >>"$m"; foreign "bytes after the end" "after the last tensor"
sed -i 's/"n_layer":[^,]*/"n_layer": 1/' "$tmp/foreign/config.json"; foreign "more layers than the model has" "tensors"
echo '{' >"$tmp/foreign/config.json"; foreign "config.json cut" "config.json"
config() {      # NAME WORD SED: config.json after this edit
    sed -i "$3" "$tmp/foreign/config.json"
    foreign "config.json: $1" "$2"
}
for key in n_layer hidden rope_base attn; do        # of the wrong type
    for value in '"12"' true null '["x"]' '{}' 1e400; do
        config "$key is $value" "config.json: .*\($key\|attention kind\)" "s/\"$key\":[^,}]*/\"$key\": $value/"
    done
done
for value in 1.5 -1 12345678901234567890; do
    config "n_layer is $value" 'n_layer"* is' "s/\"n_layer\":[^,]*/\"n_layer\": $value/"
done
for pair in '"tie_word_embeddings": false' '"tie_word_embeddings": null' '"bias": true'; do
    config "$pair" "$(cut -d : -f 1 <<<"$pair") is not" "s/{/{ $pair, /"
done
for pair in qk_norm:1 a_contextual:null order:'"2"' order:4 order:3 head_act:true head_act:'"relu"'; do
    key=${pair%%:*}
    config "$pair" "$key" "s/\"$key\":[^,}]*/\"$key\": ${pair#*:}/"
done
config "a key twice" '"n_layer" is there twice' 's/{/{ "n_layer": 2, /'
config "something after the end" "something follows" '$s/$/ {}/'
rm "$tmp/foreign/config.json"; mkfifo "$tmp/foreign/config.json"
foreign "config.json: a pipe" "not a regular file"
rm "$m"; mkfifo "$m"; foreign "a pipe" "not a regular file"

# The embedding and the output are one matrix, which published files have under both names.
# tied DTYPE SHAPE BYTE: model.safetensors with transformer.wte.weight before lm_head.weight, the same but for these
tied() {
    python3 - "$tmp/whole/step_00000012/model.safetensors" "$m" "$@" <<'END'
import json, struct, sys
data = open(sys.argv[1], 'rb').read()
n = struct.unpack('<Q', data[:8])[0]
header, weights = json.loads(data[8:8 + n]), data[8 + n:]
head = header['lm_head.weight']
wte = bytearray(weights[slice(*head['data_offsets'])])
wte[1001] ^= int(sys.argv[5])
for name, t in header.items():
    if name != '__metadata__': t['data_offsets'] = [at + len(wte) for at in t['data_offsets']]
shape = json.loads(sys.argv[4])
header['transformer.wte.weight'] = {'dtype': sys.argv[3], 'shape': shape, 'data_offsets': [0, len(wte)]}
text = json.dumps(header).encode()
open(sys.argv[2], 'wb').write(struct.pack('<Q', len(text)) + text + wte + weights)
END
}
tied F32 '[257,32]' 0
"${from[@]}" -e "$tmp/foreign" -o "$tmp/x" >"$tmp/stdout" 2>"$tmp/stderr"
check "model.safetensors: the embedding under both of its names" "$([ $? = 0 ] && echo 1)" "$(cat "$tmp/stderr")"
rm -rf "$tmp/x"
tied F32 '[257,32]' 1; foreign "an embedding that differs from the output" "lm_head.weight.* differ"
tied F32 '[32,257]' 0; foreign "an embedding of another shape than the output" "lm_head.weight.* differ"
tied I32 '[257,32]' 0; foreign "an embedding of another type than the output" "lm_head.weight.* differ"

# ---- kills at random moments, most of them during a save: the run resumes and ends like one that was never killed
kills=10; [ $long = 1 ] && kills=30
big=("$train" "${data[@]}" --n-layer 2 --n-embd 64 --n-head 3 --head-dim 16 -t 32 -b 4 -d 128 -u 2 -v 0 -s 0
     -x 60 -n 1 --keep 2 -o)
"${big[@]}" "$tmp/alone" >"$tmp/stdout" 2>&1
want=$(weights "$tmp/alone/step_00000060")
done_kills=0 tries=0
while [ $done_kills -lt $kills ] && [ $tries -lt 400 ]; do
    tries=$((tries + 1))
    "${big[@]}" "$tmp/killed" --resume >"$tmp/stdout" 2>&1 &
    pid=$!
    sleep "0.$(printf '%03d' $((RANDOM % 400 + 20)))"
    if kill -9 $pid 2>/dev/null; then done_kills=$((done_kills + 1)); fi
    wait $pid 2>/dev/null
    [ -d "$tmp/killed/step_00000060" ] && [ $done_kills -lt $kills ] && rm -rf "$tmp/killed"
done
"${big[@]}" "$tmp/killed" --resume >"$tmp/stdout" 2>&1
equal "killed $kills times, it ends with the same bits" \
    "$done_kills kills, $(weights "$tmp/killed/step_00000060")" "$kills kills, $want"

# ---- a full disk: one error line, exit code 1, and the last good checkpoint stays
mkdir "$tmp/small"
size=$(du -sk "$tmp/whole/step_00000012" | cut -f1)
if mount -t tmpfs -o size=$((size * 5 / 2))k tmpfs "$tmp/small" 2>/dev/null; then
    "${run[@]}" -o "$tmp/small/out" -x 12 -n 2 >/dev/null 2>"$tmp/stderr"
    rc=$?
    check "full disk: exit code 1 and one line" \
        "$([ $rc = 1 ] && grep -q 'No space left' "$tmp/stderr" && [ "$(wc -l <"$tmp/stderr")" = 1 ] && echo 1)" \
        "code $rc: $(cat "$tmp/stderr")"
    "${run[@]}" -o "$tmp/four" -x 12 -n 4 >/dev/null 2>&1
    equal "full disk: the last good checkpoint is whole" \
        "$(weights "$tmp/small/out/step_00000004")" "$(weights "$tmp/four/step_00000004")"
    umount "$tmp/small"
else    # without root there is no small disk: a limit on the file size makes writes fail in the same way
    (trap '' XFSZ; ulimit -f $((size / 4)); "${run[@]}" -o "$tmp/small/out" -x 4 -n 2) >/dev/null 2>"$tmp/stderr"
    rc=$?
    check "file size limit: exit code 1 and one line" \
        "$([ $rc = 1 ] && [ "$(wc -l <"$tmp/stderr")" = 1 ] && echo 1)" "code $rc: $(cat "$tmp/stderr")"
fi

# ---- closed descriptors: no line meant for the screen lands in a file of the run
described() { sed 's/ | [0-9]* ms.*//; s/;.* free in.*//; s/of [0-9.]* available//; s/started .*//' "$1"; }
files() {
    echo "$(weights "$1/step_00000004"), $(described "$1/main.log" | md5sum)," \
        "$(cut -d, -f1-4 "$1/metrics.jsonl" | md5sum)"
}
shown=("${run[@]}" -v 2 --val-tokens 640 -s 2 --sample-tokens 8 -x 4 -n 2 -o)
"${shown[@]}" "$tmp/screen" >/dev/null 2>&1
want=$(files "$tmp/screen")
for closed in '<&-' '>&-' '2>&-' '<&- >&- 2>&-'; do
    rm -rf "$tmp/closed"
    eval '"${shown[@]}" "$tmp/closed" </dev/null >/dev/null 2>&1' "$closed"
    equal "started with $closed, it writes the same files" "$?, $(files "$tmp/closed")" "0, $want"
done
"${shown[@]}" "$tmp/full" >/dev/full 2>"$tmp/stderr"
equal "a screen that cannot be written is no reason to stop" "$?, $(files "$tmp/full")" "0, $want"
refuses "--help that cannot be written" 1 "cannot write" sh -c '"$@" >/dev/full' sh "$train" --help
refuses "--version that cannot be written" 1 "cannot write" sh -c '"$@" >/dev/full' sh "$train" --version
refuses "--plan that cannot be written" 1 "cannot write" sh -c '"$@" >/dev/full' sh "${run[@]}" --plan

# ---- limits: of the address space, of a cgroup, and others
if can_limit_memory "$train"; then
    for limit in 150000 300000 340000 380000 460000; do
        bounded "-v $limit" "${run[@]}" -x 2 -n 2 --threads 2 -o "$tmp/limit_$limit"
    done
    refuses "a plan beyond ulimit -v" 2 "available (ulimit -v)" \
        bash -c 'ulimit -v 1000000; exec "$@"' bash "$train" "${data[@]}" -e 124M --threads 1 --plan
fi
for limit in '-n 5' '-n 9' '-f 20' '-u 1' '-s unlimited' '-s 100000000'; do
    rm -rf "$tmp/limit"
    bounded "$limit" "${run[@]}" -x 2 -n 1 --threads 2 -o "$tmp/limit"
done
limited_group() {       # makes a cgroup of at most 300 MB below this one, and prints its folder
    local parent folder
    for parent in /sys/fs/cgroup/memory$(sed -n 's/^[0-9]*:memory://p' /proc/self/cgroup) \
        /sys/fs/cgroup$(sed -n 's/^0:://p' /proc/self/cgroup); do
        folder=${parent%/}/t6_test_$$
        mkdir "$folder" 2>/dev/null || continue
        echo "$folder"
        { echo 300000000 >"$folder/memory.limit_in_bytes" || echo 300000000 >"$folder/memory.max"; } 2>/dev/null &&
            return
        rmdir "$folder"
    done
    return 1
}
if group=$(limited_group); then
    group=$(tail -1 <<<"$group")
    within=(bash -c 'echo $$ >"$0/cgroup.procs"; exec "$@"' "$group")
    "${within[@]}" "${run[@]}" --plan >"$tmp/stdout" 2>&1
    check "a plan within a cgroup" "$(grep -q '^memory: .* of 0.2[0-9] available (limit of' "$tmp/stdout" && echo 1)" \
        "$(cat "$tmp/stdout")"
    refuses "a plan beyond a cgroup's limit" 2 "available (limit of the container or cgroup)" \
        "${within[@]}" "$train" "${data[@]}" -e 124M --plan
    rmdir "$group"
else
    echo "skip a cgroup: none can be made here"
fi

finish
