#!/usr/bin/env bash
# Runs all tests, starting from a fresh Debian or Ubuntu: installs what is missing, builds with gcc and clang without
# warnings, with and without OpenBLAS, and runs the tests plain and under the sanitizers. If there is a GPU, the GPU
# programs run too. Ends with the line "N passed, N failed".
#   scripts/test.sh            about 23 minutes on two cores
#   scripts/test.sh --long     more kills, more damage, a minute of fuzzing of each reader; every compiler and GPU
#                              architecture
set -uo pipefail
cd "$(dirname "$0")/.."
long=""
[ "${1:-}" = --long ] && long=--long
passed=0 failed=0
log=$(mktemp) tmp=$(mktemp)
trap 'rm -f "$log" "$tmp"' EXIT

# step NAME COMMAND...: a single test; its output is shown only if it fails
step() {
    local name=$1 start=$SECONDS
    shift
    if "$@" >"$log" 2>&1; then
        passed=$((passed + 1)); echo "ok   $name ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1)); echo "FAIL $name"; tail -25 "$log" | sed 's/^/     /'
    fi
}

# tests NAME COMMAND...: a program of many tests, which ends with "N passed, N failed"; otherwise it counts as failed
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

# The lines of tracked text files that are over 120 columns wide. Exempt are table rows and lines with an address in
# Markdown, and data, golden files, seeds of the fuzzers and pictures.
wide_lines() {
    local LC_ALL=C.UTF-8
    export LC_ALL
    git grep -InE '.{121}' -- ':!*.md' ':!test/data' ':!test/golden' ':!test/fuzz/corpus' ':!*.svg'
    git grep -InE '.{121}' -- '*.md' | grep -vE '^[^:]+:[0-9]+: *\||https?://'
}
no_wide_lines() {
    wide_lines >"$tmp"
    cut -c 1-100 "$tmp"
    [ ! -s "$tmp" ]
}
scripts_parse() {
    local f
    for f in scripts/*.sh scripts/multi_node/*.s* data/*.sh test/*.sh .ci/run; do bash -n "$f" || return 1; done
}
flags_page() {
    scripts/flags.sh build/gcc | diff doc/flags.md - && return
    echo "doc/flags.md is out of date: make flags"
    return 1
}

# The pages: their local links lead somewhere, llmc/README.md has every header, README.md and doc/MODEL.md have every
# attention kind, and the picture is what its script draws.
pages() {
    local page link header kind missing=0
    lacks() { echo "$1 lacks $2"; missing=1; }
    scripts/draw_tpa.sh /dev/stdout | cmp - doc/tpa.svg || lacks doc/tpa.svg "what scripts/draw_tpa.sh draws"
    build/gcc/train_t6 --table | while read -r link; do grep -qxF "$link" doc/MODEL.md || echo "$link"; done |
        grep . && lacks doc/MODEL.md "lines of train_t6 --table"
    for page in README.md CONTRIBUTING.md doc/*.md llmc/README.md data/README.md dev/*.md dev/results/*.md; do
        for link in $(grep -o '](\([^)#:]*\))' "$page" | sed 's/^](//; s/)$//'); do
            [ -e "$(dirname "$page")/$link" ] || lacks "$page" "the target of its link, $link"
        done
    done
    for header in llmc/*.h llmc/*.cuh; do
        grep -q "\`$(basename "$header")\`" llmc/README.md || lacks llmc/README.md "$(basename "$header")"
    done
    for kind in $(. test/checks.sh; attention_kinds build/gcc/train_t6); do
        for page in README.md doc/MODEL.md; do grep -q "\`$kind\`" $page || lacks $page "$kind"; done
    done
    [ $missing = 0 ]
}

# Builds all CPU programs with a compiler and the flags that distributions build packages with. clang-N of another
# version has no OpenMP of its own; a version's omp.h and library serve the others.
builds_with() {
    local flags="-O3 -march=native -D_FORTIFY_SOURCE=3 -fstack-protector-strong" libraries="" header
    if ! echo '#include <omp.h>' | "$1" -fopenmp -fsyntax-only -x c - 2>/dev/null; then
        header=$(printf '%s\n' /usr/lib/llvm-*/lib/clang/*/include/omp.h | tail -1)
        mkdir -p build/omp && cp "$header" build/omp/omp.h || return 1
        flags="$flags -isystem build/omp" libraries="-L${header%/lib/clang/*}/lib -Wl,-rpath,${header%/lib/clang/*}/lib"
    fi
    # shellcheck disable=SC2046
    make -s OUT="build/with-$1" CC="$1" CFLAGS="$flags" LDFLAGS="$libraries" $(programs "build/with-$1")
}
# The compilers gcc-N and clang-N that the distribution offers and those that are installed. As root, the former are
# installed first.
every_compiler() {
    local offered
    offered=$(apt-cache search --names-only '^(gcc|clang)-[0-9]+$' 2>/dev/null | cut -d ' ' -f 1)
    # shellcheck disable=SC2086
    [ "$(id -u)" = 0 ] && [ -n "$offered" ] &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $offered >&2
    compgen -c | grep -xE '(gcc|clang)-[0-9]+' | sort -u
}

scripts/setup.sh test || { echo "0 passed, 1 failed"; exit 1; }
export MAKEFLAGS="-j$(nproc) -- WERROR=1"

programs() { echo "$1"/{train_t6,generate_t6,eval_t6,test_t6,test_units,data/tokenize,data/toy_corpus}; }
if git rev-parse HEAD >/dev/null 2>&1; then step "no line over 120 columns" no_wide_lines
else echo "skip the width of lines: not a git repository"; fi
step "shell scripts parse" scripts_parse
tests "Makefile" test/test_make.sh
tests "setup" test/test_setup.sh
step "headers compile alone" make -s headers
step "gcc, no warnings" make -s OUT=build/gcc CC=gcc $(programs build/gcc)
step "clang, no warnings" make -s OUT=build/clang CC=clang $(programs build/clang)
step "gcc without OpenBLAS" make -s OUT=build/plain BLAS=0 CC=gcc \
    build/plain/{train_t6,generate_t6,test_t6}
step "gcc without MPI" make -s OUT=build/alone MPI=0 CC=gcc build/alone/train_t6
step "gcc with a distribution's flags" make -s OUT=build/hard CC=gcc \
    CFLAGS="-O2 -D_FORTIFY_SOURCE=3 -fstack-protector-strong" build/hard/{generate_t6,test_units,data/tokenize}
if [ -n "$long" ]; then
    every_compiler >"$tmp" 2>"$log"
    for compiler in $(cat "$tmp"); do step "$compiler, no warnings" builds_with "$compiler"; done
fi
step "gcc with sanitizers" make -s OUT=build/sanitize SANITIZE=1 CC=gcc $(programs build/sanitize)
if make -s check-nvcc 2>/dev/null; then     # compiling needs no GPU, and the decoding kernels run on an emulated one
    for p in BF16 FP32; do      # test_t6cu has all kernels of the other two
        cuda_programs=build/$p/test_t6cu
        [ $p = BF16 ] || [ -n "$long" ] && cuda_programs+=" build/$p/train_t6cu build/$p/generate_t6cu"
        step "nvcc for sm_80 and sm_90a, no warnings, $p" \
            make -s OUT=build/$p ARCH='80 90a $(GPU_ARCH)' PRECISION=$p $cuda_programs
        if nvidia-smi -L >/dev/null 2>&1; then tests "GPU programs against the CPU's, $p" "build/$p/test_t6cu"; fi
    done
    # train_t6cu has all kernels of eval_t6cu
    step "nvcc for one architecture, no warnings, eval_t6cu" \
        make -s OUT=build/eval ARCH='$(or $(GPU_ARCH),80)' build/eval/eval_t6cu
    if nvidia-smi -L >/dev/null 2>&1; then
        tests "evaluating program on the GPU, BF16" env BIN=build/gcc EVAL=build/eval/eval_t6cu TOLERANCE=0.25 \
            test/test_eval.sh
    fi
    # generate_t6cu has all kernels of train_t6cu and those of decoding. An older nvcc does not know all of them.
    # sm_86 has the limits of sm_89.
    step "nvcc for sm_89 and sm_120, no warnings, BF16" \
        make -s OUT=build/archs ARCH='$(filter $(NVCC_ARCHS),89 120)' build/archs/generate_t6cu
    if [ -n "$long" ]; then
        for p in BF16 FP32; do
            step "nvcc for every architecture, no warnings, $p" make -s OUT=build/archs-$p PRECISION=$p \
                ARCH='90a $(filter-out 75,$(NVCC_ARCHS))' build/archs-$p/{train_t6cu,generate_t6cu,test_t6cu}
        done
    fi
    step "build for the emulated GPU" make -s OUT=build/gcc build/gcc/test_decode build/gcc/test_decode_sm80
    cases=10; [ -n "$long" ] && cases=300
    tests "decoding kernels on an emulated GPU" build/gcc/test_decode --cases $cases
    tests "decoding kernels on an emulated GPU, sm_80" build/gcc/test_decode_sm80 --cases $((cases * 2 / 3))
    tests "GPU programs without a usable GPU" \
        test/test_no_gpu.sh build/BF16/{train_t6cu,generate_t6cu,test_t6cu} build/eval/eval_t6cu
else
    echo "skip CUDA: no nvcc found"
fi
if command -v qemu-x86_64 aarch64-linux-gnu-gcc >/dev/null; then
    tests "programs for other processors" env BIN=build/gcc test/test_cpus.sh $long
else
    echo "skip programs for other processors: neither qemu-user nor gcc-aarch64-linux-gnu is installed"
fi
step "doc/flags.md is what the programs print" flags_page
step "pages: links, headers, attention kinds, the picture" pages

for b in gcc clang plain sanitize; do
    tests "gradients and golden vectors, $b" build/$b/test_t6
    tests "golden tokens through the cache, $b" build/$b/generate_t6 --golden test/golden/*.safetensors
done
for b in gcc sanitize; do tests "units, $b" build/$b/test_units; done
if make -s fuzz >"$log" 2>&1 || ! grep -q '^make: .* has no libFuzzer' "$log"; then
    fuzz=3; [ -n "$long" ] && fuzz=60
    tests "fuzzing of the readers" test/test_fuzz.sh build/fuzz $fuzz
else
    echo "skip fuzzing: clang has no libFuzzer"
fi
for b in gcc sanitize; do
    tests "toy corpus, $b" env TOY=build/$b/data/toy_corpus TOKENIZE=build/$b/data/tokenize test/test_toy.sh
done
tests "training program" env BIN=build/gcc test/test_train.sh $long
tests "training program, sanitizers" env BIN=build/sanitize test/test_train.sh
tests "launching" env BIN=build/gcc ALONE=build/alone/train_t6 test/test_launch.sh
tests "several ranks" env BIN=build/gcc test/test_comm.sh $long
tests "one run per folder" env BIN=build/gcc test/test_lock.sh $long
tests "generating program" env BIN=build/gcc test/test_generate.sh
tests "generating program, sanitizers" env BIN=build/sanitize TRAIN=build/gcc/train_t6 test/test_generate.sh --quick
tests "evaluating program" env BIN=build/gcc test/test_eval.sh
tests "evaluating program, sanitizers" env BIN=build/sanitize TRAIN=build/gcc/train_t6 test/test_eval.sh --quick
for b in gcc sanitize; do
    tests "tokenizer and data scripts, $b" env TOKENIZE="$PWD/build/$b/data/tokenize" test/test_data.sh $long
done

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
