"""What is checked of the compiled kernels outside Python: said when it is not, and built for the right architecture."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKS = ROOT / "native" / "tests" / "run"
X86 = {"avx2": "-mavx2", "avxvnni": "-mavxvnni", "avx512": "-mavx512bf16", "amx": "-mamx-int8"}
ARM = {"neon": "", "neon_dot": "-march=armv8.2-a+dotprod", "neon_mmla": "-march=armv8.2-a+dotprod+bf16+i8mm"}
PRETEND_MACOS = [
    "-DMONOSEM_TEST=ON",
    "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
    "-DCMAKE_SYSTEM_NAME=Darwin",
    "-DCMAKE_SYSTEM_PROCESSOR=arm64",
    "-DCMAKE_OSX_SYSROOT=/",
    "-DCMAKE_HAVE_LIBC_PTHREAD=1",
    "-DCMAKE_CXX_COMPILER=clang++",
    "-DCMAKE_CXX_COMPILER_WORKS=1",
    "-DCMAKE_CXX_COMPILER_TARGET=arm64-apple-macos11",
    "-DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY",
    "-DCMAKE_AR=ar",
    "-DCMAKE_INSTALL_NAME_TOOL=true",
]


@pytest.fixture
def no_tools(tmp_path: Path) -> dict[str, str]:
    """An environment without a compiler."""
    for tool in ("bash", "dirname"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or pytest.fail(f"no {tool}"))
    return {"PATH": str(tmp_path)}


def test_checks_without_their_tools_are_not_run_and_say_so(no_tools: dict[str, str]) -> None:
    done = subprocess.run([CHECKS], env=no_tools, capture_output=True, text=True, check=True)
    assert [line.split("'")[1] for line in done.stderr.splitlines()] == ["sanitizers", "arm", "clang"]
    assert done.stderr.count("was not run: there is no ") == 3


@pytest.mark.parametrize("check", ["sanitizers", "arm", "clang"])
def test_in_ci_a_check_without_its_tools_fails(check: str, no_tools: dict[str, str]) -> None:
    done = subprocess.run([CHECKS, check], env={**no_tools, "CI": "1"}, capture_output=True, text=True)
    assert done.returncode == 1 and f"'{check}' was not run" in done.stderr


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("clang++")), reason="needs cmake and clang++")
@pytest.mark.parametrize(("architectures", "flags"), [("arm64", ARM), ("x86_64", X86), ("arm64;x86_64", X86 | ARM)])
def test_macos_builds_have_the_levels_of_their_architectures(
    architectures: str, flags: dict[str, str], tmp_path: Path
) -> None:
    options = [*PRETEND_MACOS, f"-DCMAKE_OSX_ARCHITECTURES={architectures}"]
    subprocess.run(["cmake", "-S", ROOT, "-B", tmp_path, *options], check=True, capture_output=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text("utf-8"))
    levels = {Path(c["file"]).stem.removeprefix("level_"): c["command"] for c in commands if "level_" in c["file"]}
    assert levels.keys() == {"portable", *flags}
    for name, flag in flags.items():
        only_for = "" if ";" not in architectures else "-Xarch_x86_64 " if name in X86 else "-Xarch_arm64 "
        assert flag == "" or f" {only_for}{flag} " in levels[name]
        assert levels[name].count(" -m") == levels[name].count(f" {only_for}-m")
    assert " -m" not in levels["portable"]
