#!/usr/bin/env bash
# Prints doc/flags.md, the page of all flags, from the programs' own tables. `make flags` writes the page.
#   scripts/flags.sh [FOLDER]      the folder that holds the programs (default: the project's)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.}

cat <<'END'
# Flags

This page is generated from the programs by `make flags`: do not edit it. `PROGRAM --help` prints the same tables,
and `PROGRAM --version` the commit that the program was built from.

* `train_t6cu` takes the flags of `train_t6`, `generate_t6cu` those of `generate_t6`, `eval_t6cu` those of `eval_t6`.
* A long name may be shortened while it stays unique. A switch (0 or 1) without a value means 1.
* A bad value ends the program with one line that says what is accepted, and with exit code 2.
* The default is in parentheses. `(preset)`: the preset that `--model` names sets it; `llmc/model.h` has their table.
END
for program in train_t6 generate_t6 eval_t6 data/tokenize data/toy_corpus; do
    echo
    "$folder/$program" --help=markdown
done
