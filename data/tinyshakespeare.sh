#!/bin/bash
# Token shards of a small classic, 1.1 MB of Shakespeare's plays: data/tinyshakespeare.sh --help
set -euo pipefail

usage() {
    cat <<'END'
usage: data/tinyshakespeare.sh [options] [tokenize's --bytes --vocab --threads --shard-size --val-tokens]

Makes DIR/tinyshakespeare_val_000000.bin (the first 32768 tokens) and DIR/tinyshakespeare_train_000001.bin. A set that
is there must have been made with the same flags.

  --out DIR     default data/tinyshakespeare
  --text FILE   use this copy of the text instead of downloading it
END
}

program=tinyshakespeare.sh
here=$(unset CDPATH && cd "$(dirname "$0")" && pwd)
. "$here/data_set.sh"
commit=6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e
url=https://raw.githubusercontent.com/karpathy/char-rnn/$commit/data/tinyshakespeare/input.txt
sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
out=$here/tinyshakespeare text='' shard_size=100000000 val_tokens=32768
while [ $# -gt 0 ]; do
    case $1 in
    -h | --help) usage; exit 0 ;;
    --bytes) tokenize_flag "$1" ;;
    --out | --text | --vocab | --threads | --shard-size | --val-tokens)
        [ -n "${2:-}" ] || die "$1: a value is missing"
        case $1 in
        --out) out=$2 ;;
        --text) text=$2 ;;
        *) tokenize_flag "$1" "$2" ;;
        esac
        shift ;;
    *) die "$1: not a flag of this script; see --help" ;;
    esac
    shift
done
name=$out/tinyshakespeare
[ -x "$tokenize" ] || die "$tokenize does not exist; build it with: make tokenize"
if [ -e "${name}_manifest.json" ]; then
    check_existing "${name}_manifest.json"
    "$tokenize" --verify "$name" >/dev/null 2>&1 ||
        die "${name}_manifest.json: its shards are damaged; delete $out and run this again"
    say "$name is there"
    exit 0
fi
mkdir -p "$out" 2>/dev/null || code=1 die "$out: cannot make this folder"
tokenize_arguments
if [ -z "$text" ]; then
    text=$out/tinyshakespeare.txt
    [ -e "$text" ] || { curl -fsL --connect-timeout 20 --retry 2 "$url" -o "$text.part" && mv "$text.part" "$text"; } ||
        code=1 die "cannot download $url; get the text elsewhere (sha256 $sha256) and pass it with --text FILE"
fi
[ -f "$text" ] && [ -r "$text" ] || die "$text: no such file, or not to be read"
[ "$(sha256sum <"$text")" = "$sha256  -" ] ||
    die "$text: not the text, or damaged (its sha256 is not $sha256); delete it, or pass a good copy with --text FILE"
"$tokenize" "${pass[@]}" -o "$name" "$text"
