"""What the processor is and can do, as far as that decides between kernels."""

import platform
from collections.abc import Collection
from pathlib import Path

from numpy._core._multiarray_umath import __cpu_features__  # type: ignore[import-not-found]  # as np.show_runtime reads it

# of the instruction sets that a processor has, those that decide between kernels
ISA = ("AVX2", "FMA3", "AVX512F", "AVX512VNNI", "AVX512BF16", "ASIMD", "ASIMDDP", "ASIMDFHM", "SVE")
LISTED = Path("/proc/cpuinfo")  # where there is none, what Python and numpy know


def instruction_sets() -> tuple[str, ...]:
    return tuple(name for name in ISA if __cpu_features__.get(name))


def processor_name() -> str:
    return _listed("model name") or platform.processor() or platform.machine()


def sums_products_whole(machine: str | None = None, flags: Collection[str] | None = None) -> bool:
    """Whether products of two bytes are summed in 32 bits. x86-64 without VNNI adds each two of them in 16, which saturate where a weight
    has all its 8 bits."""
    if (machine or platform.machine()).lower() not in ("x86_64", "amd64"):
        return True
    known = set(_listed("flags").split()) if flags is None else set(flags)
    return bool(known & {"avx512_vnni", "avx_vnni"}) or (flags is None and bool(__cpu_features__.get("AVX512VNNI")))


def _listed(key: str) -> str:
    if LISTED.is_file():
        for line in LISTED.read_text(encoding="utf-8").splitlines():
            if line.partition(":")[0].strip() == key:
                return line.partition(":")[2].strip()
    return ""
