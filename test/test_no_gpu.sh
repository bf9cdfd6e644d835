#!/usr/bin/env bash
# Tests of the GPU programs on machines that cannot run them: without a GPU, and with a driver that is older than the
# CUDA Toolkit of the build (a small library plays the driver).
#   test/test_no_gpu.sh PROGRAM...      ends with "N passed, N failed"
set -uo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. "$(dirname "$0")/checks.sh"

cat >"$tmp/driver.c" <<'END'
int cuInit(unsigned flags) { return flags != 0; }
int cuDriverGetVersion(int *version) { *version = 11080; return 0; }
END
mkdir "$tmp/old"
cc -shared -fPIC -Wl,-soname,libcuda.so.1 "$tmp/driver.c" -o "$tmp/old/libcuda.so.1" ||
    { echo "0 passed, 1 failed"; exit 1; }

for program; do
    name=$(basename "$program")
    refuses "$name without a GPU" 1 "no NVIDIA GPU found" env CUDA_VISIBLE_DEVICES= "$program"
    refuses "$name with an old driver" 1 "the NVIDIA driver is for CUDA 11.8 and this program was built with CUDA" \
        env LD_LIBRARY_PATH="$tmp/old:${LD_LIBRARY_PATH:-}" "$program"
done
finish
