#!/bin/sh
# Downloads gpt2.tiktoken, GPT-2's vocabulary, and checks it: data/gpt2_vocab.sh --help
# It is an asset of OpenAI's Whisper. Its repository has it, and so has the package openai-whisper, which pip knows.
set -eu

usage() {
    cat <<'END'
usage: data/gpt2_vocab.sh [FILE | FOLDER]

Downloads gpt2.tiktoken, GPT-2's vocabulary, to FILE or FOLDER/gpt2.tiktoken (default: data/gpt2.tiktoken), and checks
it. Where the file is there already, nothing happens.
END
}
die() { echo "gpt2_vocab.sh: $1" >&2; exit "${2:-2}"; }

sha256=306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930
commit=c0d2f624c09dc18e709e37c2ad90c039a4eb72a2
canonical=https://raw.githubusercontent.com/openai/whisper/$commit/whisper/assets/gpt2.tiktoken
[ $# -le 1 ] || die "$2: one file is enough; see --help"
case ${1:-} in
-h | --help) usage; exit 0 ;;
-*) die "$1: not a flag of this script; see --help" ;;
esac
file=${1:-$(dirname "$0")/gpt2.tiktoken}
[ ! -d "$file" ] || file=${file%/}/gpt2.tiktoken

is_right() { [ -f "$1" ] && [ "$(sha256sum <"$1")" = "$sha256  -" ]; }

is_right "$file" && { echo "gpt2_vocab.sh: $file is there"; exit 0; }
[ ! -e "$file" ] || [ -f "$file" ] || die "$file: not a file"
part=$(mktemp "$file.XXXXXX" 2>/dev/null) || die "$file: cannot write here; is there such a folder?" 1
scratch=$(mktemp -d)
trap 'rm -rf "$part" "$scratch"' EXIT
trap 'exit 1' INT TERM

from_repository() { curl -fsSL --connect-timeout 10 --retry 2 "$canonical" -o "$part" 2>/dev/null; }
from_package() {    # PIP...: the package is an archive of the repository
    "$@" --version >/dev/null 2>&1 || return 1
    "$@" download --quiet --no-deps --no-binary :all: --dest "$scratch" openai-whisper >/dev/null 2>&1 || return 1
    tar -xzOf "$scratch"/*.tar.gz --wildcards '*/whisper/assets/gpt2.tiktoken' >"$part" 2>/dev/null
}
from=$canonical
from_repository || true
if ! is_right "$part"; then
    from="the package openai-whisper"
    from_package python3 -m pip || from_package pip3 || from_package pip || true
fi
is_right "$part" ||
    die "cannot download gpt2.tiktoken from $canonical, nor openai-whisper with pip; get it elsewhere (sha256 $sha256)\
 and put it at $file" 1
chmod 644 "$part"
mv "$part" "$file"
echo "gpt2_vocab.sh: $file from $from"
