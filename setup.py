"""Drives CMake, which holds the list of sources, and puts the modules it builds into the package."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """One CMake run builds every extension module.

    Environment, at build time only: FASTPO_SIM=1 adds the simulator modules of the test suite;
    FASTPO_CUDA=AUTO|ON|OFF and FASTPO_CUDA_ARCHS="80;90" choose the CUDA module; MAX_JOBS limits the
    number of compilers that run at a time.
    """

    def run(self) -> None:
        source = Path(__file__).parent.resolve()
        build = Path(self.build_temp).resolve()
        install = source if self.inplace else Path(self.build_lib).resolve()
        options = {name: os.environ[name] for name in ("FASTPO_CUDA", "FASTPO_CUDA_ARCHS", "FASTPO_SIM") if name in os.environ}
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        definitions += [f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_INSTALL_PREFIX={install}"]
        build.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(["cmake", "-G", "Ninja", "-S", source, "-B", build, *definitions])
        jobs = os.environ.get("MAX_JOBS")
        parallel = ["--parallel", jobs] if jobs else []
        subprocess.check_call(["cmake", "--build", build, *parallel])
        subprocess.check_call(["cmake", "--install", build])

    def get_outputs(self) -> list[str]:
        """The modules are installed by CMake; setuptools has nothing to copy."""
        return []


setup(ext_modules=[Extension("fastpo._cpu", sources=[])], cmdclass={"build_ext": CMakeBuild})
