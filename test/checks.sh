# What the tests of the programs share; they source this file, count with it and end with `finish`.
# Uses $tmp, a folder that the test makes and removes.
passed=0 failed=0

ok() { passed=$((passed + 1)); echo "ok   $1"; }
bad() { failed=$((failed + 1)); echo "FAIL $1: $2"; }
check() { if [ "$2" = 1 ]; then ok "$1"; else bad "$1" "${3:-}"; fi; }
finish() { echo "$passed passed, $failed failed"; [ $failed = 0 ]; }

# refuses NAME CODE WORD COMMAND...: the command must exit with that code and say one line on stderr that has the word in it.
refuses() {
    local name=$1 code=$2 word=$3 rc lines
    shift 3
    timeout 120 "$@" >"$tmp/stdout" 2>"$tmp/stderr"
    rc=$?
    lines=$(grep -cv '^note:' "$tmp/stderr")
    if [ $rc != "$code" ]; then bad "$name" "exit code $rc instead of $code: $(tail -1 "$tmp/stderr")"
    elif [ "$lines" != 1 ]; then bad "$name" "$lines lines on stderr instead of one: $(head -3 "$tmp/stderr")"
    elif ! grep -q -- "$word" "$tmp/stderr"; then bad "$name" "\"$word\" is not in: $(cat "$tmp/stderr")"
    else ok "$name"; fi
}

# english BYTES: so many bytes of the documents of test/data, at most 1.6 MB. What a test learns must not be a page that changes, as README does.
english() { zstd -qdc test/data/sample.jsonl.zst | sed 's/.*"text":"//; s/","url":.*//; s/\\n/\n/g' | head -c "$1"; }

# shards FOLDER ARGUMENTS...: token shards $tmp/FOLDER/t_*, by $tokenize with these arguments. Without them there is nothing to test.
shards() {
    "$tokenize" -o "$tmp/$1/t" "${@:2}" >"$tmp/log" 2>&1 && compgen -G "$tmp/$1/t_train_*.bin" >/dev/null && return
    echo "FAIL tokenize: no training shards (was there any text?): $(tail -1 "$tmp/log")"
    exit 1
}

# Every flag of $program's --help, more than $1 of them, with a value that has no meaning: nothing, a word, -1, a huge number; and 0. texts, switches and
# nonzero name the flags (with blanks around each) that take a text, 0 or 1, and no 0; README.md must describe all of them between the
# headings that match $2 and $3. The rest is a command that ends well with any good flag behind it.
test_flags() {
    local least=$1 from=$2 to=$3 count=0 f value flags undocumented
    shift 3
    flags=$("$program" --help | sed -n 's/^  .. --\([a-z0-9-]*\) .*/\1/p; s/^     --\([a-z0-9-]*\) .*/\1/p')
    for f in $flags; do
        count=$((count + 1))
        case $switches in
            *" $f "*) refuses "--$f=word" 2 "--$f" "$program" "--$f=word"; refuses "--$f=-1" 2 "--$f" "$program" "--$f=-1"; continue ;;
        esac
        refuses "--$f with nothing" 2 "--$f" "$program" "--$f"
        case $texts in *" $f "*) continue ;; esac
        for value in "" word 12x -1 1e40 99999999999999999999999 nan inf; do
            refuses "--$f '$value'" 2 "--$f" "$program" "--$f" "$value"
        done
        case $nonzero in
            *" $f "*) refuses "--$f 0" 2 "--$f" "$program" "--$f" 0 ;;
            *) "$@" "--$f" 0 >/dev/null 2>&1 && ok "--$f 0 has a meaning" || bad "--$f 0" "not accepted" ;;
        esac
    done
    check "flags: --help lists them" "$([ $count -gt "$least" ] && echo 1)" "only $count found"
    refuses "an unknown flag" 2 "no such flag" "$program" --no-such-flag
    refuses "an unknown letter" 2 "no such flag" "$program" -q
    refuses "a stray word" 2 "not a flag" "$program" hello
    "$program" --help | awk 'length > 140 { bad = 1 } END { exit bad || NR > 60 }' && ok "--help fits a screen" || bad "--help" "too long or too wide"
    undocumented=$(for f in $flags; do sed -n "/$from/,/$to/p" README.md | grep -- "--$f[\` ]" >/dev/null || printf ' --%s' "$f"; done)
    check "README describes every flag" "$([ -z "$undocumented" ] && echo 1)" "it lacks$undocumented"
}

# flip FILE: turns one random bit of it.
flip() {
    local size at byte
    size=$(stat -c %s "$1")
    at=$(((RANDOM * 32768 + RANDOM) % size))
    byte=$(od -An -tu1 -j $at -N 1 "$1")
    printf "$(printf '\\%03o' $((byte ^ (1 << (RANDOM % 8)))))" | dd of="$1" bs=1 seek=$at conv=notrunc 2>/dev/null
}
