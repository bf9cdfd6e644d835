#!/usr/bin/env bash
# Tests of the Makefile: its own options count on the command line only; compilers and their flags count from the
# environment too. Nothing is built: the tests compare the commands that `make -n` prints.
#   test/test_make.sh      ends with "N passed, N failed"
set -uo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. test/checks.sh
unset MAKEFLAGS MAKELEVEL OUT ARCH MPI NCCL BLAS SANITIZE PRECISION CC CXX CFLAGS LDFLAGS NVCC

targets="all test_units train_t6cu generate_t6cu test_decode cuda_benches headers clean"
# commands VARIABLE=VALUE...: what make would run for these targets, given these variables on its command line
commands() { make -nB "$@" $targets 2>&1; }
# changes NAME WORD COMMAND...: COMMAND prints commands that differ from those of a plain make and contain WORD
changes() {
    local name=$1 word=$2
    shift 2
    "$@" >"$tmp/changed"
    check "$name" "$(! cmp -s "$tmp/plain" "$tmp/changed" && grep -q -- "$word" "$tmp/changed" && echo 1)" "no $word"
}
# unchanged NAME COMMAND...: COMMAND prints the commands of a plain make
unchanged() {
    local name=$1
    shift
    "$@" >"$tmp/changed"
    equal "$name" "$(diff "$tmp/plain" "$tmp/changed" | head -2)" ""
}

commands >"$tmp/plain"
equal "make -n prints the commands of every target" "$(grep -c -- '-o train_t6cu ' "$tmp/plain")" 1

# ---- the environment changes nothing
for exports in "ARCH=x86_64 OUT=/nonexistent MPI=1 NCCL=1 BLAS=1 SANITIZE=1 PRECISION=FP32" "MPI=0 NCCL=0 BLAS=0" \
               "BLAS_LIBS=-lx COMM_FLAGS=-DX COMM_LIBS=-lx NCCL_FLAGS=-DX NCCL_LIBS=-lx"; do
    unchanged "export $exports" env $exports make -nB $targets
done
unchanged "make -e" env OUT=/nonexistent ARCH=x86_64 make -e -nB $targets

# ---- the command line counts, although the names are exported too, and in a sub-make
export ARCH=x86_64 OUT=/nonexistent
changes "ARCH on the command line" 'code=sm_75' commands ARCH=75
changes "OUT on the command line" '-o build/other/train_t6 ' make -nB OUT=build/other build/other/train_t6
changes "SANITIZE on the command line" '-fsanitize=address' commands SANITIZE=1
changes "PRECISION on the command line" '-DPRECISION_FP32' commands PRECISION=FP32
printf 'all:\n\t@+$(MAKE) -s -f Makefile -nB %s 2>&1\n' "$targets" >"$tmp/outer"
changes "ARCH on the command line, in a sub-make" 'code=sm_75' make -f "$tmp/outer" ARCH=75
unchanged "export ARCH OUT, in a sub-make" make -f "$tmp/outer"
unset ARCH OUT
# the options of libraries: no effect where the library is not installed
for option in "BLAS -lopenblas" "MPI -DUSE_MPI" "NCCL -DUSE_NCCL"; do
    read -r name word <<<"$option"
    if grep -q -- "$word" "$tmp/plain"; then
        equal "$name=0 on the command line: no $word" "$(commands "$name=0" | grep -c -- "$word")" 0
    else
        echo "skip $name=0: the library is not installed"
    fi
done

if nvcc=$(command -v nvcc); then
    changes "NVCC without a folder: the headers are found" "-I$(dirname "$nvcc")/../include" commands NVCC=nvcc
fi
# ---- compilers and their flags count from the environment and from the command line
usual=(CC=clang CXX=clang++ CFLAGS=-O2 LDFLAGS=-L/some/where NVCC=/some/where/nvcc)
env "${usual[@]}" make -nB $targets >"$tmp/environment" 2>&1
commands "${usual[@]}" >"$tmp/line"
for command in 'clang -O2 .*-o train_t6 -L/some/where' '-o test_decode -L/some/where' \
               '/some/where/nvcc .*-o train_t6cu -L/some/where' 'clang++ .*-fsyntax-only'; do
    for from in environment line; do
        check "from the $from: $command" "$(grep -q -- "$command" "$tmp/$from" && echo 1)" "not there"
    done
done
changes "LDFLAGS that only the linker understands, for nvcc" "-Xcompiler '-Wl[\\],-rpath[\\],/x'" \
    commands LDFLAGS=-Wl,-rpath,/x

finish
