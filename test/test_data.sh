#!/bin/bash
# Tests of the way from text to shards: data/tokenize, the scripts in data/, llmc/tokenizer.h.
#
#     test/test_data.sh [--long] [TEST...]
#
# Environment: TOKENIZE, the program to test (default data/tokenize), with sanitizers or without; CC and CFLAGS, for
# test_tokenize.c; DUCKDB. A test prints "ok NAME", "FAIL NAME: why" or "skip NAME: why". The last line has the totals.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD data=$PWD/test/data vocab=$PWD/test/data/gpt2.tiktoken
export TOKENIZE=${TOKENIZE:-$root/data/tokenize} SLOW_MACHINE=1
export UBSAN_OPTIONS=${UBSAN_OPTIONS:-halt_on_error=1}
kills=20 flips=30 documents=5000
[ "${1:-}" = --long ] && { kills=200 flips=300 documents=200000; shift; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
seed=${SEED:-$(date +%s)}
RANDOM=$seed
echo "# $TOKENIZE, SEED=$seed"

passed=0 failed=0
run_test() {
    local name=$1 why
    shift
    if why=$("test_$name" 2>&1); then
        if [[ $why == skip:* ]]; then
            echo "skip $name:${why#skip:}"
        else
            echo "ok $name${why:+ (${why//$'\n'/; })}"
            passed=$((passed + 1))
        fi
    else
        echo "FAIL $name: $(tr '\n' ' ' <<<"$why")"
        failed=$((failed + 1))
    fi
    rm -rf "${tmp:?}"/*
}

tok() { "$TOKENIZE" --vocab "$vocab" "$@"; }
quiet() { "$@" 2>"$tmp/stderr" || { cat "$tmp/stderr"; return 1; }; }
tokens_of() { for f in "$@"; do tail -c +1025 "$f"; done; }     # of shards, without their headers
say() { echo "$*"; return 1; }
has() { grep -q -e "$2" "$1"; }     # FILE PATTERN

# rejects CODE PATTERN COMMAND...: the command must exit with CODE and print one line on stderr that matches PATTERN.
rejects() {
    local code=$1 pattern=$2 got
    shift 2
    ASAN_OPTIONS=detect_leaks=0 "$@" >"$tmp/stdout" 2>"$tmp/stderr"     # an error exit does not free memory
    got=$?
    grep -q -e Sanitizer -e 'runtime error' "$tmp/stderr" && { say "$*: $(cat "$tmp/stderr")"; return; }
    [ $got = "$code" ] || { say "$*: exit code $got instead of $code: $(cat "$tmp/stderr")"; return; }
    has "$tmp/stderr" "$pattern" || { say "$*: \"$pattern\" is not in: $(cat "$tmp/stderr")"; return; }
    [ "$(wc -l <"$tmp/stderr")" = 1 ] || { say "$*: more than one line: $(cat "$tmp/stderr")"; return; }
}

# Every shard with a final name must be whole: as many bytes as its header says.
all_whole() {   # FOLDER
    local f size tokens
    for f in "$1"/*.bin; do
        [ -e "$f" ] || continue
        {   # read both from one open file: a process that survived a kill may replace it in between
            size=$(stat -Lc %s /dev/fd/9)
            tokens=$(od -An -j8 -N4 -td4 <&9 | tr -d ' ')
        } 9<"$f"
        [ "$tokens" = $(((size - 1024) / 2)) ] || { say "$f is not whole"; return; }
    done
}
nothing_left() {    # FOLDER
    [ ! -d "$1" ] || [ -z "$(ls "$1")" ] || say "left behind: $(ls "$1")"
}

# ----------------------------------------------------------------------------------------------------------------------

test_encoder() {
    ${CC:-cc} -O2 ${CFLAGS:-} -I. test/test_tokenize.c -o "$tmp/test_tokenize" -lutf8proc || return
    "$tmp/test_tokenize" "$vocab" $documents "$seed" >"$tmp/log" || { grep -v '^ok' "$tmp/log"; return 1; }
    tail -n 1 "$tmp/log"
}

test_cases() {
    quiet tok --print-ids "$data/cases.jsonl" >"$tmp/ids" || return
    sed 's/.*"ids":\(\[[0-9,]*\]\)}$/\1/' "$data/cases.jsonl" | cmp - "$tmp/ids" || return
    echo "$(wc -l <"$tmp/ids") cases"
}

test_sample() {
    quiet tok --val-tokens 0 -o "$tmp/a/s" "$data/sample.jsonl.zst" || return
    tokens_of "$tmp/a/s_train_000000.bin" | cmp - "$data/sample.u16" || return
    local m=$tmp/a/s_manifest.json
    has $m '"documents": 200,' && has $m '"tokens": 393524, "bytes": 1648206,' || say "$(cat $m)"
}

# The bytes written do not depend on the number of threads or the kind of input, nor the tokens on the shard size.
test_threads() {
    local n
    zstd -qdc "$data/sample.jsonl.zst" >"$tmp/s.jsonl"
    local size=(--shard-size 50000 --val-tokens 70000) z=$data/sample.jsonl.zst
    for n in 1 2 3 8; do quiet tok --threads $n "${size[@]}" -o "$tmp/$n/s" $z "$tmp/s.jsonl" || return; done
    for n in 2 3 8; do diff -r "$tmp/1" "$tmp/$n" || return; done
    cat $z $z | quiet tok "${size[@]}" -o "$tmp/in/s" || return
    diff -r "$tmp/1" "$tmp/in" || return
    tokens_of "$tmp"/1/s_val_000000.bin "$tmp"/1/s_val_000001.bin "$tmp"/1/s_train_* |
        cmp - <(cat "$data/sample.u16" "$data/sample.u16") || return
    # a block that takes as long as many others
    {
        cat "$tmp/s.jsonl"
        printf '{"text":"'; head -c 900000 /dev/zero | tr '\0' a; printf '"}\n'
        for n in {1..15}; do cat "$tmp/s.jsonl"; done
    } >"$tmp/late.jsonl"
    for n in 1 2 3; do quiet tok --threads $n --val-tokens 0 -o "$tmp/late$n/s" "$tmp/late.jsonl" || return; done
    for n in {1..15}; do cat "$data/sample.u16"; done >"$tmp/late.u16"
    tokens_of "$tmp"/late1/s_train_000000.bin | tail -c $((15 * 787048)) | cmp - "$tmp/late.u16" || return
    diff -r "$tmp/late1" "$tmp/late2" && diff -r "$tmp/late1" "$tmp/late3" || return
    [ "$(stat -c %s "$tmp/1/s_val_000001.bin")" = $((1024 + 2 * 20000)) ] || say "validation is not 70000 tokens"
    quiet "$TOKENIZE" --verify "$tmp/1/s" | tail -n 1 | grep -q '^ok .*400 documents' || say "--verify fails"
}

test_plain_text() {
    local form f i
    zstd -qdc "$data/sample.jsonl.zst" >"$tmp/a.txt"
    { printf b; head -c 100000 /dev/urandom; } >"$tmp/b.bin"     # b, so that it does not start like a packed file
    : >"$tmp/c.txt"
    for f in a.txt b.bin c.txt; do printf '<|endoftext|>'; cat "$tmp/$f"; done >"$tmp/expected"
    for form in --vocab=$vocab --bytes; do
        rm -rf "$tmp/o"
        quiet "$TOKENIZE" $form --shard-size 100000 --val-tokens 1 -o "$tmp/o/s" "$tmp"/{a.txt,b.bin,c.txt} || return
        quiet "$TOKENIZE" --vocab=$vocab --decode "$tmp"/o/s_val_* "$tmp"/o/s_train_* | cmp - "$tmp/expected" || return
        quiet "$TOKENIZE" --verify "$tmp/o/s" >/dev/null || return
    done
    # Cutting a text into blocks does not change its tokens.
    for i in 1 2 3; do cat "$tmp/a.txt"; done >"$tmp/d.txt"
    quiet tok --print-ids "$tmp/d.txt" | tr -d '[]' | tr ',' '\n' >"$tmp/ids" || return
    python3 -c 'import json, sys; print(json.dumps({"text": open(sys.argv[1], newline="").read()}))' \
        "$tmp/d.txt" >"$tmp/d.jsonl" 2>/dev/null || return 0
    quiet tok --print-ids "$tmp/d.jsonl" | tr -d '[]' | tr ',' '\n' | cmp - "$tmp/ids"
}

test_json() {
    cat >"$tmp/a.jsonl" <<'END'
{"text": "\u0041\ud83d\ude00\"\\\/\b\f\n\r\t\u00E9\u0000z"}

  { "n" : [1, -2.5e+3, {"text": "inner"}, [], {}], "te\u0078t" : "key" , "t": true, "u": null }  
{"text":null,"id":1}
{"text":""}
{"text":"\ud800x\udc00\ud800\ud800\udc00"}
END
    printf '{"text":"a\xff\xc3"}\r\n{"text":"last"}' >>"$tmp/a.jsonl"
    quiet tok --val-tokens 0 -o "$tmp/o/s" "$tmp/a.jsonl" || return
    quiet tok --decode "$tmp/o/s_train_000000.bin" >"$tmp/back"
    local e='<|endoftext|>'
    {
        printf "${e}A\xf0\x9f\x98\x80\"\\\\/\b\f\n\r\t\xc3\xa9\0z${e}key${e}${e}"
        printf "\xef\xbf\xbdx\xef\xbf\xbd\xef\xbf\xbd\xf0\x90\x80\x80${e}a\xff\xc3${e}last"
    } | cmp - "$tmp/back" || return
    local m=$tmp/o/s_manifest.json
    has $m '"null_texts": 1,' && has $m '"invalid_utf8_texts": 2,' && has $m '"documents": 6,' ||
        { say "wrong counts: $(cat $m)"; return; }
    printf '{"text":"a"}\n{"text":null}\n{"text":""}\n{"text":"b c"}' | quiet tok --print-ids >"$tmp/ids" || return
    printf '[64]\nnull\n[]\n[65,269]\n' | cmp - "$tmp/ids"
}

test_bad_json() {
    local line n=0
    while IFS= read -r line; do
        printf '{"text":"good"}\n%b\n{"text":"good"}\n' "$line" >"$tmp/bad.jsonl"
        rejects 2 'bad.jsonl: line 2, byte' tok -o "$tmp/o/s" "$tmp/bad.jsonl" || return
        nothing_left "$tmp/o" || return
        n=$((n + 1))
    done <<'END'
{"text":"cut
{"text":"cut"
{"text":"cut\\
{"text":"cut\\u12
{"text":"a"} {"text":"b"}
{"text":"a"}}
{"text":5}
{"text":["a"]}
{"texts":"a"}
{}
[]
"text"
{"text":"a" "id":1}
{"text":"a","id":}
{"text":"a","id":01}
{"text":"a","id":1.}
{"text":"a","id":nul}
{"text":"a","id":[1,]}
{"text":"a","id":{"b"}}
{"text":"a","text":"b"}
{"text":"a\\q"}
{"text":"a\\u12g4"}
{"text":"tab\there"}
{"text":"nul\0here"}
{text:"a"}
{"text":"a",}
END
    { printf '{"text":"a","deep":'; head -c 100000 /dev/zero | tr '\0' '['; } >"$tmp/bad.jsonl"
    rejects 2 'nested too deep' tok -o "$tmp/o/s" "$tmp/bad.jsonl" || return
    # A good file cut at each byte, or with a flipped bit: an error or a different text, never a crash.
    printf '{"id": 1.5, "text": "a\\u00e9\\ud83d\\ude00\\n", "x": [true, {"y": null}]}' >"$tmp/good.jsonl"
    local size=$(stat -c %s "$tmp/good.jsonl") i b
    for ((i = 1; i < size; i++)); do
        head -c $i "$tmp/good.jsonl" >"$tmp/cut.jsonl"
        rejects 2 'line 1, byte' tok -o "$tmp/o/s" "$tmp/cut.jsonl" || return
    done
    for ((i = 0; i < size; i += 3)); do
        flip "$tmp/good.jsonl" "$tmp/flip.jsonl" $i $((i % 8))
        tok --print-ids "$tmp/flip.jsonl" >/dev/null 2>"$tmp/stderr"
        b=$?
        [ $b = 0 ] || [ $b = 2 ] || { say "bit $i: exit code $b: $(cat "$tmp/stderr")"; return; }
    done
    echo "$n lines"
}

flip() {    # FROM TO BYTE BIT: copies a file and flips one bit
    cp "$1" "$2"
    chmod u+w "$2"
    printf "\\x$(printf %02x $((0x$(od -An -j"$3" -N1 -tx1 "$1" | tr -d ' ') ^ (1 << $4))))" |
        dd of="$2" bs=1 seek="$3" conv=notrunc status=none
}

test_bad_input() {
    local z=$data/sample.jsonl.zst size i
    size=$(stat -c %s "$z")
    rejects 2 'nowhere.jsonl: cannot open' tok -o "$tmp/o/s" "$tmp/nowhere.jsonl" || return
    rejects 2 'cannot read: Is a directory' tok -o "$tmp/o/s" "$tmp" || return
    : >"$tmp/empty.jsonl.zst"
    rejects 2 'does not start like zstd' tok -o "$tmp/o/s" "$tmp/empty.jsonl.zst" || return
    printf 'PAR1....' >"$tmp/x.parquet"
    rejects 2 'a parquet file' tok -o "$tmp/o/s" "$tmp/x.parquet" || return
    for i in 5 100 $((size / 2)) $((size - 1)); do
        head -c "$i" "$z" >"$tmp/cut.jsonl.zst"
        rejects 2 'cut.jsonl.zst: ' tok -o "$tmp/o/s" "$tmp/cut.jsonl.zst" || return
    done
    for ((i = 0; i < flips; i++)); do
        flip "$z" "$tmp/flip.jsonl.zst" $(((RANDOM * 32768 + RANDOM) % (size - 4) + 4)) $((RANDOM % 8))
        if tok --val-tokens 0 -o "$tmp/o/s" "$tmp/flip.jsonl.zst" 2>"$tmp/stderr"; then
            # some bits of a zstd header are unused
            tokens_of "$tmp/o/s_train_000000.bin" | cmp -s - "$data/sample.u16" ||
                { say "a flipped bit changed the tokens without an error"; return; }
            rm -rf "$tmp/o"
        else
            rejects 2 'flip.jsonl.zst: ' tok -o "$tmp/o/s" "$tmp/flip.jsonl.zst" || return
        fi
    done
    nothing_left "$tmp/o" || return
    head -c 800000 "$vocab" >"$tmp/v"
    rejects 2 "not GPT-2's vocabulary" "$TOKENIZE" --vocab "$tmp/v" -o "$tmp/o/s" "$z" || return
    flip "$vocab" "$tmp/v" 400000 1
    rejects 2 "not GPT-2's vocabulary" "$TOKENIZE" --vocab "$tmp/v" -o "$tmp/o/s" "$z" || return
    rejects 2 'rows instead of 201' tok --rows 201 -o "$tmp/o/s" "$z" || return
    rejects 2 'tokens instead of 393325' tok --tokens 393325 -o "$tmp/o/s" "$z" || return
    quiet tok --rows 200 --tokens 393324 -o "$tmp/p/s" "$z" || return
    rejects 2 'there is a data set of this name' tok -o "$tmp/p/s" "$z" || return
    nothing_left "$tmp/o"
}

test_bad_flags() {
    local f v
    for f in threads shard-size val-tokens rows tokens; do
        for v in -1 junk 1.5 '' 99999999999999999999999; do
            rejects 2 "\-\-$f" tok --$f "$v" -o "$tmp/o/s" "$data/cases.jsonl" || return
        done
    done
    for f in threads shard-size; do
        rejects 2 "\-\-$f: \"0\" is not accepted" tok --$f 0 -o "$tmp/o/s" "$data/cases.jsonl" || return
    done
    rejects 2 'o DIR/NAME is missing' tok "$data/cases.jsonl" || return
    rejects 2 'a name is missing after the folder' tok -o "$tmp/o/" "$data/cases.jsonl" || return
    rejects 2 'no shard given' tok --decode || return
    rejects 2 '\-\-nonsense: no such flag' tok --nonsense || return
    rejects 2 'exclude each other' tok --decode --verify "$tmp/o/s" || return
    # Files may stand anywhere between flags, and may be called 1.
    printf ab >"$tmp/1"
    (cd "$tmp" && "$TOKENIZE" --print-ids 1 --bytes 1) >"$tmp/ids" || return
    printf '[97,98]\n[97,98]\n' | cmp - "$tmp/ids" || return
    "$TOKENIZE" --help | grep -q 'usage: ' || say "--help prints no usage"
}

test_bad_shards() {
    quiet tok --shard-size 200000 --val-tokens 100000 -o "$tmp/o/s" "$data/sample.jsonl.zst" || return
    local s=$tmp/o/s_train_000001.bin
    cp -r "$tmp/o" "$tmp/good"
    flip "$tmp/good/s_train_000001.bin" "$s" 5000 0
    "$TOKENIZE" --verify "$tmp/o/s" >"$tmp/out" && { say "--verify misses a flipped bit"; return; }
    grep -q '^BAD .*s_train_000001.bin' "$tmp/out" || { say "--verify says: $(cat "$tmp/out")"; return; }
    head -c 9999 "$tmp/good/s_train_000001.bin" >"$s"
    "$TOKENIZE" --verify "$tmp/o/s" >"$tmp/out" && { say "--verify misses a cut shard"; return; }
    rejects 2 'its header says' tok --decode "$s" || return
    rejects 2 'not a token shard' tok --decode "$vocab" || return
    cp "$tmp/good/s_val_000000.bin" "$tmp/alone.bin"            # without its manifest
    rejects 2 'the vocabulary has 257' "$TOKENIZE" --bytes --decode "$tmp/alone.bin" || return
    rejects 2 "tokens are GPT-2's, by its manifest, but --bytes" \
        "$TOKENIZE" --bytes --decode "$tmp/good/s_val_000000.bin" || return
    echo "$hello" | quiet "$TOKENIZE" --bytes --val-tokens 0 -o "$tmp/bytes/s" || return
    rejects 2 'tokens are bytes, by its manifest, but .*s_val_000000.bin says' \
        tok --decode "$tmp/good/s_val_000000.bin" "$tmp/bytes/s_train_000000.bin" || return
    rm "$s"
    "$TOKENIZE" --verify "$tmp/o/s" >/dev/null && { say "--verify misses a missing shard"; return; }
    head -c 300 "$tmp/good/s_manifest.json" >"$tmp/o/s_manifest.json"
    rejects 2 'not JSON' "$TOKENIZE" --verify "$tmp/o/s" || return
    rejects 2 'not JSON' tok --decode "$tmp/o/s_val_000000.bin" || return
    quiet "$TOKENIZE" --verify "$tmp/good/s" >/dev/null
}

# Numbers of the wrong type in a manifest are refused, those that only adding needs too.
test_bad_manifest() {
    local m=$tmp/o/s_manifest.json key value
    echo "$hello" | quiet tok --val-tokens 0 --source "$vocab" -o "$tmp/o/s" || return
    cp "$m" "$tmp/good"
    for key in format vocab_size eot documents null_texts invalid_utf8_texts shard_size val_tokens tokens bytes; do
        for value in '"1"' 1.5 -1 true null '[1]' '{}' 1e400 12345678901234567890; do
            sed "0,/\"$key\": [0-9]*/s//\"$key\": $value/" "$tmp/good" >"$m"
            rejects 2 "manifest.json: .*\"$key\"" "$TOKENIZE" --verify "$tmp/o/s" || { say "$key $value"; return; }
        done
    done
    sed 's/"vocab_size": 50257/"vocab_size": 4295017553/' "$tmp/good" >"$m"         # 2^32 more
    rejects 2 '"vocab_size" is missing or wrong' "$TOKENIZE" --verify "$tmp/o/s" || return
    sed 's/"eot"/"documents": 1, "eot"/' "$tmp/good" >"$m"
    rejects 2 '"documents" is there twice' "$TOKENIZE" --verify "$tmp/o/s" || return
    { cat "$tmp/good"; echo '{}'; } >"$m"
    rejects 2 'something follows' "$TOKENIZE" --verify "$tmp/o/s" || return
    { cat "$tmp/good"; printf '\0'; } >"$m"
    rejects 2 'is zero' "$TOKENIZE" --verify "$tmp/o/s" || return
    printf '[1]' >"$m"
    rejects 2 'not a JSON object' "$TOKENIZE" --verify "$tmp/o/s" || return
    cp "$tmp/good" "$m"
    quiet "$TOKENIZE" --verify "$tmp/o/s" >/dev/null
}

# A pipe in place of a file is refused. Nothing waits for its other end.
test_pipes() {
    local pipe=$tmp/p/s_train_000000.bin m=$tmp/p/s_manifest.json
    mkdir "$tmp/p"
    mkfifo "$pipe" "$m" "$tmp/source"
    rejects 2 'not a regular file' timeout 20 "$TOKENIZE" --verify "$tmp/p/s" || return
    rejects 2 'not a regular file' timeout 20 "$TOKENIZE" --vocab "$vocab" --decode "$pipe" || return
    rm "$m"
    rejects 2 'not a regular file' timeout 20 "$TOKENIZE" --vocab "$vocab" --decode "$pipe" || return
    rejects 2 'not a regular file' timeout 20 "$TOKENIZE" --vocab "$pipe" --print-ids "$data/cases.jsonl" || return
    echo "$hello" | rejects 2 'not a regular file' \
        timeout 20 "$TOKENIZE" --vocab "$vocab" --source "$tmp/source" -o "$tmp/o/s"
}

# Files added one by one make the same shards as all at once. A file is not added twice.
test_append() {
    local i size=(--shard-size 60000 --val-tokens 70000)
    zstd -qdc "$data/sample.jsonl.zst" >"$tmp/s.jsonl"
    split -d -n l/7 --additional-suffix=.jsonl "$tmp/s.jsonl" "$tmp/part"
    quiet tok "${size[@]}" -o "$tmp/all/s" "$tmp"/part*.jsonl || return
    for i in "$tmp"/part*.jsonl "$tmp/part03.jsonl"; do
        [[ $i != *part06* ]] || cp "$tmp/one/s_manifest.json" "$tmp/before.json"
        quiet tok "${size[@]}" --source "$i" -o "$tmp/one/s" "$i" || return
    done
    for i in "$tmp"/all/*.bin; do cmp "$i" "$tmp/one/${i##*/}" || return; done
    # A run that was stopped after renaming its shards leaves the new shards with the old manifest.
    cp -r "$tmp/one" "$tmp/after"
    cp "$tmp/before.json" "$tmp/one/s_manifest.json"
    i=$tmp/part06.jsonl
    quiet tok "${size[@]}" --source "$i" -o "$tmp/one/s" "$i" || return
    diff -r "$tmp/after" "$tmp/one" || return
    quiet "$TOKENIZE" --verify "$tmp/one/s" >/dev/null || return
    i=$data/cases.jsonl
    rejects 2 'begun with --shard-size 60000' tok --source "$i" -o "$tmp/one/s" "$i" || return
    i=$tmp/part00.jsonl
    echo >>"$i"
    rejects 2 'already lists a file of this name' tok "${size[@]}" --source "$i" -o "$tmp/one/s" "$i" || return
    flip "$tmp/all/s_train_000007.bin" "$tmp/one/s_train_000007.bin" 2000 0
    i=$data/cases.jsonl
    rejects 2 'not what its manifest says' tok "${size[@]}" --source "$i" -o "$tmp/one/s" "$i" || return
    all_whole "$tmp/one"
}

# ----------------------------------------------------------------------------------------------------------------------
# What a file is, its content says

hello='{"text":"Hello world"}'
is_hello() {    # FILE: it holds the document of $hello, and nothing else
    local name=${1##*/}
    rm -rf "$tmp/o"
    quiet tok --val-tokens 0 -o "$tmp/o/x" "$1" || { say "$name is refused"; return; }
    tokens_of "$tmp"/o/*.bin | od -An -tu2 | grep -qx ' 50256 15496   995' || say "$name has other tokens"
}
bytes() { local hex="$*"; printf "$(sed 's/../\\x&/g' <<<"${hex// /}")"; }     # from hex digits
# Without a pipe: grep -q ends before nm has written everything, and then nm fails.
has_asan() { case $(nm -D "$TOKENIZE" 2>/dev/null) in *__asan*) ;; *) return 1 ;; esac; }

# gzip and zstd in all their forms, under any name.
test_packed() {
    local f m=$tmp/m i size
    mkdir "$m"
    echo "$hello" >"$tmp/a.jsonl"
    gzip -c "$tmp/a.jsonl" >"$m/a.jsonl.gz"
    cp "$m/a.jsonl.gz" "$m/content.jsonl"
    cp "$m/a.jsonl.gz" "$m/content.JSON.zst"
    zstd -qc "$tmp/a.jsonl" >"$m/a.jsonl.zstd"
    cp "$m/a.jsonl.zstd" "$m/content.ndjson"
    printf 'Hello world' | gzip -c >"$m/text"
    printf 'Hello world' | zstd -qc >"$m/text.txt"
    printf 'Hello world' | zstd -qc >"$m/text.gz"
    # members and frames, also empty ones, and those that are to be skipped
    { printf '{"text":' | gzip -1; printf '' | gzip; printf '"Hello world"}' | gzip -9; } >"$m/members.json.gz"
    { cat "$m/members.json.gz"; head -c 1000 /dev/zero; } >"$m/padded.json.gz"
    { printf '{"text":"Hello' | zstd -q; printf '' | zstd -q; printf ' world"}\n' | zstd -q; } >"$m/frames.json.zst"
    { bytes 502A4D18 04000000; printf abcd; cat "$m/a.jsonl.zstd"; bytes 5F2A4D18 00000000; } >"$m/skipped.jsonl.zst"
    type -P pzstd >/dev/null && pzstd -qc "$tmp/a.jsonl" >"$m/pzstd.jsonl.zst"
    for f in "$m"/*; do is_hello "$f" || return; done
    for f in a.jsonl.gz skipped.jsonl.zst; do
        [ "$(tok --print-ids <"$m/$f")" = '[15496,995]' ] || { say "$f on standard input"; return; }
    done
    # a window of 2 GB, as with zstd --long=31: one uncompressed block
    { bytes 28B52FFD 00 A8 B90000; cat "$tmp/a.jsonl"; } >"$m/long.jsonl.zst"
    if ! has_asan; then
        is_hello "$m/long.jsonl.zst" || return
        has "$tmp/stderr" 'note: .*takes 20[0-9][0-9] MB' || { say "no word of memory: $(cat "$tmp/stderr")"; return; }
        (ulimit -v 1000000; rejects 1 'out of memory: zstd --long' tok -o "$tmp/p/s" "$m/long.jsonl.zst") || return
    fi
    # damaged, cut, or with something else after it
    for f in members.json.gz frames.json.zst; do
        size=$(stat -c %s "$m/$f")
        for ((i = 4; i < size; i += 7)); do
            head -c $i "$m/$f" >"$tmp/cut.json.${f##*.}"
            rejects 2 'cut.json[^ ]*: ' tok -o "$tmp/p/s" "$tmp/cut.json.${f##*.}" || return
        done
        { cat "$m/$f"; printf junk; } >"$tmp/more.json.${f##*.}"
        rejects 2 'something else follows\|damaged' tok -o "$tmp/p/s" "$tmp/more.json.${f##*.}" || return
    done
    zstd -qdc "$data/sample.jsonl.zst" | gzip -c >"$tmp/s.jsonl.gz"
    quiet tok --print-ids "$tmp/s.jsonl.gz" | cmp - <(tok --print-ids "$data/sample.jsonl.zst") || return
    size=$(stat -c %s "$tmp/s.jsonl.gz")
    for ((i = 0; i < flips; i++)); do   # not the first ten bytes: some of them are a date that nothing protects
        flip "$tmp/s.jsonl.gz" "$tmp/flip.jsonl.gz" $(((RANDOM * 32768 + RANDOM) % (size - 10) + 10)) $((RANDOM % 8))
        rejects 2 'flip.jsonl.gz: ' tok -o "$tmp/p/s" "$tmp/flip.jsonl.gz" || return
    done
    nothing_left "$tmp/p"
}

# Formats that tokenize does not read are refused by name, packed or not, under any name.
test_formats() {
    local what mark n=0 f
    while read -r what mark; do
        for f in x.txt x.jsonl; do
            { bytes $mark; head -c 600 /dev/zero; } >"$tmp/$f"
            rejects 2 "$f: an\? \?${what//_/ }; \|$f: ${what//_/ }; " tok -o "$tmp/o/s" "$tmp/$f" || return
        done
        gzip -c "$tmp/x.txt" >"$tmp/x.gz"
        rejects 2 "x.gz: .*${what//_/ } in gzip data; " tok -o "$tmp/o/s" "$tmp/x.gz" || return
        zstd -qc "$tmp/x.txt" >"$tmp/x"
        rejects 2 "standard input: .*${what//_/ } in zstd data; " tok -o "$tmp/o/s" - <"$tmp/x" || return
        n=$((n + 1))
    done <<'END'
bzip2_data 425A6839314159265359
xz_data FD377A585A00
lzma_data 5D00008000
lz4_data 04224D18
zip_archive 504B0304
7z_archive 377ABCAF271C
rar_archive 526172211A07
parquet_file 50415231
Arrow_file 4152524F57310000
Avro_file 4F626A01
NumPy_file 934E554D5059
SQLite_database 53514C69746520666F726D6174203300
PDF_file 255044462D
token_shard 88D8340101000000
END
    { head -c 257 /dev/zero | tr '\0' n; printf 'ustar  '; head -c 700 /dev/zero; } >"$tmp/a.tar"
    gzip -c "$tmp/a.tar" >"$tmp/a.tgz"
    rejects 2 'a.tar: a tar archive' tok -o "$tmp/o/s" "$tmp/a.tar" || return
    rejects 2 'a.tgz: a tar archive in gzip data' tok -o "$tmp/o/s" "$tmp/a.tgz" || return
    echo "$hello" | gzip | zstd -q >"$tmp/twice.jsonl.zst"
    rejects 2 'packed twice, gzip data in zstd data' tok -o "$tmp/o/s" "$tmp/twice.jsonl.zst" || return
    for f in gz zst zstd bz2 xz zip parquet; do         # a name that promises packed data which are not there
        echo "$hello" >"$tmp/no.jsonl.$f"
        rejects 2 'does not start like' tok -o "$tmp/o/s" "$tmp/no.jsonl.$f" || return
    done
    for f in 'BZh9 is a sign' '7z is short' 'Obj 1' 'Rar! said he' 'ustar' 'PK'; do     # text that resembles them
        printf '%s' "$f" >"$tmp/b.txt"
        "$TOKENIZE" --bytes --print-ids "$tmp/b.txt" >/dev/null || { say "refused: $f"; return; }
    done
    nothing_left "$tmp/o" && echo "$n formats"
}

test_encodings() {
    local e f bom='\xef\xbb\xbf'
    mkdir "$tmp/m"
    printf "$bom$hello\n" >"$tmp/m/bom.jsonl"
    printf "$bom$hello\r\n" | gzip -c >"$tmp/m/bom.jsonl.gz"
    printf "$bom\n$bom$hello\n$bom" >"$tmp/m/joined.jsonl"
    printf "${bom}Hello world" >"$tmp/m/bom.txt"
    printf '{"a":NaN,"text":"Hello world","b":[-Infinity,{"c":Infinity}]}' >"$tmp/m/nan.jsonl"
    for f in "$tmp"/m/*; do is_hello "$f" || return; done
    printf "a$bom" >"$tmp/inside.txt"       # not at the start: it is text
    e=$("$TOKENIZE" --bytes --print-ids "$tmp/inside.txt")
    [ "$e" = '[97,239,187,191]' ] || { say "a mark inside a text: $e"; return; }
    for e in '{"text":NaN}' '{"text":"a","id":-NaN}' '{"text":"a","id":nan}' '{"text":"a","id":Infinit}'; do
        echo "$e" >"$tmp/bad.jsonl"
        rejects 2 'bad.jsonl: line 1, byte' tok -o "$tmp/p/s" "$tmp/bad.jsonl" || return
    done
    for e in UTF-16LE UTF-16BE UTF-32LE UTF-32BE UTF-16 UTF-32; do      # the last two have a byte order mark
        echo "$hello" | iconv -f UTF-8 -t $e >"$tmp/wide.jsonl" || return
        cp "$tmp/wide.jsonl" "$tmp/wide.txt"
        for f in wide.jsonl wide.txt; do rejects 2 "$f: text in ${e:0:6}" tok -o "$tmp/p/s" "$tmp/$f" || return; done
        rejects 2 "standard input: text in ${e:0:6}" tok -o "$tmp/p/s" <"$tmp/wide.jsonl" || return
    done
    nothing_left "$tmp/p" || return
    echo "$hello" >"$tmp/other.txt"         # plain text by its name, but not without a word
    tok --print-ids "$tmp/other.txt" 2>&1 >/dev/null | grep -q '^note: .*other.txt: read as plain text' ||
        say "no note about other.txt"
}

# The largest document does not depend on its place in the file.
test_giant() {
    has_asan && { echo "skip: too slow with sanitizers"; return; }
    local most=$((1 << 28)) first
    lines() {       # FIRST BYTES: the first line or nothing, then a line of that many bytes
        printf "$1"; printf '{"text":'; head -c $(($2 - 12)) /dev/zero | tr '\0' ' '; printf '"b"}'; printf "\n$1"
    }
    for first in '' '{"text":"b"}\n'; do
        lines "$first" $most | quiet "$TOKENIZE" --bytes --print-ids >/dev/null || return
        lines "$first" $((most + 1)) | rejects 2 'a line of more than 256 MB' "$TOKENIZE" --bytes --print-ids || return
    done
    mkfifo "$tmp/a.txt"
    { printf 'a '; head -c $((most + 1)) /dev/zero | tr '\0' a; } >"$tmp/a.txt" &
    rejects 2 'more than 256 MB without white space' tok --print-ids "$tmp/a.txt"
}

# ----------------------------------------------------------------------------------------------------------------------
# Validation tokens, empty input, counts

shard_sizes() {     # FOLDER: names of its shards and their numbers of tokens
    local f
    for f in "$1"/*_val_* "$1"/*_train_*; do
        [ ! -e "$f" ] || echo -n "${f##*/s_}:$((($(stat -c %s "$f") - 1024) / 2)) "
    done
}

# Without --val-tokens 1% of the tokens are for validation, at most a shard, and the rest is for training.
test_val_default() {
    local n want size=(--bytes --shard-size 1000)
    head -c 200000 "$data/sample.jsonl.zst" | od -An -v -tx1 | tr -d ' \n' >"$tmp/text"
    while read -r n want; do    # a document of n bytes has n + 1 tokens
        rm -rf "$tmp"/[ab]
        head -c $n "$tmp/text" >"$tmp/t.txt"
        quiet "$TOKENIZE" "${size[@]}" -o "$tmp/a/s" "$tmp/t.txt" || return
        quiet "$TOKENIZE" "${size[@]}" --val-tokens 0 -o "$tmp/b/s" "$tmp/t.txt" || return
        [ "$(shard_sizes "$tmp/a")" = "$want " ] || { say "$n bytes: $(shard_sizes "$tmp/a")"; return; }
        tokens_of $(ls "$tmp"/a/*_val_* 2>/dev/null; ls "$tmp"/a/*_train_*) >"$tmp/stream"
        tokens_of "$tmp"/b/*.bin | cmp - "$tmp/stream" || return
        quiet "$TOKENIZE" --verify "$tmp/a/s" >"$tmp/out" || { cat "$tmp/out"; return 1; }
    done <<'END'
50 train_000000.bin:51
98 train_000000.bin:99
99 val_000000.bin:1 train_000001.bin:99
999 val_000000.bin:10 train_000001.bin:990
1000 val_000000.bin:10 train_000001.bin:990 train_000002.bin:1
3333 val_000000.bin:33 train_000001.bin:967 train_000002.bin:1000 train_000003.bin:1000 train_000004.bin:334
END
    # the manifest's bytes of text are those of each shard
    for n in 1 2 3 4 5 6 7; do echo "{\"text\":\"$(head -c $((n * 30)) "$tmp/text")\"}"; done >"$tmp/t.jsonl"
    for ((n = 0; n < 5; n++)); do cat "$tmp/t.jsonl"; done >"$tmp/t5.jsonl"
    quiet "$TOKENIZE" "${size[@]}" -o "$tmp/c/s" "$tmp/t5.jsonl" || return
    for n in "$tmp"/c/*.bin; do
        want=$("$TOKENIZE" --bytes --decode "$n" | sed 's/<|endoftext|>//g' | wc -c)
        has "$tmp/c/s_manifest.json" "${n##*/}.*\"bytes\": $want," || { say "$n has $want bytes of text"; return; }
    done
    # much text: a whole shard, byte for byte as if it had been asked for
    quiet "$TOKENIZE" "${size[@]}" -o "$tmp/d/s" "$tmp/text" || return
    quiet "$TOKENIZE" "${size[@]}" --val-tokens 1000 -o "$tmp/e/s" "$tmp/text" || return
    diff -r "$tmp/d" "$tmp/e" || return
    # files one by one: the first decides, and an empty one decides nothing
    : >"$tmp/empty.jsonl"
    head -c 3000 "$tmp/text" >"$tmp/small.txt"
    for n in empty.jsonl small.txt text; do
        quiet "$TOKENIZE" "${size[@]}" --source "$tmp/$n" -o "$tmp/f/s" "$tmp/$n" || return
    done
    has "$tmp/f/s_manifest.json" '"val_tokens": 30,' || { say "$(head -9 "$tmp/f/s_manifest.json")"; return; }
    quiet "$TOKENIZE" --verify "$tmp/f/s" >/dev/null || return
    n=$tmp/t.jsonl
    size+=(--source "$n")
    rejects 2 'begun with .*--val-tokens 30' "$TOKENIZE" "${size[@]}" --val-tokens 31 -o "$tmp/f/s" "$n" || return
    head -c 4000 "$tmp/text" >"$tmp/large.txt"
    quiet "$TOKENIZE" --bytes --shard-size 1000 --source "$tmp/large.txt" -o "$tmp/g/s" "$tmp/large.txt" || return
    has "$tmp/g/s_manifest.json" '"val_tokens": 1000,' || { say "$(head -9 "$tmp/g/s_manifest.json")"; return; }
    # an explicit number that leaves nothing to train on is not silent
    "$TOKENIZE" --bytes --val-tokens 5000 -o "$tmp/h/s" "$tmp/small.txt" 2>"$tmp/stderr"
    has "$tmp/stderr" '^note: all tokens are for validation' || say "no note that all tokens are for validation"
}

# Input without text leaves no data set behind, so its name stays free.
test_empty_input() {
    local f
    : >"$tmp/a.txt"
    : >"$tmp/a.jsonl"
    printf '\n \n' >"$tmp/blank.jsonl"
    echo '{"text":null}' >"$tmp/null.jsonl"
    echo '{"text":""}' >"$tmp/none.jsonl"
    : | gzip -c >"$tmp/a.jsonl.gz"
    printf '\xef\xbb\xbf' >"$tmp/bom.txt"
    for f in a.txt a.jsonl blank.jsonl null.jsonl none.jsonl a.jsonl.gz bom.txt; do
        rejects 2 'the input has no text' tok -o "$tmp/o/s" "$tmp/$f" || return
        rejects 2 'the input has no text' tok --val-tokens 0 -o "$tmp/o/s" "$tmp/$f" || return
    done
    rejects 2 'the input has no text' tok -o "$tmp/o/s" </dev/null || return
    nothing_left "$tmp/o" || return
    quiet tok --print-ids "$tmp/a.jsonl" || return
    echo "$hello" | quiet tok -o "$tmp/o/s"
}

# --tokens takes <|endoftext|> in a text for one token or for ordinary text, whichever the count was made with.
test_special_tokens() {
    local ordinary special
    printf '{"text":"Hi<|endoftext|> world<|endoftext|>"}\n{"text":"<|endoftext|"}\n{"text":null}\n' >"$tmp/a.jsonl"
    tok --print-ids "$tmp/a.jsonl" >"$tmp/ids" || return
    special=$((4 + $(sed -n 2p "$tmp/ids" | tr , '\n' | wc -l)))        # Hi, the mark, world, the mark
    ordinary=$(sed 2q "$tmp/ids" | tr , '\n' | wc -l)
    quiet tok --tokens $ordinary -o "$tmp/a/s" "$tmp/a.jsonl" || return
    quiet tok --tokens $special -o "$tmp/b/s" "$tmp/a.jsonl" || return
    diff -r "$tmp/a" "$tmp/b" || return
    rejects 2 "have $ordinary tokens, or $special if" tok --tokens 4 -o "$tmp/o/s" "$tmp/a.jsonl" || return
    rejects 2 'tokens.* instead of 22 ' "$TOKENIZE" --bytes --tokens 22 -o "$tmp/o/s" "$tmp/a.jsonl" || return
    nothing_left "$tmp/o"
}

# Folders and files with [ ] * ? in their names are taken as they are; what follows an existing folder may be a glob.
test_brackets() {
    local train=${TRAIN:-$(dirname "$TOKENIZE")/../train_t6} d glob
    [ -x "$train" ] || { echo "skip: no $train"; return; }
    train=$(realpath "$train")
    try() {     # GLOB: the trainer finds shards
        "$train" -i "$1" -v 0 -s 0 -m 0 -x 1 --n-layer 1 --n-embd 32 --n-head 2 --head-dim 16 -t 64 -b 1 -d 64 \
            --threads 1 -o "$tmp/run" >"$tmp/log" 2>&1 || { say "-i $1: $(tail -1 "$tmp/log")"; return; }
        rm -rf "$tmp/run"
    }
    head -c 3000 "$vocab" >"$tmp/t.txt"
    for d in 'r[1]' 'a*b?' 'back\slash' '[' 'x]y'; do
        quiet "$TOKENIZE" --bytes --val-tokens 0 --shard-size 1000 -o "$tmp/$d/x" "$tmp/t.txt" || return
        for glob in x_train_000000.bin 'x_train_*.bin' 'x_train_00000[0-1].bin'; do try "$tmp/$d/$glob" || return; done
        quiet "$TOKENIZE" --verify "$tmp/$d/x" >/dev/null || return
    done
    quiet "$TOKENIZE" --bytes --val-tokens 0 -o "$tmp/y[1]" "$tmp/t.txt" || return
    try "$tmp/y[1]_train_000000.bin" || return
    (cd "$tmp" && try 'r[1]/x_train_*.bin' && try 'y[1]_train_000000.bin') || return
    rejects 2 'no such file' "$train" -i "$tmp/r[1]/y_*.bin" -v 0 -x 1 -o "$tmp/run"
}

# ----------------------------------------------------------------------------------------------------------------------

test_full_disk() {
    local rc
    tok --print-ids "$data/cases.jsonl" 2>"$tmp/stderr" >/dev/full &&
        { say "--print-ids to a full disk exits with 0"; return; }
    mkdir "$tmp/disk"
    if mount -t tmpfs -o size=400k none "$tmp/disk" 2>/dev/null; then
        rejects 1 'No space left' tok --shard-size 100000 -o "$tmp/disk/s" "$data/sample.jsonl.zst"
        rc=$?
        [ $rc = 0 ] && { nothing_left "$tmp/disk"; rc=$?; }
        umount "$tmp/disk"
        [ $rc = 0 ] || return
    else
        (
            trap '' XFSZ
            ulimit -f 300
            rejects 1 'File too large' tok -o "$tmp/disk/s" "$data/sample.jsonl.zst"
        ) || return
        nothing_left "$tmp/disk"
    fi
}

# Memory does not grow with the input: 64 times the sample takes as much as 16 times.
test_memory() {
    local i a b
    [ -x /usr/bin/time ] || { echo "skip: no /usr/bin/time"; return; }
    has_asan && { echo "skip: sanitizers need extra memory"; return; }
    peak() {
        for ((i = 0; i < $1; i++)); do cat "$data/sample.jsonl.zst"; done |
            /usr/bin/time -f %M "$TOKENIZE" --vocab "$vocab" --threads 2 -o "$tmp/$1/s" 2>&1 | tail -n 1
    }
    a=$(peak 16) b=$(peak 64)
    [ "$b" -lt $((a + 8000)) ] || { say "$a kB, then $b kB"; return; }
    echo "$b kB with 2 threads"
}

# ----------------------------------------------------------------------------------------------------------------------
# Parquet

have_duckdb() {
    local d
    for d in "${DUCKDB:-}" "$(type -P duckdb)" "${HOME:-}/.duckdb/cli/latest/duckdb" "$root/data/duckdb/duckdb"; do
        [ -n "$d" ] && "$d" -version >/dev/null 2>&1 && { export DUCKDB=$d; return; }
    done
    return 1
}
need_duckdb() { have_duckdb || { echo "skip: DuckDB is not installed, and installing it failed"; return 1; }; }
sql() { "$DUCKDB" -init /dev/null -c "$1" >/dev/null; }
make_parquet() {    # FOLDER: the sample as five parquet files
    local i json="read_json('$tmp/sample.jsonl', maximum_object_size = 100000000)"
    zstd -qdc "$data/sample.jsonl.zst" >"$tmp/sample.jsonl"
    mkdir -p "$1"
    for i in 0 1 2 3 4; do
        sql "COPY (SELECT * FROM $json LIMIT 40 OFFSET $((40 * i)))
            TO '$1/p$i.parquet' (FORMAT parquet, ROW_GROUP_SIZE 2048)" || return
    done
}
edu() { data/fineweb_edu.sh --vocab "$vocab" --shard-size 60000 --val-tokens 30000 "$@"; }

# Descriptors that are closed at the start: no line meant for the screen lands in a shard or the manifest.
test_closed() {
    local closed
    quiet tok -o "$tmp/d/s" "$data/sample.jsonl.zst" || return
    for closed in '<&-' '>&-' '2>&-' '<&- >&- 2>&-'; do
        rm -rf "$tmp/c"
        eval 'tok -o "$tmp/c/s" "$data/sample.jsonl.zst" >/dev/null 2>"$tmp/stderr"' "$closed" ||
            { say "$closed: $(cat "$tmp/stderr")"; return; }
        diff -r "$tmp/c" "$tmp/d" || return
    done
    rejects 1 'cannot write' sh -c '"$@" >/dev/full' sh "$TOKENIZE" --help || return
    rejects 1 'cannot write' sh -c '"$@" >/dev/full' sh "$TOKENIZE" --verify "$tmp/d/s"
}

# Limits of address space, threads, file sizes and descriptors: the shards are the same, or one line says why not and
# none is left, whichever thread it is that gets no memory.
test_limits() {
    local limit rc limits="-u 1,-n 4,-n 5,-f 100,-f 1,-s unlimited,-s 100000000"
    quiet tok --shard-size 50000 -o "$tmp/d/s" "$data/sample.jsonl.zst" || return
    { zstd -qdc "$data/sample.jsonl.zst"; printf '{"text": "'; head -c 40000000 /dev/zero | tr '\0' x; echo '"}'; } \
        >"$tmp/giant.jsonl"
    if ! has_asan; then         # sanitizers take terabytes of address space
        limits+=",-v 10000,-v 20000,-v 30000,-v 40000,-v 60000,-v 100000"
        rejects 1 'out of memory' bash -c 'ulimit -v 150000; exec "$@"' bash "$TOKENIZE" --bytes --threads 2 \
            --shard-size 50000 -o "$tmp/g/s" "$tmp/giant.jsonl" || return
        nothing_left "$tmp/g" || return
    fi
    while read -r limit; do
        rm -rf "$tmp/c"
        ASAN_OPTIONS=detect_leaks=0 bash -c "ulimit $limit; "'exec "$@"' bash "$TOKENIZE" --vocab "$vocab" --threads 2 \
            --shard-size 50000 -o "$tmp/c/s" "$data/sample.jsonl.zst" 2>"$tmp/stderr"
        rc=$?
        [ $rc -le 2 ] && [ "$(wc -l <"$tmp/stderr")" = 1 ] ||
            { say "ulimit $limit: exit code $rc: $(cat "$tmp/stderr")"; return; }
        if [ $rc = 0 ]; then diff -r "$tmp/c" "$tmp/d"; else nothing_left "$tmp/c"; fi || { echo "$limit"; return 1; }
    done <<<"${limits//,/$'\n'}"
}

test_parquet() {
    need_duckdb || return 0
    make_parquet "$tmp/p" || return
    quiet edu --parquet "$tmp/p/*.parquet" --out "$tmp/o" || return
    tokens_of "$tmp"/o/*_val_* "$tmp"/o/*_train_* | cmp - "$data/sample.u16" || return
    quiet "$TOKENIZE" --verify "$tmp/o/fineweb_edu" >/dev/null || return
    cp -r "$tmp/o" "$tmp/before"
    quiet edu --parquet "$tmp/p/*.parquet" --out "$tmp/o" --delete-parquet || return
    diff -r "$tmp/before" "$tmp/o" || return
    [ -z "$(ls "$tmp/p")" ] || say "not deleted: $(ls "$tmp/p")"
}

test_bad_parquet() {
    need_duckdb || return 0
    make_parquet "$tmp/p" || return
    local f=$tmp/p/p1.parquet size i seen=0
    size=$(stat -c %s "$f")
    bad() {     # FILE PATTERN: the file must be refused, and the shards must stay whole
        edu --parquet "$1" --out "$tmp/o" >"$tmp/stdout" 2>"$tmp/stderr"
        [ $? = 2 ] && grep -q -e "$2" "$tmp/stderr" || { say "$1: $(cat "$tmp/stderr")"; return; }
        all_whole "$tmp/o"
    }
    mkdir "$tmp/q"
    head -c $((size / 2)) "$f" >"$tmp/q/cut.parquet"
    bad "$tmp/q/cut.parquet" 'cut.parquet: DuckDB: ' || return
    : >"$tmp/q/empty.parquet"
    bad "$tmp/q/empty.parquet" 'empty.parquet: DuckDB: ' || return
    sql "COPY (SELECT id, url FROM '$f') TO '$tmp/q/column.parquet' (FORMAT parquet)"
    bad "$tmp/q/column.parquet" 'column.parquet: there is no column text; its columns are id, url' || return
    sql "COPY (SELECT 5 AS text) TO '$tmp/q/number.parquet' (FORMAT parquet)"
    bad "$tmp/q/number.parquet" 'number.parquet: its column text is of type INTEGER' || return
    # a good file, then copies of it with a flipped bit
    quiet edu --parquet "$tmp/p/p0.parquet" --out "$tmp/o" || return
    cp -r "$tmp/o" "$tmp/before"
    quiet edu --parquet "$f" --out "$tmp/o" || return
    cp -r "$tmp/o" "$tmp/after"
    mkdir "$tmp/sums" "$tmp/no_sums"
    (cd "$tmp/p" && sha256sum p1.parquet) >"$tmp/sums/SHA256SUMS"
    for ((i = 0; i < flips; i++)); do
        flip "$f" "$tmp/no_sums/p1.parquet" $(((RANDOM * 32768 + RANDOM) % size)) $((RANDOM % 8))
        cp "$tmp/no_sums/p1.parquet" "$tmp/sums/"
        rm -rf "$tmp/o" && cp -r "$tmp/before" "$tmp/o"
        bad "$tmp/sums/p1.parquet" 'its SHA-256 is not' || return
        diff -r "$tmp/before" "$tmp/o" || return
        # Without a checksum only damage to the structure, the compression or the number of tokens is found.
        if ! edu --parquet "$tmp/no_sums/p1.parquet" --out "$tmp/o" 2>"$tmp/stderr"; then
            seen=$((seen + 1))
            diff -r "$tmp/before" "$tmp/o" || return
        fi
    done
    # null and invalid text
    rm -rf "$tmp/o"
    sql "COPY (SELECT * FROM (VALUES ('a'), (NULL), ('b')) t(text)) TO '$tmp/q/null.parquet' (FORMAT parquet)"
    edu --parquet "$tmp/q/null.parquet" --out "$tmp/o" 2>"$tmp/stderr"
    has "$tmp/stderr" 'skipped 1 rows whose text is null' || { say "a null text is not counted"; return; }
    has "$tmp/o/fineweb_edu_manifest.json" '"documents": 2,' || { say "a null text is not skipped"; return; }
    echo "$flips flipped bits: all found with a checksum, $seen without"
}

# A run that is killed at random moments and restarted until it is done makes the shards of an undisturbed run.
test_kill() {
    need_duckdb || return 0
    make_parquet "$tmp/p" || return
    quiet edu --parquet "$tmp/p/*.parquet" --out "$tmp/ref" || return
    local start=$(date +%s%N) i whole=0 pid
    quiet edu --parquet "$tmp/p/*.parquet" --out "$tmp/time" || return
    local ms=$((($(date +%s%N) - start) / 1000000))
    for ((i = 0; i < kills; i++)); do
        # Every third kill hits only the script; the processes that it started keep running.
        set -m
        edu --parquet "$tmp/p/*.parquet" --out "$tmp/o" 2>/dev/null &
        pid=$!
        set +m
        sleep "$(printf '%d.%03d' $((RANDOM % ms / 1000)) $((RANDOM % ms % 1000)))"
        if ((i % 3 == 2)); then kill -9 $pid 2>/dev/null; else kill -9 -- -$pid 2>/dev/null; fi
        wait $pid 2>/dev/null
        all_whole "$tmp/o" || return
        if ((i % 4 == 3)); then
            quiet edu --parquet "$tmp/p/*.parquet" --out "$tmp/o" || return
            diff -r "$tmp/ref" "$tmp/o" || return
            rm -rf "$tmp/o"
            whole=$((whole + 1))
        fi
    done
    echo "$kills kills, $whole data sets"
}

# A killed run of tokenize leaves only whole shards, and what it leaves does not disturb the next run.
test_kill_plain() {
    local i pid
    for ((i = 0; i < 20; i++)); do cat "$data/sample.jsonl.zst"; done >"$tmp/s.jsonl.zst"
    quiet tok --shard-size 500000 -o "$tmp/ref/s" "$tmp/s.jsonl.zst" || return
    for ((i = 0; i < 10; i++)); do
        "$TOKENIZE" --vocab "$vocab" --shard-size 500000 -o "$tmp/o/s" "$tmp/s.jsonl.zst" 2>/dev/null &
        pid=$!
        sleep "0.$((RANDOM % 4))$((RANDOM % 10))"
        kill -9 $pid 2>/dev/null
        wait $pid 2>/dev/null
        all_whole "$tmp/o" || return
        [ -e "$tmp/o/s_manifest.json" ] || quiet tok --shard-size 500000 -o "$tmp/o/s" "$tmp/s.jsonl.zst" || return
        diff -r "$tmp/ref" "$tmp/o" || return
        rm -rf "$tmp/o"
    done
}

# Much text from few packed bytes, with and without zstd's checksum, ending near the end of a block.
test_zstd() {
    local n check m=$tmp/o/s_manifest.json
    for n in 1 1048551 1048575 1048576 1048577 2097152 5000001; do
        for check in --check --no-check; do
            { printf '{"text":"'; head -c $n /dev/zero | tr '\0' ' '; printf '"}\n{"text":"b"}\n'; } |
                zstd -q $check >"$tmp/a.jsonl.zst"
            quiet "$TOKENIZE" --bytes --val-tokens 0 -o "$tmp/o/s" "$tmp/a.jsonl.zst" || return
            has $m "\"tokens\": $((n + 3)), " || { say "$n $check: $(cat $m)"; return; }
            rm -rf "$tmp/o"
        done
    done
}

# The scripts in data/, as far as they need no network.
test_scripts() {
    cp "$vocab" "$tmp/v"
    data/gpt2_vocab.sh "$tmp/v" | grep -q 'is there' || { say "gpt2_vocab.sh does not accept the right file"; return; }
    rejects 2 'not the text' data/tinyshakespeare.sh --bytes --out "$tmp/o" --text "$data/cases.jsonl" || return
    rejects 2 'not a flag' data/tinyshakespeare.sh --nonsense || return
    rejects 2 'not a flag' data/fineweb_edu.sh --nonsense || return
    if have_duckdb; then
        rejects 2 'no such file' data/fineweb_edu.sh --bytes --out "$tmp/o" --parquet "$tmp/none*" || return
    fi
    local nowhere=http://127.0.0.1:1
    https_proxy=$nowhere PIP_NO_INDEX=1 PIP_FIND_LINKS='' rejects 1 'put it at' timeout 60 data/gpt2_vocab.sh "$tmp/w"
}

# Of two runs with one name, the second is refused and the first is not disturbed.
test_two_runs() {
    mkfifo "$tmp/in"
    "$TOKENIZE" --vocab "$vocab" --shard-size 50000 -o "$tmp/o/s" <"$tmp/in" 2>"$tmp/first" &
    exec 8>"$tmp/in"
    zstd -qdc "$data/sample.jsonl.zst" >&8
    sleep 0.5
    rejects 2 'another run' tok -o "$tmp/o/s" "$data/cases.jsonl"
    local rc=$?
    exec 8>&-
    wait $! || { say "the first run: $(cat "$tmp/first")"; return; }
    [ $rc = 0 ] && quiet "$TOKENIZE" --verify "$tmp/o/s" >/dev/null
}

# Downloads from test/hub.py, which stops in the middle of each file and once sends a wrong byte.
test_download() {
    need_duckdb || return 0
    type -P python3 >/dev/null || { echo "skip: test/hub.py needs python3"; return; }
    make_parquet "$tmp/p" || return
    start_hub "$tmp/p"
    quiet hub_set --delete-parquet --out "$tmp/o"
    local rc=$?
    stop_hub
    [ $rc = 0 ] || return
    tokens_of "$tmp"/o/*_val_* "$tmp"/o/*_train_* | cmp - "$data/sample.u16" || return
    [ -z "$(find "$tmp/o/parquet" -name '*.parquet*')" ] || { say "not deleted: $(ls "$tmp/o/parquet")"; return; }
    has "$tmp/stderr" 'p3.parquet: damaged' || say "the wrong byte was not noticed"
}

# ----------------------------------------------------------------------------------------------------------------------
# The scripts: what real files, folders and servers do to them

parquet_of() { mkdir -p "$(dirname "$1")" && sql "COPY ($2) TO '${1//\'/\'\'}' (FORMAT parquet)"; }    # FILE SQL
text_of() { "$TOKENIZE" --vocab "$vocab" --decode "$1"/*.bin; }     # FOLDER: the text of its shards
source_count() { grep -c '"file": .*"documents": ' "$1/fineweb_edu_manifest.json"; }

# takes FILE TEXT: fineweb_edu.sh makes a set of the file, and its text is this, with | for <|endoftext|>
takes() {
    local text=${2//|/<|endoftext|>}
    rm -rf "$tmp/o"
    quiet edu --parquet "$1" --out "$tmp/o" || return
    [ "$(text_of "$tmp/o")" = "$text" ] || say "$1: $(text_of "$tmp/o") instead of $text"
}

# refuses_set CODE PATTERN ARGUMENTS...: fineweb_edu.sh ends with CODE, and its last line matches
refuses_set() {
    edu "${@:3}" >"$tmp/stdout" 2>"$tmp/stderr"
    [ $? = "$1" ] && tail -n 1 "$tmp/stderr" | grep -q -e "$2" || say "${*:3}: \"$2\" is not in: $(cat "$tmp/stderr")"
}

# A column of text in any form that can be text is taken, any other is refused by name.
test_columns() {
    need_duckdb || return 0
    local p=$tmp/p.parquet
    parquet_of "$p" "SELECT encode('It''s café 日本') AS text" && takes "$p" "|It's café 日本" || return
    parquet_of "$p" "SELECT unnest(['\"hello\"', 'null', '12', NULL])::JSON AS text" &&
        takes "$p" '|"hello"|null|12' || return
    parquet_of "$p" "SELECT unnest(['a', 'b'])::ENUM('a', 'b') AS text" && takes "$p" '|a|b' || return
    parquet_of "$p" "SELECT 'a' AS \"Text\", 'b' AS text_1" && takes "$p" '|a' || return
    parquet_of "$p" "SELECT '\\xFF'::BLOB AS text" &&
        refuses_set 2 'p.parquet: not added' --parquet "$p" --out "$tmp/n" || return
    parquet_of "$p" "SELECT 'a' AS \"Text\", 'b' AS texu" && LC_ALL=C sed -i s/texu/text/g "$p" &&
        refuses_set 2 'several columns named text' --parquet "$p" --out "$tmp/n" || return
    parquet_of "$p" "SELECT 'a' AS content, 1 AS id" &&
        refuses_set 2 'no column text; its columns are content, id$' --parquet "$p" --out "$tmp/n" || return
    parquet_of "$p" "SELECT ['a'] AS text" &&
        refuses_set 2 'its column text is of type VARCHAR\[\]' --parquet "$p" --out "$tmp/n" || return
    # token_count: in a file without rows, null, not a number, with a fraction of zero, or wrong
    parquet_of "$p" "SELECT 'a' AS text, 1 AS token_count LIMIT 0"
    quiet edu --parquet "$p" --out "$tmp/empty" || return
    parquet_of "$p" "SELECT 'a' AS text, NULL::BIGINT AS token_count" && takes "$p" '|a' || return
    parquet_of "$p" "SELECT unnest(['a', 'b']) AS text, unnest([1, NULL]) AS token_count" && takes "$p" '|a|b' || return
    parquet_of "$p" "SELECT 'a' AS text, [1] AS token_count" && takes "$p" '|a' || return
    # FineWeb's own counter takes <|endoftext|> in a text for one token
    parquet_of "$p" "SELECT 'a <|endoftext|> b' AS text, 4 AS token_count" && takes "$p" '|a | b' || return
    parquet_of "$p" "SELECT unnest(['a', NULL]) AS text, unnest([1, 'nan'::DOUBLE]) AS token_count" &&
        takes "$p" '|a' || return
    parquet_of "$p" "SELECT 'a' AS text, 2 AS \"Token_Count\"" &&
        refuses_set 2 'differs from its token_count' --parquet "$p" --out "$tmp/n" || return
    nothing_left_but_lock "$tmp/n"
}
nothing_left_but_lock() { [ -z "$(ls "$1")" ] || say "left behind: $(ls "$1")"; }

# A path that exists is taken as it is, and no part of it is taken for a column or a pattern.
test_paths() {
    need_duckdb || return 0
    local d="$tmp/r[1]/text=raw/a*b" odd="p [1] {x} \"q\" 'r' \\s.parquet"
    parquet_of "$d/$odd" "SELECT 'one' AS text"
    takes "$d/$odd" '|one' || return
    parquet_of "$tmp/r[1]/text=raw/c/id=7/2.parquet" "SELECT 'two' AS text, 1 AS id"
    rm -rf "$tmp/o"
    ln -s "$DUCKDB" "$tmp/duckdb"
    (cd "$tmp" && DUCKDB=./duckdb quiet "$root/data/fineweb_edu.sh" --vocab "$vocab" --out o \
        --parquet 'r[1]/*/c/*/*.parquet') || return
    [ "$(text_of "$tmp/o")" = '<|endoftext|>two' ] || { say "$(text_of "$tmp/o")"; return; }
    quiet edu --parquet "$d/*.parquet" --out "$tmp/t" && quiet edu --parquet "$d/$odd" --out "$tmp/t" || return
    [ "$(source_count "$tmp/t")" = 1 ] || { say "$odd was added twice"; return; }
    # equal names in several folders are different files, in one run or in several
    parquet_of "$tmp/e/a/0.parquet" "SELECT 'in a' AS text" && parquet_of "$tmp/e/b/0.parquet" "SELECT 'in b' AS text"
    takes "$tmp/e/*/0.parquet" '|in a|in b' || return
    has "$tmp/o/fineweb_edu_manifest.json" '"file": "b%2F0.parquet"' || { say "not listed with its folder"; return; }
    quiet edu --parquet "$tmp/e/b/0.parquet" --out "$tmp/o" && quiet edu --parquet "$tmp/e/*/*" --out "$tmp/o" || return
    [ "$(source_count "$tmp/o")" = 2 ] || { say "a file was added twice"; return; }
    takes "$tmp/e/a/0.parquet" '|in a' || return
    refuses_set 2 'a different file of this name' --parquet "$tmp/e/b/0.parquet" --out "$tmp/o" || return
    refuses_set 2 'no such file' --parquet "$tmp/e/c.parquet" --out "$tmp/o" || return
    refuses_set 2 'not a file' --parquet "$tmp/e" --out "$tmp/o"
}

# --delete-parquet deletes only files whose content is in the shards.
test_delete() {
    need_duckdb || return 0
    local d=$tmp/d
    parquet_of "$d/a/0.parquet" "SELECT 'first text' AS text"
    parquet_of "$d/b/0.parquet" "SELECT 'other text' AS text"
    [ "$(stat -c %s "$d/a/0.parquet")" = "$(stat -c %s "$d/b/0.parquet")" ] || { say "the sizes differ"; return; }
    cp -r "$d/a" "$d/c"
    quiet edu --parquet "$d/a/0.parquet" --out "$tmp/o" || return
    refuses_set 2 'a different file of this name' --parquet "$d/b/0.parquet" --out "$tmp/o" --delete-parquet || return
    [ -e "$d/b/0.parquet" ] || { say "deleted a file that was never added"; return; }
    parquet_of "$d/n/1.parquet" "SELECT 1 AS text"
    refuses_set 2 'of type INTEGER' --parquet "$d/n/1.parquet" --out "$tmp/o" --delete-parquet || return
    [ -e "$d/n/1.parquet" ] || { say "deleted a file that was refused"; return; }
    quiet edu --parquet "$d/c/0.parquet" --out "$tmp/o" --delete-parquet || return
    [ ! -e "$d/c/0.parquet" ] || say "not deleted, but its content is in the shards"
}

# Over an existing set, flags that would have made another one are refused.
test_existing_set() {
    local flags m tiny=(data/tinyshakespeare.sh --out "$tmp/t")
    quiet "$TOKENIZE" --bytes --val-tokens 32768 -o "$tmp/t/tinyshakespeare" "$data/cases.jsonl" || return
    quiet "${tiny[@]}" --bytes && quiet "${tiny[@]}" --bytes --val-tokens 032768 || return
    m='made with --shard-size 100000000 --val-tokens 32768 --bytes; give the same'
    for flags in "" "--vocab $vocab" "--bytes --val-tokens 1" "--bytes --shard-size 5000"; do
        rejects 2 "$m" "${tiny[@]}" $flags || return
    done
    rejects 2 'val-tokens junk: not a whole number' "${tiny[@]}" --bytes --val-tokens junk || return
    rejects 2 'out: a value is missing' "${tiny[@]}" --out '' || return
    : >"$tmp/t/tinyshakespeare_manifest.json"
    rejects 2 'damaged, or not a manifest' "${tiny[@]}" --bytes || return
    rejects 2 'no such file' "${tiny[@]}" --bytes --out "$tmp/u" --text "$tmp" || return
    need_duckdb || return 0
    m="made with --shard-size 60000 --val-tokens 30000 and GPT-2's"
    parquet_of "$tmp/p.parquet" "SELECT 'a' AS text"
    quiet edu --parquet "$tmp/p.parquet" --out "$tmp/o" || return
    cp -r "$tmp/o" "$tmp/before"
    for flags in --bytes "--val-tokens 1" "--shard-size 1"; do
        rejects 2 "$m" edu --parquet "$tmp/p.parquet" --out "$tmp/o" $flags || return
    done
    rejects 2 "$m" data/fineweb_edu.sh --vocab "$vocab" --parquet "$tmp/p.parquet" --out "$tmp/o" || return
    diff -r "$tmp/before" "$tmp/o" || return
    mkdir -p "$tmp/o/parquet" && echo 10B >"$tmp/o/parquet/sample"
    rejects 2 'has the sample 10B, not 100B' edu 100B --out "$tmp/o"
}

# Every form of SHA256SUMS that programs write is understood: a wrong sum in it refuses the file.
test_sums() {
    need_duckdb || return 0
    local f="$tmp/s/a b.parquet" n='a b.parquet' wrong right line sums=$tmp/s/SHA256SUMS
    parquet_of "$f" "SELECT 'a' AS text"
    right=$(sha256sum <"$f" | cut -d ' ' -f 1)
    wrong=$(tr 0-9a-f f0-9a-e <<<"$right")
    for line in "$wrong  $n" "${wrong^^}  $n" "$wrong *$n" "$wrong  ./$n" "$wrong  .//./$n" "$wrong  $n\r" \
        "$wrong\t$n" "\xef\xbb\xbf$wrong  $n" "$wrong  $tmp/s/$n" "SHA256 ($n) = $wrong" "$wrong  $n\n$wrong  $n" \
        "\\\\$wrong  $n"; do
        printf "$line\n$wrong  b.parquet\n" >"$sums"
        refuses_set 2 'its SHA-256 is not' --parquet "$f" --out "$tmp/o" || { say "for the line $line"; return; }
    done
    for line in "$right  $n\n$wrong  $n" "${right:1}  $n"; do
        printf "$line\n" >"$sums"
        refuses_set 2 'two different sums, or' --parquet "$f" --out "$tmp/o" || { say "for the line $line"; return; }
    done
    for line in "$right  $n" "${right^^} *./$n\r\n$right  $n" "$wrong  x/$n"; do
        printf "$line\n" >"$sums"
        rm -rf "$tmp/o"
        quiet edu --parquet "$f" --out "$tmp/o" || return
    done
    has "$tmp/stderr" 'does not list a b.parquet' || say "no note that the file is not listed"
}

# start_hub FOLDER [MODE...]: test/hub.py in the background, with HF_ENDPOINT and $hub set. A sleep that does not wait
# but writes how long it should, and a curl that writes its arguments and environment, come first in the path.
start_hub() {
    local i
    mkdir -p "$tmp/bin"
    printf '#!/bin/sh\necho "$1" >>%q\n' "$tmp/slept" >"$tmp/bin/sleep"
    printf '#!/bin/sh\n{ echo "$@"; env; } >>%q\nexec %q "$@"\n' "$tmp/curl.log" "$(type -P curl)" >"$tmp/bin/curl"
    chmod +x "$tmp/bin/sleep" "$tmp/bin/curl"
    : >"$tmp/slept"
    : >"$tmp/port"
    python3 test/hub.py "$@" >"$tmp/port" 2>"$tmp/server" &
    hub=$!
    for ((i = 0; i < 50; i++)); do [ -s "$tmp/port" ] && break; sleep 0.1; done
    export HF_ENDPOINT=http://127.0.0.1:$(cat "$tmp/port") no_proxy=127.0.0.1,localhost
}
stop_hub() { kill $hub; wait $hub 2>/dev/null; unset HF_ENDPOINT; }
hub_set() { PATH=$tmp/bin:$PATH edu 10B --jobs 2 "$@"; }

# A server without ranges, one that cuts every answer, and one that wants a token, which nobody else may see.
test_hub() {
    need_duckdb || return 0
    type -P python3 >/dev/null || { echo "skip: test/hub.py needs python3"; return; }
    local i rc secret=hf_Secret-0123
    for i in 1 2 3; do parquet_of "$tmp/p/p$i.parquet" "SELECT 'text $i' AS text"; done
    start_hub "$tmp/p" norange
    # what lies in the folder of downloads is checked, and a listed file of the same name is another file
    mkdir -p "$tmp/c/parquet" && cp "$tmp/p/p2.parquet" "$tmp/c/parquet/p1.parquet"
    parquet_of "$tmp/own/p1.parquet" "SELECT 'a text of my own' AS text"
    refuses_set 2 'p1.parquet: damaged: its SHA-256 is not' 10B --jobs 1 --out "$tmp/c" &&
        quiet edu --parquet "$tmp/own/p1.parquet" --out "$tmp/d" &&
        refuses_set 2 'lists a different file of this name' 10B --jobs 1 --out "$tmp/d" &&
        quiet hub_set --out "$tmp/o"
    rc=$?
    stop_hub
    [ $rc = 0 ] && [ "$(text_of "$tmp/o")" = '<|endoftext|>text 1<|endoftext|>text 2<|endoftext|>text 3' ] || return
    start_hub "$tmp/p" norange always-cut
    PATH=$tmp/bin:$PATH refuses_set 1 'p1.parquet: .*run this again to resume' 10B --jobs 1 --out "$tmp/a"
    rc=$?
    stop_hub
    [ $rc = 0 ] && [ "$(tail -n 1 "$tmp/slept")" = 16 ] || { say "waits: $(cat "$tmp/slept")"; return; }
    start_hub "$tmp/p" token=$secret
    export HF_TOKEN=
    rejects 1 'answers 401: set HF_TOKEN' hub_set --out "$tmp/t" &&
        HF_TOKEN=hf_other rejects 1 'answers 401: it refuses HF_TOKEN' hub_set --out "$tmp/t" &&
        HF_TOKEN=$secret hub_set --out "$tmp/t" >"$tmp/stdout" 2>"$tmp/stderr"
    rc=$?
    unset HF_TOKEN
    stop_hub
    [ $rc = 0 ] || { say "$(cat "$tmp/stderr")"; return; }
    ! grep -rqF -e "$secret" "$tmp/stdout" "$tmp/stderr" "$tmp/curl.log" "$tmp/t" || { say "the token shows"; return; }
    HF_TOKEN=$'a"\nb' rejects 2 'HF_TOKEN: not a token' edu 10B --out "$tmp/t" || return
    ! grep -qF 'a"' "$tmp/stderr" || { say "the bad token is printed"; return; }
    HF_TOKEN=a HF_ENDPOINT=http://example.org rejects 2 'sent to https:// only' edu 10B --out "$tmp/t"
}

# The tasks' data: from a folder, from the hub with downloads that are cut off, and where there is neither.
test_eval_tasks() {
    local rc tasks=$data/eval i
    quiet data/eval_tasks.sh --from "$tasks/data" --out "$tmp/e" || return
    diff -r "$tasks/data" "$tmp/e" || return
    rejects 1 'sciq: .* has no file that eval_t6 reads; put test.json' \
        data/eval_tasks.sh sciq --from "$tmp" --out "$tmp/n" || return
    need_duckdb || return 0
    type -P python3 >/dev/null || { echo "skip: test/hub.py needs python3"; return; }
    mkdir -p "$tmp/h/allenai" "$tmp/h/cais"
    cp -r "$tasks/hub/arc_easy/hub" "$tmp/h/allenai/ai2_arc" && cp -r "$tasks/hub/mmlu/hub" "$tmp/h/cais/mmlu"
    start_hub "$tmp/h"
    PATH=$tmp/bin:$PATH quiet data/eval_tasks.sh arc_easy mmlu --out "$tmp/o" &&
        rejects 1 'piqa: .* answers 404; without the network' data/eval_tasks.sh piqa --out "$tmp/o"
    rc=$?
    stop_hub
    [ $rc = 0 ] || return
    for i in arc_easy mmlu; do
        diff -r -x files -x SHA256SUMS "$tasks/hub/$i" "$tmp/o/$i" || { say "other files"; return; }
    done
    export HF_ENDPOINT=http://127.0.0.1:9
    rejects 1 'does not answer; without the network, put valid.jsonl' data/eval_tasks.sh piqa --out "$tmp/o" &&
        quiet data/eval_tasks.sh arc_easy --out "$tmp/o"
    rc=$?
    unset HF_ENDPOINT
    return $rc
}

# What a registry carries comes through pip, where there is one, and no script names a registry's host.
test_registry() {
    need_duckdb || return 0
    type -P python3 >/dev/null || { echo "skip: needs python3, to make a package"; return; }
    ! grep -nEi 'pypi|pythonhosted|PIP_INDEX|anaconda\.|npmjs|crates\.io|conda-forge' data/*.sh scripts/*.sh || return
    mkdir -p "$tmp/bin" "$tmp/package/duckdb_cli" "$tmp/package/w-1/whisper/assets"
    printf '#!/bin/sh\nexec %q "$@"\n' "$DUCKDB" >"$tmp/package/duckdb_cli/duckdb"
    cp "$vocab" "$tmp/package/w-1/whisper/assets/gpt2.tiktoken"
    (cd "$tmp/package" && python3 -m zipfile -c ../a.whl duckdb_cli && tar -czf ../a.tar.gz w-1) || return
    cat >"$tmp/bin/python3" <<END
#!/bin/bash
[ "\$1 \$2" = "-m pip" ] || exec $(type -P python3) "\$@"
[ "\$3" = --version ] && exit
while [ \$# -gt 1 ]; do [ "\$1" != --dest ] || folder=\$2; shift; done
mkdir -p "\$folder"
case \$1 in duckdb-cli) cp $tmp/a.whl "\$folder" ;; openai-whisper) cp $tmp/a.tar.gz "\$folder" ;; *) exit 1 ;; esac
END
    chmod +x "$tmp/bin/python3"
    cp -r data "$tmp/data"
    rm -rf "$tmp/data/duckdb" "$tmp/data/gpt2.tiktoken"
    parquet_of "$tmp/p.parquet" "SELECT 'a' AS text"
    # no duckdb in the path or in HOME, no network
    local nowhere=http://127.0.0.1:1 path
    path=$(tr : '\n' <<<"$PATH" | while read -r d; do [ -e "$d/duckdb" ] || printf '%s:' "$d"; done)
    alone() {   # PATH
        env -u DUCKDB HOME="$tmp" PATH="$1" https_proxy=$nowhere PIP_NO_INDEX=1 PIP_FIND_LINKS= \
            "$tmp/data/fineweb_edu.sh" --parquet "$tmp/p.parquet" --out "$tmp/o" --val-tokens 0 2>"$tmp/stderr"
    }
    alone "$tmp/bin:${path%:}" || { say "$(cat "$tmp/stderr")"; return; }
    [ -x "$tmp/data/duckdb/duckdb" ] && cmp "$vocab" "$tmp/data/gpt2.tiktoken" || return
    rm -rf "$tmp/data/duckdb"
    alone "${path%:}" && { say "no program, and no error"; return; }
    tail -n 1 "$tmp/stderr" | grep -q 'install it, or set DUCKDB' || { say "$(cat "$tmp/stderr")"; return; }
    DUCKDB=$tmp/none rejects 2 'this program does not run' edu --parquet "$tmp/p.parquet" --out "$tmp/u"
}

test_gpt2_vocab() {
    data/gpt2_vocab.sh --help | grep -q 'usage: ' || { say "--help prints no usage"; return; }
    mkdir "$tmp/d" && cp "$vocab" "$tmp/d/gpt2.tiktoken"
    data/gpt2_vocab.sh "$tmp/d" | grep -q 'd/gpt2.tiktoken is there' || { say "a folder is not taken as one"; return; }
    rejects 2 'not a flag' data/gpt2_vocab.sh --nonsense || return
    rejects 2 'one file is enough' data/gpt2_vocab.sh "$tmp/a" "$tmp/b" || return
    rejects 1 'cannot write here' data/gpt2_vocab.sh "$tmp/none/v" || return
    rejects 2 'not a file' data/gpt2_vocab.sh /dev/null || return
    [ "$(ls "$tmp/d")" = gpt2.tiktoken ] || say "left behind: $(ls "$tmp/d")"
}

# A run on a data set of its own validates on that set, or not at all; never on another one. Needs train_t6.
test_validation_set() {
    local trainer=${TOKENIZE%data/tokenize}train_t6 d="$tmp/v[1]/a=b*" run
    [ -x "$trainer" ] || { echo "skip: no $trainer"; return; }
    run=("$trainer" --n-layer 1 --n-embd 32 --n-head 2 --head-dim 16 -t 64 -b 1 -d 64 -x 1 -s 0 -n 0 --threads 1)
    quiet tok --bytes --val-tokens 9000 -o "$d/one" "$data/cases.jsonl" || return
    quiet tok --bytes --val-tokens 0 -o "$tmp/w/two" "$data/cases.jsonl" || return
    quiet "${run[@]}" -i "$tmp/v[[]1]/*/one_train_*.bin" -o "$tmp/r1" >"$tmp/own" || return
    quiet "${run[@]}" -i "$tmp/v[[]1]/*/one_train_*.bin" -j "$tmp/v[[]1]/*/one_val_*.bin" -o "$tmp/r2" >"$tmp/named" ||
        return
    has "$tmp/own" '^val 1/1' || { say "not validated on its own set: $(cat "$tmp/own")"; return; }
    [ "$(grep '^val' "$tmp/own")" = "$(grep '^val' "$tmp/named")" ] || { say "validated on another set"; return; }
    quiet "${run[@]}" -i "$tmp/w/two_train_000000.bin" -o "$tmp/r3" >"$tmp/none" || return
    has "$tmp/stderr" '^note: no validation: ' && ! has "$tmp/none" '^val' || { say "$(cat "$tmp/stderr")"; return; }
    cp "$tmp/w/two_train_000000.bin" "$tmp/w/other.bin"     # no set, and GPT-2's vocabulary
    quiet "${run[@]}" -i "$tmp/w/other.bin" -o "$tmp/r4" >"$tmp/none" || return
    has "$tmp/stderr" '^note: no validation: ' || { say "$(cat "$tmp/stderr")"; return; }
    quiet tok --bytes --val-tokens 10 -o "$tmp/s/small" "$data/cases.jsonl" || return
    rejects 2 'val-every 0 trains without' "${run[@]}" -i "$tmp/s/small_train_*.bin" -o "$tmp/r5"
}

tests=("$@")
[ ${#tests[@]} -gt 0 ] || tests=(encoder cases sample threads plain_text json bad_json bad_input bad_flags bad_shards
    bad_manifest pipes append packed formats encodings giant val_default empty_input
    special_tokens brackets full_disk memory closed limits parquet bad_parquet kill kill_plain two_runs zstd scripts
    download)
have_duckdb || {    # fineweb_edu.sh installs it
    DUCKDB='' TOKENIZE=/bin/true data/fineweb_edu.sh --vocab "$vocab" --parquet /dev/null --out "$tmp/install" \
        >/dev/null 2>&1
    have_duckdb
}
[ $# -gt 0 ] ||
    tests+=(columns paths delete existing_set sums hub eval_tasks registry gpt2_vocab validation_set)
for t in "${tests[@]}"; do run_test "$t"; done
echo "$passed passed, $failed failed"
[ $failed = 0 ]
