#!/usr/bin/env bash
# Tests of the generating program from the command line: the cache against full recomputation, prompts of all sorts, bad
# input, damaged checkpoints. Ends with "N passed, N failed".
#   test/test_generate.sh [--quick]      programs from $BIN (default: the project's folder)
# --quick: shorter texts and three kinds of attention, for a program with sanitizers
# GENERATE: the program to test (default $BIN/generate_t6; generate_t6cu works too)
# TRAIN: the program that trains its small models (default $BIN/train_t6)
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.}
program=$(realpath "${GENERATE:-$bin/generate_t6}")
train=$(realpath "${TRAIN:-$bin/train_t6}")
tokenize=$(realpath "$bin/data/tokenize")
vocab=test/data/gpt2.tiktoken
export OMP_NUM_THREADS=1 GOMP_SPINCOUNT=20000    # the fastest for models this small; waiting threads do not spin long
greedy_tokens=300 check_bytes=400 long_bytes=1100
[ "${1:-}" = --quick ] && greedy_tokens=40 check_bytes=100 long_bytes=100
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. test/checks.sh

# ---- models: of bytes, one of each kind, trained on some English; one that ends its documents; one of GPT-2 tokens
kinds=$(attention_kinds "$train")
[ "${1:-}" = --quick ] && kinds="tpa gqa mla"      # factors, groups, latents
model() {
    "$train" -v 0 -s 0 -u 5 --keep 1 "$@" >"$tmp/log" 2>&1 && return
    echo "FAIL training: $(tail -1 "$tmp/log")"
    exit 1
}
english 22000 >"$tmp/english.txt"
shards english --val-tokens 0 --bytes "$tmp/english.txt"
for kind in $kinds; do
    model -i "$tmp/english/t_train_*.bin" --attn $kind --n-layer 2 --n-embd 64 --n-head 6 --head-dim 32 --n-kv-head 2 \
        -t 128 -b 4 -d 512 -x 150 -n 150 -l 3e-3 -o "$tmp/$kind"
done
for i in $(seq 400); do echo "{\"text\": \"The $((i % 7 + 1)) cats sat.\"}"; done >"$tmp/cats.jsonl"
shards cats --val-tokens 0 --bytes "$tmp/cats.jsonl"
model -i "$tmp/cats/t_train_*.bin" --n-layer 1 --n-embd 32 --n-head 3 --head-dim 16 \
    -t 64 -b 4 -d 256 -x 250 -n 250 -l 1e-2 -o "$tmp/cats_model"
shards gpt2_data --vocab $vocab --val-tokens 0 test/data/sample.jsonl.zst
model -i "$tmp/gpt2_data/t_train_*.bin" --n-layer 2 --n-embd 32 --n-head 4 --head-dim 32 \
    -t 64 -b 4 -d 256 -x 30 -n 30 -l 3e-3 -o "$tmp/gpt2"
generate=("$program" -e "$tmp/tpa")
gpt2=("$program" -e "$tmp/gpt2" --vocab $vocab)
prompt='The trainer reads the shards and'

# agree NAME OUTPUT: the output of --check says that it passed, with errors at rounding level. The limit of --check
# itself is looser, for models with sharp attention; in these models one missing head of 128 makes an error of 1e-5 or
# more. LARGEST: the limit for a program in another precision.
agree() {
    local good
    good=$(awk -v largest="${LARGEST:-1e-6}" '$1 == "off" { good = $3 <= largest && $12 <= largest }
        /passed/ { good = good && /^1 passed, 0 failed/ } END { print good }' <<<"$2")
    check "$1: $(sed -n 's/^ *off/off/p' <<<"$2")" "$good" "$2"
}
# same NAME FILE FILE: the files are equal
same() { check "$1" "$(cmp -s "$2" "$3" && echo 1)" "$(diff "$2" "$3" | head -5)"; }

# ---- golden vectors: greedy tokens through the cache, and every way to compute the logits
golden=$("$program" --golden test/golden/*.safetensors | tail -1)
equal "golden files: tokens through the cache, logits computed in every way" "$golden" \
    "$(ls test/golden/*.safetensors | wc -l) passed, 0 failed"

# ---- the cache against full recomputation
long=$(english $check_bytes)
for kind in $kinds; do
    greedy=("$program" -e "$tmp/$kind" -p "$prompt" --temperature 0 --stop 0 -g $greedy_tokens)
    "${greedy[@]}" >"$tmp/a" && "${greedy[@]}" --no-cache >"$tmp/b"
    check "$kind: $greedy_tokens greedy tokens are those of full recomputation" \
        "$(cmp -s "$tmp/a" "$tmp/b" && [ "$(wc -c <"$tmp/a")" -gt $greedy_tokens ] && echo 1)" \
        "$(cmp "$tmp/a" "$tmp/b" 2>&1)"
    one=$("$program" -e "$tmp/$kind" -p "$long" --check --threads 1)
    two=$("$program" -e "$tmp/$kind" -p "$long" --check --threads 2)
    agree "$kind" "$one"
    check "$kind: the same bits with one thread and two" "$([ -n "$one" ] && [ "$one" = "$two" ] && echo 1)" "$one $two"
done
out=$("${generate[@]}" -p "$(english $long_bytes)" --check)      # long enough to use every split of flashtpa_decode
agree "tpa, $long_bytes tokens" "$out"
i=0
while read -r shape; do     # odd heads, widths and ranks
    i=$((i + 1))
    model -i "$tmp/english/t_train_*.bin" $shape --n-layer 2 -t 64 -b 2 -d 128 -x 25 -n 25 -l 1e-2 -o "$tmp/shape_$i"
    out=$("$program" -e "$tmp/shape_$i" -p "${long:0:120}" --check)
    agree "$shape" "$out"
done <<'END'
--attn tpa --n-embd 40 --n-head 1 --head-dim 64 --q-rank 1 --k-rank 1 --v-rank 1
--attn tpa --n-embd 40 --n-head 5 --head-dim 6 --q-rank 16 --k-rank 4 --v-rank 3
--attn tpa --n-embd 24 --n-head 47 --head-dim 64 --q-rank 6 --k-rank 2 --v-rank 2
--attn tpa --n-embd 24 --n-head 128 --head-dim 10 --q-rank 2 --k-rank 3 --v-rank 1
--attn tpa_kvonly --n-embd 24 --n-head 7 --head-dim 22 --k-rank 3 --v-rank 4
--attn gqa --n-embd 24 --n-head 9 --head-dim 14 --n-kv-head 3
--attn mqa --n-embd 24 --n-head 11 --head-dim 2
END
greedy=("${gpt2[@]}" -p "Once upon a time" --temperature 0 --stop 0 -g $greedy_tokens)
"${greedy[@]}" >"$tmp/a" && "${greedy[@]}" --no-cache >"$tmp/b"
check "GPT-2 tokens: $greedy_tokens greedy tokens are those of full recomputation" \
    "$(cmp -s "$tmp/a" "$tmp/b" && grep -q '^Once upon a time' "$tmp/a" && echo 1)" "$(head -c 300 "$tmp/a")"
out=$("${gpt2[@]}" -p "$long" --check)
agree "GPT-2 tokens" "$out"
"${generate[@]}" -p "$prompt" --temperature 0 --stop 0 -g 100 --cache fp8 --stats >"$tmp/a" 2>"$tmp/b"
check "an fp8 cache generates text" \
    "$([ "$(wc -c <"$tmp/a")" = $((${#prompt} + 101)) ] && grep -q '^cache: fp8' "$tmp/b" && echo 1)" "$(cat "$tmp/b")"

# ---- prompts of different lengths in one batch give the texts that each gives alone
printf '%s\n' "$prompt" 'A' "$(english 300 | tr '\n' ' ')" 'When it is read, the' >"$tmp/prompts"
"${generate[@]}" -f "$tmp/prompts" --temperature 0 -g 120 >"$tmp/batch"
i=0
while IFS= read -r line; do
    i=$((i + 1))
    echo "--- prompt $i"
    "${generate[@]}" -p "$line" --temperature 0 -g 120
done <"$tmp/prompts" >"$tmp/alone"
same "a ragged batch of 4: each prompt gives the same text alone" "$tmp/batch" "$tmp/alone"
"${generate[@]}" -f "$tmp/prompts" --temperature 0 -g 120 --no-cache >"$tmp/alone"
same "a ragged batch of 4: the same texts without the cache" "$tmp/batch" "$tmp/alone"

# ---- sampling
sampled=("${generate[@]}" -p "$prompt" -g 100)
a=$("${sampled[@]}" --seed 1 | md5sum)
b=$("${sampled[@]}" --seed 1 --threads 1 | md5sum)
c=$("${sampled[@]}" --seed 2 | md5sum)
check "the same seed gives the same text, another seed a different one" \
    "$([ "$a" = "$b" ] && [ "$a" != "$c" ] && echo 1)"
"${sampled[@]}" --num-samples 3 >"$tmp/a"
{ echo "--- text 1"; "${sampled[@]}"; } >"$tmp/b"
head -c "$(wc -c <"$tmp/b")" "$tmp/a" >"$tmp/first"
same "--num-samples 3: the first text is that of --num-samples 1" "$tmp/first" "$tmp/b"
equal "--num-samples 3: three texts" "$(grep -c '^--- text' "$tmp/a")" 3
headings=$("${generate[@]}" -f "$tmp/prompts" -g 5 --num-samples 2 | grep -c '^--- prompt [1-4], text [12]$')
equal "two texts for each of 4 prompts" "$headings" 8
a=$("${generate[@]}" -p "$prompt" -g 100 --temperature 0)
for filter in "--top-k 1" "--top-p 1e-6" "--min-p 1"; do
    equal "$filter is greedy" "$("${sampled[@]}" --temperature 1 $filter)" "$a"
done

model -i "$tmp/english/t_train_*.bin" --n-layer 1 --n-embd 32 --n-head 2 --head-dim 32 -t 64 -b 2 -d 128 -x 0 \
    --vocab-size 50000 -o "$tmp/padded"
bytes=$("$program" -e "$tmp/padded" -p x --stop 0 --echo 0 -g 100 --temperature 100 | wc -c)
check "a padded vocabulary: each token drawn is printed" "$([ "$bytes" -gt 100 ] && echo 1)" "$bytes bytes"

# ---- end-of-text, token ids, standard input, arbitrary bytes
cats=("$program" -e "$tmp/cats_model" --temperature 0 -p 'The 3 cats')
a=$("${cats[@]}" --ids 0) b=$("${cats[@]}" --stop 0 -g 40)
equal "end-of-text ends a text" "$a" "The 3 cats sat."
check "--stop 0 continues after end-of-text" "$([[ $b == "The 3 cats sat.<|endoftext|>The "* ]] && echo 1)" "$b"
a=$("$program" -e "$tmp/cats_model" --temperature 0 -p '<|endoftext|>' --echo 0)
check "a prompt of <|endoftext|>, without echo" "$([[ $a == "The "*" cats sat." ]] && echo 1)" "$a"
printf '%s\n' '<|endoftext|>' 'The 3 cats' 'The 4 cats sat' >"$tmp/three"
"$program" -e "$tmp/cats_model" --temperature 0 -f "$tmp/three" --echo 0 >"$tmp/a"
equal "each text of a batch stops at its own end" "$(sed 1,2d "$tmp/a")" $'--- prompt 2\n sat.\n--- prompt 3\n.'
a=$("$program" -e "$tmp/cats_model" --temperature 0 --ids -p '256 84 104 101' -g 4 --stop 0)
check "--ids reads and prints token ids" \
    "$([[ $a == "256 84 104 101 32 "* ]] && [ "$(wc -w <<<"$a")" = 8 ] && echo 1)" "$a"
equal "standard input is a prompt" "$(echo "$prompt" | "${generate[@]}" --temperature 0 | md5sum)" \
    "$("${generate[@]}" -p "$prompt" --temperature 0 | md5sum)"
for m in tpa gpt2; do
    printf 'a\0b\377\376 caf\303\251 \360\237\230\200\303' >"$tmp/bytes"
    "$program" -e "$tmp/$m" --vocab $vocab -g 1 <"$tmp/bytes" | head -c "$(wc -c <"$tmp/bytes")" >"$tmp/a"
    same "$m: a prompt of arbitrary bytes is printed unchanged" "$tmp/a" "$tmp/bytes"
done
# A line end, in Unix's form or Windows's, and a byte order mark are no part of a prompt.
mark=$'\xef\xbb\xbf'
unix=("${generate[@]}" --temperature 0 -g 8 --ids 0)
printf 'The cat\nA dog\n' >"$tmp/unix"
printf 'The cat\r\nA dog' >"$tmp/mixed"
printf "${mark}The cat\r\nA dog\r\n" >"$tmp/windows"
"${unix[@]}" -f "$tmp/unix" >"$tmp/a"
for f in mixed windows; do
    "${unix[@]}" -f "$tmp/$f" >"$tmp/b"
    same "--prompt-file: $f line ends give the same texts" "$tmp/b" "$tmp/a"
done
"${unix[@]}" -p $'The\r\ncat' >"$tmp/a"
for f in $'The\r\ncat' $'The\r\ncat\n' $'The\r\ncat\r\n' "$mark"$'The\r\ncat\r\n'; do
    printf '%s' "$f" | "${unix[@]}" >"$tmp/b"
    same "standard input: $(printf %q "$f")" "$tmp/b" "$tmp/a"
done
printf 'x\r' | "${unix[@]}" -g 1 | head -c 2 >"$tmp/b"
same "standard input: a carriage return alone is text" "$tmp/b" <(printf 'x\r')
"${generate[@]}" -p "$prompt" --context 132 -g 100 >/dev/null 2>&1
check "--context that is just enough" "$([ $? = 0 ] && echo 1)" "refused"
"${generate[@]}" -p x --plan >"$tmp/a" 2>"$tmp/b"
check "--plan prints the memory and stops" \
    "$([ ! -s "$tmp/a" ] && grep -q '^memory:' "$tmp/b" && echo 1)" "$(cat "$tmp/b")"
"${generate[@]}" -p x -g 50 --stats >/dev/null 2>"$tmp/b"
for line in 'cache: .*MHA' 'prefill: ' 'decode: .*p99'; do
    check "--stats prints $line" "$(grep -q "^$line" "$tmp/b" && echo 1)" "$(cat "$tmp/b")"
done

# ---- bad input: one line, before any work
texts=" model vocab prompt prompt-file cache "
switches=" ids echo stop no-cache stats check plan "
nonzero=" num-samples max-tokens top-p "
test_flags 15 "${generate[@]}" -p "$prompt" -g 2
refuses "no such model" 2 "--model" "$program" -e "$tmp/nothing" -p x
refuses "a folder without a model" 2 "config.json" "$program" -e "$tmp/english" -p x
refuses "an empty prompt" 2 "empty" "${generate[@]}" --ids -p ' '
refuses "an empty standard input" 2 "empty" "${generate[@]}" </dev/null
printf 'one\n\nthree\n' >"$tmp/hole"
refuses "an empty line among prompts" 2 "line 2" "${generate[@]}" -f "$tmp/hole"
: >"$tmp/none"
refuses "an empty prompt file" 2 "empty" "${generate[@]}" -f "$tmp/none"
printf 'one\r\n\r\nthree\r\n' >"$tmp/hole"
refuses "an empty line among prompts with Windows's line ends" 2 "line 2" "${generate[@]}" -f "$tmp/hole"
printf '\r\n' >"$tmp/none"
refuses "a prompt file of a line end" 2 "line 1 .*empty" "${generate[@]}" -f "$tmp/none"
printf "$mark" >"$tmp/none"
refuses "a prompt file of a byte order mark" 2 "empty" "${generate[@]}" -f "$tmp/none"
refuses "a byte order mark on standard input" 2 "empty" "${generate[@]}" <"$tmp/none"
for wide in UTF-16 UTF-16LE UTF-16BE UTF-32; do         # what Windows's programs write
    printf 'The cat\nA dog\n' | iconv -f UTF-8 -t $wide >"$tmp/wide"
    refuses "a prompt file in $wide" 2 "prompt-file: .*text in ${wide:0:6}" "${generate[@]}" -f "$tmp/wide"
    refuses "standard input in $wide" 2 "standard input: text in ${wide:0:6}" "${generate[@]}" <"$tmp/wide"
done
for pack in gzip "zstd -q"; do
    $pack <"$tmp/prompts" >"$tmp/packed"
    refuses "a prompt file packed with $pack" 2 "prompt-file: .*unpack it" "${generate[@]}" -f "$tmp/packed"
    refuses "standard input packed with $pack" 2 "standard input: .*unpack it" "${generate[@]}" <"$tmp/packed"
done
refuses "a prompt file of tokens" 2 "token shard" "${generate[@]}" -f "$(ls "$tmp"/english/t_train_*.bin)"
check "a prompt that starts like a parquet file" "$(echo PAR1 is | "${generate[@]}" -g 1 >/dev/null 2>&1 && echo 1)"
refuses "no such prompt file" 2 "cannot open" "${generate[@]}" -f "$tmp/nothing"
refuses "a folder as prompt file" 2 "regular" "${generate[@]}" -f "$tmp"
mkfifo "$tmp/pipe"                  # opening one for reading waits for its other end
refuses "a pipe as prompt file" 2 "regular" "${generate[@]}" -f "$tmp/pipe"
refuses "--prompt and --prompt-file" 2 "both" "${generate[@]}" -p x -f "$tmp/prompts"
refuses "--cache of an unknown kind" 2 "native or fp8" "${generate[@]}" -p x --cache int4
refuses "a prompt longer than --context" 2 "context" "${generate[@]}" -p "$prompt" --context 131 -g 100
refuses "--ids beyond the vocabulary" 2 "0 to 256" "${generate[@]}" --ids -p '1 257'
refuses "--ids below zero" 2 "0 to 256" "${generate[@]}" --ids -p '-1'
refuses "--ids that is not a number" 2 "0 to 256" "${generate[@]}" --ids -p '1 2x'
printf '1 2\0 3' >"$tmp/zero.txt"
refuses "--ids with a zero byte" 2 "zero byte" "${generate[@]}" --ids -f "$tmp/zero.txt"
refuses "--check of one token" 2 "at least 2" "${generate[@]}" -p x --check
refuses "GPT-2 tokens without their vocabulary" 2 "gpt2_vocab.sh" "$program" -e "$tmp/gpt2" --vocab "$tmp/nothing" -p x
refuses "GPT-2 tokens with a file that is no vocabulary" 2 "not GPT-2" "$program" -e "$tmp/gpt2" --vocab README.md -p x
refuses "a cache larger than memory" 2 "MiB\|GiB" "${generate[@]}" -p x -g 16777216 --num-samples 1000
equal "--ids needs no vocabulary" "$("$program" -e "$tmp/gpt2" --vocab "$tmp/nothing" --ids -p '1 2' -g 3 | wc -w)" 5
refuses "output that cannot be written" 1 "cannot write" sh -c '"$@" >/dev/full' sh "${generate[@]}" -p x -g 5

refuses "--help that cannot be written" 1 "cannot write" sh -c '"$@" >/dev/full' sh "$program" --help

# ---- descriptors that are closed at the start; limits
greedy=("${generate[@]}" -p "$prompt" --temperature 0 -g 20 --stats)
want=$("${greedy[@]}" 2>/dev/null)
for closed in '<&-' '2>&-' '<&- 2>&-'; do
    equal "started with $closed, it prints the same" "$(eval '"${greedy[@]}" </dev/null 2>/dev/null' "$closed")" "$want"
done
check "started with >&-" "$("${greedy[@]}" >&- 2>/dev/null && echo 1)" "failed"
if [[ $program != *cu ]] && can_limit_memory "$program"; then
    for limit in 100000 150000 200000 300000 400000; do
        bounded "-v $limit" "${generate[@]}" -p x -g 3 --threads 2
    done
    refuses "a cache beyond ulimit -v" 2 "available (ulimit -v)" \
        bash -c 'ulimit -v 500000; exec "$@"' bash "${generate[@]}" -p x -g 1000000 --threads 1
fi
for limit in '-n 4' '-n 6' '-u 1' '-s unlimited' '-s 100000000'; do
    bounded "$limit" "${generate[@]}" -p x -g 3 --threads 2
done

# ---- damaged checkpoints
whole=$(echo "$tmp"/tpa/step_*)
missed=0
RANDOM=11
for i in $(seq 10); do
    rm -rf "$tmp/flip"; cp -r "$whole" "$tmp/flip"
    if [ $((i % 2)) = 0 ]; then flip "$tmp/flip/model.safetensors"; else flip "$tmp/flip/config.json"; fi
    "$program" -e "$tmp/flip" -p x >"$tmp/stdout" 2>"$tmp/stderr"
    [ $? = 2 ] && [ "$(wc -l <"$tmp/stderr")" = 1 ] && [ ! -s "$tmp/stdout" ] && continue
    missed=$((missed + 1)); cat "$tmp/stderr"
done
check "10 bits flipped in weights or configuration are refused" "$([ $missed = 0 ] && echo 1)" "$missed were accepted"
rm -rf "$tmp/flip"; cp -r "$whole" "$tmp/flip"; rm "$tmp"/flip/{optimizer-*,state.json}
check "weights without the optimizer's state load" "$("$program" -e "$tmp/flip" -p x -g 1 >/dev/null 2>&1 && echo 1)"
rm "$tmp/flip/CHECKSUMS"
check "weights without checksums load" "$("$program" -e "$tmp/flip" -p x -g 1 >/dev/null 2>&1 && echo 1)"
head -c 20000 "$whole/model.safetensors" >"$tmp/flip/model.safetensors"
refuses "weights cut short" 2 "cut" "$program" -e "$tmp/flip" -p x
cp "$tmp"/gqa/step_*/model.safetensors "$tmp/flip/"
refuses "weights of another attention kind" 2 "tpa model" "$program" -e "$tmp/flip" -p x
cp "$whole/model.safetensors" "$tmp/flip/"
last=$(($(stat -c %s "$whole/model.safetensors") - 4))
printf '\000\000\300\177' | dd of="$tmp/flip/model.safetensors" bs=1 seek=$last conv=notrunc 2>/dev/null
refuses "a weight that is NaN" 2 "not finite" "$program" -e "$tmp/flip" -p x
sed -i 's/"tpa"/"mla"/' "$tmp/flip/config.json"
refuses "an unknown attention kind" 2 "mla" "$program" -e "$tmp/flip" -p x
sed -i 's/"mla"/"tpa"/; s/257/64/' "$tmp/flip/config.json"
refuses "an unknown vocabulary" 2 "--ids" "$program" -e "$tmp/flip" -p x

finish
