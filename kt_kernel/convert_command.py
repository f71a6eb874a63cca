"""Command line of the converter; takes every flag of the incumbent's convert_cpu_weights.py."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from kt_kernel.config import apply_log_level, usable_cpus
from kt_kernel.methods import FLOAT_METHODS, get_method

# The incumbent's other kernels for int4 and int8 have no counterpart here: ours are the same ones everywhere.
_METHOD_OF_QUANT = {"int8": "AMXINT8", "int4": "AMXINT4", "bf16": "BF16", "moe_int8": "AMXINT8", "moe_int4": "AMXINT4"}
_REFUSED_QUANT = ("awq",)
_INPUT_TYPES = ("auto", "bf16", "fp16", "fp32", "fp8", "int4", "gptq", "awq", "mxfp4", "nvfp4", "mxfp8", "gguf")

logger = logging.getLogger("kt_kernel.converter")


def build_parser() -> argparse.ArgumentParser:
    """The flags, incumbent's first."""
    parser = argparse.ArgumentParser(
        prog="convert_cpu_weights.py",
        description="Convert the experts of a Hugging Face checkpoint for CPU execution by kt_kernel. A killed "
        "conversion goes on where it stopped when the same command is started again.",
    )
    parser.add_argument("--input-path", "-i", help="folder of the checkpoint, a GGUF file, or a Hugging Face model id")
    parser.add_argument(
        "--input-type",
        choices=_INPUT_TYPES,
        help="what the checkpoint holds (checked); int4 = compressed-tensors, auto = whatever it is",
    )
    parser.add_argument("--output", "-o", help="folder to write")
    parser.add_argument(
        "--quant-method",
        choices=[*_METHOD_OF_QUANT, *_REFUSED_QUANT],
        default="int4",
        help="int4 = AMXINT4, int8 = AMXINT8, bf16 = BF16 (default int4); moe_int4, moe_int8: the same",
    )
    parser.add_argument("--group-size", type=int, help="int4: elements that share a scale, a multiple of 32; 0 = row")
    parser.add_argument("--verify", metavar="DIR", nargs="?", const="", help="check a converted folder (default: -o)")
    parser.add_argument("--cpuinfer-threads", type=int, help="threads (default: every usable CPU)")
    parser.add_argument("--threadpool-count", type=int, help="no effect: the files fit any number of NUMA nodes")
    parser.add_argument("--gpu", action="store_true", help="no effect: conversion needs no GPU")
    parser.add_argument("--no-merge-safetensor", action="store_true", help="no effect: a layer is a few files")
    parser.add_argument("--resume-layer", type=int, help="no effect: resuming is automatic")
    parser.add_argument("--save-backward-weights", action="store_true", help="refused: no fine-tuning")
    parser.add_argument("--profile", action="store_true", help="no effect")
    parser.add_argument("--verbose", "-v", action="store_true", help="log details")
    return parser


def _notes(args: argparse.Namespace) -> list[str]:
    notes = []
    if args.threadpool_count is not None:
        notes.append("--threadpool-count has no effect: the converted files fit any number of NUMA nodes.")
    if args.gpu:
        notes.append("--gpu has no effect: conversion runs on the CPU.")
    if args.no_merge_safetensor:
        notes.append("--no-merge-safetensor has no effect: a layer is written to a few safetensors files.")
    if args.resume_layer is not None:
        notes.append("--resume-layer has no effect: a conversion goes on by itself where it stopped.")
    if args.profile:
        notes.append("--profile has no effect: rate and time are always shown.")
    return notes


def _check(args: argparse.Namespace) -> None:
    if args.input_path is None or args.output is None or args.input_type is None:
        missing = [
            flag
            for flag, value in (
                ("--input-path", args.input_path),
                ("--input-type", args.input_type),
                ("--output", args.output),
            )
            if value is None
        ]
        hint = "; --input-type auto takes whatever the files hold" if args.input_type is None else "; see --help"
        raise ValueError(f"{' and '.join(missing)} must be given{hint}.")
    _check_output(args.output)
    if args.quant_method in _REFUSED_QUANT:
        raise ValueError(
            f"--quant-method {args.quant_method} is not made by kt_kernel; use int4, int8 or bf16 "
            f"({', '.join(FLOAT_METHODS)}), or serve an AWQ checkpoint as it is with --kt-method AWQ."
        )
    if args.save_backward_weights:
        raise ValueError("--save-backward-weights is for fine-tuning, which kt_kernel does not do; leave it out.")
    if args.cpuinfer_threads is not None and args.cpuinfer_threads < 1:
        raise ValueError(f"--cpuinfer-threads is {args.cpuinfer_threads}; it must be at least 1.")


def _check_output(output: str) -> None:
    folder = Path(output).expanduser()
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"--output {output} cannot be a folder, because {path} is a file; give another path.")


def _convert(args: argparse.Namespace) -> int:
    from kt_kernel.converter import ConvertOptions, convert

    _check(args)
    for note in _notes(args):
        logger.info("%s", note)
    threads = args.cpuinfer_threads or 0
    if threads > usable_cpus():
        logger.info("--cpuinfer-threads %d is cut to the %d CPUs this process may use.", threads, usable_cpus())
        threads = usable_cpus()
    result = convert(
        ConvertOptions(
            input_path=args.input_path,
            output=Path(args.output).expanduser(),
            method=get_method(_METHOD_OF_QUANT[args.quant_method]),
            group_size=args.group_size,
            input_type=args.input_type,
            num_threads=threads,
        )
    )
    logger.info(
        "%s is complete: %d layers (%d from an earlier run), %.2f GB from %.2f GB, relative error %.4f on average and "
        "%.4f at most (%s)",
        args.output,
        result.layers,
        result.resumed_layers,
        result.packed_bytes / 1e9,
        result.source_bytes / 1e9,
        result.mean_error,
        result.worst_error,
        result.worst_tensor,
    )
    logger.info("serve it with --kt-weight-path %s --kt-method %s", args.output, _METHOD_OF_QUANT[args.quant_method])
    return 0


def _verify(folder: str) -> int:
    from kt_kernel.packed_folder import manifest_tensors, read_manifest, verify
    from kt_kernel.progress import Progress

    if not folder:
        raise ValueError("--verify needs a folder: --verify DIR, or -o DIR beside it.")
    manifest = read_manifest(Path(folder))
    layers = manifest["layers"]
    total = sum(tensor["bytes"] for _, _, tensor in manifest_tensors(manifest))
    progress = Progress("verifying", total_bytes=total, total_layers=len(layers), logger=logger)
    try:
        problems = verify(folder, progress.add, progress.finish_layer)
    finally:
        progress.close()
    for problem in problems:
        logger.error("%s", problem)
    if problems:
        logger.error("%s is not whole; delete the files named above, if any, and run the conversion again.", folder)
        return 1
    logger.info("%s is whole: %d layers, %.2f GB, every checksum matches", folder, len(layers), total / 1e9)
    return 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    int
        Exit code: 0 done, 1 refused or damaged, 130 interrupted.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose else logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        apply_log_level()
        if args.verify is not None:
            return _verify(args.verify or args.output or "")
        return _convert(args)
    except (ValueError, OSError) as error:
        logger.error("%s", _sentence(error))
        return 1
    except KeyboardInterrupt:
        logger.error("interrupted; start the same command again to go on.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
