#!/bin/sh
# Installs the Triton Inference Server into an environment of its own, so that
#     .venv-triton/bin/tritonserver --model-repository model_repository
# serves what `trio triton` wrote. The server comes from PyPI: the wheel of nvidia-pytriton holds
# Triton 2.51 with the python backend (no other), built for CPUs and GPUs.
#
#     scripts/setup_triton.sh [FOLDER]        # default: .venv-triton; PYTHON=python3.11 chooses
#
# Running it again does nothing unless the requirements changed. Exit status 3: the server's wheel
# cannot be had or run here, with the reason in FOLDER/unavailable; 1: something else failed.
set -eu

python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/.venv-triton}
pins=$root/requirements/triton.txt

unavailable() {
    mkdir -p "$folder"
    echo "$1" >"$folder/unavailable"
    echo "setup_triton: $1" >&2
    exit 3
}

fail() {
    echo "setup_triton: $1" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "there is no $python: name one with PYTHON=python3.11"
[ "$(uname -s)" = Linux ] ||
    unavailable "the Triton server's wheel is for Linux, not for $(uname -s): use NVIDIA's container"
case $(uname -m) in
x86_64 | aarch64) ;;
*) unavailable "there is no wheel of the Triton server for $(uname -m): use NVIDIA's container" ;;
esac
# numpy 1.26, the last before 2, has wheels up to Python 3.12.
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
case $version in
3.10 | 3.11 | 3.12) ;;
*) unavailable "the Triton server's Python needs numpy < 2, which Python $version does not have: \
set PYTHON to a Python 3.10, 3.11 or 3.12" ;;
esac
glibc=$("$python" -c 'import os; print(os.confstr("CS_GNU_LIBC_VERSION") or "another C library")' \
    2>/dev/null || echo "another C library")
"$python" - <<'END' || unavailable "the Triton server's wheel needs glibc 2.35 or later, here is $glibc: use NVIDIA's container"
import os, sys
try:
    name, version = os.confstr("CS_GNU_LIBC_VERSION").split()
    sys.exit(name != "glibc" or tuple(map(int, version.split("."))) < (2, 35))
except (ValueError, AttributeError):
    sys.exit(1)
END
case $folder in
*[[:space:]]*)
    unavailable "Triton starts models by a shell that takes $folder apart at its spaces: name a \
folder without any, scripts/setup_triton.sh FOLDER"
    ;;
esac
# The python backend runs models in a program of its own that loads libpython.
library=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR"))')
shared=$library/libpython$version.so.1.0
[ -e "$shared" ] || ldconfig -p 2>/dev/null | grep -q "libpython$version.so.1.0" ||
    unavailable "$python has no shared library libpython$version.so.1.0: install it \
(Debian: libpython$version), or build Python with --enable-shared"

rm -f "$folder/unavailable"
stamp=$folder/ready
wanted=$(cat "$0" "$pins" "$root/pyproject.toml" | cksum)
if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted $version" ]; then
    echo "The Triton server is ready: $folder/bin/tritonserver"
    exit 0
fi
rm -f "$stamp"
if [ -x "$folder/bin/python" ] &&
    [ "$("$folder/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" != "$version" ]; then
    rm -rf "$folder"
fi
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"

install() {
    "$folder/bin/python" -m pip --disable-pip-version-check install --quiet --constraint "$pins" "$@"
}
# The server itself needs none of nvidia-pytriton's own requirements, which are of its Python side.
install --editable "${root}[cpu,export]" 'numpy<2' 'tritonclient[grpc,http]' pytest ||
    fail "pip could not install trio-deploy for the server (above is why): try again"
install --no-deps --only-binary :all: nvidia-pytriton ||
    unavailable "pip could not get the wheel of nvidia-pytriton, which holds the Triton server: run \
scripts/setup_triton.sh to see why"

# A backend folder of our own: the wheel's python backend and the program for this Python.
package=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
server=$package/pytriton/tritonserver
stub=$server/python_backend_stubs/$version/triton_python_backend_stub
[ -x "$server/bin/tritonserver" ] && [ -e "$stub" ] ||
    fail "the wheel of nvidia-pytriton holds no server for Python $version: delete $folder and try again"
backend=$folder/triton/backends/python
rm -rf "$folder/triton"
mkdir -p "$backend"
ln -s "$server/backends/python/"* "$backend/"
chmod +x "$stub"
ln -s "$stub" "$backend/triton_python_backend_stub"

# The stub finds libpython by LD_LIBRARY_PATH, and this environment by the first python3 of PATH.
cat >"$folder/bin/tritonserver" <<END
#!/bin/sh
PATH="$folder/bin:\$PATH"
LD_LIBRARY_PATH="$library\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
PYTHONNOUSERSITE=1
unset PYTHONHOME PYTHONPATH
export PATH LD_LIBRARY_PATH PYTHONNOUSERSITE
exec "$server/bin/tritonserver" --backend-directory="$folder/triton/backends" \\
    --cache-directory="$server/caches" "\$@"
END
chmod +x "$folder/bin/tritonserver"
"$folder/bin/tritonserver" --help 2>&1 | grep -q -e --model-repository ||
    fail "the server was installed but does not start: $("$folder/bin/tritonserver" --help 2>&1 | head -n 1)"
missing=$(LD_LIBRARY_PATH=$library ldd "$stub" | grep "not found" || true)
[ -z "$missing" ] || fail "the server's Python program misses libraries of the system: $missing"
echo "$wanted $version" >"$stamp"
echo "The Triton server is ready: $folder/bin/tritonserver"
