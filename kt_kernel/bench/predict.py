"""``python -m kt_kernel.bench predict``: tokens per second on machines that could not be measured.

    experts read(T)  = E (1 - (1 - k / E)^T)              of E experts, by T tokens that choose k each, uniformly
    read time        = experts read * bytes of an expert / (read bandwidth * measured share)
    multiply time    = 2 T k * weights of an expert / (peak * measured share)
    time of a layer  = max(read time, multiply time) + dispatch and join
    tokens/s         = T / (layers * (time of a layer + time of the GPU part))

The shares were measured on another machine; bandwidth, clock, dispatch, the second socket and the GPU part are assumed.
``docs/predictions.md`` says what from; the tables there are what this prints.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from kt_kernel.bench.shapes import SHAPES, Shape
from kt_kernel.experts import packed_bytes
from kt_kernel.methods import FLOAT_METHODS, Method

# Both barriers of a layer with a hundred threads; two threads need 0.2 to 0.3 us (docs/measurements.md).
DISPATCH_SECONDS = 5e-6
# What a second socket adds to the first, each reading its own memory: the target of this project, not measured.
SECOND_SOCKET = 0.85
DECODE_USERS = (1, 8)
PREFILL_TOKENS = (2048, 8192)
MODELS = tuple(name for name, shape in SHAPES.items() if shape.num_layers > 1)
BEGIN, END = "<!-- predict:begin -->\n", "<!-- predict:end -->\n"


@dataclass(frozen=True)
class Machine:
    """Sockets, and of each the nominal and the real read bandwidth, cores, clock and width of the multipliers.

    `clock_ghz` is that of all cores under AVX-512 load; `int8_ops` counts operations of a core and cycle, an addition
    and a multiplication each, and bf16 has half as many.
    """

    name: str
    sockets: int
    nominal_gb_per_s: float
    read_share: float
    cores: int
    clock_ghz: float
    int8_ops: int

    @property
    def scale(self) -> float:
        """How many single sockets the machine is worth."""
        return 1 + SECOND_SOCKET * (self.sockets - 1)

    @property
    def read_bytes_per_s(self) -> float:
        """Real read bandwidth of the machine."""
        return self.scale * self.nominal_gb_per_s * self.read_share * 1e9

    def peak_ops_per_s(self, method: Method) -> float:
        """Peak of the instruction that the method multiplies with; 4-bit weights are expanded to int8."""
        int8 = self.scale * self.cores * self.clock_ghz * 1e9 * self.int8_ops
        return int8 / 2 if method.weight_dtype == "bf16" else int8


MACHINES = (
    Machine("2 x Xeon 8480+", 2, 8 * 4.8 * 8, 0.82, 56, 2.6, 256),
    Machine("2 x Xeon 6980P", 2, 12 * 8.8 * 8, 0.68, 128, 2.5, 256),
    Machine("EPYC 9654", 1, 12 * 4.8 * 8, 0.82, 96, 3.5, 128),
    Machine("EPYC 9755", 1, 12 * 6.0 * 8, 0.82, 128, 3.3, 256),
)


@dataclass(frozen=True)
class Efficiency:
    """Shares of the limits that a whole layer reached: of the read bandwidth decoding, of the peak in prefill."""

    read: float
    peak: float


# The layer bench on two Zen 4 cores, table "One layer" of docs/measurements.md: the smallest share of read at 1 to 4
# tokens (1 where it is more), and the share of peak at 64 rows an expert.
EFFICIENCY = {
    "AMXINT4": Efficiency(read=0.90, peak=0.70),
    "AMXINT8": Efficiency(read=0.96, peak=0.82),
    "BF16": Efficiency(read=1.00, peak=0.89),
}


def expert_bytes(shape: Shape, method: Method) -> int:
    """Packed bytes of one expert, scales included."""
    layouts = (method.layout, method.layout)
    return sum(packed_bytes(layouts, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size))


def expert_weights(shape: Shape) -> int:
    """Weights of one expert: gate, up and down."""
    return 3 * shape.hidden_size * shape.intermediate_size


def experts_read(shape: Shape, tokens: int) -> float:
    """Expected number of different experts that `tokens` tokens choose, each `top_k` of them uniformly."""
    return shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** tokens)


def layer_seconds(machine: Machine, shape: Shape, method: Method, tokens: int) -> float:
    """Time of the routed experts of one layer for a batch of `tokens`."""
    efficiency = EFFICIENCY[method.name]
    size = experts_read(shape, tokens) * expert_bytes(shape, method)
    operations = 2 * tokens * shape.top_k * expert_weights(shape)
    reading = size / (machine.read_bytes_per_s * efficiency.read)
    multiplying = operations / (machine.peak_ops_per_s(method) * efficiency.peak)
    return max(reading, multiplying) + DISPATCH_SECONDS


def tokens_per_s(machine: Machine, shape: Shape, method: Method, tokens: int, gpu_seconds: float = 0) -> float:
    """Tokens per second of a batch; `gpu_seconds` is the part of a layer that the CPU's experts wait for."""
    return tokens / (shape.num_layers * (layer_seconds(machine, shape, method, tokens) + gpu_seconds))


def crossover_rows(machine: Machine, shape: Shape, method: Method) -> float:
    """Rows of an expert from which multiplying takes longer than reading its weights."""
    efficiency = EFFICIENCY[method.name]
    reading = expert_bytes(shape, method) / (machine.read_bytes_per_s * efficiency.read)
    row = 2 * expert_weights(shape) / (machine.peak_ops_per_s(method) * efficiency.peak)
    return reading / row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument(
        "--gpu-us", type=float, default=100, help="GPU's part of a layer in a decode step, us (%(default)s)"
    )
    parser.add_argument(
        "--gpu-prefill-us",
        type=float,
        default=1000,
        help="GPU's part of a layer for 1,024 tokens of a prefill, us (%(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the tables into docs/predictions.md instead")


def main(args: argparse.Namespace) -> int:
    """Print the predictions.

    Returns
    -------
    int
        Exit code: 0 done, 2 bad arguments.
    """
    for name in ("gpu_us", "gpu_prefill_us"):
        if not 0 <= getattr(args, name) < float("inf"):
            flag = name.replace("_", "-")
            print(f"--{flag} is {getattr(args, name)}; it must be 0 or more microseconds.", file=sys.stderr)
            return 2
    if args.json:
        print(json.dumps(as_json(args.gpu_us, args.gpu_prefill_us), indent=2))
    elif args.page:
        try:
            write_page(args.page, tables(args.gpu_us, args.gpu_prefill_us))
        except (OSError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
    else:
        print(tables(args.gpu_us, args.gpu_prefill_us), end="")
    return 0


def write_page(page: Path, text: str) -> None:
    """Replace what stands between the markers of a page; ValueError where it has none."""
    head, begin, rest = page.read_text().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {BEGIN.strip()} and {END.strip()} for the tables to stand between.")
    page.write_text(f"{head}{begin}{text}{end}{tail}")


def cells(machine: Machine, shape: Shape, batches: tuple[int, ...], gpu_seconds: dict[int, float]) -> list[dict]:
    """Predictions of one machine and model: an entry for each method and batch."""
    return [
        {
            "method": method.name,
            "tokens": tokens,
            "experts_alone": tokens_per_s(machine, shape, method, tokens),
            "with_gpu_part": tokens_per_s(machine, shape, method, tokens, gpu_seconds[tokens]),
        }
        for method in FLOAT_METHODS.values()
        for tokens in batches
    ]


def as_json(gpu_us: float, gpu_prefill_us: float) -> dict:
    """Everything that :func:`tables` shows, by machine and model."""
    decode = dict.fromkeys(DECODE_USERS, gpu_us * 1e-6)
    prefill = {tokens: gpu_prefill_us * 1e-6 * tokens / 1024 for tokens in PREFILL_TOKENS}
    return {
        "prediction": True,
        "gpu_us": gpu_us,
        "gpu_prefill_us": gpu_prefill_us,
        "efficiency": {name: asdict(efficiency) for name, efficiency in EFFICIENCY.items()},
        "machines": [
            asdict(machine)
            | {
                "models": {
                    name: {
                        "decode": cells(machine, SHAPES[name], DECODE_USERS, decode),
                        "prefill": cells(machine, SHAPES[name], PREFILL_TOKENS, prefill),
                    }
                    for name in MODELS
                }
            }
            for machine in MACHINES
        ],
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, all columns but the first to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def tables(gpu_us: float, gpu_prefill_us: float) -> str:
    """The predictions as text in Markdown."""
    result = as_json(gpu_us, gpu_prefill_us)
    methods = list(FLOAT_METHODS.values())
    names = [method.name for method in methods]
    parts = ["### Machines\n", machines_table(methods), "### Models\n", models_table(methods)]
    for machine in result["machines"]:
        parts.append(f"### {machine['name']}: predicted tokens/s\n")
        for kind, batches, what in (
            ("decode", DECODE_USERS, "users: {:,}"),
            ("prefill", PREFILL_TOKENS, "prefill of {:,}"),
        ):
            header = ["model", *(f"{name}, {what.format(tokens)}" for name in names for tokens in batches)]
            rows = [
                [name, *(f"{cell['experts_alone']:,.0f} / {cell['with_gpu_part']:,.0f}" for cell in model[kind])]
                for name, model in machine["models"].items()
            ]
            parts.append(table(header, rows))
    return "\n".join(parts)


def machines_table(methods: list[Method]) -> str:
    """Limits of the machines, and from how many rows of an expert they multiply longer than they read."""
    int8, bf16 = FLOAT_METHODS["AMXINT8"], FLOAT_METHODS["BF16"]
    rows = [
        [
            machine.name,
            f"{machine.nominal_gb_per_s:.0f}",
            f"{machine.nominal_gb_per_s * machine.read_share:.0f}",
            f"{machine.cores} x {machine.clock_ghz}",
            f"{machine.read_bytes_per_s / 1e9:.0f}",
            f"{machine.peak_ops_per_s(int8) / 1e12:.0f} / {machine.peak_ops_per_s(bf16) / 1e12:.0f}",
            *(f"{crossover_rows(machine, SHAPES['dsv3'], method):.0f}" for method in methods),
        ]
        for machine in MACHINES
    ]
    crossover = [f"crossover rows, {method.name}" for method in methods]
    socket = ["nominal GB/s a socket", "real read", "cores x GHz a socket"]
    return table(["machine", *socket, "GB/s in all", "peak TOPS int8 / TFLOPS bf16", *crossover], rows)


def models_table(methods: list[Method]) -> str:
    """What the models hold and read."""
    rows = []
    for name in MODELS:
        shape = SHAPES[name]
        layer = [shape.top_k * expert_bytes(shape, method) / 1e6 for method in methods]
        held = [shape.num_layers * shape.num_experts * expert_bytes(shape, method) / 1e9 for method in methods]
        size = f"{shape.hidden_size} / {shape.intermediate_size}"
        experts = f"{shape.num_experts} / {shape.top_k}"
        figures = [*(f"{value:.0f}" for value in held), *(f"{value:.0f}" for value in layer)]
        rows.append([name, size, experts, str(shape.num_layers), *figures])
    columns = [f"{what}, {method.name}" for what in ("GB in all", "MB a token and layer") for method in methods]
    return table(["model", "hidden / intermediate", "experts / top-k", "MoE layers", *columns], rows)
