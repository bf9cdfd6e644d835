#!/bin/sh
# Downloads gpt2.tiktoken, GPT-2's vocabulary, and checks it: data/gpt2_vocab.sh [FILE]   (default: data/gpt2.tiktoken)
# It is an asset of OpenAI's Whisper: tries its repository, then its package on PyPI (or the mirror PIP_INDEX_URL).
set -eu
sha256=306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930
commit=c0d2f624c09dc18e709e37c2ad90c039a4eb72a2
canonical=https://raw.githubusercontent.com/openai/whisper/$commit/whisper/assets/gpt2.tiktoken
index=${PIP_INDEX_URL:-https://pypi.org/simple}
file=${1:-$(dirname "$0")/gpt2.tiktoken}

is_right() { [ -f "$1" ] && [ "$(sha256sum <"$1")" = "$sha256  -" ]; }
fetch() { curl -fsSL --connect-timeout 10 --retry 2 "$1" 2>/dev/null; }

is_right "$file" && { echo "gpt2_vocab.sh: $file is there"; exit 0; }
part=$(mktemp "$file.XXXXXX") || exit 1
trap 'rm -f "$part"' EXIT
trap 'exit 1' INT TERM
from=$canonical
if ! { fetch "$canonical" >"$part" && is_right "$part"; }; then
    # the newest source archive on the package's page; a relative address is relative to the page
    page=${index%/}/openai-whisper/
    from=$(fetch "$page" | grep -o 'href="[^"#]*\.tar\.gz' | sed 's/^href="//' | tail -n 1) || true
    case $from in http*) ;; *) from=$page$from ;; esac
    fetch "$from" | tar -xzO --wildcards '*/whisper/assets/gpt2.tiktoken' >"$part" 2>/dev/null || true
fi
if ! is_right "$part"; then
    echo "gpt2_vocab.sh: cannot download gpt2.tiktoken from $canonical or PyPI's openai-whisper;" \
        "get it elsewhere (sha256 $sha256) and put it at $file" >&2
    exit 1
fi
chmod 644 "$part"
mv "$part" "$file"
echo "gpt2_vocab.sh: $file from $from"
