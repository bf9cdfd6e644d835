#!/usr/bin/env bash
# Every test there is, from a fresh Debian or Ubuntu: installs what is missing, builds with gcc and clang without a warning, with and
# without OpenBLAS, and runs the tests plain and under the sanitizers. Ends with one line, "N passed, N failed".
#   scripts/test.sh            at most 15 minutes on two cores; where there is a GPU, its programs run too
#   scripts/test.sh --long     more kills, more damage, a minute of fuzzing
set -uo pipefail
cd "$(dirname "$0")/.."
long=""
[ "${1:-}" = --long ] && long=--long
passed=0 failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# step NAME COMMAND...: one test of its own, its output shown only when it fails
step() {
    local name=$1 start=$SECONDS
    shift
    if "$@" >"$log" 2>&1; then
        passed=$((passed + 1)); echo "ok   $name ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1)); echo "FAIL $name"; tail -25 "$log" | sed 's/^/     /'
    fi
}

# tests NAME COMMAND...: a program of many tests, whose last line is "N passed, N failed"; one that ends otherwise counts as failed
tests() {
    local name=$1 start=$SECONDS last p f rc
    shift
    "$@" >"$log" 2>&1
    rc=$?
    last=$(tail -1 "$log")
    if [[ $last =~ ^([0-9]+)\ passed,\ ([0-9]+)\ failed ]]; then
        p=${BASH_REMATCH[1]} f=${BASH_REMATCH[2]}
        [ "$rc" != 0 ] && [ "$f" = 0 ] && f=1
        [ "$p" = 0 ] && [ "$f" = 0 ] && f=1
    else
        p=0 f=1
    fi
    passed=$((passed + p)) failed=$((failed + f))
    if [ "$f" = 0 ]; then
        echo "ok   $name: $p tests ($((SECONDS - start)) s)"
    else
        echo "FAIL $name: $last"; grep -v '^ok' "$log" | tail -25 | sed 's/^/     /'
    fi
}

scripts/setup.sh test || { echo "0 passed, 1 failed"; exit 1; }
export MAKEFLAGS="-j$(nproc)"

programs() { echo "$1/train_t6 $1/generate_t6 $1/test_t6 $1/test_units $1/data/tokenize $1/data/toy_corpus"; }
step "headers compile alone" make -s headers
step "gcc, no warnings" make -s OUT=build/gcc CC=gcc $(programs build/gcc)
step "clang, no warnings" make -s OUT=build/clang CC=clang $(programs build/clang)
step "gcc without OpenBLAS" make -s OUT=build/plain BLAS=0 CC=gcc build/plain/train_t6 build/plain/generate_t6 build/plain/test_t6
step "gcc without MPI" make -s OUT=build/alone MPI=0 CC=gcc build/alone/train_t6
step "gcc with sanitizers" make -s OUT=build/sanitize SANITIZE=1 CC=gcc $(programs build/sanitize)
if make -s check-nvcc 2>/dev/null; then     # no GPU is needed to compile, nor to run the decoding kernels on an emulated one
    for p in BF16 FP32; do
        step "nvcc for sm_80 and sm_90a, no warnings, $p" make -s OUT="build/$p" ARCH='80 90a $(GPU_ARCH)' PRECISION=$p "build/$p/train_t6cu" "build/$p/generate_t6cu" "build/$p/test_t6cu"
        if nvidia-smi -L >/dev/null 2>&1; then tests "GPU programs against the CPU's, $p" "build/$p/test_t6cu"; fi
    done
    step "emulated GPU" make -s OUT=build/gcc build/gcc/test_decode build/gcc/test_decode_sm80
    cases=10; [ -n "$long" ] && cases=300
    tests "decoding kernels on an emulated GPU" build/gcc/test_decode --cases $cases
    tests "decoding kernels on an emulated GPU, sm_80" build/gcc/test_decode_sm80 --cases $((cases * 2 / 3))
    tests "GPU programs where they cannot run" test/test_no_gpu.sh build/BF16/train_t6cu build/BF16/generate_t6cu build/BF16/test_t6cu
else
    echo "skip CUDA: there is no nvcc"
fi
step "shell scripts parse" bash -n scripts/*.sh data/*.sh test/*.sh

for b in gcc clang plain sanitize; do
    tests "gradients and golden vectors, $b" build/$b/test_t6
    tests "golden tokens by the cache, $b" build/$b/generate_t6 --golden test/golden/*.safetensors
done
fuzz=5; [ -n "$long" ] && fuzz=60
for b in gcc sanitize; do tests "units, $b" build/$b/test_units --fuzz $fuzz; done
for b in gcc sanitize; do tests "toy corpus, $b" env TOY=build/$b/data/toy_corpus TOKENIZE=build/$b/data/tokenize test/test_toy.sh; done
tests "training program" env BIN=build/gcc test/test_train.sh $long
tests "training program, sanitizers" env BIN=build/sanitize test/test_train.sh
tests "several ranks" env BIN=build/gcc test/test_comm.sh $long
tests "generating program" env BIN=build/gcc test/test_generate.sh
tests "generating program, sanitizers" env BIN=build/sanitize TRAIN=build/gcc/train_t6 test/test_generate.sh --quick
for b in gcc sanitize; do tests "tokenizer and data scripts, $b" env TOKENIZE="$PWD/build/$b/data/tokenize" test/test_data.sh $long; done

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
