"""Drives CMake, which holds the list of sources, and installs its modules into the package."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Given on every run, so that nothing is left over from an earlier one in the same build folder.
DEFAULTS = {"FASTPO_SIM": "OFF", "FASTPO_CUDA": "AUTO", "FASTPO_CUDA_ARCHS": "80;90;100;120"}
SOURCES = ["CMakeLists.txt", *(str(p) for p in sorted(Path("csrc").rglob("*.*")))]


class CMakeBuild(build_ext):
    """One CMake run builds every extension module.

    Environment, at build time only: FASTPO_SIM=ON adds the simulator modules of the test suite;
    FASTPO_CUDA=AUTO|ON|OFF and FASTPO_CUDA_ARCHS="80;90" choose the CUDA module; MAX_JOBS limits
    the number of compilers that run at a time.
    """

    def run(self) -> None:
        """Configure, build, install."""
        source = Path(__file__).parent.resolve()
        build = Path(self.build_temp).resolve()
        in_tree = self.inplace or self.editable_mode
        install = source if in_tree else Path(self.build_lib).resolve()
        definitions = [f"-D{name}={os.environ.get(name, DEFAULTS[name])}" for name in DEFAULTS]
        definitions += [f"-DPython_EXECUTABLE={sys.executable}"]
        build.mkdir(parents=True, exist_ok=True)
        subprocess.check_call(["cmake", "-G", "Ninja", "-S", source, "-B", build, *definitions])
        parallel = ["--parallel", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.check_call(["cmake", "--build", build, *parallel])
        subprocess.check_call(["cmake", "--install", build, "--prefix", install])

    def get_outputs(self) -> list[str]:
        """Nothing for setuptools to copy: CMake has installed the modules."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """As above, for editable installs."""
        return {}


setup(
    ext_modules=[Extension("fastpo._cpu", sources=[], depends=SOURCES)],
    cmdclass={"build_ext": CMakeBuild},
)
