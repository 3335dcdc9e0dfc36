"""Runs everything that needs a GPU and prints one table: what ran, what came out, what could not run and why.

Called by gpu_check.sh. One part's failure stops no other. Exit code: 0 nothing that ran failed, 1 something failed, 2
there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = 77
"""Exit code of a part that found that it cannot run; its last line says why."""


@dataclass(frozen=True)
class Outcome:
    """`state` is 'passed', 'failed' or 'not run'."""

    part: str
    state: str
    detail: str
    seconds: float = 0.0
    data: object = None


@dataclass
class Machine:
    """Where things are, and the environment that the parts run in."""

    build: Path
    logs: Path
    ort: Path | None
    tensorrt: Path | None
    architecture: str
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    def run(self, name: str, command: list[str], seconds: float = 1800) -> tuple[int, str]:
        """Exit code and all output, which is also kept as a log."""
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=seconds,
                check=False,
            )
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or b""
            output = printed if isinstance(printed, str) else printed.decode(errors="replace")
            code, output = 1, f"{output}\nstopped after {seconds:.0f} s"
        except OSError as error:
            code, output = 1, str(error)
        with (self.logs / f"{name}.log").open("a") as log:
            log.write(f"$ {' '.join(command)}\n{output}\nexit code {code}\n\n")
        return code, output

    def judge(self, part: str, log: str, code: int, output: str, *, passed: str = "") -> Outcome:
        last = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "no output")
        if code == SKIPPED:
            return Outcome(part, "not run", last)
        if code == 0:
            return Outcome(part, "passed", passed or last)
        return Outcome(part, "failed", f"{last} (exit code {code}; {self.logs / log}.log)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu_check.json"), help="JSON with all results")
    parser.add_argument("--build-dir", type=Path, default=ROOT / "build" / "gpu", help="where to build")
    parser.add_argument("--ort-include-dir", type=Path, help="folder of onnxruntime_cxx_api.h, or $ORT_INCLUDE_DIR")
    parser.add_argument(
        "--tensorrt-include-dir", type=Path, help="folder of NvInferRuntime.h, or $TENSORRT_INCLUDE_DIR"
    )
    parser.add_argument("--samples", type=int, default=50, help="samples of every timing (default 50)")
    options = parser.parse_args()

    gpu = query_gpu()
    if isinstance(gpu, str):
        print(f"gpu_check: {gpu}", file=sys.stderr)
        return 2
    options.build_dir.mkdir(parents=True, exist_ok=True)
    logs = options.build_dir / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir()
    machine = Machine(
        options.build_dir,
        logs,
        find_header(options.ort_include_dir, "ORT_INCLUDE_DIR", "onnxruntime_cxx_api.h"),
        find_header(options.tensorrt_include_dir, "TENSORRT_INCLUDE_DIR", "NvInferRuntime.h"),
        gpu["compute_capability"].replace(".", ""),
    )
    with tempfile.TemporaryDirectory() as folder:
        make_importable(machine, Path(folder))
        parts: list[tuple[str, Callable[[Machine], Outcome]]] = [
            ("build", build),
            ("native tests", native_tests),
            ("gpu tests", gpu_tests),
            ("memcheck", lambda m: sanitizer(m, "memcheck")),
            ("racecheck", lambda m: sanitizer(m, "racecheck")),
            ("TensorRT", lambda m: runtime(m, "tensorrt", "vq_trt")),
            ("TensorRT for RTX", lambda m: runtime(m, "tensorrt_rtx", "vq_trt")),
            ("ONNX Runtime CUDA", lambda m: runtime(m, "onnxruntime", "vq_ort")),
            ("bench_gpu.py", lambda m: bench(m, options.samples)),
        ]
        outcomes = [attempt(name, part, machine) for name, part in parts]

    print_table(gpu, outcomes)
    record = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": gpu,
        "host": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "parts": [asdict(outcome) for outcome in outcomes],
    }
    whole = options.output.with_name(options.output.name + ".part")
    whole.write_text(json.dumps(record, indent=2) + "\n")
    whole.replace(options.output)
    print(f"\n{options.output} has all of it; logs: {logs}")
    return 1 if any(outcome.state == "failed" for outcome in outcomes) else 0


def attempt(name: str, part: Callable[[Machine], Outcome], machine: Machine) -> Outcome:
    print(f"{name} ...", flush=True)
    start = time.monotonic()
    try:
        outcome = part(machine)
    except Exception as error:  # whatever it is, the other parts still run
        outcome = Outcome(name, "failed", f"{type(error).__name__}: {error}")
    return Outcome(name, outcome.state, outcome.detail, round(time.monotonic() - start, 1), outcome.data)


def query_gpu() -> dict[str, str] | str:
    """Name, compute capability and driver of the first GPU, or why there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi was not found, so there is no NVIDIA driver and no GPU to check"
    query = [tool, "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not done.stdout.strip():
        return f"nvidia-smi finds no GPU: {(done.stdout + done.stderr).strip()}"
    name, capability, driver = (part.strip() for part in done.stdout.splitlines()[0].split(","))
    return {"name": name, "compute_capability": capability, "driver": driver}


def find_header(given: Path | None, variable: str, header: str) -> Path | None:
    """The option's folder, the environment's, or a usual place that has the header."""
    if given is not None and not (given / header).is_file():
        raise SystemExit(f"gpu_check: {given} has no {header}")
    from_environment = [Path(os.environ[variable])] if os.environ.get(variable) else []
    usual = [Path("/usr/include"), Path(f"/usr/include/{platform.machine()}-linux-gnu"), Path("/usr/local/include")]
    folders = [*([given] if given else []), *from_environment, *usual, Path("/usr/include/onnxruntime")]
    return next((folder for folder in folders if (folder / header).is_file()), None)


def make_importable(machine: Machine, folder: Path) -> None:
    """export_vq as the tests import it: installed, or else this checkout under that name."""
    code, _ = machine.run("python", [sys.executable, "-c", "import export_vq.plugins.library"])
    if code == 0:
        return
    package = folder / "export_vq"
    package.mkdir()
    for item in (ROOT / "exporter").iterdir():
        (package / item.name).symlink_to(item)
    for name in ("plugins", "calibration"):
        if (ROOT / name).is_dir() and not (package / name).exists():
            (package / name).symlink_to(ROOT / name)
    paths = [str(folder), machine.environment.get("PYTHONPATH", "")]
    machine.environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)


def build(machine: Machine) -> Outcome:
    """Libraries and native tests for this GPU, installed where export_vq looks for libraries."""
    if shutil.which("cmake") is None:
        return Outcome("", "failed", "cmake was not found")
    code, output = machine.run(
        "python",
        [sys.executable, "-c", "from export_vq.plugins.library import *; print(source_hash(), LIB, sep='\\n')"],
    )
    if code != 0:
        return machine.judge("", "python", code, output)
    source_hash, libraries = output.split("\n")[:2]
    settings = {
        "VQ_TESTS": "ON",
        "VQ_CUDA_ARCHITECTURES": machine.architecture,
        "VQ_SOURCE_HASH": source_hash,
        "ORT_INCLUDE_DIR": str(machine.ort or ""),
        "TENSORRT_INCLUDE_DIR": str(machine.tensorrt or ""),
    }
    jobs = str(len(os.sched_getaffinity(0)))
    for command in (
        [
            "cmake",
            "-S",
            "plugins",
            "-B",
            str(machine.build),
            *(f"-D{name}={value}" for name, value in settings.items()),
        ],
        ["cmake", "--build", str(machine.build), "--parallel", jobs],
        ["cmake", "--install", str(machine.build), "--prefix", libraries],
    ):
        code, output = machine.run("build", command)
        if code != 0:
            return machine.judge("", "build", code, output)
    built = sorted(path.name for path in Path(libraries).glob("lib*.so"))
    lacking = [
        f"{library} for want of {header}"
        for library, header, folder in (
            ("libvq_ort.so", "onnxruntime_cxx_api.h", machine.ort),
            ("libvq_trt.so", "NvInferRuntime.h", machine.tensorrt),
        )
        if folder is None
    ]
    detail = f"{', '.join(built)} for sm_{machine.architecture}" + (f"; not {', '.join(lacking)}" if lacking else "")
    return Outcome("", "passed", detail)


def native_tests(machine: Machine) -> Outcome:
    """CTest: kernels on the host and on the GPU, the conformance harness of the TensorRT plugin."""
    if not (machine.build / "CTestTestfile.cmake").is_file():
        return Outcome("", "not run", "nothing was built")
    code, output = machine.run("ctest", ["ctest", "--test-dir", str(machine.build), "--output-on-failure"])
    counts = re.findall(r"^\d+% tests passed.*", output, re.MULTILINE)
    skipped = re.findall(r"Test +#\d+: (\S+) .*Skipped", output)
    passed = (counts[-1] if counts else "") + (f"; skipped: {', '.join(skipped)}" if skipped else "")
    if "No tests were found" in output:
        return Outcome("", "failed", "ctest found no tests")
    return machine.judge("", "ctest", code, output, passed=passed)


def gpu_tests(machine: Machine) -> Outcome:
    """Every test that is marked gpu, in files that can be imported here."""
    for module in ("pytest", "torch"):
        if importlib.util.find_spec(module) is None:
            return Outcome("", "not run", f"{module} is not installed")
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if importlib.util.find_spec("hypothesis") is None:
        left_out = [path for path in files if "hypothesis" in path.read_text()]
    else:
        left_out = []
    names = [str(path.relative_to(ROOT)) for path in files if path not in left_out]
    if not names:
        return Outcome("", "not run", "hypothesis is not installed, which all of these tests need")
    code, output = machine.run(
        "pytest", [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *names]
    )
    last = output.strip().splitlines()[-1].strip("= ") if output.strip() else ""
    note = f"; left out, hypothesis is not installed: {', '.join(p.name for p in left_out)}" if left_out else ""
    if code in (0, 5) and "passed" not in last:
        return Outcome("", "not run", f"{last}{note}")
    return machine.judge("", "pytest", code, output, passed=last + note)


def sanitizer(machine: Machine, tool: str) -> Outcome:
    """compute-sanitizer over the native tests on the GPU; racecheck looks for hazards in shared memory."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if program is None:
        return Outcome("", "not run", "compute-sanitizer was not found (it comes with the CUDA toolkit)")
    summaries = []
    for name in ("test_cuda_device", "test_cuda_decode_device"):
        test = machine.build / "native" / name
        if not test.is_file():
            return Outcome("", "not run", f"{name} was not built")
        code, output = machine.run(tool, [program, "--tool", tool, "--error-exitcode", "1", str(test)])
        if code != 0:
            return machine.judge("", tool, code, output)
        summaries += re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    return Outcome("", "passed", "; ".join(summaries))


def runtime(machine: Machine, name: str, library: str) -> Outcome:
    """The op through a runtime, if its Python module is there; in a process of its own, for it may crash."""
    program = str(ROOT / "scripts" / "gpu_check_runtime.py")
    code, output = machine.run(name, [sys.executable, program, name, library])
    return machine.judge("", name, code, output)


def bench(machine: Machine, samples: int) -> Outcome:
    target = machine.build / "bench_gpu.json"
    target.unlink(missing_ok=True)
    program = str(ROOT / "scripts" / "bench_gpu.py")
    code, output = machine.run("bench", [sys.executable, program, "-o", str(target), "--samples", str(samples)])
    if code == 2:
        return Outcome("", "not run", output.strip().splitlines()[-1])
    if code != 0:
        return machine.judge("", "bench", code, output)
    print(output)
    return Outcome("", "passed", "see above", data=json.loads(target.read_text()))


def print_table(gpu: dict[str, str], outcomes: list[Outcome]) -> None:
    print(f"\n{gpu['name']}, compute capability {gpu['compute_capability']}, driver {gpu['driver']}\n")
    width = max(len(outcome.part) for outcome in outcomes)
    for outcome in outcomes:
        print(f"{outcome.part:{width}}  {outcome.state:8} {outcome.seconds:8.1f} s  {outcome.detail}")


if __name__ == "__main__":
    sys.exit(main())
