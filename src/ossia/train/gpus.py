"""What GPUs can do, by name: from the makers' data sheets, and memory as nvidia-smi shows it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain

from ossia.errors import UsageError, nearest

AMPERE = (8, 0)
"""The first compute capability with bfloat16, which gpt-oss needs."""


@dataclass(frozen=True)
class Gpu:
    """One model of GPU.

    Args:
        name: as people call it; with its size where there are several.
        gigabytes: as the box says; 0: several sizes.
        mebibytes: memory.total of nvidia-smi; 0: not looked up.
        capability: CUDA's compute capability.
        tflops: dense bfloat16 products with float32 sums, 10¹² a second; 0: none.
        bandwidth: of its memory, 10⁹ bytes a second.
    """

    name: str
    gigabytes: int
    mebibytes: int
    capability: tuple[int, int]
    tflops: float
    bandwidth: float

    @property
    def title(self) -> str:
        """The name with its size."""
        return f"{self.name} {self.gigabytes} GB" if self.gigabytes and "GB" not in self.name else self.name

    @property
    def free(self) -> int:
        """Bytes that a run finds free: all but what the driver and CUDA's context take, about 1 GiB."""
        return (self.mebibytes - 1024) * 2**20

    @property
    def flops(self) -> float:
        """FLOP/s in dense bfloat16 products."""
        return self.tflops * 1e12


# Dense bfloat16, not the sparse figure that sheets print first. A longer name stands before one that it begins with.
GPUS = (
    Gpu("B300", 0, 0, (10, 3), 2500, 8000),
    Gpu("B200", 180, 183359, (10, 0), 2250, 8000),
    Gpu("GH200", 0, 0, (9, 0), 989, 4000),
    Gpu("H200", 141, 143771, (9, 0), 989, 4800),
    Gpu("H100 PCIe", 80, 81559, (9, 0), 756, 2000),
    Gpu("H100 NVL", 94, 95830, (9, 0), 835, 3900),
    Gpu("H100", 80, 81559, (9, 0), 989, 3350),
    Gpu("H800", 80, 81559, (9, 0), 989, 3350),
    Gpu("H20", 96, 97871, (9, 0), 148, 4000),
    Gpu("A100 80GB", 80, 81920, (8, 0), 312, 2039),
    Gpu("A100 40GB", 40, 40960, (8, 0), 312, 1555),
    Gpu("A800", 80, 81920, (8, 0), 312, 2039),
    Gpu("A40", 48, 46068, (8, 6), 150, 696),
    Gpu("A30", 24, 24576, (8, 0), 165, 933),
    Gpu("A10G", 24, 23028, (8, 6), 70, 600),
    Gpu("A10", 24, 23028, (8, 6), 125, 600),
    Gpu("L40S", 48, 46068, (8, 9), 362, 864),
    Gpu("L40", 48, 46068, (8, 9), 181, 864),
    Gpu("L4", 24, 23034, (8, 9), 121, 300),
    Gpu("RTX PRO 6000", 96, 97887, (12, 0), 504, 1792),
    Gpu("RTX 6000 Ada", 48, 49140, (8, 9), 364, 960),
    Gpu("RTX A6000", 48, 49140, (8, 6), 155, 768),
    Gpu("RTX 5090", 32, 32607, (12, 0), 210, 1792),
    Gpu("RTX 4090", 24, 24564, (8, 9), 165, 1008),
    Gpu("RTX 4080", 16, 16376, (8, 9), 97, 717),
    Gpu("RTX 3090", 24, 24576, (8, 6), 71, 936),
    Gpu("T4", 16, 15360, (7, 5), 0, 320),
    Gpu("V100", 0, 0, (7, 0), 0, 900),
    Gpu("P100", 16, 16280, (6, 0), 0, 732),
    Gpu("RTX 2080 Ti", 11, 11264, (7, 5), 0, 616),
)
COMMON = ("RTX 3090", "RTX 4090", "RTX 5090", "A100 40GB", "L40S", "A100 80GB", "H100", "RTX PRO 6000", "H200", "B200")
"""What is shown where no GPU is named or present, by memory."""

_NOISE = re.compile(r"nvidia|geforce|tesla|quadro|blackwell|generation|workstation|server|edition|sxm\d?|hbm\de?|gpu")


def of_device(device_name: str) -> Gpu | None:
    """The GPU that a driver's name means; None for one that isn't known."""
    words = set(re.findall(r"[a-z0-9]+", device_name.lower()))
    names = {gpu: set(gpu.name.lower().split()) for gpu in GPUS}
    exact = (gpu for gpu, name in names.items() if name <= words)
    of_other_size = (gpu for gpu, name in names.items() if {word for word in name if not word.endswith("gb")} <= words)
    return next(chain(exact, of_other_size), None)


def named(text: str) -> Gpu:
    """The GPU that a person means: `RTX 4090`, `4090`, `h100-sxm`, `A100 80GB`.

    Raises:
        UsageError: unknown, with the nearest names; a name of several sizes; one before Ampere.
    """
    wanted = _letters(text)
    found = [gpu for gpu in GPUS if wanted in _spellings(gpu)]
    if not found:
        sizes = [gpu.name for gpu in GPUS if wanted and _letters(gpu.name).startswith(wanted)]
        if len(sizes) > 1:
            raise UsageError(f"--gpu {text}: there are several, {' and '.join(sizes)}; name one")
        hint = nearest(wanted.upper(), [_letters(gpu.name).upper() for gpu in GPUS])
        known = ", ".join(gpu.name for gpu in GPUS if gpu.capability >= AMPERE)
        raise UsageError(f"--gpu {text}: unknown{hint} (known: {known}; or give its memory, such as 24GB)")
    gpu = found[0]
    check_capability(gpu.name, gpu.capability)
    if not gpu.mebibytes:
        raise UsageError(f"--gpu {text}: it comes with different memory; give that, such as --gpu 96GB")
    return gpu


def check_capability(name: str, capability: tuple[int, int]) -> None:
    """UsageError for a GPU before Ampere."""
    if capability < AMPERE:
        raise UsageError(
            f"{name} (compute capability {capability[0]}.{capability[1]}) is older than Ampere (8.0): it has no "
            "bfloat16, and gpt-oss overflows in float16"
        )


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", _NOISE.sub("", text.lower()))


def _spellings(gpu: Gpu) -> set[str]:
    name = _letters(gpu.name)
    short = name.removeprefix("rtx")
    return {name, short, f"{name}{gpu.gigabytes}gb", f"{short}{gpu.gigabytes}gb"}
