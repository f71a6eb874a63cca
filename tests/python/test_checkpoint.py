"""Reading checkpoints: every naming style, every way a folder can be wrong, and what stays in memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from pathlib import Path

import kt_files
import pytest
import torch
from checkpoints import BASES, STYLES, config_of, layer_tensors, random_experts, write_checkpoint
from safetensors.torch import save_file

from kt_kernel import files
from kt_kernel.checkpoint import Checkpoint, describe_layers, expert_weights, model_sizes, resolve_folder
from kt_kernel.loader import open_source
from kt_kernel.methods import get_method

GGUF = Path(__file__).resolve().parents[1] / "data/formats/gguf"
E, H, INNER = 4, 64, 48


def assert_holds(checkpoint: Checkpoint, layer: int, experts) -> None:
    checkpoint.check_layer(layer)
    for expert in range(experts.gate.shape[0]):
        for found, wanted in zip(expert_weights(checkpoint, layer, expert), experts, strict=True):
            assert torch.equal(found, wanted[expert])
    checkpoint.close()


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("style", [*STYLES, "fused", "transposed"])
def test_every_naming_style_is_read(tmp_path: Path, style: str, base: str) -> None:
    layers = {1: random_experts(E, H, INNER, seed=1), 12: random_experts(E, H, INNER, seed=2)}
    checkpoint = Checkpoint(write_checkpoint(tmp_path, layers, style=style, base=base))
    assert checkpoint.layers == [1, 12]
    for layer, experts in layers.items():
        assert_holds(checkpoint, layer, experts)
        assert checkpoint.expert_bytes(layer) == 3 * H * INNER * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_float_type_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    experts = random_experts(E, H, INNER, dtype=dtype)
    assert_holds(Checkpoint(write_checkpoint(tmp_path, {0: experts})), 0, experts)


@pytest.mark.parametrize(("hidden", "inner"), [(96, 48), (64, 64)])
@pytest.mark.parametrize("style", ["fused", "transposed"])
def test_a_square_fused_tensor_follows_its_sibling(tmp_path: Path, style: str, hidden: int, inner: int) -> None:
    experts = random_experts(E, hidden, inner)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, {0: experts}, style=style))
    assert_holds(checkpoint, 0, experts)


@pytest.mark.parametrize("style", ["long", "fused"])
def test_layers_beyond_the_model_are_left_out(tmp_path: Path, style: str) -> None:
    """Layers that draft tokens come after the last hidden one, may be incomplete, and are not served."""
    layers = {layer: random_experts(E, H, INNER, seed=layer) for layer in (1, 2)}
    folder = write_checkpoint(tmp_path, layers, style=style, config=config_of(layers[1], 2))
    checkpoint = Checkpoint(folder)
    assert checkpoint.layers == [1]
    assert_holds(checkpoint, 1, layers[1])
    with pytest.raises(ValueError, match="no experts in layer 2; layers with experts are 1"):
        checkpoint.check_layer(2)
    (folder / "config.json").write_text(json.dumps(config_of(layers[1], None)))
    assert model_sizes(folder).num_hidden_layers is None
    assert Checkpoint(folder).layers == [1, 2]
    (folder / "config.json").write_text(json.dumps(config_of(layers[1], 1)))
    with pytest.raises(ValueError, match="experts only beyond the 1 layers that config.json promises"):
        Checkpoint(folder)


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    layers = {layer: random_experts(E, H, INNER, seed=layer) for layer in range(2)}
    checkpoint = Checkpoint(write_checkpoint(tmp_path, layers, num_shards=3))
    assert checkpoint.files(0) == [f"model-{shard:05d}-of-00003.safetensors" for shard in (1, 2, 3)]
    for layer, experts in layers.items():
        assert_holds(checkpoint, layer, experts)


@pytest.mark.parametrize("key", ["n_routed_experts", "num_experts", "num_local_experts"])
@pytest.mark.parametrize("nested", [None, "text_config"])
def test_sizes_under_every_key(tmp_path: Path, key: str, nested: str | None) -> None:
    experts = random_experts(E, H, INNER)
    config = config_of(experts, 1, num_experts=None, intermediate_size=7) | {key: E}
    if nested:
        config = {"model_type": "outer", "hidden_size": 1, nested: config}
    sizes = Checkpoint(write_checkpoint(tmp_path, {0: experts}, config=config)).sizes
    assert (sizes.num_experts, sizes.top_k, sizes.hidden_size, sizes.intermediate_size) == (E, 2, H, INNER)
    assert sizes.model_type == "test_moe"


def test_intermediate_size_alone_is_the_experts(tmp_path: Path) -> None:
    experts = random_experts(E, H, INNER)
    config = config_of(experts, 1, moe_intermediate_size=None, intermediate_size=INNER)
    assert Checkpoint(write_checkpoint(tmp_path, {0: experts}, config=config)).sizes.intermediate_size == INNER


@pytest.mark.parametrize("family", ["Qwen3Moe", "Qwen2Moe", "DeepseekV3", "Mixtral"])
def test_what_transformers_saves_is_read(tmp_path: Path, family: str) -> None:
    from kt_kernel.integrations.torchvision_repair import repair_torchvision

    repair_torchvision()
    import transformers

    config = getattr(transformers, f"{family}Config")(
        hidden_size=H,
        intermediate_size=INNER if family == "Mixtral" else 80,
        moe_intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=32,
        num_experts=E,
        num_local_experts=E,
        n_routed_experts=E,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        **({"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16}
           if family == "DeepseekV3" else {}),
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.layers == ([1] if family == "DeepseekV3" else [0, 1])
    # The model holds them fused and computes gate_up @ x: independent of the names in the file.
    block = model.model.layers[1].mlp.experts
    gate, up = block.gate_up_proj.detach().chunk(2, dim=1)
    for expert in range(E):
        weights = expert_weights(checkpoint, 1, expert)
        assert torch.equal(weights.gate, gate[expert])
        assert torch.equal(weights.up, up[expert])
        assert torch.equal(weights.down, block.down_proj.detach()[expert])


# --- refusals ---


def broken(tmp_path: Path, change) -> Path:
    """A checkpoint after change(tensors, config)."""
    experts = random_experts(E, H, INNER)
    tensors = layer_tensors(0, experts)
    config = config_of(experts, 1)
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


NAME = "model.layers.0.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t.pop(NAME), "lacks up of expert 2 in layer 0"),
        (lambda t, c: c.update(num_experts=3), "has an expert 3 in layer 0.*3 experts"),
        (lambda t, c: c.update(num_experts=5), "lacks gate of expert 4"),
        (
            lambda t, c: t.update({NAME: torch.zeros(H, INNER)}),
            r"expert.*2.up_proj.weight has shape \[64, 48\].*\[48, 64\]",
        ),
        (lambda t, c: c.update(moe_intermediate_size=32), r"has shape .*48.*intermediate size 32\) means \["),
        (lambda t, c: t.update({NAME: torch.zeros(INNER, H, dtype=torch.float8_e4m3fn)}), "F8_E4M3.*unquantized"),
        (lambda t, c: c.pop("num_experts"), "n_routed_experts or num_experts or num_local_experts"),
        (lambda t, c: c.pop("hidden_size"), "no hidden_size"),
        (lambda t, c: (t.clear(), t.update(x=torch.zeros(1))), "no expert tensors.*first of 1 tensors: x"),
        (
            lambda t, c: (t.clear(), t.update({"blk.0.ffn_up_exps.0.numa.0.weight": torch.zeros(1)})),
            "converted by another program",
        ),
        (
            lambda t, c: (t.clear(), t.update({"model.layers.0.mlp.experts.gate_up_proj": torch.zeros(E, 96, 64)})),
            "only .*gate_up_proj of the experts of layer 0",
        ),
        (
            lambda t, c: (
                t.clear(),
                t.update(
                    {
                        "model.layers.0.mlp.experts.gate_up_proj": torch.zeros(E, 90, 64),
                        "model.layers.0.mlp.experts.down_proj": torch.zeros(E, 64, 48),
                    }
                ),
            ),
            r"has shape \[4, 90, 64\].*\[4, 96, 64\] or \[4, 64, 96\]",
        ),
    ],
)
def test_a_wrong_checkpoint_is_refused_in_a_sentence(tmp_path: Path, change, words: str) -> None:
    folder = broken(tmp_path, change)
    with pytest.raises(ValueError, match=words) as caught:
        checkpoint = Checkpoint(folder)
        for layer in checkpoint.layers:
            checkpoint.check_layer(layer)
    assert "\n" not in str(caught.value)


def test_a_layer_without_experts_is_named(tmp_path: Path) -> None:
    experts = random_experts(E, H, INNER)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, {1: experts, 2: experts, 3: experts}))
    with pytest.raises(ValueError, match="no experts in layer 0; layers with experts are 1-3"):
        checkpoint.check_layer(0)


def test_missing_files_are_named(tmp_path: Path) -> None:
    gguf = "of a GGUF model, download the GGUF file and give its path"
    with pytest.raises(ValueError, match=f"has no config.json; .*{gguf}"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_of(random_experts(E, H, INNER), 1)))
    with pytest.raises(ValueError, match=rf"has no \*.safetensors and no \*.gguf .*{gguf}"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is no JSON"):
        Checkpoint(tmp_path)


def test_an_index_to_a_missing_shard_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {0: random_experts(E, H, INNER)}, num_shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="names model-00002-of-00002.safetensors, which is not there"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": {"x": 3}}',
     '{"weight_map": {"x": null}}', '{"weight_map": {"x": ["a"], "y": "b"}}'],
)  # fmt: skip
def test_a_broken_index_is_refused(tmp_path: Path, index: str) -> None:
    write_checkpoint(tmp_path, {0: random_experts(E, H, INNER)}, num_shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="index.json (is no|has a weight_map).*; copy the file"):
        Checkpoint(tmp_path)


def test_an_index_to_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {0: random_experts(E, H, INNER)}, num_shards=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    (wrong,) = set(index["weight_map"].values()) - {index["weight_map"][NAME]}
    index["weight_map"][NAME] = wrong
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ValueError, match=f"{wrong} lacks tensor {NAME}"):
        checkpoint.check_layer(0)


def test_a_shard_that_vanishes_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_checkpoint(tmp_path, {0: random_experts(E, H, INNER)}, num_shards=2))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing"):
        checkpoint.check_layer(0)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_cut_off_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = write_checkpoint(tmp_path, {0: random_experts(E, H, INNER)}) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(ValueError, match="cut off|copy"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b'{"x": 3}',
        b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b'{"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b"[]",
    ],
)
def test_a_broken_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match=r"x.safetensors is no safetensors file or is cut off .*; copy it again"):
        files.open_safetensors(path)


def test_a_file_that_cannot_be_mapped_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(64 << 20, dtype=torch.uint8)}, path)
    limit = resource.getrlimit(resource.RLIMIT_AS)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    # Room for one mapping of the file, not for the package's and torch's.
    resource.setrlimit(resource.RLIMIT_AS, (virtual + (96 << 20), limit[1]))
    try:
        with pytest.raises(ValueError, match=r"x.safetensors cannot be mapped .*Cannot allocate memory"):
            files.open_safetensors(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    method = get_method("AMXINT8")
    with pytest.raises(ValueError, match="does not exist"):
        open_source("/not/there", method)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="is a file"):
        open_source(file, method)
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model.gguf").touch()
    with pytest.raises(ValueError, match="model.gguf is cut off: it has 0 bytes"):
        open_source(gguf, method)

def test_a_hub_id_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("first line\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ValueError, match=r"model id it failed \(first line\); correct the path, or .*\.$"):
        resolve_folder("someone/some-model")


def test_a_path_of_two_parts_is_no_hub_id_where_its_folder_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "gone").symlink_to(tmp_path / "nowhere")
    for path in ("models/Qwen33", "models/gone", "someone/model.gguf"):
        with pytest.raises(ValueError, match=f"^{path} does not exist; give the folder of .*, a GGUF file, or"):
            resolve_folder(path)


# --- how it reads ---


def test_one_index_for_all_layers_and_a_new_one_after_a_change(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {0: random_experts(E, H, INNER)})
    method = get_method("AMXINT8")
    source = open_source(tmp_path, method)
    assert open_source(str(tmp_path), method) is source
    write_checkpoint(tmp_path, {0: random_experts(E, H, 16, seed=3)})
    assert open_source(tmp_path, method) is not source


def test_a_change_of_any_file_with_experts_is_seen(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "shards", {0: random_experts(E, H, INNER)}, num_shards=3)
    trees = tmp_path / "tree"
    for name, data in kt_files.tree_files(kt_files.Case("INT8", 2, 1, 64, 128)).items():
        (trees / name).parent.mkdir(parents=True, exist_ok=True)
        (trees / name).write_bytes(data)
    (tmp_path / "gguf").mkdir()
    for file in GGUF.glob("mixture-*"):
        shutil.copy(file, tmp_path / "gguf")
    shards, parts, splits = (sorted(tmp_path.glob(p)) for p in ("shards/*.safetensors", "tree/*/_numa_*", "gguf/*"))
    assert (len(shards), len(parts), len(splits)) == (3, 2, 3)
    method = get_method("AMXINT8")
    for opened, changed in (
        *((tmp_path / "shards", shard) for shard in shards),
        *((trees, part) for part in parts),
        *((path, split) for path in (tmp_path / "gguf", splits[1]) for split in splits),
    ):
        source = open_source(opened, method)
        assert open_source(opened, method) is source
        os.utime(changed, ns=(0, changed.stat().st_mtime_ns + 1))
        assert open_source(opened, method) is not source, changed


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    experts = random_experts(E, H, INNER)
    folder = write_checkpoint(tmp_path, {0: experts})
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].rstrip() + b" "
    while len(header) % 2 == 0:
        header += b" "
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])
    assert_holds(Checkpoint(folder), 0, experts)


def resident_kib(kind: str) -> int:
    """RssAnon (memory of the process) or RssFile (pages of mapped files)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1])


@pytest.mark.parametrize("style", ["long", "fused"])
def test_weights_are_views_and_closed_files_are_unmapped(tmp_path: Path, style: str) -> None:
    experts = random_experts(4, 1024, 1024)
    checkpoint = Checkpoint(write_checkpoint(tmp_path, {0: experts}, style=style))
    anon, file = resident_kib("RssAnon"), resident_kib("RssFile")
    for expert in range(4):
        for weights in expert_weights(checkpoint, 0, expert):
            weights.view(torch.uint8).max()
    mapped = resident_kib("RssFile") - file
    assert mapped > 20_000, "four experts of 6 MiB were read where they are"
    assert resident_kib("RssAnon") - anon < 6_000, "not one of them was copied"
    del weights
    checkpoint.close()
    assert resident_kib("RssFile") - file < mapped / 8
    assert_holds(checkpoint, 0, experts)


def test_a_file_is_opened_once_while_a_layer_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {layer: random_experts(E, H, INNER, seed=layer) for layer in range(2)}
    folder = write_checkpoint(tmp_path, layers, num_shards=2)
    opened: list[str] = []
    real = files.safe_open

    def counted(path: Path, framework: str):
        opened.append(path.name)
        return real(path, framework=framework)

    monkeypatch.setattr(files, "safe_open", counted)
    checkpoint = Checkpoint(folder)
    for layer, experts in layers.items():
        assert_holds(checkpoint, layer, experts)
        assert sorted(opened) == sorted(checkpoint.files(layer))
        opened.clear()


def test_bytes_beside_the_experts(tmp_path: Path) -> None:
    from kt_kernel.integrations.sglang.memory import bytes_without_experts

    folder = write_checkpoint(tmp_path, {1: random_experts(E, H, INNER)}, num_shards=2)
    # The embedding, [4, 64] bf16, and a dense layer's [4, 4] fp32.
    assert bytes_without_experts(folder) == 4 * 64 * 2 + 4 * 4 * 4
    assert bytes_without_experts(tmp_path / "not-there") == 0


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([], "none"),
        ([3], "3"),
        ([0, 2], "0, 2"),
        ([1, 2, 3], "1-3"),
        (list(range(0, 40, 2)), "0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, ... (20 in all)"),
    ],
)
def test_layers_in_words(layers: list[int], text: str) -> None:
    assert describe_layers(layers) == text
