"""Sum over tensor-parallel ranks, residual addition and RMSNorm in one kernel: each GPU reads the others' memory over NVLink.

Called by `layers.parallel`, which makes the memory that all ranks see. H is the hidden size, T the tokens of the step.

How it works. Each rank's matrix product writes its partial sums [T, H] into one of the `SLOTS` buffers of its symmetric memory.
In the kernel, program i tells program i of every rank that it has started, waits until they all have, then reads row i of
every rank's buffer and adds them up. Every rank does all rows (one-shot): no second exchange, and equal results to the bit,
as all add in the order of the ranks.

Why a row may be read after that wait. A kernel starts when the one before it on its GPU, the product, has ended and its
writes are visible (a plain launch, or `gdc_wait`). The signal is a release at system scope after that start, the wait an
acquire at system scope, and a barrier of the program stands between the wait and the reads. So whoever has been told "I
have started" may read what that rank's product wrote.

Why one wait a call is enough, though buffers are written again. Two calls in a row must use different slots (`buffer` sees
to it in eager code; a step begins with another slot than it ends with, so graphs and eager steps may follow each other in
any order). Let call n use slot s, and call m > n be the next with s, so m >= n + 2. The product before call m runs on this
rank after its call m - 1 has ended. There, some program was told by every peer that its call m - 1 had started, and a
peer's call m - 1 starts when its call m - 2 has ended, and so has call n <= m - 2: no peer reads slot s any more. Sizes of
the launches do not matter, since one program of a launch is proof of all that lies before the launch.

Why flags need no counters and graphs may be replayed at will. A flag is one word for each slot, program and rank: the sender
stores 1, and the one who waits for it stores 0 once it has seen it. The same argument holds as for buffers: when call m stores
its 1, the receiver's call n has ended, so its 0 was written before. Between calls all flags are 0, as torch wants its own
signal pads to be; these flags lie in our memory, as the size of torch's pads differs by release and is too small in some.

Why it cannot hang. A program waits only for programs of the same index in the same call of other GPUs, and tells them before
it waits. A launch has no more programs than fit the GPU at once (`most_programs`), and what runs beside them ends by itself:
the kernel before ends without us, the one after takes no place before all of ours have begun. All ranks launch the same calls
in the same order, and a launch never needs the end of a later call. If a rank dies, the others wait forever; the executor
then kills them, and a killed process's kernels end with it.

Only loads and stores of peers' memory are used, no NVLink multicast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanovllm.kernels.layernorm import add_rms_norm_torch
from nanovllm.kernels.triton_compat import tl, triton, use_pdl

SLOTS = 3
ALIGNMENT = 256
# A row is read by at most 16 warps of 64 registers a thread, so each multiprocessor holds two programs.
MAX_WARPS = 16
MAX_REGISTERS = 64
PROGRAMS_PER_SM = 2


def all_reduce_add_rms_norm_torch(
    partials: Sequence[torch.Tensor], residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm_torch` of the sum of `partials` ([T, H] each, one a rank).

    The sum is taken in float32 in the order of the ranks and rounded to the model's type before the residual is added: what
    NCCL gives for two ranks, and where one rank's product would round.
    """
    total = partials[0].float()
    for partial in partials[1:]:
        total = total + partial.float()
    return add_rms_norm_torch(total.to(partials[0].dtype), residual, weight, eps)


def most_programs(multiprocessors: int) -> int:
    """Programs of one launch that surely run at the same time on a GPU of so many multiprocessors."""
    return PROGRAMS_PER_SM * multiprocessors


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class OneShotAllReduce:
    """One rank's end of the exchange: its buffers, its flags and where the others have theirs.

    Symmetric memory holds the flags of all slots, then the slots' buffers, at the same offsets on every rank.

    Args:
        memory: this rank's symmetric memory, `memory_bytes(...)` of uint8, all zero.
        addresses: where every rank's memory begins in this process's address space, in the order of the ranks.
        rank: this rank's place in `addresses`.
        programs: most programs of one launch, the same on all ranks.
        slot_bytes: size of one buffer, the same on all ranks.
        sync: whether there are other ranks that run at the same time. Off, the kernel only computes (for the interpreter).
        handle: whatever must live as long as this does.

    Raises:
        ValueError: `memory` has another size.
    """

    def __init__(
        self,
        memory: torch.Tensor,
        addresses: Sequence[int],
        rank: int,
        programs: int,
        slot_bytes: int,
        *,
        sync: bool = True,
        handle: object = None,
    ) -> None:
        if memory.numel() != self.memory_bytes(len(addresses), programs, slot_bytes):
            raise ValueError(f"{memory.numel()} bytes of symmetric memory do not fit the layout")
        self.memory = memory
        self.rank = rank
        self.size = len(addresses)
        self.programs = programs
        self.slot_bytes = slot_bytes
        self.sync = sync
        self.handle = handle
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=memory.device)
        self.flags_bytes = _round_up(4 * programs * self.size)
        self.offsets = [SLOTS * self.flags_bytes + slot * _round_up(slot_bytes) for slot in range(SLOTS)]
        self.slots = {memory.data_ptr() + offset: slot for slot, offset in enumerate(self.offsets)}
        self.last: int | None = None

    def reset(self) -> None:
        """Forget all signals. No rank may be in a call, nor begin one before all ranks have done this."""
        self.memory[: SLOTS * self.flags_bytes].zero_()
        self.last = None

    @staticmethod
    def memory_bytes(size: int, programs: int, slot_bytes: int) -> int:
        """Bytes of symmetric memory a rank of `size` ranks needs."""
        return SLOTS * (_round_up(4 * programs * size) + _round_up(slot_bytes))

    def buffer(self, slot: int, tokens: int, size: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The buffer [tokens, size] of `slot` to write partial sums to, or None where it is too small, or there are none.

        A call of `add_rms_norm` with it must follow before the next buffer is asked for.

        Raises:
            RuntimeError: the last buffer had the same slot, see the module's text.
        """
        count = tokens * size
        if not 0 < count * dtype.itemsize <= self.slot_bytes:
            return None
        if slot == self.last:
            raise RuntimeError(f"two all-reduces in a row use slot {slot} of the symmetric memory")
        self.last = slot
        start = self.offsets[slot]
        return self.memory[start : start + count * dtype.itemsize].view(dtype).view(tokens, size)

    def holds(self, x: torch.Tensor) -> bool:
        """Whether `x` is one of the buffers."""
        return x.data_ptr() in self.slots

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, spins: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `all_reduce_add_rms_norm_torch`; `x` is this rank's buffer, and all ranks call this with their own.

        Args:
            spins: give up waiting for the others after so many looks, with results that mean nothing; 0: wait forever.

        Returns:
            The norm and the sum, fresh tensors [T, H].
        """
        tokens, size = x.shape
        slot = self.slots[x.data_ptr()]
        others = x if residual is None else residual
        assert x.is_contiguous() and weight.is_contiguous() and others.stride(1) == 1 and others.dtype == x.dtype
        assert tokens * others.stride(0) < 1 << 31
        normed = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
        total = torch.empty_like(normed)
        block = triton.next_power_of_2(size)
        pdl = use_pdl(x)
        # Wider rows may need all registers of a multiprocessor.
        programs = self.programs if block <= 512 * MAX_WARPS else self.programs // PROGRAMS_PER_SM
        _all_reduce_add_rms_norm_kernel[(min(tokens, programs),)](
            self.addresses,
            others,
            weight,
            normed,
            total,
            tokens,
            size,
            others.stride(0),
            eps,
            self.offsets[slot],
            slot * self.flags_bytes,
            self.rank,
            spins,
            WORLD=self.size,
            ADD=residual is not None,
            SYNC=self.sync,
            BLOCK=block,
            PDL=pdl,
            launch_pdl=pdl,
            # Four elements a thread, as in `add_rms_norm`, until there are enough warps.
            num_warps=min(max(block // 128, 1), MAX_WARPS),
            **({"maxnreg": MAX_REGISTERS} if x.is_cuda and programs == self.programs else {}),
        )
        return normed, total


@triton.jit(do_not_specialize=["tokens", "rank", "spins"])
def _all_reduce_add_rms_norm_kernel(
    addresses_ptr,
    residual_ptr,
    weight_ptr,
    normed_ptr,
    total_ptr,
    tokens,
    size,
    stride_residual,
    eps,
    data_offset,
    flags_offset,
    rank,
    spins,
    WORLD: tl.constexpr,
    ADD: tl.constexpr,
    SYNC: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program i takes rows i, i + programs, ... of all ranks' buffers."""
    first = tl.program_id(0)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < size
    dtype = normed_ptr.dtype.element_ty
    # What no kernel before this one has written: read while that one ends.
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0)
    buffers = ()
    for peer in tl.static_range(WORLD):
        address = tl.load(addresses_ptr + peer) + data_offset
        buffers += (tl.multiple_of(address.to(tl.pointer_type(dtype)), 16),)  # type: ignore[assignment]
    if SYNC:
        flags = flags_offset + first * (WORLD * 4)
        theirs = _address_of_peer(addresses_ptr, WORLD) + (flags + rank * 4)
        mine = tl.load(addresses_ptr + rank) + flags
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if SYNC:
        _signal(theirs, WORLD)
    # 32 bits are enough to count what fits a buffer.
    for row in range(first, tokens, programs):
        start = row * size
        if ADD:
            residual = tl.load(residual_ptr + row * stride_residual + column, mask=inside, other=0.0)
        if SYNC:  # noqa: SIM102
            if row == first:
                _wait(mine, spins, WORLD)
        # Past the first-level cache, which may hold what these addresses held before.
        total = tl.load(buffers[0] + start + column, mask=inside, other=0.0, cache_modifier=".cg")  # type: ignore[misc]
        total = total.to(tl.float32)
        for peer in tl.static_range(1, WORLD):
            other = tl.load(buffers[peer] + start + column, mask=inside, other=0.0, cache_modifier=".cg")
            total += other.to(tl.float32)
        total = total.to(dtype)
        if ADD:
            total = (total.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + start + column, total, mask=inside)
        x = total.to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
        normed = x * scale
        if weight.dtype == dtype:  # else float32, see `rms_norm_torch`
            normed = normed.to(dtype).to(tl.float32)
        normed *= weight.to(tl.float32)
        tl.store(normed_ptr + start + column, normed.to(dtype), mask=inside)


# Below, what Triton has no words for: threads 0 to WORLD - 1 of a program do different things, one peer each. What such a
# function returns differs by thread, though Triton takes it for one number, so it goes to another of them and nowhere else.


@triton.jit
def _address_of_peer(addresses_ptr, WORLD: tl.constexpr):
    """In thread t < WORLD: where the memory of rank t begins."""
    return tl.inline_asm_elementwise(
        """{
            .reg .pred in_world;
            .reg .b32 thread;
            .reg .b64 address;
            mov.u32 thread, %tid.x;
            setp.lt.u32 in_world, thread, $2;
            mul.wide.u32 address, thread, 8;
            add.s64 address, address, $1;
            mov.b64 $0, 0;
            @in_world ld.global.b64 $0, [address];
        }""",
        "=&l,l,r",
        [addresses_ptr, WORLD],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _signal(flag, WORLD: tl.constexpr):
    """In thread t < WORLD: tell rank t, whose flag for this rank is at address `flag`, that this program has started."""
    tl.inline_asm_elementwise(
        """{
            .reg .pred in_world;
            .reg .b32 thread, one;
            mov.u32 thread, %tid.x;
            setp.lt.u32 in_world, thread, $2;
            mov.b32 one, 1;
            @in_world st.release.sys.global.b32 [$1], one;
            mov.b32 $0, 0;
        }""",
        "=r,l,r",
        [flag, WORLD],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _wait(flags, spins, WORLD: tl.constexpr):
    """Wait until the WORLD flags from address `flags` on are 1, one a thread, and store 0; then go on together.

    Each look counts `spins` down to 0, where waiting ends; 0 from the start does not count, and waits forever.
    """
    tl.inline_asm_elementwise(
        """{
            .reg .pred outside, seen, more;
            .reg .b32 thread, flag, left, step;
            .reg .b64 address;
            mov.u32 thread, %tid.x;
            setp.ge.u32 outside, thread, $3;
            @outside bra leave;
            mul.wide.u32 address, thread, 4;
            add.s64 address, address, $1;
            min.u32 step, $2, 1;
            max.u32 left, $2, 1;
        look:
            ld.acquire.sys.global.b32 flag, [address];
            setp.ne.b32 seen, flag, 0;
            @seen bra reset;
            sub.u32 left, left, step;
            setp.ne.b32 more, left, 0;
            @more bra look;
            bra leave;
        reset:
            mov.b32 flag, 0;
            st.relaxed.sys.global.b32 [address], flag;
        leave:
            mov.b32 $0, 0;
        }""",
        "=r,l,r,r",
        [flags, spins, WORLD],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()
