#!/usr/bin/env bash
# Tests of programs for other processors: those that were moved to an older one say so, and the CPU programs build and
# run on aarch64 (Grace, DGX Spark). Needs the Debian packages qemu-user and gcc-aarch64-linux-gnu; what is missing is
# skipped with a line.
#   BIN=build/gcc test/test_cpus.sh             ends with "N passed, N failed"
#   BIN=build/gcc test/test_cpus.sh --long      also test_t6 on an emulated aarch64, some minutes
set -uo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. test/checks.sh
out=$PWD/build/aarch64
programs="train_t6 generate_t6 data/tokenize data/toy_corpus"
has() { command -v "$1" >"$tmp/where"; }
# builds NAME ARGUMENTS...: make, without a warning and without what only the build machine has
builds() {
    local name=$1
    shift
    make -s WERROR=1 MPI=0 BLAS=0 NVCC= "$@" >"$tmp/log" 2>&1
    check "$name" "$([ $? = 0 ] && ! grep -qv '^note:' "$tmp/log" && echo 1)" "$(head -5 "$tmp/log")"
}

# ---- moved to an older processor: the machine's own code, and x86-64 as it was in 2003
if has qemu-x86_64 && [ "$(uname -m)" = x86_64 ]; then
    for program in $programs; do
        refuses "$program on an older processor" 1 "compiled for a processor with .*make CFLAGS=-O3" \
            qemu-x86_64 -cpu qemu64 "$BIN/$program" --help
    done
    builds "code for any x86-64" CC=gcc CFLAGS=-O1 OUT="$tmp/any" "$tmp/any/data/toy_corpus"
    check "... runs on an older processor" "$(qemu-x86_64 -cpu qemu64 "$tmp/any/data/toy_corpus" --help \
        >"$tmp/log" 2>&1 && echo 1)" "$(head -1 "$tmp/log")"
else
    echo "skip moved programs: no qemu-x86_64, or not an x86-64 machine"
fi

# ---- aarch64: its libraries come from the distribution, into a folder of their own
libraries() {
    local apt=$out/apt packages
    packages="libc6-dev libcjson-dev libxxhash-dev libutf8proc-dev libzstd-dev zlib1g-dev libgomp1"
    [ "$(cat "$out/ready" 2>/dev/null)" = "$packages" ] && return
    mkdir -p "$apt/lists/partial" "$apt/archives/partial" "$out/root"
    : >"$apt/status"
    set -- -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root \
        -o Dir::State="$apt" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt"
    # shellcheck disable=SC2086
    apt-get "$@" update && apt-get "$@" install -d -y --no-install-recommends $packages || return 1
    for package in "$apt"/archives/*.deb; do dpkg-deb -x "$package" "$out/root" || return 1; done
    echo "$packages" >"$out/ready"
}
cross=aarch64-linux-gnu-gcc
if ! has $cross; then echo "skip aarch64: no $cross"
elif ! has apt-get || ! libraries >"$tmp/log" 2>&1; then
    echo "skip aarch64: no libraries for it: $(tail -1 "$tmp/log")"
else
    flags="-O2 --sysroot=$out/root"
    compile() { builds "$1" CC=$cross "${@:2}"; }
    compile "the CPU programs build for aarch64" CFLAGS="$flags" OUT="$out" $(printf "$out/%s " $programs)
    compile "... and for a newer processor" CFLAGS="$flags -mcpu=neoverse-v1" OUT="$out/v1" "$out/v1/data/toy_corpus"
    if has qemu-aarch64; then
        for program in $programs; do
            qemu-aarch64 -L "$out/root" "$out/$program" --help >"$tmp/log" 2>&1
            check "... $program runs" "$([ $? = 0 ] && echo 1)" "$(head -1 "$tmp/log")"
        done
        refuses "its code on an older processor" 1 "compiled for a processor with .*make CFLAGS=-O3" \
            qemu-aarch64 -cpu cortex-a53 -L "$out/root" "$out/v1/data/toy_corpus" --help
        if [ "${1:-}" = --long ]; then
            compile "test_t6 builds for aarch64" CFLAGS="$flags" OUT="$out" "$out/test_t6"
            qemu-aarch64 -L "$out/root" "$out/test_t6" >"$tmp/log" 2>&1
            check "... and passes" "$([ $? = 0 ] && echo 1)" "$(tail -1 "$tmp/log")"
        fi
    else
        echo "skip running aarch64 programs: no qemu-aarch64"
    fi
fi
finish
