#!/usr/bin/env bash
# Tests of the GPU programs on machines that cannot run them: without a GPU, with a driver that is older than the CUDA
# Toolkit of the build (a small library plays the driver), and on a GPU with less shared memory than a kernel needs (the
# emulated one of test_decode).
#   test/test_no_gpu.sh PROGRAM...      ends with "N passed, N failed"
set -uo pipefail
tests=$(dirname "$0")
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. "$tests/checks.sh"

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

# ---- 99 KB of shared memory, as on RTX GPUs
cat >"$tmp/shared.cpp" <<'END'
#include "llmc/cuda_utils.cuh"
static void kernel(int) {}
int main(int, char **argv) {
    gpu.shared_bytes = 99 << 10;
    launch(kernel, {1, 32, (size_t)atol(argv[1]), 0}, 1);
    puts("launched");
}
END
nvcc=${NVCC:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}
if make -s -C "$tests/.." build/emulated/llmc/{cuda_utils.cuh,utils.h,rng.h} >"$tmp/log" 2>&1 &&
   $nvcc -x c++ -std=c++17 -DEMULATED_CC=8 -I"$tests/../build/emulated" -I"$tests/.." \
       -include "$tests/emulated_gpu.h" "$tmp/shared.cpp" -o "$tmp/shared" >>"$tmp/log" 2>&1; then
    for bytes in 0 49153 101376; do
        equal "a kernel that needs $bytes bytes of shared memory" "$("$tmp/shared" $bytes 2>&1)" launched
    done
    for bytes in 101377 147584 10000000000; do
        refuses "a kernel that needs $bytes bytes of shared memory" 1 \
            "needs $bytes bytes of shared memory per block and this GPU has 101376: use .*--head-dim" \
            "$tmp/shared" $bytes
    done
else
    bad "the program for the emulated GPU" "$(tail -3 "$tmp/log")"
fi
finish
