#!/usr/bin/env bash
# Installs what is missing to build and run on Debian or Ubuntu (root or sudo); says so where it cannot.
#   scripts/setup.sh          compiler, libraries, gnuplot, xz
#   scripts/setup.sh mpi      also Open MPI, for several ranks
#   scripts/setup.sh test     also what the tests need: Open MPI, clang
set -euo pipefail

packages="ca-certificates curl gcc g++ make libc6-dev binutils libcjson-dev libxxhash-dev libutf8proc-dev libzstd-dev zstd libopenblas-dev gnuplot-nox xz-utils unzip"
[ "${1:-}" = mpi ] || [ "${1:-}" = test ] && packages="$packages openmpi-bin libopenmpi-dev"
[ "${1:-}" = test ] && packages="$packages clang libomp-dev python3 python3-venv iproute2 openssh-client"

missing=""
for p in $packages; do
    [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$p" 2>/dev/null | cut -c1-2)" = ii ] || missing="$missing $p"
done
[ -z "$missing" ] && exit 0

if ! command -v apt-get >/dev/null; then
    echo "setup: this is neither Debian nor Ubuntu; please install the counterparts of:$missing" >&2
    exit 1
fi
sudo=""
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "setup: run as root, or install sudo; missing:$missing" >&2; exit 1; }
    sudo=sudo
fi
echo "setup: installing$missing"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086
if ! { $sudo apt-get update && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $missing; } >"$log" 2>&1; then
    tail -5 "$log" >&2
    echo "setup: apt-get could not install:$missing" >&2
    exit 1
fi
