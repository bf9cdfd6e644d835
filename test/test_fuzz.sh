#!/usr/bin/env bash
# Fuzzes the readers of files (test/fuzz/fuzz.c, built by `make fuzz`), all of them at once, from the seeds in
# test/fuzz/corpus.
#   test/test_fuzz.sh [PROGRAM [SECONDS]]    build/fuzz, 3 seconds; ends with "N passed, N failed"
# The window of a zstd file may be 128 MiB, whatever its size: the largest allocation that is allowed.
# An input with a finding is kept in the current folder: READER=... PROGRAM INPUT reads it again.
set -uo pipefail
program=$(realpath "${1:-build/fuzz}") seconds=${2:-3}
tests=$(cd "$(dirname "$0")" && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. "$tests/checks.sh"

pids=()
for corpus in "$tests"/fuzz/corpus/*; do
    reader=${corpus##*/}
    mkdir "$tmp/$reader"
    READER=$reader "$program" -max_total_time="$seconds" -timeout=5 -rss_limit_mb=512 -malloc_limit_mb=160 \
        -max_len=4096 -print_final_stats=1 -artifact_prefix="$PWD/$reader-" \
        "$tmp/$reader" "$corpus" >"$tmp/$reader.log" 2>&1 &
    pids+=("$! $reader")
done
for p in "${pids[@]}"; do
    reader=${p#* } log=$tmp/${p#* }.log
    wait "${p% *}"
    rc=$?
    inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    check "fuzz: $reader: ${inputs:-no} inputs" "$([ $rc = 0 ] && [ "${inputs:-0}" -gt 0 ] && echo 1)" \
        "exit code $rc: $(grep -aE 'ERROR|SUMMARY|CLAIM|runtime error|written to' "$log" | head -5 | tr '\n' ' ')"
done
finish
