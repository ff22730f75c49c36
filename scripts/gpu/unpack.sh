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
whole=$(cd "$2" && pwd)/trio-gpu
rm -rf "$whole.unpacking"
mkdir "$whole.unpacking"
cat "$1"/trio-gpu.[0-9]* | python3 -c '
import sys, tarfile
with tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz") as packed:
    if hasattr(tarfile, "fully_trusted_filter"):
        packed.extraction_filter = tarfile.fully_trusted_filter
    packed.extractall(sys.argv[1])' "$whole.unpacking" || {
    echo "unpack.sh: $1 is not whole: $(ls "$1" | wc -l) parts are there" >&2
    exit 1
}
rm -rf "$whole"
mv "$whole.unpacking/trio-gpu" "$whole"
rmdir "$whole.unpacking"
