#!/usr/bin/env bash
# Tests of scripts/setup.sh, without root, network or real packages: PATH has stand-ins only. Those of the compilers
# refuse what the file `absent` lists, and that of apt-get notes how it is called.
#   test/test_setup.sh      ends with "N passed, N failed"
set -uo pipefail
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. test/checks.sh
unset CC CXX CFLAGS LDFLAGS CURL_CA_BUNDLE
export NVCC=none

# stub NAME [LINE]: a stand-in for the program NAME, in $tmp/bin
stub() { printf '#!/bin/sh\n%s\n' "${2:-exit 0}" >"$tmp/bin/$1"; chmod +x "$tmp/bin/$1"; }
# A compiler reads a program, and compiles it unless it, or the compiler's command line, has a word of `absent`.
compiler='[ "$1" = --version ] && exit 0
{ echo "$0 $*"; cat; } | grep -qF -f '"'$tmp/absent'"' && exit 1
exit 0'
# fresh: a Debian with everything, as root
fresh() {
    local p
    rm -rf "$tmp/bin" "$tmp/calls"
    mkdir "$tmp/bin"
    : >"$tmp/absent"
    for p in sh sed grep tail cat mktemp rm env chmod; do ln -s "$(command -v $p)" "$tmp/bin/$p"; done
    for p in bash gnuplot xz curl unzip objcopy zstd python3 ip ssh pgrep mpirun dpkg-query \
        qemu-aarch64 aarch64-linux-gnu-gcc; do stub $p; done
    for p in gcc g++ clang mpicc; do stub $p "$compiler"; done
    stub make 'echo GNU Make 4'
    stub id 'echo 0'
    # installs what is named: from then on nothing is absent
    stub apt-get "echo \"apt-get \$*\" >>'$tmp/calls'; [ \"\$1\" = update ] || : >'$tmp/absent'"
    export SSL_CERT_FILE=$tmp/bin/make      # any file that is not empty
}
lacks() { printf '%s\n' "$@" >"$tmp/absent"; }
setup() { PATH=$tmp/bin "$tmp/bin/sh" scripts/setup.sh "$@" >"$tmp/stdout" 2>"$tmp/stderr" </dev/null; rc=$?; }
# installs NAME PACKAGES: the last setup called apt-get for these packages only, and so that nothing is removed
installs() {
    local call
    call=$(grep install "$tmp/calls" 2>/dev/null | tail -1)
    equal "$1: the packages" "$(grep -oE '( [a-z0-9+-]+)+$' <<<"${call% }" | sed 's/^ //')" "$2"
    check "$1: nothing is removed or upgraded" "$(grep -q -- '--no-remove --no-upgrade' <<<"$call" && echo 1)" "$call"
}
ends() { equal "$1: exit code" "$rc" "$2"; }
says() { check "$1: says $2" "$(cat "$tmp/stdout" "$tmp/stderr" | grep -q -- "$2" && echo 1)" "$(cat "$tmp/std"*)"; }
no_apt() { equal "$1: apt-get is not called" "$(cat "$tmp/calls" 2>/dev/null)" ""; }

# ---- nothing is missing
for what in "" mpi test; do
    fresh; setup $what
    ends "everything there${what:+, $what}" 0
    says "everything there${what:+, $what}" "nothing is missing"
    no_apt "everything there${what:+, $what}"
done
fresh; rm "$tmp"/bin/{apt-get,id}; setup
ends "everything there, no apt-get" 0
says "everything there, no apt-get" "nothing is missing"

# ---- Debian: only what does not work is installed
fresh; lacks cjson/ zlib.h; setup
ends "two libraries missing" 0
installs "two libraries missing" "libcjson-dev zlib1g-dev"
fresh; lacks cJSON_ParseWithLength; setup
installs "a cJSON that is too old" "libcjson-dev"
fresh; lacks stdio.h; setup
installs "a compiler without headers" "libc6-dev"
fresh; rm "$tmp"/bin/{objcopy,zstd,mpirun}; setup
no_apt "what only the tests need is missing"
setup mpi
installs "mpi" "openmpi-bin libopenmpi-dev"
fresh; lacks omp.h; setup test
installs "OpenMP of both compilers" "gcc libomp-dev"
fresh; lacks "/clang "; setup
no_apt "clang does not work, but gcc is used"
CC=clang setup
says "CC=clang" "libomp-dev"
fresh; lacks omp.h; CC="ccache $tmp/bin/clang-15 -m64"; stub ccache "$compiler"; CC=$CC setup; unset CC
installs "OpenMP of a version of clang" "libomp-15-dev"
fresh; lacks vector; setup
no_apt "no C++ compiler and no nvcc"
stub nvcc; NVCC=nvcc setup
installs "no C++ compiler, but nvcc" "g++"

# ---- Any gnuplot will do; only where there is none, one is installed.
fresh; lacks cjson/; setup
installs "a gnuplot of the user's" "libcjson-dev"
rm "$tmp/bin/gnuplot"
stub apt-get "echo \"apt-get \$*\" >>'$tmp/calls'; : >'$tmp/bin/gnuplot'; chmod +x '$tmp/bin/gnuplot'"
setup
installs "no gnuplot" "gnuplot-nox"

# ---- apt-get fails: its error is shown
fresh; lacks cjson/
stub apt-get '[ "$1" = update ] && exit 100
echo "Reading package lists..."; echo "E: Packages need to be removed but remove is disabled." >&2; exit 100'
setup
ends "apt-get fails" 1
says "apt-get fails" "^E: Packages need to be removed"
says "apt-get fails" "missing: cJSON.*could not install: libcjson-dev"
equal "apt-get fails: two lines" "$(wc -l <"$tmp/stderr")" 2
stub apt-get 'echo "E: Unable to locate package libcjson-dev"; exit 100'; setup
says "no such package" universe
fresh; lacks cjson/; stub apt-get "[ \$1 = update ] && exit 100; : >'$tmp/absent'"; setup
ends "a source of packages does not answer, yet they install" 0
fresh; lacks cjson/; stub apt-get; setup
ends "apt-get installs a cJSON that is too old" 1
says "apt-get installs a cJSON that is too old" \
    "missing: cJSON 1.7.13; apt-get installed libcjson-dev, but gcc .*too old"
fresh; rm "$tmp/bin/gnuplot"; stub apt-get 'exit 100'; setup
ends "apt-get fails, but only gnuplot is missing" 0
says "apt-get fails, but only gnuplot is missing" "better with: gnuplot"

# ---- neither root nor sudo; sudo
fresh; lacks cjson/; stub id 'echo 1000'; setup
ends "no root" 1
no_apt "no root"
says "no root" "missing: cJSON.*as root: apt-get install --no-remove libcjson-dev$"
equal "no root: one line" "$(cat "$tmp/stdout" "$tmp/stderr" | wc -l)" 1
fresh; stub id 'echo 1000'; rm "$tmp/bin/gnuplot"; setup test
ends "no root, the tests need gnuplot" 1
fresh; lacks cjson/; stub id 'echo 1000'; stub sudo 'exec "$@"'; setup
ends "sudo" 0
installs "sudo" "libcjson-dev"
fresh; lacks cjson/; stub id 'echo 1000'; stub sudo 'echo "sudo: a password is required" >&2; exit 1'; setup
ends "sudo refuses" 1
says "sudo refuses" "a password is required"

# ---- no apt-get: the names of the packages, of the distribution that this is if one can tell
fresh; rm "$tmp"/bin/{apt-get,gnuplot}; lacks cjson/ zlib.h; setup
ends "no apt-get" 1
says "no apt-get" "missing: cJSON 1.7.13, zlib, gnuplot;"
says "no apt-get" "Fedora: dnf install cjson-devel zlib-devel gnuplot$"
says "no apt-get" "Arch:   pacman -S --needed cjson zlib gnuplot$"
says "no apt-get" "Alpine: apk add cjson-dev zlib-dev gnuplot$"
fresh; lacks cjson/; stub dpkg-query 'exit 1'; setup
ends "Fedora with an apt-get" 1
no_apt "Fedora with an apt-get"
says "Fedora with an apt-get" "Fedora: dnf install cjson-devel$"
for manager in "dnf dnf install cjson-devel" "pacman pacman -S --needed cjson" "apk apk add cjson-dev"; do
    fresh; rm "$tmp/bin/apt-get"; lacks cjson/; stub ${manager%% *}; setup
    equal "${manager%% *}: one line" "$(cat "$tmp/stdout" "$tmp/stderr")" \
        "setup: missing: cJSON 1.7.13; as root: ${manager#* }"
done
fresh; rm "$tmp"/bin/{apt-get,gnuplot,xz}; stub apk; setup
ends "no apt-get, nothing needed is missing" 0
says "no apt-get, nothing needed is missing" "better with: gnuplot, xz; as root: apk add gnuplot xz"
fresh; rm "$tmp"/bin/{apt-get,gcc}; stub dnf; setup
ends "no compiler" 1
says "no compiler" "missing: gcc, .*dnf install gcc glibc-devel cjson-devel "

refuses "an unknown word" 2 "usage" scripts/setup.sh tests
refuses "two words" 2 "usage" scripts/setup.sh mpi test

finish
