#!/usr/bin/env bash
# Installs the packages that are missing for building and running, on Debian or Ubuntu, as root or with sudo.
#   scripts/setup.sh          compilers, libraries, gnuplot, xz
#   scripts/setup.sh mpi      also Open MPI, for several ranks
#   scripts/setup.sh test     also what the tests need: Open MPI, clang, Python
set -euo pipefail

packages="ca-certificates curl gcc g++ make libc6-dev binutils gnuplot-nox xz-utils unzip zstd"
packages="$packages libcjson-dev libxxhash-dev libutf8proc-dev libzstd-dev zlib1g-dev libopenblas-dev"
[ "${1:-}" = mpi ] || [ "${1:-}" = test ] && packages="$packages openmpi-bin libopenmpi-dev"
[ "${1:-}" = test ] && packages="$packages clang libomp-dev python3 python3-venv iproute2 openssh-client"

missing=""
for p in $packages; do
    [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$p" 2>/dev/null | cut -c1-2)" = ii ] || missing="$missing $p"
done
[ -z "$missing" ] && exit 0

if ! command -v apt-get >/dev/null; then
    echo "setup: there is no apt-get here (not Debian or Ubuntu); install the equivalents of:$missing" >&2
    exit 1
fi
sudo=""
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "setup: run this as root, or install sudo; missing:$missing" >&2; exit 1; }
    sudo=sudo
fi
echo "setup: installing$missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086
install() {
    $sudo apt-get update &&
        $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing
}
if ! install >"$log" 2>&1; then
    tail -5 "$log" >&2
    echo "setup: apt-get could not install:$missing" >&2
    exit 1
fi
