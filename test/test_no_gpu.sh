#!/usr/bin/env bash
# The GPU programs where they cannot run: no GPU, and a driver that is older than the toolkit (a library that says so stands in for it).
#   test/test_no_gpu.sh PROGRAM...      ends with "N passed, N failed"
set -uo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
passed=0 failed=0

# refuses NAME WORDS COMMAND...: exit code 1, and one line on stderr with the words in it
refuses() {
    local name=$1 words=$2 rc
    shift 2
    timeout 60 "$@" >/dev/null 2>"$tmp/stderr"
    rc=$?
    if [ $rc = 1 ] && [ "$(wc -l <"$tmp/stderr")" = 1 ] && grep -q -- "$words" "$tmp/stderr"; then
        passed=$((passed + 1)); echo "ok   $name"
    else
        failed=$((failed + 1)); echo "FAIL $name: exit code $rc, $(cat "$tmp/stderr")"
    fi
}

cat >"$tmp/driver.c" <<'END'
int cuInit(unsigned flags) { return flags != 0; }
int cuDriverGetVersion(int *version) { *version = 11080; return 0; }
END
mkdir "$tmp/old"
cc -shared -fPIC -Wl,-soname,libcuda.so.1 "$tmp/driver.c" -o "$tmp/old/libcuda.so.1" || { echo "0 passed, 1 failed"; exit 1; }

for program; do
    name=$(basename "$program")
    refuses "$name without a GPU" "no NVIDIA GPU to be used here" env CUDA_VISIBLE_DEVICES= "$program"
    refuses "$name with an old driver" "the NVIDIA driver is for CUDA 11.8 and this program was built with CUDA" \
        env LD_LIBRARY_PATH="$tmp/old:${LD_LIBRARY_PATH:-}" "$program"
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
