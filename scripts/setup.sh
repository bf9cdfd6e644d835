#!/bin/sh
# Looks for what building and running need, by compiling and running, and installs what is missing where there is
# apt-get (Debian, Ubuntu), as root or with sudo. It removes nothing. Elsewhere it prints the names of the packages.
#   scripts/setup.sh          what `make` needs; wished for: OpenBLAS, gnuplot, xz, curl, unzip
#   scripts/setup.sh mpi      also MPI, for several ranks
#   scripts/setup.sh test     also what the tests need
#   CC=clang scripts/setup.sh     for a different compiler from gcc; CXX, CFLAGS and LDFLAGS count too, as in make
# Exit code 1: something that is needed is missing. What is only wished for does not count.
# shellcheck disable=SC2086
set -u
for_what=${1:-}
case $#$for_what in
    0 | 1mpi | 1test) ;;
    *) echo "setup: usage: scripts/setup.sh [mpi|test]" >&2; exit 2 ;;
esac
cc=${CC:-gcc} cxx=${CXX:-g++}
version=$(printf '%s' "$cc" | sed -nE 's/.*(gcc|clang)(-[0-9]+).*/\2/p')
case $cc in
    *clang*) compiler="clang$version|clang|clang|clang" openmp="libomp$version-dev|libomp-devel|openmp|openmp-dev" ;;
    *) compiler="gcc$version|gcc|gcc|gcc" openmp=$compiler ;;
esac

# links HEADER FUNCTION FLAGS...: a C program that uses this function compiles and links
links() {
    header=$1 function=$2
    shift 2
    printf '#include <%s>\nint main(void) { void *volatile f = (void *)%s; return !f; }\n' "$header" "$function" |
        $cc ${CFLAGS-} -x c - -o /dev/null ${LDFLAGS-} "$@"
}
has() { command -v "$1" >/dev/null; }
compiles_cxx() { echo '#include <vector>' | $cxx -x c++ -fsyntax-only -; }
gnu_make() { make --version | grep GNU; }
has_mpi() { (cc=mpicc && links mpi.h MPI_Init) && mpirun --version; }
certificates() {
    for f in "${CURL_CA_BUNDLE:-}" "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt /etc/ssl/cert.pem \
             /etc/pki/tls/certs/ca-bundle.crt /etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem; do
        [ -s "$f" ] && return
    done
    return 1
}

# look NEED WHAT NAMES COMMAND...: WHAT is missing if COMMAND fails. NEED is need or wish. NAMES are its packages in
# Debian|Fedora|Arch|Alpine; a single name is that of all four.
look() {
    need=$1 what=$2 names=$3
    shift 3
    "$@" >/dev/null 2>&1 </dev/null && return
    if [ "$need" = need ]; then needed="$needed${needed:+, }$what"; else wished="$wished${wished:+, }$what"; fi
    rest=${names#*|} d=${names%%|*}
    f=${rest%%|*} rest=${rest#*|}
    a=${rest%%|*} l=${rest#*|}
    debian="$debian $d" fedora="$fedora $f" arch="$arch $a" alpine="$alpine $l"
}
once() {
    list=""
    for p in $1; do case " $list " in *" $p "*) ;; *) list="$list${list:+ }$p" ;; esac; done
    echo "$list"
}

all=wish
[ "$for_what" = test ] && all=need
look_for_all() {
    needed="" wished="" debian="" fedora="" arch="" alpine=""
    look need bash bash has bash
    look need "$cc" "$compiler" $cc --version
    look need "the C library's headers" 'libc6-dev|glibc-devel|glibc|musl-dev' links stdio.h printf
    look need "OpenMP for $cc" "$openmp" links omp.h omp_get_max_threads -fopenmp
    look need "GNU make" make gnu_make
    look need "cJSON 1.7.13" 'libcjson-dev|cjson-devel|cjson|cjson-dev' \
        links cjson/cJSON.h cJSON_ParseWithLength -lcjson
    look need xxHash 'libxxhash-dev|xxhash-devel|xxhash|xxhash-dev' links xxhash.h XXH64 -DXXH_INLINE_ALL
    look need utf8proc 'libutf8proc-dev|utf8proc-devel|libutf8proc|utf8proc-dev' \
        links utf8proc.h utf8proc_iterate -lutf8proc
    look need "zstd's library" 'libzstd-dev|libzstd-devel|zstd|zstd-dev' links zstd.h ZSTD_decompressStream -lzstd
    look need zlib 'zlib1g-dev|zlib-devel|zlib|zlib-dev' links zlib.h inflate -lz
    # Without these: slow matrix products, no pictures, no comparison with xz in the quickstart, no downloads.
    look "$all" OpenBLAS 'libopenblas-dev|openblas-devel|openblas|openblas-dev' \
        links cblas.h cblas_sgemm -I/usr/include/openblas -lopenblas
    look "$all" gnuplot 'gnuplot-nox|gnuplot|gnuplot|gnuplot' gnuplot --version
    look "$all" xz 'xz-utils|xz|xz|xz' has xz
    look "$all" curl curl has curl
    look "$all" "certificates for curl" ca-certificates certificates
    look "$all" unzip unzip has unzip
    if [ "$for_what" = test ] || has "${NVCC:-nvcc}" || has "${NVCC:-/usr/local/cuda/bin/nvcc}"; then
        look need "$cxx" 'g++|gcc-c++|gcc|g++' compiles_cxx
    fi
    [ -z "$for_what" ] && return
    look need "MPI (mpicc and mpirun)" 'openmpi-bin libopenmpi-dev|openmpi-devel|openmpi|openmpi openmpi-dev' has_mpi
    [ "$for_what" = test ] || return
    cc=clang
    look need clang clang clang --version
    look need "OpenMP for clang" 'libomp-dev|libomp-devel|openmp|openmp-dev' links omp.h omp_get_max_threads -fopenmp
    cc=${CC:-gcc}
    look need objcopy binutils has objcopy
    look need "zstd's program" zstd has zstd
    look need Python 'python3|python3|python|python3' has python3
    look need ip 'iproute2|iproute|iproute2|iproute2' has ip
    look need ssh 'openssh-client|openssh-clients|openssh|openssh-client' has ssh
    look need pgrep 'procps|procps-ng|procps-ng|procps' has pgrep
    # for the programs on aarch64 and on older processors
    look wish "an emulator of other processors" qemu-user has qemu-aarch64
    look wish "gcc for aarch64" 'gcc-aarch64-linux-gnu|gcc-aarch64-linux-gnu|aarch64-linux-gnu-gcc|' \
        has aarch64-linux-gnu-gcc
}

# missing: all that is missing, in words
missing() { echo "$needed${needed:+${wished:+, }}$wished"; }
# finish HINT: ends the script; HINT says how to install what is missing
finish() {
    [ -n "$needed" ] && { echo "setup: missing: $(missing)$1" >&2; exit 1; }
    echo "setup: nothing that is needed is missing; it would be better with: $wished$1"
    exit 0
}

look_for_all
[ -z "$(missing)" ] && { echo "setup: nothing is missing"; exit 0; }

# Other distributions have apt-get too, as a tool for making images of Debian.
is_debian() { has apt-get && dpkg-query -W libc6 >/dev/null 2>&1; }
if ! is_debian; then
    dnf="dnf install $(once "$fedora")" pacman="pacman -S --needed $(once "$arch")" apk="apk add $(once "$alpine")"
    if has dnf; then finish "; as root: $dnf"; fi
    if has pacman; then finish "; as root: $pacman"; fi
    if has apk; then finish "; as root: $apk"; fi
    finish "; their packages:
  Fedora: $dnf
  Arch:   $pacman
  Alpine: $apk"
fi

# --no-remove: apt-get fails rather than remove a package that conflicts. --no-upgrade: what is there stays as it is.
packages=$(once "$debian")
install="apt-get install -y --no-remove --no-upgrade --no-install-recommends -o DPkg::Lock::Timeout=300 $packages"
sudo=""
if [ "$(id -u)" != 0 ]; then
    has sudo || finish "; as root: apt-get install --no-remove $packages"
    sudo=sudo
fi
echo "setup: installing $packages"
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
# A source of packages that does not answer (update) matters only if the packages cannot be installed.
$sudo apt-get update >"$log" 2>&1
if ! $sudo env DEBIAN_FRONTEND=noninteractive LC_ALL=C $install >>"$log" 2>&1; then
    { grep '^E: ' "$log" || tail -5 "$log"; } >&2
    hint="; apt-get could not install: $packages"
    grep -q '^E: Unable to locate' "$log" && hint="$hint (on Ubuntu they are in \"universe\")"
    look_for_all
    finish "$hint"
fi
look_for_all
[ -z "$(missing)" ] || finish \
    "; apt-get installed $packages, but $cc cannot use that: too old (README.md, Build), or $cc looks elsewhere"
