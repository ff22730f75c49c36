#!/usr/bin/env bash
# Copy an interpreter to a folder of its own: the program, its standard library, libpython and the
# libraries that these are linked with, but for glibc's. Nothing else of its prefix, which may be
# /usr.
#
#   scripts/gpu/pack_python.sh PYTHON DEST     then: PYTHONHOME=DEST DEST/bin/python3.x
set -euo pipefail

if [ $# -ne 2 ] || [ "${1#-}" != "$1" ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
fi
mkdir -p "$2/bin" "$2/lib"
"$1" -I - "$2" <<'PY'
import pathlib, re, shutil, subprocess, sys, sysconfig

dest = pathlib.Path(sys.argv[1])
name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
library = pathlib.Path(sysconfig.get_path("stdlib"))
program = pathlib.Path(sys.executable).resolve()
if sys.prefix != sys.base_prefix:  # of a virtual environment: its own is a link
    program = (pathlib.Path(sys.base_prefix) / "bin" / name).resolve()
if library.name != name:
    sys.exit(f"pack_python.sh: the standard library is not in .../{name} but in {library}")
leave = ("site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo",
         "ensurepip", "__pycache__", "config-*", "*.a")
shutil.copy2(program, dest / "bin" / name)
shutil.copytree(library, dest / "lib" / name, ignore=shutil.ignore_patterns(*leave),
                dirs_exist_ok=True, ignore_dangling_symlinks=True)
glibc = re.compile(r"(ld-linux.*|lib(c|m|dl|rt|pthread|util|resolv|nsl)\.so.*|linux-vdso.*)")
linked = [dest / "bin" / name, *(dest / "lib" / name / "lib-dynload").glob("*.so")]
for file in linked:
    out = subprocess.run(["ldd", file], capture_output=True, text=True).stdout
    for found in re.findall(r"^\s*(\S+) => (/\S+)", out, re.M):
        if not glibc.fullmatch(found[0]) and not (dest / "lib" / found[0]).exists():
            shutil.copy2(found[1], dest / "lib" / found[0])
size = sum(f.stat().st_size for f in dest.rglob("*") if f.is_file())
print(f"{size >> 20} MiB of {name}")
if size > 300 << 20:
    sys.exit("pack_python.sh: that is more than an interpreter; use another one")
PY
