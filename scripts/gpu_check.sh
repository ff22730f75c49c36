#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one go: the gpu tests, engines of the tiny model and of a
# random 7B LLaVA-NeXT, parity, times against torch on the same GPU, and the figures in
# docs/measurements/gpu-<name>.json and .md.
#
#   scripts/gpu_check.sh [--parts DIR] [--python PYTHON] [options of scripts/gpu_check.py]
#
#   --parts DIR      what scripts/gpu/pack.sh has packed, for a host without a network; torch stays
#                    the host's own (python3 there)
#   --python PYTHON  with TensorRT and this package's dependencies (default: .venv's, else python3)
#
# scripts/gpu_check.py --help tells the rest. Run again, it goes on where it ended.
set -euo pipefail

root=$(cd "$(dirname "$0")/.." && pwd)
parts="" python="" rest=()
while [ $# -gt 0 ]; do
    case $1 in
    --parts | --python)
        [ $# -ge 2 ] || { echo "gpu_check.sh: $1 needs a value" >&2; exit 2; }
        if [ "$1" = --parts ]; then parts=$2; else python=$2; fi
        shift 2
        ;;
    -h | --help)
        sed -n '2,13s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
    *)
        rest+=("$1")
        shift
        ;;
    esac
done
# torch is the host's own: what it runs with is kept before another Python takes its place
export TRIO_HOST_PYTHON TRIO_HOST_PYTHONPATH=${PYTHONPATH-} TRIO_HOST_LD_LIBRARY_PATH=${LD_LIBRARY_PATH-}
TRIO_HOST_PYTHON=$(command -v python3 || true)
if [ -n "$parts" ]; then
    place=${TMPDIR:-/tmp}/trio-gpu-$(id -u)
    [ -f "$place/trio-gpu/env.sh" ] || "$root/scripts/gpu/unpack.sh" "$parts" "$place"
    # shellcheck source=/dev/null
    source "$place/trio-gpu/env.sh"
    python=python3.11
elif [ -z "$python" ]; then
    python=python3
    [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
fi
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd "$root"
exec "$python" scripts/gpu_check.py ${rest[@]+"${rest[@]}"}
