#!/bin/sh
# Check models in CI:  verify_in_ci.sh DIRECTORY
# The directory holds .qf files and, beside them, SHA256SUMS with the digests that were reviewed and committed:
#     qformat checksum *.qf > SHA256SUMS
set -eu
cd "$1"

# Every byte of every file against the digests inside it: finds damage, and names the tensor.
qformat verify ./*.qf

# A file that nobody reviewed is no good either.
for file in *.qf; do
    cut -c67- SHA256SUMS | grep -qxF -e "$file" || { echo "$file: not listed in SHA256SUMS"; exit 1; }
done

# Whole files against the pinned list: finds that a file is a good one, but another one.
qformat verify SHA256SUMS
