#!/bin/bash
# Tests of data/toy_corpus: its self-check (test/check_toy.h), the files it writes, --judge, bad flags, a full disk.
#
#     test/test_toy.sh
#
# Environment: TOY, the program to test (default data/toy_corpus); TOKENIZE (default data/tokenize), which verifies the
# shards if it exists. The last line has the totals.
set -uo pipefail
cd "$(dirname "$0")/.."
toy=$(realpath "${TOY:-data/toy_corpus}") tokenize=$(realpath "${TOKENIZE:-data/tokenize}")
tmp=$(mktemp -d)
mounted=""
trap '[ -n "$mounted" ] && umount "$tmp/full"; rm -rf "$tmp"' EXIT
passed=0 failed=0

# check NAME COMMAND...
check() {
    local name=$1
    shift
    if "$@" >"$tmp/log" 2>&1; then passed=$((passed + 1)); echo "ok   $name"
    else failed=$((failed + 1)); echo "FAIL $name: $(tail -3 "$tmp/log" | tr '\n' ' ')"; fi
}

# rejects CODE PATTERN ARGUMENT...: the program must exit with CODE and print one line on stderr that matches PATTERN.
rejects() {
    local code=$1 pattern=$2 rc
    shift 2
    timeout 60 "$toy" "$@" >/dev/null 2>"$tmp/err"
    rc=$?
    [ "$rc" = "$code" ] && [ "$(wc -l <"$tmp/err")" = 1 ] && grep -q -- "$pattern" "$tmp/err" && return
    echo "exit code $rc instead of $code, or not one line with \"$pattern\": $(cat "$tmp/err")"
    return 1
}

small() { "$toy" --bytes 20000 --val-bytes 5000 "$@"; }
json() { sed -n "s/^ *\"$2\": \([0-9.]*\),*$/\1/p" "$1/toy_entropy.json"; }

self_check() { [ "$("$toy" --check | tail -1 | sed 's/^[1-9][0-9]* passed, 0 failed$/good/')" = good ]; }
all_files() {
    local d=$tmp/a/b f
    small -o "$d" || return
    for f in toy_train_000001.bin toy_val_000000.bin toy_val.txt toy_entropy.json toy_manifest.json; do
        test -s "$d/$f" || return
    done
    ! ls "$d"/*.tmp
}
whole_shards() { "$tokenize" --verify "$tmp/a/b/toy"; }

# The shard without its end-of-text tokens (256) is toy_val.txt.
same_text() {
    tail -c +1025 "$tmp/a/b/toy_val_000000.bin" | od -An -v -tu2 -w2 | awk '$1 != 256 { printf "%c", $1 }' |
        cmp - "$tmp/a/b/toy_val.txt"
}
entropy_adds_up() {
    local d=$tmp/a/b
    [ "$(json "$d" val_bytes)" = "$(stat -c %s "$d/toy_val.txt")" ] &&
        [ "$(json "$d" val_stories)" = "$(wc -l <"$d/toy_val.txt")" ] &&
        awk -v b="$(json "$d" bits_per_byte)" -v s="$(json "$d" bits_per_story)" -v n="$(json "$d" bytes_per_story)" \
            'BEGIN { e = b - s / n; exit !(b > 0 && e < 1e-9 && e > -1e-9) }'
}
same_seed() { small --seed 5 -o "$tmp/s1" && small --seed 5 -o "$tmp/s2" && diff -r "$tmp/s1" "$tmp/s2"; }
different_seed() {
    small --seed 6 -o "$tmp/s2" && ! cmp -s "$tmp/s1/toy_train_000001.bin" "$tmp/s2/toy_train_000001.bin"
}

# Compression without attention stays far above the entropy.
attention_pays() {
    local bits
    "$toy" -o "$tmp/big" && bits=$(($(xz -9 -c "$tmp/big/toy_val.txt" | wc -c) * 8)) &&
        awk -v bits=$bits -v bytes="$(json "$tmp/big" val_bytes)" -v entropy="$(json "$tmp/big" val_bits_per_byte)" \
            'BEGIN { exit !(bits / bytes > 2 * entropy) }'
}

check "--check passes" self_check
check "writes all its files, and makes the folders above them" all_files
if [ -x "$tokenize" ]; then check "the shards match the manifest" whole_shards; fi
check "toy_val.txt is the text of the validation shard" same_text
check "the numbers in toy_entropy.json agree" entropy_adds_up
check "the same seed gives the same files" same_seed
check "a different seed gives different files" different_seed
check "xz -9 needs more than twice the entropy" attention_pays

# ---- judging. In this story words 11, 16, 19, 20, 24, 29, 32, 33, 50, 53, 54 and 57 are references.
story="On a fine day Amy met Ben by the cave. Amy had a blue bell. Amy hid the blue bell by the dock. Ben had a grey \
cart. Ben hid the grey cart by the fort. They saw bold bears, bold bears and bold bears. Early in the evening Amy got \
the blue bell by the dock."
right="1 stories: 1 right, 0 with a wrong reference, 0 with invented words only, 0 that leave"
wrong="1 stories: 0 right, 1 with a wrong" invented="1 stories: 0 right, 0 .*, 1 with invented" left=".*, 1 that leave"

# judges HEAD COUNT [INVENTED]: of the text on standard input. The first line starts with HEAD; COUNT: "RIGHT ALL"
# references; INVENTED words (0).
judges() {
    cat >"$tmp/judged"
    "$toy" --judge "$tmp/judged" -o "$tmp/no" >"$tmp/verdict" && grep -q "^$1" "$tmp/verdict" &&
        [ "$(awk '$1 == "all" { print $2, $3 }' "$tmp/verdict")" = "$2" ] &&
        grep -qx "invented words: ${3-0}" "$tmp/verdict" && return
    cat "$tmp/judged" "$tmp/verdict"
    return 1
}
# with N WORD...: the story with its N-th word replaced by WORD, and so on; punctuation stays.
with() {
    echo "$story" | awk -v changes="$*" '{
        n = split(changes, change, " ")
        for (i = 1; i < n; i += 2) sub(/[A-Za-z]+/, change[i + 1], $change[i])
        print }'
}
n=$(wc -l <"$tmp/a/b/toy_val.txt")
own_text() { judges "$n stories: $n right" "$((12 * n)) $((12 * n))" <"$tmp/a/b/toy_val.txt"; }
each_reference() {
    local i
    for i in 11 16 19 20 24 29 32 33 50 53 54 57; do
        with $i Una | judges "$wrong" "11 12" && with $i bells | judges "$wrong" "11 12" || return
    done
}
headings() {
    { echo "--- text 1"; echo "$story"; printf '\n--- text 2\n\n--- text 3\n'; echo "$story"; echo; } |
        judges "3 stories: 2 right, 0 with .*, 1 that leave" "24 36"
}
check "--judge: all references of the corpus are right" own_text
check "--judge: one story" judges "$right" "12 12" <<<"$story"
check "--judge: each reference replaced is one wrong" each_reference
check "--judge: two references exchanged" judges "$wrong" "10 12" < <(with 54 dock 57 bell)
check "--judge: two names exchanged" judges "$wrong" "10 12" < <(with 24 Amy 50 Ben)
check "--judge: a different word bound" judges "$wrong" "11 12" < <(with 23 barn)
check "--judge: a word of the other child's list" judges "$wrong" "11 12" 1 < <(with 27 blue)
check "--judge: the same, repeated" judges "$invented" "12 12" 1 < <(with 27 blue 32 blue)
check "--judge: an invented word" judges "$invented" "12 12" 1 < <(with 3 odd)
check "--judge: an invented word for each word of choice" judges "$invented" "12 12" 16 < <(
    with 3 fun 5 An 7 Bo 10 home 11 An 14 red 15 bull 16 An 19 red 20 bull 23 doc 24 Bo 27 goldy 28 coins 29 Bo \
        32 goldy 33 coins 36 air 39 b 40 bees 41 c 42 bees 44 d 45 bees 50 An 53 red 54 bull 57 doc)
check "--judge: an invented word that is not repeated" judges "$wrong" "11 12" 1 < <(with 15 bull 20 bull)
check "--judge: a word in the list's other form" judges "$wrong" "11 12" < <(with 54 Bell)
check "--judge: no word" judges "$left" "1 12" < <(echo "${story/blue bell.}")
check "--judge: a story that was cut" judges "$left" "6 12" < <(echo "${story%grey*}")
check "--judge: a story that goes on" judges "$left" "12 12" <<<"$story Ann"
check "--judge: garbage between two stories" judges "3 stories: 2 right, 0 with .*, 1 that" "24 36" \
    < <(echo "$story"; head -c 1000 /dev/urandom | tr -d '\0\n'; echo; echo "$story")
check "--judge: what generate_t6 prints, one of three empty" headings
: >"$tmp/empty"
printf '\n\n' >"$tmp/blank"
printf 'Long\0ago' >"$tmp/binary"
truncate -s 2G "$tmp/huge"
echo "$story" | gzip >"$tmp/gz"
while read -r file what; do
    check "--judge $file" rejects 2 "$what" --judge "$file" -o "$tmp/no"
done <<END
- -: cannot open
$tmp/nothing No such file
$tmp not a regular file
$tmp/empty no story
$tmp/blank no story
$tmp/binary byte 4 is zero
$tmp/huge at most 1073741824
$tmp/gz gzip
$tmp/a/b/toy_val_000000.bin token shard
END
check "--judge without a file" rejects 2 "judge needs a value" --judge ""

for value in -1 1e30 999999999999999999999 many ""; do
    for flag in --bytes --val-bytes --seed; do
        check "$flag '$value'" rejects 2 "${flag#--}" "$flag" "$value" -o "$tmp/no"
    done
done
for flag in --bytes --val-bytes; do check "$flag 0" rejects 2 "${flag#--}" "$flag" 0 -o "$tmp/no"; done
check "a flag without its value" rejects 2 bytes --bytes
check "an unknown flag" rejects 2 nonsense --nonsense
check "an argument that is not a flag" rejects 2 stray stray
check "nothing was written by any of them" test ! -e "$tmp/no"
touch "$tmp/file"
check "a folder that is a file" rejects 2 file -o "$tmp/file"
check "a folder below a file" rejects 2 file -o "$tmp/file/below"
check "a folder that cannot be written" rejects 2 /proc -o /proc

# Descriptors that are closed at the start: no line meant for the screen lands in a file.
small -o "$tmp/screen" >/dev/null
closed() {
    rm -rf "$tmp/closed"
    eval 'small -o "$tmp/closed" </dev/null >/dev/null 2>&1' "$1" && diff -r "$tmp/screen" "$tmp/closed"
}
for c in '<&-' '>&-' '2>&-' '<&- >&- 2>&-'; do check "started with $c, it writes the same files" closed "$c"; done
cannot_print() { ! "$toy" --help >/dev/full 2>"$tmp/err" && grep -q "cannot write" "$tmp/err"; }
check "--help that cannot be written" cannot_print

# A full disk: 64 KB of memory, where mounting is allowed.
mkdir "$tmp/full"
if mount -t tmpfs -o size=64k none "$tmp/full" 2>/dev/null; then
    mounted=1
    check "a full disk" rejects 1 "No space left" -o "$tmp/full"
    check "a full disk leaves no partial file" \
        test ! -e "$tmp/full/toy_train_000001.bin" -a ! -e "$tmp/full/toy_manifest.json"
else
    echo "skip a full disk: mounting is not allowed here"
fi

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
