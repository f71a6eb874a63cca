"""Converts a checkpoint to a folder of packed experts: file by file, experts in parallel, memory of one file."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from kt_kernel.checkpoint import (
    SourceReader,
    describe_layers,
    expert_biases,
    expert_weights,
    is_kt_folder,
    open_checkpoint,
    resolve_folder,
)
from kt_kernel.config import MoEConfig, usable_cpus
from kt_kernel.experts import packed_bytes
from kt_kernel.files import write_atomically
from kt_kernel.methods import Method, source_kind
from kt_kernel.packed_folder import PackedDescription, manifest_tensors
from kt_kernel.packed_writer import PackedMatrix, PackedWriter
from kt_kernel.progress import Progress

logger = logging.getLogger("kt_kernel.converter")

# What --input-type calls the kinds of sources (kt_kernel/methods.py) that have other names.
INPUT_TYPES = {
    "fp8_block": "fp8",
    "fp8_row": "fp8",
    "pack_quantized": "int4",
    "gptq_v2": "gptq",
}
ANY_INPUT = "auto"
# Copied beside the experts, so that a converted folder tells which model it belongs to.
_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_HASH_CHUNK = 8 << 20
# Most packed bytes of a file, unless one expert has more. A file is in memory until it is written: little on a machine
# that can serve the model, and enough for every thread to have experts to pack and for few, long writes.
SHARD_BYTES = 1 << 30


@dataclass(frozen=True)
class ConvertOptions:
    """One conversion.

    Attributes
    ----------
    input_path : str
        Folder of a Hugging Face checkpoint or of GGUF files, a GGUF file, or a model id.
    output : Path
        Folder to write; empty, or begun by the same conversion.
    method : Method
        Target method.
    group_size : int, optional
        int4 only; None: the method's own, 0: whole rows.
    input_type : str, optional
        What the caller believes the checkpoint holds, checked against it; None or ``"auto"``: whatever it is.
    num_threads : int
        Threads, each of which quantizes an expert; 0: as many as CPUs may be used. Does not change a byte of the
        result. However many there are, no more experts are in memory than one output file holds.
    """

    input_path: str
    output: Path
    method: Method
    group_size: int | None = None
    input_type: str | None = None
    num_threads: int = 0


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion made.

    Attributes
    ----------
    layers, resumed_layers : int
        MoE layers in all, and those that were there from an earlier run.
    packed_bytes, source_bytes : int
        Size of the packed experts and of the experts they were made from.
    mean_error, worst_error : float
        Relative quantization error over the tensors; ``sqrt(sum (q - w)^2 / sum w^2)`` each.
    worst_tensor : str
        Name of the tensor with the largest error.
    """

    layers: int
    resumed_layers: int
    packed_bytes: int
    source_bytes: int
    mean_error: float
    worst_error: float
    worst_tensor: str


def convert(options: ConvertOptions) -> ConvertResult:
    """Convert every MoE layer of a checkpoint.

    Resumes by itself: layers that an earlier, killed run finished are checked and kept. The bytes depend on the
    checkpoint and the layout only.

    Raises
    ------
    ValueError
        The checkpoint cannot be read, the output holds something else, a weight is NaN or infinite; one sentence.
    OSError
        The disk is full or fails; one sentence, finished layers stay.
    """
    folder = resolve_folder(options.input_path)
    if is_kt_folder(folder):
        raise ValueError(
            f"{folder} holds experts that kt-kernel converted, which are not converted again; serve AMXINT4 and "
            f"AMXINT8 as they are, or give the original checkpoint."
        )
    source = open_checkpoint(folder, options.method.name)
    layout = options.method.layout_with_group(options.group_size)
    if options.output.exists() and options.output.resolve() == source.root.resolve():
        raise ValueError(f"output {options.output} is the folder of the checkpoint; give another one.")
    _check_sizes(source, layout)
    num_experts = source.sizes.num_experts
    layer_bytes = {}
    for layer in source.layers:
        source.check_layer(layer)
        layer_bytes[layer] = source.expert_bytes(layer) * num_experts
        if any(expert_biases(source, layer, expert) for expert in range(num_experts)):
            raise ValueError(
                f"{source.folder} has experts with biases, which converted folders do not hold; serve the checkpoint "
                f"as it is."
            )
        source.close()
    description = _describe(source, options, layout)

    writer = PackedWriter(options.output, description)
    try:
        todo = [layer for layer in source.layers if layer not in writer.finished_layers]
        resumed = len(source.layers) - len(todo)
        if resumed:
            logger.info("%d of %d layers are there already and whole", resumed, len(source.layers))
        source_files = _SourceFiles(source, writer)
        source_files.begin()
        progress = Progress(
            f"converting to {options.method.name}",
            total_bytes=sum(layer_bytes[layer] for layer in todo),
            total_layers=len(todo),
            logger=logger,
        )
        try:
            with ThreadPoolExecutor(options.num_threads or usable_cpus()) as pool, ThreadPoolExecutor(1) as hash_pool:
                hashing = [hash_pool.submit(source_files.hash_file, file) for file in source_files.missing(todo)]
                try:
                    for layer in todo:
                        _convert_layer(source, source_files, writer, layer, layout, pool, progress)
                        for future in hashing:
                            if future.done():
                                future.result()  # a file that changed ends the conversion now
                    for future in hashing:
                        future.result()
                except BaseException:
                    source_files.stop()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            progress.close()
        if todo or not writer.complete:
            writer.finish(source_files.sha256(), _copy_files(source.folder, options.output))
        return _summary(writer, resumed, sum(layer_bytes.values()))
    finally:
        writer.close()


def _check_sizes(source: SourceReader, layout: str) -> None:
    """Refuse a model that could be packed and never computed."""
    sizes = source.sizes
    try:
        MoEConfig(
            layer_idx=source.layers[0],
            num_experts=sizes.num_experts,
            top_k=sizes.top_k,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
        )
        packed_bytes((layout, layout), hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{source.folder} cannot be converted: {error}") from error


def _describe(source: SourceReader, options: ConvertOptions, layout: str) -> PackedDescription:
    from kt_kernel import __version__

    input_type = _input_type(source)
    if options.input_type not in (None, ANY_INPUT, input_type):
        raise ValueError(
            f"--input-type is {options.input_type}, but the experts of {source.folder} are {input_type}; "
            f"give --input-type {input_type}."
        )
    sizes = source.sizes
    files = sorted({file for layer in source.layers for file in source.files(layer)})
    return PackedDescription(
        method=options.method.name,
        layout=layout,
        package_version=__version__,
        input_type=input_type,
        model={
            "model_type": sizes.model_type,
            "num_experts": sizes.num_experts,
            "top_k": sizes.top_k,
            "hidden_size": sizes.hidden_size,
            "intermediate_size": sizes.intermediate_size,
            "num_hidden_layers": sizes.num_hidden_layers,
        },
        moe_layers=source.layers,
        source_bytes={file: (source.root / file).stat().st_size for file in files},
        config_sha256=_config_sha256(source.folder),
    )


def _config_sha256(folder: Path) -> str:
    """Hash of config.json; a GGUF file, which has its sizes itself, has none."""
    config = folder / "config.json"
    return hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else ""


def _input_type(source: SourceReader) -> str:
    """What the experts are, in the words of --input-type; several where gate, up and down differ."""
    layer = source.typical_layer
    kinds = {source_kind(source.source(layer, 0, projection)[0]) for projection in ("gate", "up", "down")}
    source.close()
    return "+".join(sorted({INPUT_TYPES.get(kind, kind) for kind in kinds}))


# --- one layer ---


def _convert_layer(
    source: SourceReader,
    source_files: _SourceFiles,
    writer: PackedWriter,
    layer: int,
    layout: str,
    pool: ThreadPoolExecutor,
    progress: Progress,
) -> None:
    sizes = source.sizes
    both = packed_bytes((layout, layout), hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size)
    expert_bytes = sum(both)
    per_shard = max(1, SHARD_BYTES // expert_bytes)
    share = source.expert_bytes(layer)

    def pack_expert(expert: int) -> tuple[PackedMatrix, PackedMatrix]:
        weights = expert_weights(source, layer, expert)
        w13 = _pack(source, layer, expert, layout, weights.gate, weights.up)
        w2 = _pack(source, layer, expert, layout, weights.down)
        progress.add(share)
        return w13, w2

    # A function, so that nothing refers to the tensors of a file while those of the next are made.
    def write_shard(shard: int, experts: range) -> dict[str, dict]:
        packed = {
            f"experts.{expert}.{part}": matrix
            for expert, pair in zip(experts, pool.map(pack_expert, experts), strict=True)
            for part, matrix in zip(("w13", "w2"), pair, strict=True)
        }
        return writer.write_shard(layer, shard, packed)

    files: dict[str, dict] = {}
    for shard, start in enumerate(range(0, sizes.num_experts, per_shard)):
        files |= write_shard(shard, range(start, min(start + per_shard, sizes.num_experts)))
    source.close()
    source_files.check_layer(layer)
    writer.finish_layer(layer, files)
    progress.finish_layer(layer)


def _pack(source: SourceReader, layer: int, expert: int, layout: str, *matrices: torch.Tensor) -> PackedMatrix:
    """Pack gate and up (w13), or down (w2)."""
    ops = torch.ops.kt_kernel
    merged = len(matrices) == 2
    if len({matrix.dtype for matrix in matrices}) > 1:
        matrices = tuple(matrix.float() for matrix in matrices)
    try:
        packed, error = (ops.quantize_pack_w13 if merged else ops.quantize_pack)(*matrices, layout)
    except RuntimeError as cause:
        name = source.tensor_name(layer, expert, "gate" if merged else "down")
        also = f" (or {source.tensor_name(layer, expert, 'up')})" if merged else ""
        raise ValueError(f"{name}{also} cannot be packed: {cause}") from cause
    return PackedMatrix.of(packed, error)


# --- source files ---


class _SourceFiles:
    """The files that hold experts: keeps layers of two sources from getting into one folder.

    A file may not change from the first layer that is made from it to its SHA-256, which the finished folder records.
    Until the hash is known, the size and the time in the manifest stand for it. Hashes of files that were read are kept
    beside the output until the conversion is complete.
    """

    def __init__(self, source: SourceReader, writer: PackedWriter) -> None:
        self._source = source
        self._writer = writer
        self._files = sorted({file for layer in source.layers for file in source.files(layer)})
        # Size and time that every use of a file in this run must find.
        self._begun = {file: self._stat(file) for file in self._files}
        self._state = writer.load_source_state()
        self._recorded: dict[str, str] = writer.manifest.get("source_sha256") or {
            file: entry["sha256"] for file, entry in self._state.items()
        }
        self._stopped = False

    def _stat(self, file: str) -> tuple[int, int]:
        status = (self._source.root / file).stat()
        return status.st_size, status.st_mtime_ns

    def _check_unchanged(self, file: str, found: tuple[int, int]) -> None:
        if found != self._begun[file]:
            raise self._changed(file)

    def _changed(self, file: str) -> ValueError:
        return ValueError(
            f"{self._source.root / file} has changed since {self._writer.folder} was begun; give another output "
            f"folder, or delete this one."
        )

    def begin(self) -> None:
        """Refuse a source that finished layers were not made from, and record this one before the first layer.

        Raises
        ------
        ValueError
            A file has another hash, or, where none is known, another size or time than a finished layer was made from.
        """
        self._check_hashed()
        times = self._writer.source_mtime_ns
        made_from = {file for layer in self._writer.finished_layers for file in self._source.files(layer)}
        for file in self._files:
            # Sizes were compared when the folder was opened; the file must not have been replaced since.
            self._check_unchanged(file, (self._writer.manifest["source_bytes"][file], self._begun[file][1]))
            if file in made_from and file not in self._recorded and times.get(file) != self._begun[file][1]:
                raise self._changed(file)
        self._writer.record_source_times({file: mtime_ns for file, (_, mtime_ns) in self._begun.items()})

    def _check_hashed(self) -> None:
        again = [file for file in self._recorded if not self._is_as_hashed(file)]
        if not again:
            return
        progress = Progress(
            "checking the source",
            total_bytes=sum(self._begun[file][0] for file in again),
            total_layers=len(again),
            logger=logger,
            unit="file",
        )
        try:
            for file in again:
                if self._hash(file, progress.add) != self._recorded[file]:
                    raise self._changed(file)
                self._remember(file, self._recorded[file])
                progress.finish_layer(file)
        finally:
            progress.close()

    def _is_as_hashed(self, file: str) -> bool:
        """Whether size and time of a file are those it had when it was hashed."""
        entry = self._state.get(file)
        return entry is not None and (entry["bytes"], entry["mtime_ns"]) == self._begun[file]

    def check_layer(self, layer: int) -> None:
        """Refuse to keep a layer whose files changed in this run."""
        for file in self._source.files(layer):
            self._check_unchanged(file, self._stat(file))

    def missing(self, layers: list[int]) -> list[str]:
        """Files without a hash, those of the given layers first, in the order they are needed."""
        order = [file for layer in layers for file in self._source.files(layer)]
        return [file for file in dict.fromkeys(order + self._files) if file not in self._state]

    def hash_file(self, file: str) -> None:
        """Hash one file and keep the result; returns early once stopped."""
        digest = self._hash(file)
        if digest is not None:
            self._remember(file, digest)

    def _remember(self, file: str, digest: str) -> None:
        self._check_unchanged(file, self._stat(file))
        size, mtime_ns = self._begun[file]
        self._state[file] = {"bytes": size, "mtime_ns": mtime_ns, "sha256": digest}
        self._writer.store_source_state(self._state)

    def _hash(self, file: str, progress: Callable[[int], None] = lambda num_bytes: None) -> str | None:
        digest = hashlib.sha256()
        with open(self._source.root / file, "rb") as data:
            while chunk := data.read(_HASH_CHUNK):
                if self._stopped:
                    return None
                digest.update(chunk)
                progress(len(chunk))
        return digest.hexdigest()

    def stop(self) -> None:
        """End hashing at the next chunk."""
        self._stopped = True

    def sha256(self) -> dict[str, str]:
        """Hash of every file."""
        return {file: self._state[file]["sha256"] for file in self._files}


def _copy_files(source: Path, output: Path) -> dict[str, str]:
    copied = {}
    for name in _COPIED:
        path = source / name
        if path.exists():
            data = path.read_bytes()
            write_atomically(output / name, data)
            shutil.copymode(path, output / name)
            copied[name] = hashlib.sha256(data).hexdigest()
    return copied


def _summary(writer: PackedWriter, resumed: int, source_bytes: int) -> ConvertResult:
    tensors = list(manifest_tensors(writer.manifest))
    errors = [(tensor["relative_error"], f"layer {layer} {name}") for layer, name, tensor in tensors]
    worst, name = max(errors)
    layers = writer.manifest["moe_layers"]
    logger.debug("layers with experts: %s", describe_layers(layers))
    return ConvertResult(
        layers=len(layers),
        resumed_layers=resumed,
        packed_bytes=sum(tensor["bytes"] for _, _, tensor in tensors),
        source_bytes=source_bytes,
        mean_error=sum(error for error, _ in errors) / len(errors),
        worst_error=worst,
        worst_tensor=name,
    )
