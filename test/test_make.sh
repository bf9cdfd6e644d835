#!/usr/bin/env bash
# Tests of the Makefile: its own options count on the command line only; compilers and their flags count from the
# environment too; what it finds out about compilers, nvcc and GPUs. Nothing is built: the tests compare the commands
# that `make -n` prints.
#   test/test_make.sh      ends with "N passed, N failed"
set -uo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. test/checks.sh
unset MAKEFLAGS MAKELEVEL OUT ARCH MPI NCCL BLAS SANITIZE PRECISION WERROR CC CXX CFLAGS LDFLAGS NVCC

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
for exports in "ARCH=x86_64 OUT=/nonexistent MPI=1 NCCL=1 BLAS=1 SANITIZE=1 PRECISION=FP32 WERROR=1" \
               "MPI=0 NCCL=0 BLAS=0" "BLAS_LIBS=-lx COMM_FLAGS=-DX COMM_LIBS=-lx NCCL_FLAGS=-DX NCCL_LIBS=-lx"; do
    unchanged "export $exports" env $exports make -nB $targets
done
unchanged "make -e" env OUT=/nonexistent ARCH=x86_64 make -e -nB $targets

# ---- the command line counts, although the names are exported too, and in a sub-make
export ARCH=x86_64 OUT=/nonexistent
changes "ARCH on the command line" 'code=sm_86' commands ARCH=86
changes "OUT on the command line" '-o build/other/train_t6 ' make -nB OUT=build/other build/other/train_t6
changes "SANITIZE on the command line" '-fsanitize=address' commands SANITIZE=1
changes "WERROR on the command line" '-Werror' commands WERROR=1
equal "without WERROR no warning is an error" "$(grep -c -e -Werror "$tmp/plain")" 0
changes "PRECISION on the command line" '-DPRECISION_FP32' commands PRECISION=FP32
printf 'all:\n\t@+$(MAKE) -s -f Makefile -nB %s 2>&1\n' "$targets" >"$tmp/outer"
changes "ARCH on the command line, in a sub-make" 'code=sm_86' make -f "$tmp/outer" ARCH=86
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

# ---- which GPUs: a made-up toolkit, and an nvidia-smi that prints $SAYS and exits with $EXITS
mkdir -p "$tmp/smi" "$tmp/cuda/bin" "$tmp/cuda/include" "$tmp/cuda/lib64" "$tmp/scripts"
printf '%s\n' '#!/bin/sh' 'printf "%b\n" "$SAYS"; exit $EXITS' >"$tmp/smi/nvidia-smi"
cat >"$tmp/cuda/bin/nvcc" <<'END'
#!/bin/sh
case "$*" in
    *--list-gpu-arch*) printf 'compute_%s\n' 75 80 86 89 90 100 120 ;;
    *--dryrun*) printf '#$ _HERE_=x\n#$ TOP=%s/..\n' "$(dirname "$(readlink -f "$0")")" >&2 ;;
esac
END
printf '%s\n' '#!/bin/sh' 'exec "$@"' >"$tmp/scripts/ccache"
printf '%s\n' '#!/bin/sh' "exec $tmp/cuda/bin/nvcc -allow-unsupported-compiler \"\$@\"" >"$tmp/scripts/my-cuda"
chmod +x "$tmp"/*/nvidia-smi "$tmp/cuda/bin/nvcc" "$tmp"/scripts/*
ln -s "$tmp/cuda/bin/nvcc" "$tmp/scripts/nvcc"
# with_gpu SAYS EXITS ARGUMENTS...: make on a machine where nvidia-smi says that; CC=true to be quick
with_gpu() { SAYS=$1 EXITS=$2 PATH=$tmp/smi:$PATH make CC=true "NVCC=$tmp/cuda/bin/nvcc" "${@:3}" 2>&1; }
architectures() { grep -o 'code=sm_[0-9a-z]*' | sort -u | sed 's/code=sm_//' | paste -sd' '; }
while IFS='|' read -r says code expected; do
    equal "nvidia-smi prints \"$says\" and exits with $code" \
        "$(with_gpu "$says" "$code" -nB train_t6cu | architectures)" "$expected"
    equal "... make help ends well" "$(with_gpu "$says" "$code" help | grep -c 'code for sm_')" 1
done <<'END'
No devices were found|6|80 90a
No devices were found|0|80 90a
Failed to initialize NVML: Driver/library version mismatch|18|80 90a
NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. (Is it "on"?)|9|80 90a
Field "compute_cap" is not a valid field to query.|2|80 90a
[N/A]|0|80 90a
8.9|9|80 90a
|0|80 90a
8.9|0|89
 9.0 \r|0|90a
12.0\n12.0|0|120
8.6\n8.9\n8.6|0|86 89
7.5\n8.0|0|80
END
# stops NAME WORD COMMAND...: the command, a make, fails with one line of its own, which contains WORD
stops() {
    local name=$1 word=$2 rc
    shift 2
    "$@" >"$tmp/changed" 2>&1
    rc=$?
    grep -v ' \*\*\* ' "$tmp/changed" >"$tmp/said"
    check "$name" "$([ $rc = 2 ] && [ "$(wc -l <"$tmp/said")" = 1 ] && grep -q -- "$word" "$tmp/said" && echo 1)" \
        "exit code $rc, $(head -3 "$tmp/changed")"
}
stops "a GPU that is too old" "sm_75 is too old: the oldest .* sm_80" with_gpu 7.5 0 -s check-nvcc
for arch in 75 70 "80 75"; do
    stops "ARCH=$arch" "too old: the oldest .* sm_80" with_gpu 8.9 0 -s check-nvcc "ARCH=$arch"
done
for arch in sm_89 8.9 89,90 x86_64 -1 Native ""; do
    stops "ARCH=$arch" "not an architecture" with_gpu 8.9 0 -s check-nvcc "ARCH=$arch"
done
stops "ARCH=native without a GPU" "finds no GPU here" with_gpu "No devices were found" 6 -s check-nvcc ARCH=native
stops "an architecture that this nvcc does not know" "has no sm_121" with_gpu 8.9 0 -s check-nvcc ARCH="80 121"
equal "ARCH=native" "$(with_gpu 8.9 0 -nB ARCH=native train_t6cu | architectures)" 89
equal "ARCH=native and another" "$(with_gpu 8.9 0 -nB ARCH="80 native" train_t6cu | architectures)" "80 89"
equal "known architectures" "$(with_gpu 8.9 0 -s check-nvcc ARCH='80 86 89 90 90a 100 120 120a')" ""

# ---- NVCC may be several words, a link or a script; NCCL in the toolkit's folder is found
echo '#define NCCL_OF_THE_TOOLKIT' >"$tmp/cuda/include/nccl.h"
cc -shared -x c /dev/null -o "$tmp/cuda/lib64/libnccl.so"
for words in "$tmp/cuda/bin/nvcc" "$tmp/cuda/bin/nvcc -ccbin g++-12" "$tmp/scripts/ccache $tmp/cuda/bin/nvcc" \
             "$tmp/scripts/nvcc" "$tmp/scripts/my-cuda" nvcc "ccache nvcc -ccbin g++" my-cuda; do
    PATH=$tmp/scripts:$PATH commands "NVCC=$words" >"$tmp/changed"
    check "NVCC=\"${words//$tmp\//}\"" "$(grep -q -- "$words .*-DUSE_NCCL.* -o train_t6cu .* -lnccl" "$tmp/changed" &&
        grep -q -- "-I$tmp/cuda/bin/../include " "$tmp/changed" && echo 1)" "no -DUSE_NCCL"
done

# ---- compilers that do not know an option: compiler NAME WORD... makes one that refuses these words
compiler() {
    printf '#!/bin/sh\nfor word; do case $word in %s) echo "no $word" >&2; exit 1 ;; esac; done\n' "$2" \
        >"$tmp/scripts/$1"
    printf 'for word; do shift; [ "$word" = -mcpu=native ] || set -- "$@" "$word"; done\nexec cc "$@"\n' \
        >>"$tmp/scripts/$1"
    chmod +x "$tmp/scripts/$1"
}
compiler modern -nothing; compiler older -march=native; compiler cross "-m*=native"; compiler bare -fopenmp
while read -r name flags; do
    commands CC="$tmp/scripts/$name" >"$tmp/changed"
    check "native code with the $name compiler: $flags" \
        "$(grep -q -- "/$name $flags *-std=.* -o train_t6 " "$tmp/changed" && echo 1)" \
        "$(grep -m 1 -- '-o train_t6 ' "$tmp/changed")"
done <<'END'
modern -O3 -march=native
older -O3 -mcpu=native
cross -O3
END
equal "flags that give warnings hide no library" "$(make -s check-libraries CFLAGS='-O0 -D_FORTIFY_SOURCE=3' 2>&1)" \
    "$(make -s check-libraries 2>&1)"
stops "a compiler without OpenMP" "missing for .*: OpenMP; .*libomp-dev" \
    make -s check-libraries CC="$tmp/scripts/bare" BLAS=0 CFLAGS=-O2
stops "a compiler that is not there" "nonesuch does not build an empty program" make -s check-libraries CC=nonesuch
stops "flags that the compiler refuses" "check CC, CFLAGS and LDFLAGS" make -s check-libraries CFLAGS=--no-such-option

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
