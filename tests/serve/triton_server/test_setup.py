"""How the server's environment is set up, with stand-ins for Python, pip and the system."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = """#!/bin/sh
case "$*" in
*version_info*) echo 3.11 ;;
*CS_GNU_LIBC_VERSION*) echo "glibc 2.36" ;;
*LIBDIR*) echo "$STAND_IN/lib" ;;
-) cat >/dev/null ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip "*)
    printf '%s\\n' "$@" >>"$STAND_IN/pip"
    case "$*" in *"$PIP_LACKS"*) exit 1 ;; esac
    ;;
*) exit 9 ;;
esac
"""
UNAME = '#!/bin/sh\n[ "$1" = -s ] && echo Linux || echo x86_64\n'
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def write_program(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """As much of a checkout as the set-up reads, at a path that a shell would take apart."""
    root = tmp_path / "my check out"
    for name in (
        "Makefile",
        "pyproject.toml",
        "requirements/triton.txt",
        "scripts/setup_triton.sh",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    write_program(root / "bin" / "python", PYTHON)
    write_program(root / "bin" / "uname", UNAME)
    write_program(root / "bin" / "ldconfig", "#!/bin/sh\n")
    return root


def set_up(checkout: Path, lacks: str, folder: Path | None = None) -> tuple[int, str | None]:
    """Exit status, and the reason why the server is unavailable; by default beside the checkout."""
    folder = folder or checkout.parent / "server"
    environment = {
        **os.environ,
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(checkout / "bin" / "python"),
        "STAND_IN": str(checkout),
        "PIP_LACKS": lacks,
    }
    script = checkout / "scripts" / "setup_triton.sh"
    status = subprocess.run([script, folder], env=environment, capture_output=True).returncode
    reason = folder / "unavailable"
    return status, reason.read_text() if reason.exists() else None


def add_libpython(checkout: Path) -> None:
    (checkout / "lib").mkdir()
    (checkout / "lib" / "libpython3.11.so.1.0").touch()


def test_a_wheel_that_cannot_be_had_is_a_reason_and_anything_else_a_failure(checkout: Path) -> None:
    status, reason = set_up(checkout, "nvidia-pytriton")
    assert status == 3 and reason is not None and "libpython3.11.so.1.0: install it" in reason
    add_libpython(checkout)
    assert set_up(checkout, "tritonclient") == (1, None), "the old reason holds no more"
    status, reason = set_up(checkout, "nvidia-pytriton")
    assert status == 3 and reason is not None and "the wheel of nvidia-pytriton" in reason


def test_a_path_with_spaces_reaches_pip_whole(checkout: Path) -> None:
    add_libpython(checkout)
    set_up(checkout, "nvidia-pytriton")
    given = (checkout / "pip").read_text().splitlines()
    assert given.count(str(checkout / "requirements" / "triton.txt")) == 2
    assert f"{checkout}[cpu,export]" in given


def test_a_folder_with_spaces_is_refused_since_triton_cannot_start_models_there(
    checkout: Path,
) -> None:
    add_libpython(checkout)
    status, reason = set_up(checkout, "nvidia-pytriton", checkout / ".venv-triton")
    assert status == 3 and reason is not None and "spaces" in reason
    assert not (checkout / "pip").exists(), "before anything is fetched"


@needs_make
def test_server_tests_run_as_soon_as_what_was_missing_is_there(checkout: Path) -> None:
    write_program(checkout / ".venv" / "bin" / "python", "#!/bin/sh\n")
    write_program(checkout / "pytest", "#!/bin/sh\necho the tests ran\n")
    write_program(
        checkout / "scripts" / "setup_triton.sh",
        "#!/bin/sh\necho setting up\nmkdir -p .venv-triton/bin\n"
        "[ -e library ] || { echo no library >.venv-triton/unavailable; exit 3; }\n"
        "rm -f .venv-triton/unavailable\ncp pytest .venv-triton/bin/python\n",
    )
    environment = {name: v for name, v in os.environ.items() if not name.startswith("MAKE")}

    def make() -> list[str]:
        command = ["make", "--silent", "server-tests", f"PYTHON={sys.executable}"]
        made = subprocess.run(
            command, cwd=checkout, env=environment, capture_output=True, text=True, check=True
        )
        return made.stdout.splitlines()

    assert make() == ["setting up", "server tests skipped: no library"]
    (checkout / "library").touch()
    assert make() == ["setting up", "the tests ran"]
    assert make() == ["the tests ran"]
