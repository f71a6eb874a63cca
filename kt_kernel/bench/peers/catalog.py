"""The systems of the comparison: their formats, where they come from, and what they reached where they were first seen.

Figures: two-core Zen 4 with AVX-512 VNNI and BF16, the Qwen3-30B layer; GB/s of weights read at one token, else GOPS.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# activations: what the products take; "bf16", or int8 with one scale a row, for the whole batch, or for so many columns
BF16_ACTIVATIONS, ROW, BATCH = 0, -1, -2


@dataclass(frozen=True)
class Format:
    """One storage of the layer.

    Attributes
    ----------
    name : str
        The engine's name for it.
    bits : int
        4, 8 or 16: what is compared with our format of so many bits.
    activations : int
        BF16_ACTIVATIONS, ROW, BATCH, or the columns that share a scale.
    bf16_peak : bool
        Its products are bf16, so that is the peak it is held against.
    figures : dict
        ``(threads, tokens)`` to the figure above.
    """

    name: str
    bits: int
    activations: int
    bf16_peak: bool = False
    figures: dict[tuple[int, int], float] = field(default_factory=dict)


@dataclass(frozen=True)
class System:
    """An engine in a process of its own.

    Attributes
    ----------
    name : str
        On the command line.
    title : str
        In tables.
    adapter : str
        Module that its process runs; this folder is the package `peers` there.
    formats : tuple of Format
        Measured ones.
    tier : str
        Which of our tiers it is compared with: "" the machine's best, or a value of KT_FORCE_ISA.
    release : str
        What pip installs; "" runs with our own interpreter.
    """

    name: str
    title: str
    adapter: str
    formats: tuple[Format, ...]
    tier: str = ""
    release: str = ""


MADE = (Format("AMXINT8", 8, ROW), Format("AMXINT4", 4, ROW), Format("BF16", 16, BF16_ACTIVATIONS, True))
# Codes that the files bring, beside which activations have a scale for every 128 columns, or are bf16.
GIVEN = (Format("FP8", 8, BF16_ACTIVATIONS, True), Format("RAWINT4", 4, 128), MADE[2])


def ours(tier: str, *, given: bool = False) -> System:
    """Our own library, restricted to a tier where one is named, with the formats it makes or with those of files."""
    return System(
        name=f"ours-{tier}" if tier else "ours",
        title=f"kt_kernel ({tier.upper()})" if tier else "kt_kernel",
        adapter="peers.ours",
        formats=GIVEN if given else MADE,
        tier=tier,
    )


PEERS: dict[str, System] = {
    system.name: system
    for system in (
        System(
            "kt",
            "kt-kernel wheel",
            "peers.kt_wheel",
            (
                Format(
                    "INT8",
                    8,
                    ROW,
                    figures={(1, 1): 8.2, (1, 64): 77, (1, 256): 102, (1, 1024): 112, (2, 1): 16.7, (2, 1024): 210},
                ),
                Format(
                    "FP8",
                    8,
                    BF16_ACTIVATIONS,
                    True,
                    figures={(1, 1): 10.5, (1, 64): 44, (1, 256): 63, (1, 1024): 69},
                ),
                Format("INT4", 4, ROW, figures={(1, 1): 7.8, (1, 64): 82, (1, 256): 97, (1, 1024): 108}),
                Format(
                    "RAWINT4",
                    4,
                    ROW,
                    figures={(1, 1): 10.8, (1, 64): 36, (1, 256): 58, (1, 1024): 59, (2, 1): 19.4, (2, 1024): 126},
                ),
                Format(
                    "BF16",
                    16,
                    BF16_ACTIVATIONS,
                    True,
                    figures={(1, 1): 11.8, (1, 64): 36, (1, 256): 78, (1, 1024): 168},
                ),
            ),
            release="kt-kernel==0.7.2",
        ),
        System(
            "llama",
            "llama.cpp",
            "peers.llama_cpp",
            (
                Format("Q8_0", 8, 32, figures={(1, 1): 17.5, (1, 64): 35, (1, 256): 37, (1, 1024): 34}),
                Format(
                    "Q4_0",
                    4,
                    32,
                    figures={(1, 1): 18.8, (1, 64): 68, (1, 256): 63, (1, 1024): 44, (2, 1): 31.8, (2, 1024): 91},
                ),
                Format("Q4_K", 4, 256, figures={(1, 1): 19.0, (1, 64): 53, (1, 256): 71, (1, 1024): 59}),
                Format("BF16", 16, BF16_ACTIVATIONS, True),
            ),
            release="llama-cpp-python==0.3.36",
        ),
        System(
            "ik",
            "ik_llama.cpp (AVX2 wheel)",
            "peers.ik_llama",
            (
                Format("Q8_0_R8", 8, 32, figures={(1, 1): 19.6, (1, 1024): 80}),
                Format("Q4_0_R8", 4, 32, figures={(1, 1): 22.4, (1, 1024): 102}),
                Format("Q4_K_R4", 4, 256),
                # faster than its BF16 here; BF16_R16 aborts in a build without AVX512_BF16
                Format("F16", 16, BF16_ACTIVATIONS, True),
            ),
            tier="avx2",
            release="ik-llama-cpp-python==0.1.5",
        ),
        System(
            "onednn",
            "oneDNN",
            "peers.onednn",
            (Format("u8s8", 8, BATCH), Format("bf16", 16, BF16_ACTIVATIONS, True)),
        ),
        System("torch", "torch bf16 mm", "peers.torch_mm", (Format("bf16", 16, BF16_ACTIVATIONS, True),)),
    )
}
