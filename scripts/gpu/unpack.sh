#!/usr/bin/env bash
# Put together on a GPU host what pack.sh has packed; needs nothing but python3.
#
#   scripts/gpu/unpack.sh PARTS DEST     then: source DEST/trio-gpu/env.sh
set -euo pipefail

if [ $# -ne 2 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0"
    exit 2
fi
ls "$1"/trio-gpu.00 >/dev/null 2>&1 || { echo "unpack.sh: $1 holds no trio-gpu.00" >&2; exit 1; }
mkdir -p "$2"
cat "$1"/trio-gpu.[0-9]* | python3 -c '
import sys, tarfile
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz") as packed:
    packed.extractall(sys.argv[1])' "$2"
