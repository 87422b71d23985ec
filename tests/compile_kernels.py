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
    layernorm,
    lora,
    paged_decode,
    paged_prefill,
    qk_norm_rope,
    shared_prefix,
)

BF16, F32, I32, I64 = "*bf16", "*fp32", "*i32", "*i64"
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
DECODE_SHAPE |= {"MERGE_G": 2, "MERGE_J": 32, "SHARED_J": 8, "STAGES": 6, "PRECISION": "tf32", "PDL": True}
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


def forms() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Name, kernel, types of what is no int32, constants."""
    found: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = []
    scaled = {"scale_log2": "fp32"}
    for window, softcap, shared in ((0, 0.0, True), (1000, 72.1, False)):
        kind = f"window {window}, softcap {softcap}, shared {shared}"
        switches = {"WINDOW": window, "WINDOWED": window > 0, "SOFTCAP": softcap, "SHARED": shared}
        found.append((f"decode, {kind}", paged_decode._decode_kernel, DECODE | scaled, DECODE_SHAPE | switches))
        prefill = {**QKV, "tiles": I32, **scaled}
        found.append((f"prefill, {kind}", paged_prefill._prefill_kernel, prefill, PREFILL_SHAPE | switches))
        plan = {"slots": I64, "context_lens": I64, "starts": I32, "items": I32, "skipped": I32, "row_of": I32}
        plan |= {"entries": I32, "entry_counts": I32}
        found.append((f"plan, {kind}", paged_decode._plan_kernel, plan, PLAN_SHAPE | switches))
        part = {**QKV, "items": I32, "num_items": I32, "members": I32, "entries": I32, "rows": I32}
        part |= {"out_ptr": F32, "lse_ptr": F32}
        shape = PREFILL_SHAPE | switches | {"ROWS": 64, "TILE": 64, "PDL": True}
        found.append((f"shared, {kind}", shared_prefix._shared_kernel, part | scaled, shape))
    for rotary, weight in ((96, BF16), (128, F32)):
        types = ROPE | {"q_weight": weight, "k_weight": weight}
        kernel = qk_norm_rope._qk_norm_rope_store_kernel
        found.append((f"rope {rotary} {weight}", kernel, types, ROPE_SHAPE | {"ROTARY": rotary}))
    norm = {"ADD": True, "SPLITS": 1, "BLOCK": 1024, "PDL": True}
    found.append(("norm", layernorm._add_rms_norm_kernel, NORM | {"weight_ptr": F32}, norm))
    reduced = NORM | {"weight_ptr": F32, "addresses_ptr": I64}
    shape = {"WORLD": 2, "ADD": False, "SYNC": True, "BLOCK": 1024, "PDL": True}
    found.append(("sum over ranks", all_reduce._all_reduce_add_rms_norm_kernel, reduced, shape))
    gate = {"GELU": True, "BLOCK": 1024, "PDL": True}
    found.append(("gelu", activation._gate_kernel, {"x_ptr": BF16, "out_ptr": BF16}, gate))
    route = {"logits_ptr": BF16, "ids_ptr": I32, "weights_ptr": F32}
    shape = {"TOP_K": 8, "NORMALIZE": True, "BLOCK_E": 128, "BLOCK_K": 8}
    found.append(("route", fused_moe._route_kernel, route, shape))
    sort = {"NUM_EXPERTS": 128, "BLOCK_M": 64, "BLOCK_E": 256, "BLOCK": fused_moe.SORT_BLOCK}
    found.append(("sort", fused_moe._sort_kernel, {"ids": I32, "order": I32, "plan": I32}, sort))
    for pairs, even, gated in ((8, True, True), (99999, False, True), (99999, True, False)):
        tiles = fused_moe.moe_tiles(pairs, 128)
        shape = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k, "STAGES": tiles.stages}
        shape |= {"GATED": gated, "TOP_K": 8, "EVEN_N": even, "EVEN_K": even, "PRECISION": "tf32"}
        kind = f"grouped {tiles.block_m}, even {even}, gated {gated}"
        found.append((kind, fused_moe._grouped_linear_kernel, GROUPED, shape | {"num_warps": tiles.warps}))
    shrink = {"x_ptr": BF16, "a_ptr": BF16, "low_ptr": F32, "adapters": I32}
    found.append(("shrink", lora._shrink_kernel, shrink, {"TOKENS": 16, "RANK": 16, "COLUMNS": 128}))
    expand = {"low_ptr": F32, "b_ptr": BF16, "out_ptr": BF16, "adapters": I32}
    found.append(("expand", lora._expand_kernel, expand, {"SPLITS": 2, "TOKENS": 16, "RANK": 16, "COLUMNS": 128}))
    summed = {"outer_ptr": BF16, "ids_ptr": I32, "weights_ptr": F32, "out_ptr": BF16}
    found.append(("weighted sum", fused_moe._weighted_sum_kernel, summed, {"TOP_K": 8, "BLOCK": 1024}))
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
