"""Tenants against their quotas: who may hold how much, and whose blocks leave.

One core of few slots, tenant 0 and up to three with quotas, all with blocks of one size and some
with a second. After every step:

  - a tenant with a quota holds no more than it (slots being written and removed ones still read
    included);
  - a put of one tenant takes nothing from another that was no more over its share than the taker;
  - a put is refused only when nothing that may be taken could leave;
  - what each tenant is said to hold is what its blocks sum to, on ssd as well.
"""

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore import _native
from kvstore.control import NO_SPACE, PRESENT, RESERVED
from kvstore.records import records_from
from tests.core_support import rows

SLOT = 4096
CHUNK = 1 << 15  # 7 slots
CHUNKS = 4
NAMES = [f"b{i}" for i in range(40)]
HASHES = rows(NAMES)
TENANTS = st.integers(0, 3)
PICK = st.integers(0, 1 << 20)


class TenantsModel(RuleBasedStateMachine):
    @initialize(
        policy=st.sampled_from(_native.eviction_policy_names()),
        quotas=st.lists(st.sampled_from([0, 3, 8, 20, 100]), min_size=3, max_size=3),
        ssd_quotas=st.lists(st.sampled_from([0, 2, 9]), min_size=3, max_size=3),
        large=st.just([False] * 4) | st.lists(st.booleans(), min_size=4, max_size=4),
    )
    def start(
        self, policy: str, quotas: list[int], ssd_quotas: list[int], large: list[bool]
    ) -> None:
        self.core = _native.StoreCore(CHUNK * CHUNKS, CHUNK, False, policy)
        self.cpu_quotas = [0, *(quota * SLOT for quota in quotas)]
        self.ssd_quotas = [0, *(quota * 1000 for quota in ssd_quotas)]
        for cpu, ssd in zip(self.cpu_quotas[1:], self.ssd_quotas[1:], strict=True):
            self.core.add_tenant(cpu, ssd)
        self.spaces: list[list[int]] = []
        for tenant in range(4):
            sizes = [SLOT, 2 * SLOT] if large[tenant] else [SLOT]
            self.spaces.append([self.core.add_namespace(size, tenant) for size in sizes])
        self.leases: list[tuple[int, int]] = []
        self.reservations: list[tuple[int, int]] = []
        self.page = 0

    def used(self) -> list[int]:
        return [self.core.tenant_stats(tenant)["cpu_used_bytes"] for tenant in range(4)]

    def over(self, used: list[int]) -> list[int]:
        capacity = CHUNK * CHUNKS
        quotas = [min(quota, capacity) for quota in self.cpu_quotas]
        left = max(0, capacity - sum(quotas)) // quotas.count(0)
        return [u - (q or left) for u, q in zip(used, quotas, strict=True)]

    @rule(tenant=TENANTS, pick=PICK, n=st.integers(1, 6), linked=st.booleans(), keep=st.booleans())
    def put(self, tenant: int, pick: int, n: int, linked: bool, keep: bool) -> None:
        space = self.spaces[tenant][pick % len(self.spaces[tenant])]
        first = 0 if linked else pick % (len(NAMES) - n)
        before = self.used()
        owner = self.core.new_owner()
        reservation, statuses, _ = self.core.reserve(
            owner, space, rows(NAMES[first : first + n]), 0 if linked else -1, None, False
        )
        after = self.used()
        # A giver was above the taker until it gave last, a chunk at most.
        for other in range(4):
            if other != tenant and after[other] < before[other]:
                assert self.over(before)[other] > self.over(before)[tenant]
                assert self.over(after)[other] > self.over(before)[tenant] - CHUNK
        count = int((statuses == RESERVED).sum())
        if NO_SPACE in statuses and self.is_simple(reservation):
            # All of its own that could leave has left, and nobody else has to give.
            chain = int((statuses <= PRESENT).sum())
            assert after[tenant] == chain * SLOT
            full = self.cpu_quotas[tenant] and after[tenant] + SLOT > self.cpu_quotas[tenant]
            over = self.over(after)
            assert full or all(over[o] <= over[tenant] or not after[o] for o in range(4))
        if not reservation:
            return
        if keep:
            self.reservations.append((owner, reservation))
        else:
            assert self.core.commit(owner, reservation, np.zeros(count, np.uint64), None)

    def is_simple(self, reservation: int) -> bool:
        """Nothing is held but by the put under way, and all blocks have one size."""
        others = [r for _, r in self.reservations if r != reservation]
        return not self.leases and not others and all(len(spaces) == 1 for spaces in self.spaces)

    @rule(tenant=TENANTS, pick=PICK, n=st.integers(1, 4))
    def lease(self, tenant: int, pick: int, n: int) -> None:
        space = self.spaces[tenant][pick % len(self.spaces[tenant])]
        first = pick % (len(NAMES) - n)
        owner = self.core.new_owner()
        lease, *_ = self.core.acquire(owner, space, rows(NAMES[first : first + n]), None, True)
        if lease:
            self.leases.append((owner, lease))

    @precondition(lambda self: bool(getattr(self, "leases", None)))
    @rule(pick=PICK)
    def release(self, pick: int) -> None:
        assert self.core.release(*self.leases.pop(pick % len(self.leases)))

    @precondition(lambda self: bool(getattr(self, "reservations", None)))
    @rule(pick=PICK, commit=st.booleans())
    def finish(self, pick: int, commit: bool) -> None:
        owner, reservation = self.reservations.pop(pick % len(self.reservations))
        self.core.release_owner(owner) if commit else self.core.abort(owner, reservation)

    @rule(tenant=TENANTS, pick=PICK)
    def remove(self, tenant: int, pick: int) -> None:
        for space in self.spaces[tenant]:
            self.core.remove(space, rows([NAMES[pick % len(NAMES)]]))

    @rule(tenant=TENANTS, pick=PICK)
    def clear(self, tenant: int, pick: int) -> None:
        if pick % 4 == 0:
            self.core.clear(self.spaces[tenant][0])

    @rule(tenant=TENANTS, pick=PICK, n=st.integers(1, 4), size=st.integers(1, 3000))
    def write_behind(self, tenant: int, pick: int, n: int, size: int) -> None:
        first = pick % (len(NAMES) - n)
        records: Any = records_from(
            self.core.describe(self.spaces[tenant][0], rows(NAMES[first : first + n]))
        )
        for record in records:
            self.page += 1
            record["segment"], record["page"], record["stored_bytes"] = 0, self.page, size
        self.core.set_ssd(records)
        self.core.take_garbage()

    @rule(tenant=TENANTS, pick=PICK)
    def drop_ssd(self, tenant: int, pick: int) -> None:
        name = NAMES[pick % len(NAMES)]
        packed = self.core.describe(self.spaces[tenant][0], rows([name]))
        for record in records_from(packed):
            self.core.drop_ssd(
                self.spaces[tenant][0],
                record["hash"].tobytes(),
                int(record["segment"]),
                int(record["page"]),
            )

    @precondition(lambda self: hasattr(self, "core"))
    @invariant()
    def nobody_is_over_its_quota(self) -> None:
        for tenant in range(4):
            stats = self.core.tenant_stats(tenant)
            assert not self.cpu_quotas[tenant] or stats["cpu_used_bytes"] <= self.cpu_quotas[tenant]
            if self.ssd_quotas[tenant]:
                assert stats["ssd_used_bytes"] <= self.ssd_quotas[tenant]
            assert stats["cpu_quota_bytes"] == self.cpu_quotas[tenant]

    @precondition(lambda self: hasattr(self, "core"))
    @invariant()
    def counts_are_sums(self) -> None:
        per_tenant = [self.core.tenant_stats(tenant) for tenant in range(4)]
        for tenant, stats in enumerate(per_tenant):
            bits = [self.core.residency(space, HASHES) for space in self.spaces[tenant]]
            ready = [int((b & 1 != 0).sum()) for b in bits]
            held = [int((b & 5 != 0).sum()) * SLOT * (i + 1) for i, b in enumerate(bits)]
            assert stats["cpu_blocks"] >= sum(ready)
            assert stats["cpu_used_bytes"] >= sum(held)
            if not self.leases and not self.reservations:
                assert stats["cpu_blocks"] == sum(ready)
                assert stats["cpu_used_bytes"] == sum(held)
            assert stats["ssd_blocks"] == sum(int((b & 2 != 0).sum()) for b in bits)
            stored = [
                int(records_from(self.core.describe(space, rows([NAMES[i]])))[0]["stored_bytes"])
                for space, tiers in zip(self.spaces[tenant], bits, strict=True)
                for i in np.flatnonzero(tiers & 2)
            ]
            assert stats["ssd_used_bytes"] == sum(stored)
        totals = self.core.stats()
        for name in ("cpu_blocks", "ssd_blocks", "cpu_used_bytes", "evicted"):
            assert totals[name] == sum(stats[name] for stats in per_tenant), name

    def teardown(self) -> None:
        if not hasattr(self, "core"):
            return
        for owner, _ in self.leases + self.reservations:
            self.core.release_owner(owner)
        for spaces in self.spaces:
            for space in spaces:
                self.core.clear(space)
        assert self.used() == [0] * 4
        assert [self.core.tenant_stats(t)["ssd_used_bytes"] for t in range(4)] == [0] * 4


TenantsModel.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestTenantsModel = TenantsModel.TestCase
