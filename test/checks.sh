# Functions that the test scripts share: they source this file, report through it and end with `finish`.
# $tmp is a folder that the script makes and removes.
passed=0 failed=0

ok() { passed=$((passed + 1)); echo "ok   $1"; }
bad() { failed=$((failed + 1)); echo "FAIL $1: $2"; }
check() { if [ "$2" = 1 ]; then ok "$1"; else bad "$1" "${3:-}"; fi; }      # check NAME RESULT [DETAILS]: 1 is a pass
equal() { if [ "$2" = "$3" ]; then ok "$1"; else bad "$1" "$2 instead of $3"; fi; }      # equal NAME VALUE EXPECTED
finish() { echo "$passed passed, $failed failed"; [ $failed = 0 ]; }

# refuses NAME CODE WORD COMMAND...: the command must exit with CODE and print one line on stderr that contains WORD.
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

# bounded LIMIT COMMAND...: under this limit of ulimit the command succeeds, or says why not in one line.
bounded() {
    local limit=$1 rc
    shift
    ASAN_OPTIONS=detect_leaks=0 timeout -s KILL 120 bash -c "ulimit $limit; "'exec "$@"' bash "$@" \
        >"$tmp/stdout" 2>"$tmp/stderr"
    rc=$?
    case "$rc, $(wc -l <"$tmp/stderr")" in
        0,\ * | [12],\ 1) ok "${1##*/}, ulimit $limit: $(tail -1 "$tmp/stderr")" ;;
        *) bad "${1##*/}, ulimit $limit" "exit code $rc, $(head -3 "$tmp/stderr")" ;;
    esac
}
# can_limit_memory PROGRAM: sanitizers take terabytes of address space, so that ulimit -v is not for them.
can_limit_memory() {
    { (ulimit -v 2000000; "$1" --help) && return; } >/dev/null 2>&1
    echo "skip ulimit -v: this program needs more even for --help"
    return 1
}

# english BYTES: that many bytes (at most 1.6 MB) of the documents in test/data. Tests train on these, not on a page of
# the project, because an edit of such a page would change their losses. Needs the program zstd.
english() {
    command -v zstd >/dev/null || { echo "FAIL zstd is missing; scripts/setup.sh test installs it" >&2; exit 1; }
    zstd -qdc test/data/sample.jsonl.zst | sed 's/.*"text":"//; s/","url":.*//; s/\\n/\n/g' | head -c "$1"
}

# shards FOLDER ARGUMENTS...: makes the token shards $tmp/FOLDER/t_* with $tokenize; ends the script if that fails.
shards() {
    "$tokenize" -o "$tmp/$1/t" "${@:2}" >"$tmp/log" 2>&1 && compgen -G "$tmp/$1/t_train_*.bin" >/dev/null && return
    echo "FAIL tokenize: no training shards (was there any text?): $(tail -1 "$tmp/log")"
    exit 1
}

# attention_kinds PROGRAM: the kinds of --attn that a trainer's help lists, such as "tpa mha gqa".
attention_kinds() { "$1" --help | sed -n 's/^ *--attn  *\(.*\) (.*/\1/p' | sed 's/,//g; s/ or / /'; }

# test_flags LEAST COMMAND...: tries each flag of $program, which must have more than LEAST, with values that make no
# sense (none, a word, -1, a huge number) and with 0. COMMAND succeeds with any good flag added to it. $texts,
# $switches, $nonzero and $negative list the flags (with blanks around each) that take a string, that take 0 or 1, that
# refuse 0, and that take -1 but not -2.
# doc/flags.md must describe every flag.
test_flags() {
    local least=$1 count=0 f value low flags wide section undocumented
    shift
    flags=$("$program" --help | sed -n 's/^  .. --\([a-z0-9-]*\) .*/\1/p; s/^     --\([a-z0-9-]*\) .*/\1/p')
    for f in $flags; do
        count=$((count + 1))
        case $switches in
            *" $f "*)
                for value in word -1; do refuses "--$f=$value" 2 "--$f" "$program" "--$f=$value"; done
                continue ;;
        esac
        refuses "--$f with nothing" 2 "--$f" "$program" "--$f"
        case $texts in *" $f "*) continue ;; esac
        low=-1
        case ${negative-} in *" $f "*) low=-2 ;; esac
        for value in "" word 12x $low 1e40 99999999999999999999999 nan inf; do
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
    refuses "--help with a value" 2 "--help" "$program" --help=word
    wide=$("$program" --help | awk 'length > 140 || NR > 80' | wc -l)
    equal "--help has short lines, and not too many" "$wide" 0
    section=$(basename "${program%cu}")
    undocumented=$(for f in $flags; do
        sed -n "/^## $section\$/,/^## /p" doc/flags.md | grep -- "--$f[\` ]" >/dev/null || printf ' --%s' "$f"
    done)
    equal "flags that doc/flags.md lacks" "${undocumented:-none}" none
}

# flip FILE: flips one random bit of it.
flip() {
    local size at byte
    size=$(stat -c %s "$1")
    at=$(((RANDOM * 32768 + RANDOM) % size))
    byte=$(od -An -tu1 -j $at -N 1 "$1")
    byte=$((byte ^ (1 << (RANDOM % 8))))
    printf "$(printf '\\%03o' $byte)" | dd of="$1" bs=1 seek=$at conv=notrunc 2>/dev/null
}
