#!/usr/bin/env bash
# Tests of the evaluating program: every row of test/data/eval against lm-evaluation-harness (prompts, few-shot draws,
# tokens, log-likelihoods, choices, scores), and bad input. Ends with "N passed, N failed".
#   test/test_eval.sh [--quick]      programs from $BIN (default: the project's folder)
# --quick: one comparison and the bad input, for a program with sanitizers
# EVAL: the program to test (default $BIN/eval_t6; eval_t6cu works too)
# TRAIN: the program that trains a model of bytes (default $BIN/train_t6)
# TOLERANCE: of a log-likelihood, per token (2e-4); 0.05 for eval_t6cu in bf16
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.}
program=$(realpath "${EVAL:-$bin/eval_t6}")
tokenize=$(realpath "$bin/data/tokenize")
train=$(realpath "${TRAIN:-$bin/train_t6}")
quick=${1:-}
given=test/data/eval
export OMP_NUM_THREADS=1     # the fastest for a model this small
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. test/checks.sh
evaluate=("$program" -e $given/model --vocab test/data/gpt2.tiktoken)

# against NAME DATA SHOTS CONTEXT FLAGS...: all that the harness has of these tasks, equal
against() {
    local name=$1 data=$2 shots=$3 context=$4
    shift 4
    if "${evaluate[@]}" --data "$data" --shots "$shots" --context "$context" --log "$tmp/log" \
        --json "$tmp/scores" "$@" >"$tmp/table" 2>"$tmp/stderr"
    then
        test/check_eval.py $given/expected.jsonl.gz "$tmp/log" "$tmp/scores" "$shots" "$context" \
            ${TOLERANCE:+"$TOLERANCE"} >"$tmp/checked"
        grep -v ' passed, ' "$tmp/checked" | sed "s/^\(ok  \|FAIL\) /\1 $name: /"
        passed=$((passed + $(grep -c '^ok' "$tmp/checked"))) failed=$((failed + $(grep -c '^FAIL' "$tmp/checked")))
        grep -q ' passed, ' "$tmp/checked" || bad "$name" "check_eval.py failed"
    else bad "$name" "$(tail -1 "$tmp/stderr")"; fi
}

# ---- lm-evaluation-harness
against release $given/data 2 256
if [ "$quick" != --quick ]; then
    against release $given/data 0 1024
    against release $given/data 0 256 --batch-size 1
    against release $given/data 2 1024 --threads 2
    mkdir -p "$tmp/superglue/boolq"
    cp -r $given/data/boolq/superglue "$tmp/superglue/boolq"
    against SuperGLUE "$tmp/superglue" 2 1024
fi
for duckdb in "${DUCKDB:-}" "$(type -P duckdb)" "${HOME:-}/.duckdb/cli/latest/duckdb" data/duckdb/duckdb; do
    [ -n "$duckdb" ] && "$duckdb" -version >/dev/null 2>&1 && break
done
if "$duckdb" -version >/dev/null 2>&1; then
    export DUCKDB=$duckdb
    [ "$quick" = --quick ] || against hub $given/hub 2 1024
    mkdir -p "$tmp/cut"
    cp -r $given/hub/boolq "$tmp/cut"
    truncate -s 5000 "$tmp/cut/boolq/hub/boolq/validation-00000-of-00001.parquet"
    refuses "a parquet file that was cut short" 2 "validation-00000-of-00001.parquet: DuckDB: " \
        "${evaluate[@]}" --data "$tmp/cut"
else echo "skip hub: DuckDB is not installed"; fi
refuses "a DuckDB that does not run" 1 "DUCKDB=/nowhere" env DUCKDB=/nowhere "${evaluate[@]}" --data $given/hub

# ---- several ranks
if [ "$quick" != --quick ] && [ -z "${EVAL:-}" ] && command -v mpirun >/dev/null; then
    ranks=(mpirun --allow-run-as-root --oversubscribe --bind-to none -np 3)
    few=("${evaluate[@]}" --data $given/data --tasks hellaswag,mmlu,winogrande --shots 2 --batch-size 2)
    "${few[@]}" --log "$tmp/one.log" --json "$tmp/one.json" >"$tmp/one.table" 2>"$tmp/stderr"
    "${ranks[@]}" "${few[@]}" --log "$tmp/three.log" --json "$tmp/three.json" >"$tmp/three.table" 2>"$tmp/stderr3"
    for part in log json table; do
        check "three ranks: the $part of one" "$(cmp -s "$tmp/one.$part" "$tmp/three.$part" && echo 1)" \
            "$(tail -3 "$tmp/stderr3")"
    done
fi

# ---- the table, --tasks and --limit
"${evaluate[@]}" --data $given/data --tasks sciq,arc_easy --limit 3 --json "$tmp/scores" >"$tmp/table" 2>"$tmp/stderr"
equal "the table's columns" "$(awk 'NR == 1 { print $1, $2, $3 }' "$tmp/table")" "SciQ ARC-E Avg."
equal "--limit" "$(awk '/^rows/ { print $2, $3 }' "$tmp/table")" "3 3"
"${evaluate[@]}" --data $given/data --tasks mmlu_sociology --limit 1 --json "$tmp/scores" >"$tmp/table" 2>"$tmp/stderr"
equal "one row has no standard error" "$(grep -c '"acc_stderr":.*"N/A"' "$tmp/scores")" 3
equal "all tasks: a note for each without data" \
    "$(mkdir -p "$tmp/piqa" && cp -r $given/data/piqa "$tmp/piqa" &&
       "${evaluate[@]}" --data "$tmp/piqa" --limit 1 2>&1 >/dev/null | grep -c '^note: .*: no data')" 8

# ---- bad input
# spoil NAME WORD FILE SED: a copy of the data in which one file is changed
spoil() {
    local task=${3%%/*}
    rm -rf "$tmp/spoiled"
    mkdir -p "$tmp/spoiled"
    cp -r "$given/data/$task" "$tmp/spoiled"
    sed -i "$4" "$tmp/spoiled/$3"
    refuses "$1" 2 "${2:+$3: $2}" "${evaluate[@]}" --data "$tmp/spoiled" --tasks "$task" --shots 2
}
spoil "a renamed column" "row 1: there is no column sol1" piqa/valid.jsonl 's/"sol1"/"solution1"/'
spoil "a label that no choice has" "row 2: its answerKey" arc_easy/ARC-Easy/ARC-Easy-Test.jsonl \
    '2s/"answerKey": "."/"answerKey": "Z"/'
spoil "a label beyond the endings" "row 3: its label" hellaswag/hellaswag_val.jsonl '3s/"label": ./"label": 7/'
spoil "an answer that is empty" "row 1: its answer" winogrande/dev.jsonl '1s/"answer": "."/"answer": ""/'
spoil "a sentence without _" "row 1: its sentence has no _" winogrande/train_xl.jsonl '1s/_ //; 1s/ _/ /'
spoil "a label in words" "row 1: its answer" boolq/google/dev.jsonl '1s/"answer": false/"answer": "maybe"/'
spoil "a line that is not JSON" "row 2: not JSON" openbookqa/test.jsonl '2s/}$//'
spoil "a file with two rows in a line" "row 1: something follows" openbookqa/test.jsonl '1N; s/\n/ /'
spoil "an array that was cut short" "not JSON" sciq/test.json '$d'
spoil "a file of labels that is too short" "has .* labels for the .* rows" piqa/valid-labels.lst '1d'
spoil "zero rows" "has no rows" openbookqa/test.jsonl 'd'
spoil "CSV with a field too few" "row 1: it has 5 fields" mmlu/data/test/prehistory_test.csv '1s/,[A-D]$//'
spoil "CSV with an answer in digits" "row 1: its answer" mmlu/data/test/nutrition_test.csv '1s/[A-D]$/2/'
spoil "CSV with an open quote" "row .*: not CSV: a quote is not closed" mmlu/data/test/astronomy_test.csv '$s/,/,"/4'
spoil "more labels than rows" "" piqa/train.jsonl '3,$d'
sed -i '3,$d' "$tmp/spoiled/piqa/train-labels.lst"
refuses "too few rows to draw from" 2 "train.jsonl: has 2 rows, and --shots 2 needs 3" \
    "${evaluate[@]}" --data "$tmp/spoiled" --shots 2
rm "$tmp/spoiled/piqa/train.jsonl"
refuses "no train file" 2 "train.jsonl: cannot open" "${evaluate[@]}" --data "$tmp/spoiled" --shots 2
mkdir -p "$tmp/blank/openbookqa"
printf '{"id": "1", "question": {"stem": " \\u2003", "choices": [{"text": "a", "label": "A"}]}, "answerKey": "A"}\n' \
    >"$tmp/blank/openbookqa/test.jsonl"
refuses "a context of blanks" 2 "row 1: its context is only blanks" "${evaluate[@]}" --data "$tmp/blank"
refuses "a continuation that is too long" 2 "tokens, more than --context 4" \
    "${evaluate[@]}" --data $given/data --tasks piqa --context 4
refuses "no data for a task that was named" 2 "no data for sciq" "${evaluate[@]}" --data "$tmp/blank" --tasks sciq
refuses "no data at all" 2 "has no data of any task" "${evaluate[@]}" --data /nowhere
refuses "a task that does not exist" 2 "\"arc\" is no task" "${evaluate[@]}" --data $given/data --tasks arc
refuses "a task twice" 2 "mmlu_sociology is there twice" "${evaluate[@]}" --data $given/data \
    --tasks mmlu,mmlu_sociology
refuses "a model that does not exist" 2 "--model" "$program" -e /nowhere
one=("${evaluate[@]}" --data $given/data --tasks sciq --limit 1)
refuses "a --log in no folder" 2 "--log: /nowhere/log" "${one[@]}" --log /nowhere/log
refuses "a --json that is a folder" 2 "--json: $tmp: cannot create" "${one[@]}" --json "$tmp"
echo old >"$tmp/kept"
refuses "no data, with a --json that exists" 2 "no data for sciq" "${evaluate[@]}" --data "$tmp/blank" --tasks sciq \
    --json "$tmp/kept"
equal "which is as before" "$(cat "$tmp/kept")" old
"${one[@]}" --json "$tmp/kept" >/dev/null 2>&1
equal "then it is replaced" "$(grep -c -e old -e '"scores"' "$tmp/kept")" 1
mkfifo "$tmp/pipe"
cat "$tmp/pipe" >"$tmp/piped" &
"${one[@]}" --json "$tmp/pipe" >/dev/null 2>&1
wait $!
equal "--json to a pipe, which stays one" "$(cmp "$tmp/piped" "$tmp/kept" && test -p "$tmp/pipe" && echo good)" good
english 22000 >"$tmp/english.txt"
shards english --val-tokens 0 --bytes "$tmp/english.txt"
shards gpt2 --val-tokens 0 --vocab test/data/gpt2.tiktoken "$tmp/english.txt"
"$train" -i "$tmp/english/t_train_*.bin" -j "$tmp/english/t_train_*.bin" -v 20 -m 0 -s 0 -n 20 -x 20 \
    --n-layer 1 --n-embd 32 --n-head 2 --head-dim 32 -t 32 -b 1 -d 32 -o "$tmp/bytes" >"$tmp/training" 2>&1
refuses "a model of bytes" 2 "vocabulary of 257 does not fit" "$program" -e "$tmp/bytes" --data $given/data

# ---- perplexity
# perplexity FLAGS...: what it prints, without the part on context and stride
perplexity() { "$program" -e "$tmp/bytes" --perplexity "$tmp/english/t_train_*.bin" "$@" | sed 's/, context .*//'; }
if [ -z "${TOLERANCE:-}" ]; then
    equal "perplexity: the trainer's validation loss" \
        "$(perplexity --context 32 | awk '{ print $2, $7 }')" "$(awk '/^val 20/ { print $5, $7 }' "$tmp/training")"
    equal "perplexity: a stride through one context is that context" \
        "$(perplexity --context 512 --stride 32 --limit 16)" "$(perplexity --context 512 --limit 1)"
fi
check "perplexity: a stride that loses context is worse" \
    "$([ "$(perplexity --context 32 --limit 16)" != "$(perplexity --context 512 --limit 1)" ] && echo 1)"
equal "perplexity: every token once" \
    "$(perplexity --context 32 --stride 5 --json "$tmp/scores" | awk '{ print $10, $11 }')" '22000 tokens'
equal "perplexity: --json" "$(grep -cE '"(loss|perplexity|bits_per_byte|tokens|stride)":' "$tmp/scores")" 5
refuses "perplexity of tokens that do not fit" 2 "does not fit the model's of 257" "$program" -e "$tmp/bytes" \
    --perplexity "$tmp/gpt2/t_train_*.bin"
refuses "a stride above the context" 2 "--stride 64 is more than --context 32" "$program" -e "$tmp/bytes" \
    --perplexity x --context 32 --stride 64
refuses "perplexity of no file" 2 "--perplexity: /nowhere" "$program" -e "$tmp/bytes" --perplexity /nowhere
refuses "perplexity and tasks" 2 "both given" "${evaluate[@]}" --perplexity x --tasks sciq

# ---- flags
if [ "$quick" != --quick ]; then
    texts=" model vocab tasks data log json perplexity " switches=" " nonzero=" context batch-size "
    test_flags 11 "${evaluate[@]}" --data $given/data --tasks sciq --limit 1
fi
finish
