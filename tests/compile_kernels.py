"""Compile kernels for a GPU that need not be there, in every form that a model asks for: `python -m tests.compile_kernels`.

The interpreter runs what the compiler refuses (types that differ between branches, conditions that are no numbers), so the tests
need both. One line a form that does not compile; the last line says how many did.
"""

from __future__ import annotations

import sys
from typing import Any

from nanovllm.kernels import (
    activation,
    all_reduce,
    fused_moe,
    grouping,
    layernorm,
    lora,
    packed_linear,
    paged_decode,
    paged_prefill,
    qk_norm_rope,
    quantize,
    scaled_linear,
    shared_prefix,
    skinny_linear,
)

BF16, F32, I32, I64 = "*bf16", "*fp32", "*i32", "*i64"
FP8, I8, I16, U8 = "*fp8e4nv", "*i8", "*i16", "*u8"
QKV = {"q_ptr": BF16, "k_ptr": BF16, "v_ptr": BF16, "out_ptr": BF16, "block_tables": I32}
DECODE = {**QKV, "starts": I32, "items": I32, "partial_out": F32, "partial_lse": F32, "arrived": I32}
DECODE |= {"shared_out": F32, "shared_lse": F32}
DECODE_SHAPE = {
    "NUM_KV_HEADS": 8,
    "GROUP": 2,
    "BLOCK_G": 16,
    "HEAD_DIM": 128,
    "BLOCK_D": 128,
    "BLOCK_SIZE": 64,
    "TILE": 64,
}
DECODE_SHAPE |= {"MERGE_G": 2, "MERGE_J": 32, "SHARED_J": 8, "STAGES": 6, "PRECISION": "tf32", "ASM": True, "PDL": True}
DECODE_SHAPE |= {"NARROW_SCORES": False}
PREFILL_SHAPE = {"NUM_HEADS": 16, "GROUP": 2, "HEAD_DIM": 128, "BLOCK_D": 128, "BLOCK_SIZE": 64, "BLOCK_M": 64}
PREFILL_SHAPE |= {"BLOCK_N": 64, "STAGES": 3, "PRECISION": "tf32"}
PLAN_SHAPE = {"TILE": 64, "MIN_TILES": 4, "ITEM_TILES": 2, "BLOCK_B": 256, "BLOCK_P": 256}
ROPE = {"qkv_ptr": BF16, "positions": I64, "cos_ptr": BF16, "sin_ptr": BF16, "q_weight": BF16, "k_weight": BF16}
ROPE |= {"q_ptr": BF16, "k_cache": BF16, "v_cache": BF16, "slot_mapping": I64, "eps": "fp32"}
ROPE_SHAPE = {
    "NUM_HEADS": 16,
    "NUM_KV_HEADS": 8,
    "HEAD_DIM": 128,
    "BLOCK_SIZE": 64,
    "BLOCK_HEADS": 16,
    "BLOCK_HALF": 64,
}
ROPE_SHAPE |= {"PDL": True}
NORM = {"x_ptr": BF16, "residual_ptr": BF16, "normed_ptr": BF16, "total_ptr": BF16, "eps": "fp32"}
GROUPED = {"x_ptr": BF16, "weight_ptr": BF16, "out_ptr": BF16, "order": I32, "plan": I32}

# Window, soft cap, shared prefixes, cache in eight bits.
SWITCHES = (
    (0, 0.0, True, True),
    (0, 0.0, True, False),
    (0, 0.0, False, False),
    (1000, 72.1, False, True),
    (1000, 72.1, False, False),
)


def forms() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types of what is no int32, constants."""
    found: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for window, softcap, shared, fp8 in SWITCHES:
        kind = f"window {window}, softcap {softcap}, shared {shared}, fp8 {fp8}"
        none = {} if fp8 else {"scales": None}
        scaled = {"scale_log2": "fp32"} | ({"scales": I32} if fp8 else {})
        words, values = ({"k_ptr": cache, "v_ptr": cache} if fp8 else {} for cache in (I16, FP8))
        switches = {"WINDOW": window, "WINDOWED": window > 0, "SOFTCAP": softcap, "SHARED": shared}
        switches |= none
        launch = {"TILE": 32, "STAGES": 8, "num_warps": 2} if fp8 else {}
        shape = DECODE_SHAPE | switches | launch
        found.append((f"decode, {kind}", paged_decode._decode_kernel, DECODE | words | scaled, shape))
        if fp8:
            types = DECODE | words | scaled | {"k_ptr": FP8}
            narrow = {"NARROW_SCORES": True, "BLOCK_G": paged_decode.NARROW_HEADS, "TILE": 64, "num_warps": 4}
            found.append((f"decode of narrow scores, {kind}", paged_decode._decode_kernel, types, shape | narrow))
        prefill = {**QKV, "tiles": I32, **scaled}
        found.append((f"prefill, {kind}", paged_prefill._prefill_kernel, prefill | values, PREFILL_SHAPE | switches))
        plan = {"slots": I64, "context_lens": I64, "starts": I32, "items": I32, "skipped": I32, "row_of": I32}
        plan |= {"entries": I32, "entry_counts": I32}
        found.append((f"plan, {kind}", paged_decode._plan_kernel, plan, PLAN_SHAPE | switches))
        part = {**QKV, "items": I32, "num_items": I32, "members": I32, "entries": I32, "rows": I32}
        part |= {"out_ptr": F32, "lse_ptr": F32}
        shape = PREFILL_SHAPE | switches | {"ROWS": 64, "TILE": 64, "PDL": True}
        found.append((f"shared, {kind}", shared_prefix._shared_kernel, part | values | scaled, shape))
    for rotary, weight, cache in ((96, BF16, BF16), (128, F32, FP8)):
        types = ROPE | {"q_weight": weight, "k_weight": weight, "k_cache": cache, "v_cache": cache}
        scales = {"scales": None}
        if cache == FP8:
            types, scales = types | {"scales": BF16}, {}
        kernel = qk_norm_rope._qk_norm_rope_store_kernel
        found.append((f"rope {rotary} {weight} {cache}", kernel, types, ROPE_SHAPE | scales | {"ROTARY": rotary}))
    norm = {"ADD": True, "SPLITS": 1, "BLOCK": 1024, "PDL": True, "LARGEST": 0.0, "LEAST_SCALE": 1e-10, "GROUP": 1024}
    norm |= {"INTEGER": False, "CUDA": True, "scale_ptr": None, "row_scale_ptr": None, "column_scale_ptr": None}
    found.append(("norm", layernorm._add_rms_norm_kernel, NORM | {"weight_ptr": F32}, norm))
    for numbers, group in ((FP8, 4096), (I8, 128)):
        types = NORM | {"weight_ptr": BF16, "normed_ptr": numbers, "scale_ptr": F32}
        shape = norm | {"LARGEST": 448.0, "GROUP": group, "INTEGER": numbers == I8, "BLOCK": 4096, "num_warps": 16}
        del shape["scale_ptr"]
        if numbers == FP8:
            types |= {"row_scale_ptr": F32, "column_scale_ptr": F32}
            del shape["row_scale_ptr"], shape["column_scale_ptr"]
        found.append((f"norm {numbers} {group}", layernorm._add_rms_norm_kernel, types, shape))
    reduced = NORM | {"weight_ptr": F32, "addresses_ptr": I64}
    shape = {"WORLD": 2, "ADD": False, "SYNC": True, "BLOCK": 1024, "PDL": True}
    found.append(("sum over ranks", all_reduce._all_reduce_add_rms_norm_kernel, reduced, shape))
    gate = {"GELU": True, "BLOCK": 1024, "PDL": True}
    found.append(("gelu", activation._gate_kernel, {"x_ptr": BF16, "out_ptr": BF16}, gate))
    route = {"logits_ptr": BF16, "ids_ptr": I32, "weights_ptr": F32}
    shape = {"TOP_K": 8, "NORMALIZE": True, "BLOCK_E": 128, "BLOCK_K": 8, "PDL": True}
    found.append(("route", fused_moe._route_kernel, route, shape))
    grouping_types = {"ids": I32, "counts": I32, "ranks": I32, "order": I32, "plan": I32}
    shape = {"NUM_GROUPS": 128, "BLOCK_M": 64, "BLOCK_G": 128, "BLOCK": grouping.BLOCK, "PDL": True}
    found.append(("count", grouping._count_kernel, grouping_types, shape))
    found.append(("place", grouping._place_kernel, grouping_types, shape))
    for pairs, even, gated in (
        (8, True, True),
        (8, True, False),
        (2048, False, True),
        (99999, False, True),
        (99999, True, False),
    ):
        moe = fused_moe.moe_tiles(pairs, 128, grouped=pairs > 8)
        block_m, tiles = moe.block_m, moe.gate_up if gated else moe.down
        shape = {"BLOCK_M": block_m, "TAIL_M": min(block_m, fused_moe.TAIL_M), "BLOCK_N": tiles.block_n}
        shape |= {"BLOCK_K": tiles.block_k, "STAGES": tiles.stages, "GATED": gated, "GROUPED": pairs > 8, "TOP_K": 8}
        shape |= {
            "TURNS": moe.turns,
            "EVEN_N": even,
            "EVEN_K": even,
            "PREFETCH": 16 * (pairs <= 8),
            "PRECISION": "tf32",
            "PDL": True,
        }
        kind = f"grouped {block_m}, even {even}, gated {gated}"
        shape |= {"num_warps": tiles.warps}
        plain = {"x_scale_ptr": None, "scale_ptr": None, "APART": False}
        found.append((kind, fused_moe._grouped_linear_kernel, GROUPED, shape | plain))
    for numbers, apart in ((FP8, True), (I8, False)):
        types = GROUPED | {"x_ptr": numbers, "weight_ptr": numbers, "x_scale_ptr": F32, "scale_ptr": F32}
        switches = {"APART": apart, "GATED": apart, "BLOCK_K": 128}
        found.append((f"grouped {numbers}", fused_moe._grouped_linear_kernel, types, shape | switches))
    low_rank = {
        "x_ptr": BF16,
        "a_ptr": BF16,
        "low_ptr": F32,
        "b_ptr": BF16,
        "order": I32,
        "plan": I32,
        "column_tiles": I32,
    }
    for block_m, out in ((16, BF16), (64, F32)):
        shape = {"BLOCK_M": block_m, "RANK": 16, "BLOCK_K": lora.BLOCK_K, "SPLITS": 2, "COLUMNS": 128, "PDL": True}
        shape |= {"OLD_X": block_m == 16, "ALIGNED": block_m == 16}
        found.append((f"shrink {block_m}", lora._shrink_kernel, low_rank, shape))
        found.append((f"expand {block_m} {out}", lora._expand_kernel, low_rank | {"out_ptr": out}, shape))
    skinny = {"x_ptr": BF16, "weight_ptr": BF16, "out_ptr": BF16, "low_ptr": F32, "b_ptr": BF16}
    skinny |= {"adapters_ptr": I32, "parts_ptr": I32}
    for rows, n, gated, adapters in ((256, 3072, True, 0), (256, 3072, True, 8), (64, 1024, False, 8)):
        tiles = skinny_linear.skinny_tiles(rows, n, 1024, 132, gated=gated, partial=not gated)
        assert tiles is not None
        shape = {
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": 64,
            "STAGES": tiles.stages,
            "GATED": gated,
        }
        shape |= {"LOW_SPLITS": 2 if adapters else 0, "LOW_WIDTH": 32, "ADAPTERS": adapters, "RANK": 16, "BLOCK_R": 128}
        shape |= {"PART_COLUMNS": 32, "PRECISION": "tf32", "PDL": True, "num_warps": tiles.warps, "bias_ptr": None}
        out = skinny | {"out_ptr": BF16 if tiles.splits == 1 else F32}
        found.append(
            (f"skinny {rows}, gated {gated}, adapters {adapters}", skinny_linear._skinny_linear_kernel, out, shape)
        )
    summed = {"outer_ptr": BF16, "ids_ptr": I32, "weights_ptr": F32, "out_ptr": BF16}
    found.append(("weighted sum", fused_moe._weighted_sum_kernel, summed, {"TOP_K": 8, "BLOCK": 1024, "PDL": True}))
    return [*found, *quantized_forms()]


def quantized_forms() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Those of weights that stay quantised."""
    found: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    for numbers, group in ((FP8, 128), (I8, 4096)):
        types = {"x_ptr": BF16, "numbers_ptr": numbers, "scale_ptr": F32}
        shape = {"LARGEST": 448.0, "LEAST_SCALE": 1e-10, "GROUP": group, "INTEGER": numbers == I8, "BLOCK": 4096}
        shape |= {"GATED": group == 128, "CUDA": True, "PDL": True, "num_warps": 16}
        found.append((f"quantize {numbers}", quantize._quantize_rows_kernel, types, shape))
    for numbers, rows, apart, out in ((FP8, 8, True, F32), (I8, 100, False, BF16), (FP8, 4096, True, BF16)):
        types = {"x_ptr": numbers, "weight_ptr": numbers, "x_scale_ptr": F32, "scale_ptr": F32, "bias_ptr": BF16}
        scaled = scaled_linear.scaled_tiles(rows, 6144, 4096, 132, grouped=apart, partial=out == F32)
        shape = {"BLOCK_M": scaled.block_m, "BLOCK_N": scaled.block_n, "BLOCK_K": 128, "STAGES": scaled.stages}
        shape |= {"GROUPED": apart, "EVEN_N": apart, "PDL": True, "num_warps": scaled.warps}
        form = f"scaled {numbers} {rows}, grouped {apart}"
        found.append((form, scaled_linear._scaled_linear_kernel, types | {"out_ptr": out}, shape))
    for numbers, zero, rows in ((U8, True, 8), (U8, False, 200), (FP8, False, 64)):
        packed = packed_linear.packed_tiles(rows, 6144, 4096, 128, 132)
        types = {"x_ptr": BF16, "numbers_ptr": numbers, "scale_ptr": F32, "zero_ptr": I16, "out_ptr": BF16}
        shape = {
            "BLOCK_M": packed.block_m,
            "BLOCK_N": packed.block_n,
            "BLOCK_K": packed.block_k,
            "STAGES": packed.stages,
        }
        shape |= {"PACKED": numbers == U8, "EVEN_N": zero, "PRECISION": "tf32", "PDL": True, "bias_ptr": None}
        shape |= {} if zero else {"zero_ptr": None}
        types = {name: type for name, type in types.items() if name not in shape}
        found.append((f"packed {numbers} {rows}", packed_linear._packed_linear_kernel, types, shape))
        types = {name: type for name, type in types.items() if name != "x_ptr"} | {"weight_ptr": BF16}
        shape = {name: value for name, value in shape.items() if name in ("PACKED", "zero_ptr")} | {"BLOCK": 1024}
        found.append((f"unpack {numbers}", packed_linear._unpack_kernel, types, shape))
    return found


def compile_form(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    """The machine code for an H100 or H200, as text."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = [param.name for param in kernel.params]
    options = {"num_warps": constants.get("num_warps", 4)} | ({"launch_pdl": True} if "PDL" in names else {})
    constants = {name: value for name, value in constants.items() if name in names}
    types = {name: value for name, value in types.items() if name in names}
    signature = dict.fromkeys(names, "i32") | types | dict.fromkeys(constants, "constexpr")
    aligned = [name for name in names if signature[name].startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    ptx: str = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    return ptx


if __name__ == "__main__":
    count = 0
    for name, kernel, types, constants in forms():
        try:
            count += ".entry" in compile_form(kernel, types, constants)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {str(error)[-300:]}")
    print(f"{count} of {len(forms())} compiled")
    sys.exit(count != len(forms()))
