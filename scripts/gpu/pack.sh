#!/usr/bin/env bash
# Pack what a GPU host without a network needs for scripts/gpu_check.sh, but for torch and this
# checkout: TensorRT 8.6 (the newest whose builder PyPI has), Python 3.11 and this package's
# dependencies. Run it with Python 3.11 where there is a network; it needs 3 GB of disk, gcc and xz.
#
# A part and this checkout together stay below 64 MiB, what a call may carry to such a host.
#
#   scripts/gpu/pack.sh OUT      writes OUT/trio-gpu.00, .01, … of 48 MiB at most
set -euo pipefail

if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0"
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || { echo "pack.sh: $python is needed (PYTHON=… names another)" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "pack.sh: TensorRT 8.6's bindings are for Python 3.11, $python is not" >&2
    exit 1
}
mkdir -p "$1"
out=$(cd "$1" && pwd)
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
root=$tmp/trio-gpu
mkdir -p "$root/site" "$root/lib" "$root/python"

get() {
    "$python" -m pip download -q --no-deps --only-binary=:all: -d "$tmp/wheels" \
        --platform manylinux_2_17_x86_64 "$@"
}
echo "TensorRT 8.6"
# The libraries come in the wheel for Python 3.10, the bindings for 3.11 have one of their own.
get --python-version 3.10 tensorrt==8.6.0
get --python-version 3.11 tensorrt_bindings==8.6.1
"$python" -m zipfile -e "$tmp"/wheels/tensorrt-8.6.0-*.whl "$tmp/tensorrt"
"$python" -m zipfile -e "$tmp"/wheels/tensorrt_bindings-*.whl "$root/site"
mv "$tmp"/tensorrt/tensorrt/libnv*.so* "$root/lib/"
mv "$root/site/tensorrt_bindings" "$root/site/tensorrt"

echo "empty cuBLAS and cuDNN, which the plugin library is linked with and no engine of ours uses"
while read -r library functions; do
    {
        echo '#include <stdio.h>'
        for name in $functions; do
            printf 'int %s(void) { fputs("%s of an empty %s was called", stderr); return 1; }\n' \
                "$name" "$name" "$library"
        done
    } >"$tmp/stub.c"
    echo "$library { global: *; };" >"$tmp/stub.map"
    gcc -shared -fPIC -w -Wl,-soname,"$library" -Wl,--version-script,"$tmp/stub.map" \
        -o "$root/lib/$library" "$tmp/stub.c"
done <"$here/stubs.txt"

echo "dependencies"
"$python" -m pip install -q --no-compile --target "$root/site" -r "$here/requirements.txt"

echo "Python"
"$here/pack_python.sh" "$python" "$root/python"
cat >"$root/env.sh" <<'ENV'
trio_gpu=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONHOME=$trio_gpu/python PYTHONPATH=$trio_gpu/site${PYTHONPATH:+:$PYTHONPATH}
export PATH=$trio_gpu/python/bin:$PATH
export LD_LIBRARY_PATH=$trio_gpu/lib:$trio_gpu/python/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
ENV

tar -C "$tmp" -cf - trio-gpu | xz -T0 -2 | split -b 48M -d - "$out/trio-gpu."
ls -l "$out"
