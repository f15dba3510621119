"""What a build compiles with is there before it works, or one line says what to install."""

import shutil

import pytest
import torch

from common.cli import Console
from common.compiler.toolchain import (
    assemble_cuda_home,
    check_compiles,
    prepare_toolchain,
)
from common.errors import EnvironmentProblemError

QUIET = Console(quiet=True)


def test_this_machine_can_build_for_the_cpu():
    prepare_toolchain("cpu", host_code=True, console=QUIET)


@pytest.mark.parametrize(("compiler", "cure"), [("CC", "apt-get install gcc"), ("CXX", "g++")])
def test_missing_compiler_is_named_with_its_cure(monkeypatch, tmp_path, compiler, cure):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv(compiler, raising=False)
    with pytest.raises(EnvironmentProblemError, match=cure):
        check_compiles(compiler, ("stddef.h",), [])


def test_compiler_that_the_user_names_and_has_not_is_named(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentProblemError, match="no-such-compiler is not on PATH"):
        check_compiles("CXX", ("vector",), [])


def test_missing_python_headers_are_named_with_their_cure(tmp_path):
    with pytest.raises(EnvironmentProblemError, match=r"Python\.h is missing.*python3\.\d+-dev"):
        check_compiles("CXX", ("Python.h",), ["-I", str(tmp_path)])


@pytest.mark.parametrize("header", ["nv/target", "cuda_runtime_api.h"])
def test_missing_cuda_header_is_cured_by_the_wheel_of_this_torchs_cuda(
    monkeypatch, tmp_path, header
):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(EnvironmentProblemError, match=rf"{header} is missing.*-cu12==12\.8\.\*"):
        check_compiles("CXX", (header,), ["-I", str(tmp_path)])


def test_missing_openssl_is_named_with_its_cure(monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: which(name) if name != "openssl" else None)
    with pytest.raises(EnvironmentProblemError, match="apt-get install openssl"):
        prepare_toolchain("cpu", host_code=True, console=QUIET)


def test_missing_library_is_named():
    with pytest.raises(EnvironmentProblemError, match="no_such_driver"):
        check_compiles("CXX", ("vector",), ["-lno_such_driver"])


def test_a_compiler_that_would_put_its_library_into_programs_is_refused(monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(
        f"""#!/bin/sh
case $1 in
-print-file-name=libstdc++.so) echo libstdc++.so ;;
*) exec {shutil.which("g++")} "$@" ;;
esac
"""
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(EnvironmentProblemError, match=r"ln -s /.*libstdc\+\+\.so\.6\S* /"):
        check_compiles("CXX", ("vector",), [])


def test_cuda_home_takes_headers_of_the_user_first_and_links_the_driver(monkeypatch, tmp_path):
    (tmp_path / "users/include/cccl/nv").mkdir(parents=True)
    (tmp_path / "users/include/cuda.h").write_text("// the user's")
    (tmp_path / "users/include/cccl/nv/target").write_text("")
    driver = tmp_path / "libcuda.so.1"
    driver.write_bytes(b"")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "users"))
    monkeypatch.setattr("common.cuda.loaded_library", lambda name: str(driver))
    home = assemble_cuda_home(tmp_path)
    assert (home / "include/cuda.h").read_text() == "// the user's"
    assert (home / "include/nv/target").exists()
    assert (home / "lib64/libcuda.so").resolve() == driver
